"""Continuous refilling: a RowBatch whose ended rows make place for the next requests of a queue.

Memory: `max_rows` times the slots of the longest request at hand, in the caches of target and draft, and one prompt's.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList, StopStringCriteria

from .attention_interface import block_attention_on
from .batch import RowBatch
from .compat import CACHE
from .dispatch import load_kernels, report
from .features import FeatureTap
from .generate import Stopwatch
from .limits import check_batch, check_prompt_length
from .rows import Emission, Row
from .schedule import Schedule
from .slots import GROWTH, why_not_in_slots
from .state import GenerationStats
from .terms import Terms

# Errors after which this process can compute nothing more, such as CUDA's device-side assert; since torch 2.8.
DEVICE_LOST = getattr(torch, "AcceleratorError", ())


@dataclass(frozen=True, slots=True)
class Settings:
    """What requests have in common whose tokens are chosen together."""

    law: tuple[tuple[str, float], ...] | None  # what is given of temperature, top_k and top_p; None: greedy
    stop: tuple[str, ...]

    def arguments(self) -> dict[str, Any]:
        """Of generate()."""
        return {"do_sample": self.law is not None, **dict(self.law or ())}


@dataclass(frozen=True, slots=True)
class QueuedRequest:
    """A request that was found right."""

    index: int
    settings: Settings
    input_ids: list[int]
    max_new_tokens: int
    seed: int | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request: its new tokens, or the error that ended it."""

    request: QueuedRequest
    token_ids: list[int]
    stats: GenerationStats | None
    error: Exception | None = None


@dataclass(slots=True, eq=False)
class _Live:
    """A request that is being decoded."""

    request: QueuedRequest
    row: Row
    watch: Stopwatch


class RowQueue:
    """Decodes requests, at most `max_rows` at once."""

    def __init__(
        self,
        target: PreTrainedModel,
        draft: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        max_rows: int,
        schedule: Schedule | None = None,
    ):
        check_batch(target, draft)
        draft.bind_target(target)
        load_kernels()
        self.target, self.tokenizer = target, tokenizer
        self.schedule = draft.schedule_or_own(schedule)
        self.tap = FeatureTap(target, draft.config.target_layer_ids, by_hooks=True)
        sizes = {"num_rows": max_rows, "num_slots": GROWTH}
        self.batch = RowBatch(draft, target, self.tap, self.schedule, **sizes, is_refilled=True)
        self._max_rows = max_rows
        self._watch = Stopwatch(target.device)
        self._live: dict[int, _Live] = {}
        self._terms: dict[Settings, Terms] = {}

    @torch.no_grad()
    def run(self, requests: list[QueuedRequest]) -> Iterator[Outcome]:
        """Outcomes as they are known. An error of one request's own ends that request."""
        waiting = deque(requests)
        self.schedule.reset()
        while waiting or self._live:
            outcomes: list[Outcome] = []
            # Nothing is switched over while the caller has the word.
            with self._decoding():
                while waiting and len(self._live) < self._max_rows:
                    outcomes += self._admit(waiting.popleft())
                if self._live and not outcomes:
                    emission, _, _ = self.batch.round(self._watch)
                    outcomes = self._finish(emission)
            yield from outcomes

    @contextmanager
    def _decoding(self):
        switched = block_attention_on(self.target, self.batch.draft, attention_mask=None, output_attentions=False)
        with self.tap, switched:
            yield

    def _admit(self, request: QueuedRequest) -> list[Outcome]:
        """Read a prompt and choose the token behind it."""
        num_rows = len(self.batch.rows)
        try:
            live, logits = self._prefill(request)
            nothing = torch.zeros(1, 0, dtype=torch.long, device=logits.device)
            emission = self.batch.emit([live.row], logits, nothing, None, None)
            self.batch.columns.append([live.row], emission)
        except DEVICE_LOST:
            raise
        except Exception as error:  # whatever it is, it is of this request
            self.tap.discard()
            self.batch.drop(self.batch.rows[num_rows:])
            return [Outcome(request, [], None, error)]
        self._live[request.index] = live
        return self._finish(emission, [live.row])

    def _prefill(self, request: QueuedRequest) -> tuple[_Live, torch.Tensor]:
        """Have generate() prepare the call as it would be alone, and stop behind its prefill."""
        prepared = []

        def prefill(target, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
            watch = Stopwatch(target.device)
            watch.start("total")
            terms = self._terms_of(request, logits_processor, stopping_criteria, generation_config)
            outputs = target._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
            cache, length = model_kwargs[CACHE], input_ids.shape[1]
            reason = why_not_in_slots(cache)
            if reason is not None:
                raise ValueError(f"{type(target).__name__} decodes one sequence at a time with a draft: {reason}.")
            row = Row(request.index, terms, length + request.max_new_tokens, length, length)
            features = self.tap.take(outputs)
            check_prompt_length(target, cache, features.shape[1])
            slots = torch.arange(length, device=input_ids.device).unsqueeze(0)
            self.batch.admit([row], input_ids, cache, slots, slots[:, -1], features)
            prepared.append((_Live(request, row, watch), outputs.logits[:, -1:].to(input_ids.device, torch.float32)))
            return input_ids

        ids = torch.tensor([request.input_ids], device=self.target.device)
        arguments = request.settings.arguments() | {"max_new_tokens": request.max_new_tokens}
        if request.settings.stop:
            criterion = StopStringCriteria(self.tokenizer, list(request.settings.stop))
            arguments["stopping_criteria"] = StoppingCriteriaList([criterion])
        mask = torch.ones_like(ids)
        alone = {"custom_generate": prefill, "num_beams": 1, "num_return_sequences": 1}
        self.target.generate(ids, attention_mask=mask, **alone, **arguments)
        return prepared[0]

    def _terms_of(self, request: QueuedRequest, *prepared) -> Terms:
        """Terms of a request; shared where nothing in them is its own, so that tokens are chosen together."""
        device, generator = self.target.device, None
        if request.seed is not None:
            generator = torch.Generator(device).manual_seed(request.seed)
        terms = Terms.of(*prepared, device, generator)
        if generator is not None or terms.has_other_criteria or not terms.rule.is_prefix_free:
            return terms
        return self._terms.setdefault(request.settings, terms)

    def _finish(self, emission: Emission, rows: list[Row] | None = None) -> list[Outcome]:
        """Take out the rows that ended; `rows` are those of `emission`, None: all."""
        rows = list(self.batch.rows) if rows is None else rows
        ended = [row for row, ends in zip(rows, emission.finished, strict=True) if ends]
        outcomes = []
        for row in ended:
            live = self._live.pop(row.index)
            live.watch.stop("total")
            length = len(live.request.input_ids)
            # One synchronisation for each row that ends: its tokens go to the caller.
            tokens = self.batch.columns.ids[row.place, length : row.length].tolist()
            stats = GenerationStats.from_rounds(row.records, len(tokens), live.watch.seconds(), report())
            outcomes.append(Outcome(live.request, tokens, stats))
        self.batch.drop(ended)
        return outcomes
