"""The loop: prefill, then rounds of draft, schedule, verify, accept, roll back. The only file that knows their order.

Also the only one with clocks, and the owner of a round's device synchronisations; each says why it is there.
"""

import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import stopping_criteria as sc
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput, logging

from .accept import choose_tokens
from .agreement import Agreement
from .attention_interface import block_attention_on
from .batch_call import BatchCall, stream
from .candidate_generator import DSparkCandidateGenerator, context_of, in_transformers_loop
from .compat import CACHE, is_users_cache
from .compiled import CompiledRound
from .dispatch import load_kernels, note, report
from .features import FeatureTap
from .limits import check_compiled, check_prompt_length, check_request, why_not_in_a_row
from .rollback import MAX_PENDING, Rewinder, recording_past, why_not_reversible
from .schedule import Schedule, schedule_from
from .state import Decision, DecodeState, DraftBlock, DraftContext, GenerationStats, RoundRecord, Verification
from .terms import Terms, Verdicts
from .verify import extras_of_tokens, read_pending, read_verification, verify_block

logger = logging.get_logger(__name__)


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """What plain generate() returns, with the rounds and the call's figures."""

    rounds: tuple[RoundRecord, ...] | None = None
    stats: GenerationStats | None = None


class SpeculativeDecoding:
    """Gives a draft model `speculative_decode`, the decoding method behind both doors."""

    @torch.no_grad()
    def speculative_decode(
        self,
        target: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: sc.StoppingCriteriaList,
        generation_config: GenerationConfig,
        *,
        streamer=None,
        synced_gpus: bool = False,
        schedule: Schedule | None = None,
        generator: torch.Generator | None = None,
        loop: str = "dspark",
        **model_kwargs: Any,
    ) -> torch.Tensor | SpeculativeOutput:
        """Continue `input_ids` [B, n] as the target would, by drafting and verifying.

        Arguments are as generate() prepares them for a decoding method. Greedy output equals plain generate()'s in
        fp32, sampled output has its distribution. Raises ValueError for what is not supported, before any forward.
        """
        if loop not in ("dspark", "transformers"):
            raise ValueError(f'`loop` must be "dspark" (the default) or "transformers", got {loop!r}.')
        check_request(target, input_ids, synced_gpus)
        self.bind_target(target)
        arguments = (target, input_ids, logits_processor, stopping_criteria, generation_config)
        call = _Call(self, *arguments, schedule=self.schedule_or_own(schedule), generator=generator)
        run = call.run if loop == "dspark" else call.run_in_transformers
        return run(model_kwargs, streamer)

    def schedule_or_own(self, schedule: Schedule | None) -> Schedule:
        """`schedule`, or the one that the draft's generation config asks for. Raises ValueError where it cannot be."""
        if schedule is None:
            own = self.generation_config
            schedule = schedule_from(own.num_assistant_tokens, own.assistant_confidence_threshold)
        if schedule.needs_confidence and self.confidence_head is None:
            raise ValueError(
                f"{schedule} needs a confidence head, and this draft has none. Use FixedLength, or set "
                "`draft.generation_config.assistant_confidence_threshold` to None."
            )
        return schedule

    def compile_round(self, target: PreTrainedModel, **options: Any) -> None:
        """Have generate() of `target` with this draft run its rounds as graphs, in fixed shapes.

        Whole rounds where the call is greedy or samples by temperature, top-k and top-p; else the two forwards. On
        CUDA they are CUDA graphs, and torch.compile compiles one layer for all that are alike; elsewhere it compiles
        these functions as wholes. `options` are torch.compile's. The first calls compile, for tens of seconds; a later
        one does again where prompt and new tokens need another number of slots (eight between powers of two, and 256
        at least), or it has another number of rows.
        """
        self.bind_target(target)
        check_compiled(target, self)
        self.compiled_rounds[target] = CompiledRound(target, self, **options)


