"""generate_many(): a queue of requests, each with parameters of its own, decoded with the draft.

A request that fails, for whatever reason, fails alone. predictor.py makes requests of the rows of a data set.
"""

import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .row_queue import Outcome, QueuedRequest, RowQueue, Settings
from .schedule import Schedule
from .state import GenerationStats


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and how it is continued; a parameter that is None is the target's own.

    Text is taken as it is; messages go through the tokenizer's chat template. `temperature` 0 is greedy; another one,
    `top_k` or `top_p` sample. `max_new_tokens` is cut to the positions that the prompt leaves of the target's.
    Generation stops behind any of the strings of `stop`, which stay in the text. With `seed` the tokens do not depend
    on other requests.
    """

    prompt: str | Sequence[Mapping[str, Any]] | Sequence[int]  # text, chat messages or token ids
    max_new_tokens: int = 128
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None  # 0: no limit
    top_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """What became of one request: its new tokens, or the error that ended it."""

    index: int  # of the request among those given
    token_ids: tuple[int, ...] = ()  # new tokens, a final stop token included
    text: str | None = None  # without special tokens; None without a tokenizer
    finish_reason: str | None = None  # "stop": a stop token or string; "length"; None: it failed
    stats: GenerationStats | None = None
    error: str | None = None


def generate_many(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    requests: Iterable[GenerationRequest],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_rows: int = 8,
    schedule: Schedule | None = None,
) -> list[GenerationResult]:
    """Continue every request as `target` would, at most `max_rows` at once; results in the order of the requests.

    `tokenizer` is needed for prompts that are text or messages, for stop strings, and for the results' texts. Whatever
    is wrong with one request becomes its result's `error`; the others go on. `schedule` is as in generate(); one that
    looks at all rows, such as ThroughputSchedule, makes the tokens of a `seed` depend on other requests.
    """
    results = run_requests(target, draft, requests, tokenizer=tokenizer, max_rows=max_rows, schedule=schedule)
    return sorted(results, key=lambda result: result.index)


def run_requests(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    requests: Iterable[GenerationRequest],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_rows: int = 8,
    schedule: Schedule | None = None,
) -> Iterator[GenerationResult]:
    """The results of `generate_many` as they finish."""
    if max_rows < 1:
        raise ValueError(
            f"`max_rows` is the number of requests decoded at once and must be at least 1, got {max_rows}."
        )
    queue = RowQueue(target, draft, tokenizer, max_rows, schedule)
    waiting: list[QueuedRequest] = []
    for index, request in enumerate(requests):
        try:
            waiting.append(_prepare(index, request, target, tokenizer))
        except Exception as error:  # a chat template may raise anything
            yield _failure(index, error)
    for outcome in queue.run(waiting):
        if outcome.error is None:
            yield _result(target, outcome, tokenizer)
        else:
            yield _failure(outcome.request.index, outcome.error)


def _result(target, outcome: Outcome, tokenizer) -> GenerationResult:
    request, token_ids = outcome.request, outcome.token_ids
    eos = target.generation_config.eos_token_id
    is_stopped = (
        len(token_ids) < request.max_new_tokens
        or token_ids[-1] in (eos if isinstance(eos, list) else [eos])
        or any(stop in tokenizer.decode(token_ids) for stop in request.settings.stop)
    )
    text = None if tokenizer is None else tokenizer.decode(token_ids, skip_special_tokens=True)
    reason = "stop" if is_stopped else "length"
    return GenerationResult(request.index, tuple(token_ids), text, reason, outcome.stats)


def _failure(index: int, error: Exception) -> GenerationResult:
    """A ValueError is written for users; others are named."""
    message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return GenerationResult(index, error=message)


def _prepare(index: int, request: GenerationRequest, target, tokenizer) -> QueuedRequest:
    """Raises ValueError where the request is wrong: it must not reach those that would be decoded together with it."""
    if not isinstance(request, GenerationRequest):
        raise ValueError(f"A request must be a GenerationRequest, got {type(request).__name__}.")
    for name, (required, is_right) in _PARAMETERS.items():
        value = getattr(request, name)
        if value != GenerationRequest.__dataclass_fields__[name].default and not is_right(value):
            raise ValueError(f"`{name}` must be {required}, got {value!r}.")
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    if stop and tokenizer is None:
        raise ValueError("`stop` is compared with text: give `tokenizer`, too.")
    ids = _token_ids(request.prompt, tokenizer)
    room = _room(ids, target)
    settings = Settings(_law(request, target), stop)
    return QueuedRequest(index, settings, ids, min(request.max_new_tokens, room), request.seed)


def _law(request: GenerationRequest, target) -> tuple[tuple[str, float], ...] | None:
    kinds = {"temperature": float, "top_k": int, "top_p": float}
    law = [(name, kind(value)) for name, kind in kinds.items() if (value := getattr(request, name)) is not None]
    if request.do_sample is not False and request.temperature != 0:
        is_sampled = law or request.do_sample or target.generation_config.do_sample
        return tuple(law) if is_sampled else None
    contradicting = [f"`{name}={value}`" for name, value in law if (name, value) != ("temperature", 0)]
    if request.do_sample or contradicting:
        greedy = "`do_sample=False`" if request.do_sample is False else "`temperature=0`"
        sampled = ", ".join(contradicting) or "`do_sample=True`"
        raise ValueError(f"{greedy} is greedy decoding, and {sampled} is for sampling. Leave one of them out.")
    return None


def _token_ids(prompt: Any, tokenizer) -> list[int]:
    items = prompt if isinstance(prompt, Sequence) and not isinstance(prompt, str) else None
    if prompt == "" or items is not None and len(items) == 0:
        raise ValueError("The prompt is empty. Give text, chat messages or token ids.")
    if items is not None and all(_is_integer(item) for item in items):
        return [int(item) for item in items]
    is_chat = items is not None and all(isinstance(item, Mapping) for item in items)
    if not is_chat and not isinstance(prompt, str):
        raise ValueError(f"A prompt must be text, a list of chat messages or a list of token ids, got {prompt!r:.80}.")
    if tokenizer is None:
        raise ValueError("A prompt of text or chat messages needs `tokenizer`. Give it, or token ids.")
    if is_chat:
        return tokenizer.apply_chat_template(list(items), add_generation_prompt=True, return_dict=True)["input_ids"]
    return tokenizer(prompt)["input_ids"]


def _room(ids: list[int], target) -> int:
    """How many tokens fit behind the prompt."""
    config = target.config.get_text_config(decoder=True)
    if not ids:
        raise ValueError("The tokenizer made no tokens of the prompt. Give more text.")
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
        raise ValueError(
            f"The prompt's token ids reach from {min(ids)} to {max(ids)}, and the target has those from 0 to "
            f"{config.vocab_size - 1}. Use the target's own tokenizer."
        )
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    if len(ids) >= positions:
        raise ValueError(
            f"The prompt has {len(ids)} tokens, and the target has {positions} positions for it and the answer. "
            "Shorten it."
        )
    return positions - len(ids)


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _are_strings(value: Any) -> bool:
    items = [value] if isinstance(value, str) else value
    return isinstance(items, Sequence) and all(isinstance(item, str) and item for item in items)


_PARAMETERS = {
    "max_new_tokens": ("an integer of at least 1", lambda v: _is_integer(v) and v >= 1),
    "do_sample": ("true or false", lambda v: isinstance(v, bool)),
    "temperature": ("a number of at least 0 (0: greedy)", lambda v: _is_number(v) and v >= 0),
    "top_k": ("an integer of at least 0 (0: no limit)", lambda v: _is_integer(v) and v >= 0),
    "top_p": ("a number above 0 and at most 1", lambda v: _is_number(v) and 0 < v <= 1),
    "seed": ("an integer from 0 to 2**64 - 1", lambda v: _is_integer(v) and 0 <= v < 2**64),
    "stop": ("a string that is not empty, or a list of such", _are_strings),
}
