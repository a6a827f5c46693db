"""Rows of a data set in, texts and figures out: what `hf-dspark generate --input` and Ray Data run."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .modeling_dspark import DSparkDraftModel
from .serving import GenerationRequest, GenerationResult, run_requests

PARAMETERS = tuple(field.name for field in fields(GenerationRequest) if field.name != "prompt")
_LAW = {"do_sample", "temperature", "top_k", "top_p"}
_PROMPTS = ("prompt", "turns", "messages")


class DSparkPredictor:
    """A callable for Ray Data's `map_batches`: target and draft are loaded once an actor (`examples/ray_data.py`).

    Args:
        target, draft: folders or Hub names.
        chat_template: take a prompt as a user's turn, where the tokenizer has a chat template.
        max_rows: rows decoded at once.
        seed: with a column `index` every row is sampled with a seed of its own, whichever actor gets it.
        parameters: of GenerationRequest, for rows that have none of their own.
    """

    def __init__(
        self,
        target: str,
        draft: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        chat_template: bool = True,
        max_rows: int = 8,
        seed: int = 0,
        **parameters: Any,
    ):
        unknown = sorted(parameters.keys() - set(PARAMETERS))
        if unknown:
            raise ValueError(f"Unknown parameters {unknown}. A request has {list(PARAMETERS)}.")
        self.target, self.draft, self.tokenizer = load_models(target, draft, dtype=dtype, device=device)
        self.options = {"parameters": parameters, "chat_template": chat_template, "max_rows": max_rows}
        self.seed = seed

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        """The columns of `batch`, and those of `answer_rows`.

        A batch has a column `prompt`, `turns` or `messages`, and any of a request's parameters as further columns.
        """
        columns = {name: [_plain(value) for value in column] for name, column in batch.items()}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        seeds = (
            [row_seed(self.seed, index) for index in columns["index"]] if "index" in columns else [None] * len(rows)
        )
        answers = dict(answer_rows(self.target, self.draft, self.tokenizer, rows, seeds, **self.options))
        names = answers[0] if answers else ()
        return {**batch, **{name: [answers[row][name] for row in range(len(rows))] for name in names}}


def load_models(
    target: str, draft: str, *, dtype: str = "auto", device: str = "auto"
) -> tuple[PreTrainedModel, DSparkDraftModel, PreTrainedTokenizerBase]:
    """Target, draft and the target's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype=dtype, device_map=device)
    return loaded, DSparkDraftModel.from_pretrained(draft, target=loaded, dtype=dtype), tokenizer


def answer_rows(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Any],
    seeds: Sequence[int | None],
    *,
    parameters: Mapping[str, Any],
    chat_template: bool = True,
    max_rows: int = 8,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Pairs of a row's place in `rows` and its answer, as they finish.

    A row is an object with `prompt`, `turns` (the first one is the prompt) or `messages`. A parameter of its own
    stands instead of the one in `parameters`; one of `do_sample`, `temperature`, `top_k` and `top_p` instead of all
    four. `seeds` are for rows without one. An answer has `text`, `tokens`, `finish_reason`, `tau`, `rounds` and
    `error`; what does not apply is None.
    """
    as_chat = chat_template and tokenizer.chat_template is not None
    places, requests = [], []
    for place, (row, seed) in enumerate(zip(rows, seeds, strict=True)):
        try:
            requests.append(_request(row, {"seed": seed, **parameters}, as_chat=as_chat))
        except ValueError as error:
            yield place, _answer(GenerationResult(place, error=str(error)))
        else:
            places.append(place)
    for result in run_requests(target, draft, requests, tokenizer=tokenizer, max_rows=max_rows):
        yield places[result.index], _answer(result)


def row_seed(seed: int, index: int) -> int:
    """The seed of row `index` in a run with `seed`: the same in whatever process and order the rows are run."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:8], "big")


def _request(row: Any, parameters: Mapping[str, Any], *, as_chat: bool) -> GenerationRequest:
    found = [name for name in _PROMPTS if row.get(name) is not None] if isinstance(row, Mapping) else []
    if len(found) != 1:
        reason = f"it has {' and '.join(found)}" if found else f"got {row!r:.80}"
        raise ValueError(f'A row must be an object with one of {_PROMPTS}, such as {{"prompt": "..."}}; {reason}.')
    prompt = row[found[0]]
    if found[0] == "turns":
        prompt = prompt[0] if isinstance(prompt, Sequence) and prompt else ""
    if found[0] == "messages" and (not isinstance(prompt, Sequence) or isinstance(prompt, str)):
        raise ValueError(
            f'`messages` must be a list such as [{{"role": "user", "content": "..."}}], got {prompt!r:.80}.'
        )
    if as_chat and isinstance(prompt, str) and prompt:
        prompt = [{"role": "user", "content": prompt}]
    own = {name: row[name] for name in PARAMETERS if row.get(name) is not None}
    dropped = _LAW if own.keys() & _LAW else set()
    return GenerationRequest(prompt, **{k: v for k, v in parameters.items() if k not in dropped} | own)


def _answer(result: GenerationResult) -> dict[str, Any]:
    """Only what depends on nothing but the request, so that it does not tell how a run was divided."""
    stats = result.stats
    return {
        "text": result.text,
        "tokens": len(result.token_ids),
        "finish_reason": result.finish_reason,
        "tau": None if stats is None else stats.tau,
        "rounds": None if stats is None else stats.rounds,
        "error": result.error,
    }


def _plain(value: Any) -> Any:
    """A value of a column as JSON has it. Where values are missing, a column of integers is one of floats with NaN."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return value