class _Call:
    """One generate() call: what was asked for, read once, and the loop over it."""

    def __init__(self, draft, target, input_ids, processors, criteria, config, *, schedule, generator):
        self.draft, self.target, self.input_ids = draft, target, input_ids
        self.config, self.schedule = config, schedule
        self.terms = Terms.of(processors, criteria, config, input_ids.device, generator)
        self.watch = Stopwatch(target.device)
        self.agreement = Agreement(target)
        self.schedule.reset()
        load_kernels()

    def run(self, model_kwargs: dict[str, Any], streamer) -> torch.Tensor | SpeculativeOutput:
        """Our loop: that of rows, whose caches roll back for nothing and need not grow by copies, where it can be."""
        returns_cache = model_kwargs.get("use_cache") is not False
        self._check_cache(model_kwargs.get(CACHE), before_prefill=True)
        cache = _ensure_cache(self.target, model_kwargs)
        reason = None
        if len(self.input_ids) == 1 and self.draft.compiled_rounds.get(self.target) is None:
            shown = bool(self.config.output_attentions)
            reason = why_not_in_a_row(self.target, self.draft, model_kwargs, cache, output_attentions=shown)
        note("cache", "slots" if reason is None else f"the target's own: {reason}")
        if reason is None:
            return self._run_rows(model_kwargs, cache, streamer, returns_cache=returns_cache)
        return self._run_one(model_kwargs, cache, streamer, returns_cache=returns_cache)

    def _run_one(
        self, model_kwargs: dict[str, Any], cache: Cache, streamer, *, returns_cache: bool
    ) -> torch.Tensor | SpeculativeOutput:
        """One sequence on a cache that transformers made for it."""
        state = DecodeState(self.input_ids, model_kwargs, cache_length=cache.get_seq_length())
        state.extras = {name: [] for name in self.terms.extras}
        candidates = self._candidates(context_of(self.draft, cache, state.cache_length))
        with self.watch.part("total"), candidates.tap:
            with self.watch.part("prefill"):
                outputs = self.target._prefill(
                    self.input_ids,
                    self.config,
                    model_kwargs | candidates.tap.forward_kwargs,
                    is_first_iteration=not self.config.is_assistant,
                )
            self._check_cache(cache)
            with recording_past(cache), self._block_attention(model_kwargs):
                rewinder = Rewinder(cache)
                try:
                    self._first_token(state, candidates, outputs, streamer)
                    while not state.finished:
                        self._round(state, candidates, rewinder, streamer)
                    if returns_cache:
                        self._read_pending(state, candidates, rewinder)
                finally:  # also after a streamer or a criterion raised
                    rewinder.cut_to_length(state.cache_length - state.num_pending)
        if streamer is not None:
            streamer.end()
        return self._finish(state, cache if returns_cache else None)

    def _first_token(self, state: DecodeState, candidates, outputs: Any, streamer) -> None:
        """The prompt's features go to the draft; its next token is the target's alone."""
        features = candidates.tap.take(outputs)
        state.cache_length += features.shape[1]
        check_prompt_length(self.target, state.model_kwargs[CACHE], state.cache_length)
        candidates.observe_prompt(features, state.model_kwargs)
        verification = read_verification(outputs, 0, state.input_ids.device)
        decision = self._decide(state, verification, state.input_ids[:, :0], None)
        self._commit(state, verification, decision, is_prefill=True)
        stream(streamer, decision.emitted_ids, [decision.num_accepted])

    def _round(self, state: DecodeState, candidates: DSparkCandidateGenerator, rewinder: Rewinder, streamer) -> None:
        start = self.watch.host_seconds()
        with self.watch.part("draft"):
            block = candidates.propose(state.input_ids)
            verify_length = 0 if block is None else candidates.verify_length(block)
            block, verify_length = self.agreement.on_block(block, verify_length)
        draft_ids = state.input_ids[:, :0] if block is None else block.token_ids[:, :verify_length]
        draft_ids = draft_ids.to(state.input_ids.device)
        if state.num_pending > MAX_PENDING:
            self._read_pending(state, candidates, rewinder)
        num_pending = state.num_pending
        with self.watch.part("verify"):
            rewinder.before_forward()
            verification = verify_block(self.target, state, draft_ids, candidates.tap)
        decision = self._decide(state, verification, draft_ids, block)
        # The target read the anchor and the drafted tokens; the last token emitted is the next anchor, not read yet.
        num_read = decision.emitted_ids.shape[1]
        state.num_pending = rewinder.keep(num_pending + num_read, num_pending + verify_length + 1)
        state.cache_length += num_read
        # Pending tokens come first in the forward; the draft has their features.
        candidates.observe(candidates.tap.take(verification.outputs)[:, num_pending:][:, :num_read])
        self._commit(state, verification, decision)
        state.rounds.append(RoundRecord.of(block, verify_length, decision.num_accepted, decision.emitted_ids))
        # Behind the round's synchronisation the host's clock is right. Processes that must agree have one clock each.
        seconds = None if self.agreement.is_needed else self.watch.host_seconds() - start
        self.schedule.observe(num_read, None if block is None else verify_length, seconds=seconds)
        stream(streamer, decision.emitted_ids, [decision.num_accepted])

    def _read_pending(self, state: DecodeState, candidates: DSparkCandidateGenerator, rewinder: Rewinder) -> None:
        """Have the target read again what a rollback took out of its cache along with rejected tokens."""
        if state.num_pending:
            with self.watch.part("verify"):
                outputs = read_pending(self.target, state, candidates.tap)
            candidates.tap.take(outputs)  # the draft has them
            state.num_pending = rewinder.keep(state.num_pending, state.num_pending)

    def _decide(
        self, state: DecodeState, verification: Verification, draft_ids: torch.Tensor, block: DraftBlock | None
    ) -> Decision:
        """Accept, add the target's own token, and stop where plain generate() would."""
        terms = self.terms
        verdicts = Verdicts(terms, state) if terms.has_other_criteria else None
        stops = None if verdicts is None else verdicts.on_last
        choice = choose_tokens(
            terms.rule, state.input_ids, verification.logits, draft_ids, block, eos_ids=terms.eos_ids, stops=stops
        )
        tokens, num_accepted = choice.token_ids, choice.num_accepted
        num_emitted = num_accepted + 1
        at_eos = torch.zeros_like(num_accepted)
        if terms.eos_ids is not None:
            column = torch.arange(tokens.shape[1], device=tokens.device)
            is_eos = torch.isin(tokens, terms.eos_ids) & (column <= num_accepted.unsqueeze(-1))
            at_eos = is_eos.any(-1).long()
            num_emitted = torch.where(at_eos > 0, is_eos.long().argmax(-1) + 1, num_emitted)
        # The one synchronisation of every round: shapes and the end of the loop depend on these three numbers.
        accepted, kept, finished = torch.cat([num_accepted, num_emitted, at_eos]).tolist()
        finished = bool(finished) or state.input_ids.shape[1] + kept >= terms.max_length
        if verdicts is not None:
            kept, stops = verdicts.first_stop(tokens[:, :kept], choice.scores)
            finished = finished or any(stops)
        decision = Decision(tokens[:, :kept], accepted, finished, choice.scores)
        return self.agreement.on_decision(decision, width=tokens.shape[1])

    def _commit(
        self, state: DecodeState, verification: Verification, decision: Decision, *, is_prefill: bool = False
    ) -> None:
        """Make the emitted tokens part of the sequence."""
        count = decision.emitted_ids.shape[1]
        # The verification's first row is the anchor's, as many positions back as tokens were emitted.
        where = {"first_position": state.cache_length - count, "is_prefill": is_prefill}
        extras = extras_of_tokens(self.terms.extras, self.target, verification, decision.scores, count, **where)
        for name, entries in extras.items():
            state.extras[name] += entries
        state.input_ids = torch.cat([state.input_ids, decision.emitted_ids], dim=1)
        state.model_kwargs = self.target._update_model_kwargs_for_generation(
            ModelOutput(), state.model_kwargs, num_new_tokens=count
        )
        state.finished = decision.finished

    def _run_rows(
        self, model_kwargs: dict[str, Any], cache: Cache, streamer, *, returns_cache: bool
    ) -> torch.Tensor | SpeculativeOutput:
        """Any number of sequences as rows of slots."""
        returns_cache = returns_cache and (self.config.return_dict_in_generate or is_users_cache(cache))
        tap = self._tap()
        call = (self.input_ids, self.terms, self.config, self.schedule, self.watch)
        batch = BatchCall(self.draft, self.target, *call)
        settings = {"attention": self._block_attention(model_kwargs), "returns_cache": returns_cache}
        with self.watch.part("total"), tap:
            sequences = batch.run(model_kwargs, cache, tap, streamer, **settings)
        stats = self._record(batch.records, sum(row.num_emitted for row in batch.rows))
        if not self.config.return_dict_in_generate:
            return sequences
        cache = {CACHE: cache if returns_cache else None}
        return SpeculativeOutput(sequences=sequences, **batch.extras, **cache, rounds=batch.records, stats=stats)

    def _finish(self, state: DecodeState, cache: Cache | None) -> torch.Tensor | SpeculativeOutput:
        stats = self._record(state.rounds, state.input_ids.shape[1] - self.input_ids.shape[1])
        if not self.config.return_dict_in_generate:
            return state.input_ids
        extras = {name: tuple(entries) for name, entries in state.extras.items()}
        return SpeculativeOutput(
            sequences=state.input_ids, **extras, **{CACHE: cache}, rounds=tuple(state.rounds), stats=stats
        )

    def run_in_transformers(self, model_kwargs: dict[str, Any], streamer) -> torch.Tensor | SpeculativeOutput:
        """transformers' own assisted loop with our candidates; what it does wrong is refused by name."""
        cache = model_kwargs.get(CACHE)
        limits = {
            "a target whose state cannot be rolled back": getattr(self.target, "_is_stateful", False),
            "`use_cache=False`": cache is None,
            "a cache that is already filled": cache is not None and cache.get_seq_length() > 0,
            "stop strings, `max_time` or other stopping criteria": self.terms.has_other_criteria,
            "logits processors that keep a state": self.terms.rule.is_stateful,
            "`output_hidden_states`": bool(self.config.output_hidden_states),
            "`output_attentions`": bool(self.config.output_attentions),
            "several sequences at once": len(self.input_ids) > 1,
        }
        for limit, is_met in limits.items():
            if is_met:
                raise ValueError(
                    f'transformers\' own assisted loop (loop="transformers") is wrong or fails with {limit}. '
                    'Use the default loop="dspark".'
                )
        candidates = self._candidates(DraftContext(self.draft.new_cache()))
        arguments = (self.input_ids, self.terms.rule.processors, self.terms.criteria, self.config)
        borrowed = in_transformers_loop(self.target, candidates)
        with self.watch.part("total"), candidates.tap, recording_past(cache), borrowed:
            output = self.target._assisted_decoding(*arguments, streamer=streamer, **model_kwargs)
        if not self.config.return_dict_in_generate:
            self._record(candidates.rounds, output.shape[1] - self.input_ids.shape[1])
            return output
        stats = self._record(candidates.rounds, output.sequences.shape[1] - self.input_ids.shape[1])
        return SpeculativeOutput(**output, rounds=tuple(candidates.rounds), stats=stats)

    def _candidates(self, context: DraftContext) -> DSparkCandidateGenerator:
        return DSparkCandidateGenerator(
            self.draft,
            self.terms.rule,
            schedule=self.schedule,
            max_length=self.terms.max_length,
            tap=self._tap(),
            context=context,
        )

    def _tap(self) -> FeatureTap:
        by_hooks = self.config.prefill_chunk_size is not None or bool(self.config.output_hidden_states)
        return FeatureTap(self.target, self.draft.config.target_layer_ids, by_hooks=by_hooks)

    def _block_attention(self, model_kwargs: dict[str, Any]):
        """For the rounds alone: the prompt is read as plain generate() reads it."""
        mask, shown = model_kwargs.get("attention_mask"), bool(self.config.output_attentions)
        return block_attention_on(self.target, self.draft, attention_mask=mask, output_attentions=shown)

    def _record(self, rounds: Sequence[RoundRecord], tokens: int) -> GenerationStats:
        self.draft.last_stats = GenerationStats.from_rounds(rounds, tokens, self.watch.seconds(), report())
        return self.draft.last_stats

    def _check_cache(self, cache: Cache | None, *, before_prefill: bool = False) -> None:
        reason = why_not_reversible(self.target, cache, before_prefill=before_prefill)
        if reason is not None:
            raise ValueError(
                f"Speculative decoding undoes rejected tokens in the target's cache, and here it cannot: {reason}. "
                "Call generate() without `assistant_model`."
            )


