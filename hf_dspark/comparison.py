"""compare(): plain generate() and generate(assistant_model=draft) on one prompt, in one process.

It measures both and says whether the tokens are the same and, where they part, how close the target's decision was.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .state import GenerationStats, RoundRecord

# Arguments of the speculative call that plain generate() does not know.
_DRAFT_ARGUMENTS = ("schedule", "generator")
_REFUSED = {
    "assistant_model": "the draft is the second argument",
    "custom_generate": "it would replace the decoding that is compared",
    "cache": "each run fills a cache of its own",
    "past_key_values": "each run fills a cache of its own",
}
# Logits closer than this many roundings of the larger one are a tie. On SmolLM2 in bfloat16, reading the same tokens
# as one block instead of one by one moves the gap of the two best logits by up to 2.4 of them.
_ROUNDINGS_OF_A_TIE = 4


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Plain against speculative generation of one prompt; token ids are new tokens only."""

    plain_ids: list[int]
    speculative_ids: list[int]
    is_equal: bool | None  # None: sampled, so the tokens need not be the same
    first_difference: int | None  # index of the first new token that differs
    plain_token: str | None  # text of the tokens there; their ids without a tokenizer
    speculative_token: str | None
    top2_logits: tuple[float, float] | None  # the target's two best raw logits there, in plain generation
    dtype: torch.dtype  # of the target
    plain_seconds: float
    speculative_seconds: float
    stats: GenerationStats  # of the speculative call
    rounds: tuple[RoundRecord, ...]

    @property
    def plain_token_id(self) -> int | None:
        """Plain generation's token at the first difference; None without one, or where plain generation ended."""
        return _item(self.plain_ids, self.first_difference)

    @property
    def speculative_token_id(self) -> int | None:
        """The speculative token at the first difference; None without one, or where it ended."""
        return _item(self.speculative_ids, self.first_difference)

    @property
    def top2_gap(self) -> float | None:
        """Gap of the target's two best logits at the first difference."""
        return None if self.top2_logits is None else self.top2_logits[0] - self.top2_logits[1]

    @property
    def is_tie(self) -> bool | None:
        """Whether that gap is within rounding of the target's dtype; None without a gap."""
        if self.top2_logits is None:
            return None
        unit = torch.finfo(self.dtype).eps * max(1.0, abs(self.top2_logits[0]))
        return self.top2_gap <= _ROUNDINGS_OF_A_TIE * unit

    @property
    def plain_tokens_per_second(self) -> float:
        """New tokens of the plain call per second, prefill included."""
        return len(self.plain_ids) / self.plain_seconds

    @property
    def speculative_tokens_per_second(self) -> float:
        """New tokens of the speculative call per second, prefill included."""
        return len(self.speculative_ids) / self.speculative_seconds

    @property
    def ratio(self) -> float:
        """Speculative tokens per second over plain ones; below 1 it is slower."""
        return self.speculative_tokens_per_second / self.plain_tokens_per_second

    @property
    def tau(self) -> float:
        """Mean tokens emitted by a round, the bonus token included."""
        return self.stats.tau

    @property
    def summary(self) -> str:
        """One line: tau, speed against plain generation, and whether the text is the same."""
        speed = f"{self.speculative_tokens_per_second:.1f} tokens/s, plain {self.plain_tokens_per_second:.1f}"
        return f"tau {self.tau:.2f}, {speed} ({self.ratio:.2f}x); {self._verdict()}"

    def _verdict(self) -> str:
        if self.is_equal is None:
            return "sampled, so the text is another than plain generation's"
        if self.is_equal:
            return "the text equals plain generation's"
        tokens = f"{self.speculative_token} for {self.plain_token}"
        parts = f"the text parts from plain at token {self.first_difference} ({tokens})"
        if self.top2_gap is None:
            return parts
        dtype = str(self.dtype).removeprefix("torch.")
        if self.is_tie:
            return f"{parts}, a tie of {self.top2_gap:.2g} logits; rounding in {dtype}"
        return f"{parts}, where plain's choice leads by {self.top2_gap:.2g} logits: more than rounding in {dtype}"