class Stopwatch:
    """Seconds spent in named parts; on CUDA by events that are read once, at the end of the call."""

    def __init__(self, device: torch.device):
        self._on_cuda = device.type == "cuda"
        self._open: dict[str, Any] = {}
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str):
        self.start(name)
        yield
        self.stop(name)

    def start(self, name: str) -> None:
        self._open[name] = self._now()

    def stop(self, name: str) -> None:
        self._spans.append((name, self._open.pop(name), self._now()))

    @staticmethod
    def host_seconds() -> float:
        """The host's clock."""
        return time.perf_counter()

    def seconds(self) -> dict[str, float]:
        """Sums by part."""
        if self._on_cuda:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for name, start, stop in self._spans:
            span = start.elapsed_time(stop) / 1000 if self._on_cuda else stop - start
            sums[name] = sums.get(name, 0.0) + span
        return sums

    def _now(self):
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _ensure_cache(target: PreTrainedModel, model_kwargs: dict[str, Any]) -> Cache:
    """The call's cache; one of our own where the user asked for none."""
    if model_kwargs.get(CACHE) is None:
        logger.warning_once(
            "`use_cache=False`: speculative decoding verifies blocks against a cache, so it uses one of its own for "
            "the length of this call. The output is the same."
        )
        model_kwargs[CACHE] = DynamicCache(config=target.config.get_text_config(decoder=True))
        model_kwargs["use_cache"] = True
    return model_kwargs[CACHE]