def compare(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    inputs: torch.Tensor | Mapping[str, Any],  # ids [1, n], or what a tokenizer returns
    *,
    tokenizer=None,
    streamer=None,
    **generate_kwargs: Any,
) -> Comparison:
    """Run plain and speculative generate() on the same inputs, greedily unless sampling is asked for.

    Args:
        tokenizer: names the differing tokens in the summary; generate() gets it, too (for `stop_strings`).
        streamer: streams the speculative run, within its measured time.
        generate_kwargs: for both runs; `schedule` and `generator` go to the speculative one.

    Before each is measured once, both run a few tokens: the first call of a process pays for lazy set-up. Raises
    ValueError for more than one prompt and for arguments that leave nothing to compare.
    """
    model_inputs = _checked_inputs(inputs, target.device)
    arguments = _checked_arguments(target, generate_kwargs)
    plain_arguments = {name: value for name, value in arguments.items() if name not in _DRAFT_ARGUMENTS}
    for assistant in (draft, None):
        target.generate(**model_inputs, assistant_model=assistant, max_new_tokens=8, do_sample=False)
    run = {**model_inputs, "tokenizer": tokenizer}
    speculative = _run(target, **run, **arguments, assistant_model=draft, streamer=streamer)
    plain = _run(target, **run, **plain_arguments)
    is_sampled = arguments["do_sample"]
    index = None if is_sampled else _first_difference(plain.ids, speculative.ids)
    return Comparison(
        plain_ids=plain.ids,
        speculative_ids=speculative.ids,
        is_equal=None if is_sampled else index is None,
        first_difference=index,
        plain_token=_name_token(plain.ids, index, tokenizer),
        speculative_token=_name_token(speculative.ids, index, tokenizer),
        top2_logits=None if index is None else _top2_logits(target, index, **run, **plain_arguments),
        dtype=target.dtype,
        plain_seconds=plain.seconds,
        speculative_seconds=speculative.seconds,
        stats=speculative.stats,
        rounds=speculative.rounds,
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """What is kept of one generate() call; its cache is not, or it would lie beside the next run's."""

    ids: list[int]
    seconds: float
    stats: GenerationStats | None  # None: plain
    rounds: tuple[RoundRecord, ...] | None


def _run(target: PreTrainedModel, **arguments: Any) -> _Run:
    _synchronize(target.device)
    start = time.perf_counter()
    output = target.generate(**arguments, return_dict_in_generate=True)
    _synchronize(target.device)
    seconds = time.perf_counter() - start
    ids = output.sequences[0, arguments["input_ids"].shape[1] :].tolist()
    return _Run(ids, seconds, getattr(output, "stats", None), getattr(output, "rounds", None))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _checked_inputs(inputs: torch.Tensor | Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    named = inputs if isinstance(inputs, Mapping) else {"input_ids": inputs}
    ids = named.get("input_ids")
    if not isinstance(ids, torch.Tensor):
        raise ValueError(
            f"compare() needs token ids as a tensor [1, n] or a mapping that holds them as `input_ids`, got "
            f"{type(inputs).__name__} with {type(ids).__name__}. Tokenize with `tokenizer(text, return_tensors='pt')`."
        )
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ValueError(
            f"compare() runs one prompt at a time and needs ids of shape [1, n], got {list(ids.shape)}. "
            "Call it once for each prompt."
        )
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in named.items()}


def _checked_arguments(target: PreTrainedModel, generate_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of both calls: greedy unless this call asks for sampling, whatever the target's own config says."""
    for name, reason in _REFUSED.items():
        if generate_kwargs.get(name) is not None:
            raise ValueError(f"compare() takes no `{name}`: {reason}. Leave it out.")
    config = generate_kwargs.get("generation_config")
    for name in ("num_beams", "num_return_sequences"):
        value = generate_kwargs.get(name) or getattr(config or target.generation_config, name) or 1
        if value > 1:
            raise ValueError(f"compare() follows one sequence, got `{name}={value}`. Set it to 1.")
    do_sample = generate_kwargs.get("do_sample")
    if do_sample is None:
        do_sample = bool(getattr(config, "do_sample", False))
    return {**generate_kwargs, "do_sample": do_sample}


def _first_difference(plain_ids: list[int], speculative_ids: list[int]) -> int | None:
    """Index of the first token that differs, or of the first one only one of them has."""
    if plain_ids == speculative_ids:
        return None
    pairs = zip(plain_ids, speculative_ids, strict=False)
    shorter = min(len(plain_ids), len(speculative_ids))
    return next((index for index, (a, b) in enumerate(pairs) if a != b), shorter)


def _top2_logits(target: PreTrainedModel, index: int, **arguments: Any) -> tuple[float, float] | None:
    """The logits new token `index` was chosen by: plain generation up to it once more, so the timed run keeps none.

    None where plain generation ended before it.
    """
    arguments = {name: value for name, value in arguments.items() if name not in ("max_length", "max_time")}
    arguments |= {"max_new_tokens": index + 1, "output_logits": True, "return_dict_in_generate": True}
    logits = target.generate(**arguments).logits
    return None if len(logits) <= index else tuple(logits[index][0].topk(2).values.tolist())


def _item(ids: list[int], index: int | None) -> int | None:
    return None if index is None or index >= len(ids) else ids[index]


def _name_token(ids: list[int], index: int | None, tokenizer) -> str | None:
    if index is None:
        return None
    token_id = _item(ids, index)
    if token_id is None:
        return "the end"
    return str(token_id) if tokenizer is None else repr(tokenizer.decode([token_id]))
