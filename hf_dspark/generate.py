"""The loop: prefill, then rounds of draft, schedule, verify, accept, roll back. The only file that knows their order.

Also the only one with clocks, and with the device synchronisations of a round; each says why it is there.
"""

import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers import StoppingCriteriaList
from transformers.generation import stopping_criteria as criteria_types
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput, logging

from .accept import accept_greedy, accept_prefix, on_common_support
from .candidate_generator import DSparkCandidateGenerator, committed_positions, in_transformers_loop
from .compat import CACHE, get_cache
from .features import FeatureTap
from .rollback import cut_to_length, drop_last, recording_past, why_not_reversible
from .sampling import SamplingRule, process_scores
from .schedule import ConfidenceThreshold, FixedLength, schedule_from
from .state import Decision, DecodeState, Distribution, DraftBlock, DraftContext, GenerationStats, RoundRecord
from .state import Verification
from .verify import attentions_of_token, read_verification, states_of_token, verify_block

logger = logging.get_logger(__name__)

Schedule = FixedLength | ConfidenceThreshold


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """What plain generate() returns, with the rounds and the call's figures."""

    rounds: tuple[RoundRecord, ...] | None = None
    stats: GenerationStats | None = None


class SpeculativeDecoding:
    """Gives a draft model `speculative_decode` and the unpatched door to it, `as_custom_generate`."""

    def as_custom_generate(
        self,
        *,
        streamer=None,
        stop_strings: str | list[str] | None = None,
        tokenizer=None,
        schedule: Schedule | None = None,
        generator: torch.Generator | None = None,
        loop: str = "dspark",
    ) -> Callable:
        """A callable for `target.generate(..., custom_generate=...)`: the same loop without the patched door.

        generate() hands no `streamer`, `tokenizer` or `stop_strings` to such a callable, so they are given here.
        `loop="transformers"` runs transformers' own assisted loop with our candidates: batch 1, and within its limits.
        """
        if stop_strings is not None and tokenizer is None:
            raise ValueError("`stop_strings` are compared with text: pass `tokenizer=`, too.")

        def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
            if stop_strings is not None:
                stopping_criteria.append(criteria_types.StopStringCriteria(tokenizer, stop_strings))
            if streamer is not None:  # generate() puts the prompt only to a streamer of its own
                streamer.put(input_ids.cpu())
            return self.speculative_decode(
                model,
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                streamer=streamer,
                schedule=schedule,
                generator=generator,
                loop=loop,
                **model_kwargs,
            )

        return decode

    @torch.no_grad()
    def speculative_decode(
        self,
        target: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        *,
        streamer=None,
        synced_gpus: bool = False,
        schedule: Schedule | None = None,
        generator: torch.Generator | None = None,
        loop: str = "dspark",
        **model_kwargs: Any,
    ) -> torch.Tensor | SpeculativeOutput:
        """Continue `input_ids` [1, n] as the target would, by drafting and verifying.

        Arguments are as generate() prepares them for a decoding method. Greedy output equals plain generate()'s in
        fp32, sampled output has its distribution. Raises ValueError for what is not supported, before any forward.
        """
        if loop not in ("dspark", "transformers"):
            raise ValueError(f'`loop` must be "dspark" (the default) or "transformers", got {loop!r}.')
        arguments = (target, input_ids, logits_processor, stopping_criteria, generation_config)
        if generation_config.num_beams > 1:
            return _beam_search(*arguments, streamer, model_kwargs)
        _check_request(target, input_ids, synced_gpus)
        self.bind_target(target)
        if schedule is None:
            own = self.generation_config
            schedule = schedule_from(own.num_assistant_tokens, own.assistant_confidence_threshold)
        if schedule.needs_confidence and self.confidence_head is None:
            raise ValueError(
                f"{schedule} needs a confidence head, and this draft has none. Use FixedLength, or set "
                "`draft.generation_config.assistant_confidence_threshold` to None."
            )
        call = _Call(self, *arguments, schedule=schedule, generator=generator)
        run = call.run if loop == "dspark" else call.run_in_transformers
        return run(model_kwargs, streamer)

    def context_of(self, cache: Cache, past_length: int) -> DraftContext:
        """The draft's context for a target cache that holds `past_length` positions: a new one, or the last turn's."""
        context = self._contexts.get(cache)
        if context is not None and _rewind(context, past_length):
            return context
        if past_length > 0:
            logger.warning_once(
                "This cache was filled without this draft, so the draft knows nothing of what it holds and reads the "
                "sequence from its first new token on. The output is the same; fewer tokens are accepted at first."
            )
        self._contexts[cache] = DraftContext(self.new_cache(), target_length=past_length)
        return self._contexts[cache]


class _Call:
    """One generate() call: what was asked for, read once, and the loop over it."""

    def __init__(self, draft, target, input_ids, processors, criteria, config, *, schedule, generator):
        self.draft, self.target, self.input_ids = draft, target, input_ids
        self.criteria, self.config, self.schedule = criteria, config, schedule
        wants = {name: bool(config.return_dict_in_generate and getattr(config, f"output_{name}")) for name in _EXTRAS}
        self.wants = wants
        self.rule = SamplingRule(
            processors, do_sample=config.do_sample, generator=generator, keep_scores=wants["scores"]
        )
        lengths = [c.max_length for c in criteria if type(c) is criteria_types.MaxLengthCriteria]
        self.max_length = min(lengths, default=config.max_length)
        eos = [c.eos_token_id for c in criteria if type(c) is criteria_types.EosTokenCriteria]
        self.eos_ids = torch.cat(eos).to(input_ids.device) if eos else None
        # Length and EOS are decided on the device; any other criterion is asked for every prefix.
        known = (criteria_types.MaxLengthCriteria, criteria_types.EosTokenCriteria)
        self.has_other_criteria = any(type(c) not in known for c in criteria)
        self.watch = _Stopwatch(target.device)

    def run(self, model_kwargs: dict[str, Any], streamer) -> torch.Tensor | SpeculativeOutput:
        """Our loop."""
        returns_cache = model_kwargs.get("use_cache") is not False
        cache = _ensure_cache(self.target, model_kwargs)
        self._check_cache(cache, before_prefill=True)
        state = DecodeState(self.input_ids, model_kwargs, cache_length=cache.get_seq_length())
        tap = self._tap()
        candidates = self._candidates(tap, self.draft.context_of(cache, state.cache_length))
        with self.watch.part("total"), tap:
            with self.watch.part("prefill"):
                outputs = self.target._prefill(
                    self.input_ids,
                    self.config,
                    model_kwargs | tap.forward_kwargs,
                    is_first_iteration=not self.config.is_assistant,
                )
            self._check_cache(cache)
            with recording_past(cache):
                try:
                    self._commit_prefill(state, candidates, outputs, streamer)
                    while not state.finished:
                        self._round(state, candidates, cache, streamer)
                finally:  # also after a streamer or a criterion raised
                    cut_to_length(cache, state.cache_length)
        if streamer is not None:
            streamer.end()
        return self._finish(state, cache if returns_cache else None)

    def _commit_prefill(self, state: DecodeState, candidates, outputs: Any, streamer) -> None:
        """The prompt's features to the draft, and the first token, which the target alone decides."""
        features = candidates.tap.take(outputs)
        new = slice(-features.shape[1], None)
        state.cache_length += features.shape[1]
        positions = committed_positions(state.model_kwargs, state.cache_length)
        mask = state.model_kwargs.get("attention_mask")
        candidates.observe(features, positions[:, new], None if mask is None else mask[:, new])
        verification = read_verification(outputs, 0, state.input_ids.device)
        decision = self._decide(state, verification, None, 0)
        self._commit(state, verification, decision, num_rows=None)
        _stream(streamer, decision, num_accepted=0)

    def _round(self, state: DecodeState, candidates, cache: Cache, streamer) -> None:
        with self.watch.part("draft"):
            block = candidates.propose(state.input_ids)
            verify_length = 0 if block is None else candidates.verify_length(block)
        with self.watch.part("verify"):
            draft_ids = state.input_ids[:, :0] if block is None else block.token_ids[:, :verify_length]
            draft_ids = draft_ids.to(state.input_ids.device)
            verification = verify_block(self.target, state, draft_ids, candidates.tap)
        decision = self._decide(state, verification, block, verify_length)
        kept = decision.emitted_ids.shape[
            1
        ]  # the anchor and the accepted tokens; the last emitted one is not read yet
        drop_last(cache, verify_length + 1 - kept)
        state.cache_length += kept
        features = candidates.tap.take(verification.outputs)[:, :kept]
        positions = committed_positions(state.model_kwargs, state.cache_length)[:, -1:]
        self._commit(state, verification, decision, num_rows=verify_length + 1)
        candidates.observe(features, positions + torch.arange(kept, device=positions.device))
        state.rounds.append(
            RoundRecord(
                draft_ids=None if block is None else block.token_ids,
                emitted_ids=decision.emitted_ids,
                verify_length=verify_length,
                num_accepted=decision.num_accepted,
                confidence_probs=None if block is None else block.confidence,
            )
        )
        _stream(streamer, decision, decision.num_accepted)

    def _decide(
        self, state: DecodeState, verification: Verification, block: DraftBlock | None, verify_length: int
    ) -> Decision:
        """Accept, add the target's token, and stop where plain generate() would: all that leaves the device."""
        draft_ids = state.input_ids[:, :0] if block is None else block.token_ids[:, :verify_length]
        draft_ids = draft_ids.to(state.input_ids.device)
        choose = self._choose_sampled if self.config.do_sample else self._choose_greedy
        emitted, num_accepted, scores = choose(state, verification.logits, draft_ids, block)
        column = torch.arange(verify_length + 1, device=emitted.device)
        num_emitted = num_accepted + 1
        at_eos = torch.zeros_like(num_accepted, dtype=torch.bool)
        if self.eos_ids is not None:
            is_eos = torch.isin(emitted, self.eos_ids) & (column <= num_accepted.unsqueeze(-1))
            at_eos = is_eos.any(-1)
            num_emitted = torch.where(at_eos, is_eos.long().argmax(-1) + 1, num_emitted)
        # The one synchronisation of every round: shapes and the end of the loop depend on these three numbers.
        accepted, kept, finished = torch.cat([num_accepted, num_emitted, at_eos.long()]).tolist()
        emitted = emitted[:, :kept]
        finished = bool(finished) or state.input_ids.shape[1] + kept >= self.max_length
        if self.has_other_criteria:
            stop = self._first_stop(state, emitted, scores)
            if stop is not None:
                emitted, finished = emitted[:, :stop], True
        return Decision(emitted, accepted, finished, scores)

    def _choose_greedy(self, state, logits, draft_ids, block):
        scores = self._process(state, logits, draft_ids, lambda i, row: row.argmax(-1) == draft_ids[:, i])
        target_ids = scores.argmax(-1)
        return target_ids, accept_greedy(draft_ids, target_ids), scores

    def _choose_sampled(self, state, logits, draft_ids, block):
        rule, scores = self.rule, None
        uniforms = rule.uniforms(draft_ids)
        law = rule.sparse_distribution(logits, exact=True)
        draft_law = Distribution(logits[:, :0]) if block is None else block.distribution.narrow(draft_ids.shape[1])
        if law is None:

            def accepts(i: int, row: torch.Tensor) -> torch.Tensor:
                token = draft_ids[:, i, None]
                bound = uniforms[:, i, None] * draft_law.probs[:, i].gather(-1, token)
                return bound < row.softmax(-1).gather(-1, token)

            scores = self._process(state, logits, draft_ids, accepts)
            law = Distribution(scores.softmax(-1))
        columns, draft_probs, target_probs = on_common_support(draft_ids, draft_law, law, logits.shape[-1])
        acceptance = accept_prefix(columns, draft_probs, target_probs, uniforms)
        num_accepted = acceptance.num_accepted
        next_ids = rule.draw(acceptance.next_probs).unsqueeze(-1)
        if law.support_ids is not None:
            row = num_accepted.view(-1, 1, 1).expand(-1, 1, law.support_ids.shape[-1])
            next_ids = law.support_ids.gather(1, row).squeeze(1).gather(-1, next_ids)
        is_accepted = torch.arange(logits.shape[1], device=logits.device) < num_accepted.unsqueeze(-1)
        padded = torch.cat([draft_ids, next_ids], dim=1)
        return torch.where(is_accepted, padded, next_ids), num_accepted, scores

    def _process(self, state, logits, draft_ids, accepts):
        """Processed scores; where a processor keeps a state, only of rows whose prefix is emitted."""

        def goes_on(i: int, row: torch.Tensor) -> bool:
            accepted = accepts(i, row)
            if self.eos_ids is not None:
                accepted = accepted & ~torch.isin(draft_ids[:, i], self.eos_ids)
            # One synchronisation a token: such a processor must not be called for a token that is not emitted.
            return accepted.all().tolist()

        rule, candidate_ids = self.rule, torch.cat([state.input_ids, draft_ids], dim=1)
        return process_scores(
            rule.processors,
            candidate_ids,
            logits,
            prefix_free=rule.is_prefix_free,
            goes_on=goes_on if rule.is_stateful else None,
        )

    def _first_stop(self, state: DecodeState, emitted: torch.Tensor, scores: torch.Tensor | None) -> int | None:
        """How many of `emitted` [1, m] plain generate() would have emitted; None: all, and it would go on."""
        verdicts = []
        for count in range(1, emitted.shape[1] + 1):
            prefix = torch.cat([state.input_ids, emitted[:, :count]], dim=1)
            seen = (*state.scores, *scores[:, :count].unbind(1)) if self.wants["scores"] else None
            verdicts.append(self.criteria(prefix, seen))
        # One more synchronisation a round, only where the user gave criteria: they decide how much is emitted.
        verdicts = torch.cat(verdicts).tolist()
        return verdicts.index(True) + 1 if True in verdicts else None

    def _commit(self, state: DecodeState, verification, decision: Decision, num_rows: int | None) -> None:
        """Make the emitted tokens part of the sequence; `num_rows` positions were verified (None: the prefill)."""
        count = decision.emitted_ids.shape[1]
        outputs = verification.outputs
        if self.wants["scores"]:
            state.scores += decision.scores[:, :count].unbind(1)
        if self.wants["logits"]:
            state.logits += verification.logits[:, :count].unbind(1)
        if self.wants["hidden_states"]:
            rows = (
                [outputs.hidden_states]
                if num_rows is None
                else (states_of_token(outputs, i, num_rows) for i in range(count))
            )
            state.hidden_states += rows
        if self.wants["attentions"]:
            windows = [getattr(layer, "sliding_window", None) for layer in state.model_kwargs[CACHE].layers]
            rows = (
                [outputs.attentions]
                if num_rows is None
                else (attentions_of_token(outputs, i, num_rows, windows) for i in range(count))
            )
            state.attentions += rows
        state.input_ids = torch.cat([state.input_ids, decision.emitted_ids], dim=1)
        state.model_kwargs = self.target._update_model_kwargs_for_generation(
            ModelOutput(), state.model_kwargs, num_new_tokens=count
        )
        state.finished = decision.finished

    def _finish(self, state: DecodeState, cache: Cache | None) -> torch.Tensor | SpeculativeOutput:
        tokens = state.input_ids.shape[1] - self.input_ids.shape[1]
        stats = GenerationStats.from_rounds(state.rounds, tokens, self.watch.seconds())
        self.draft.last_stats = stats
        if not self.config.return_dict_in_generate:
            return state.input_ids
        extras = {name: tuple(getattr(state, name)) for name in _EXTRAS if self.wants[name]}
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
            "stop strings, `max_time` and other stopping criteria": self.has_other_criteria,
            "processors that keep a state": self.rule.is_stateful,
            "`output_hidden_states`": bool(self.config.output_hidden_states),
            "`output_attentions`": bool(self.config.output_attentions),
        }
        for limit, is_met in limits.items():
            if is_met:
                raise ValueError(
                    f'transformers\' own assisted loop (loop="transformers") is wrong or fails with {limit}. '
                    "Use the default loop, which supports what can be supported."
                )
        tap = self._tap()
        candidates = self._candidates(tap, DraftContext(self.draft.new_cache()))
        arguments = (self.input_ids, self.rule.processors, self.criteria, self.config)
        with self.watch.part("total"), tap, recording_past(cache), in_transformers_loop(self.target, candidates):
            output = self.target._assisted_decoding(*arguments, streamer=streamer, **model_kwargs)
        sequences = output.sequences if self.config.return_dict_in_generate else output
        tokens = sequences.shape[1] - self.input_ids.shape[1]
        stats = GenerationStats.from_rounds(candidates.rounds, tokens, self.watch.seconds())
        self.draft.last_stats = stats
        if not self.config.return_dict_in_generate:
            return output
        return SpeculativeOutput(**output, rounds=tuple(candidates.rounds), stats=stats)

    def _tap(self) -> FeatureTap:
        by_hooks = self.config.prefill_chunk_size is not None or bool(self.config.output_hidden_states)
        return FeatureTap(self.target, self.draft.config.target_layer_ids, by_hooks=by_hooks)

    def _candidates(self, tap: FeatureTap, context: DraftContext) -> DSparkCandidateGenerator:
        return DSparkCandidateGenerator(
            self.draft, self.rule, schedule=self.schedule, max_length=self.max_length, tap=tap, context=context
        )

    def _check_cache(self, cache: Cache, *, before_prefill: bool = False) -> None:
        reason = why_not_reversible(self.target, cache, before_prefill=before_prefill)
        if reason is not None:
            raise ValueError(
                f"Speculative decoding undoes rejected tokens in the target's cache, and here it cannot: {reason}. "
                "Call generate() without `assistant_model`."
            )


_EXTRAS = ("scores", "logits", "hidden_states", "attentions")


class _Stopwatch:
    """Seconds spent in named parts; on CUDA by events that are read once, at the end of the call."""

    def __init__(self, device: torch.device):
        self._on_cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str):
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

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


def _check_request(target: PreTrainedModel, input_ids: torch.Tensor, synced_gpus: bool) -> None:
    if target.config.is_encoder_decoder:
        raise ValueError(
            f"A DSpark draft reads the hidden states of a decoder-only target, and {type(target).__name__} is an "
            "encoder-decoder. Call generate() without `assistant_model`."
        )
    if input_ids.shape[0] > 1:
        raise ValueError(
            f"Speculative decoding runs one sequence at a time for now, got {input_ids.shape[0]} (batch size times "
            "`num_return_sequences`). Call generate() for each prompt, or leave out `assistant_model`."
        )
    if synced_gpus:
        raise ValueError(
            "`synced_gpus=True` (FSDP or ZeRO-3 over several processes) is not supported with a DSpark draft: processes "
            "would run different numbers of forwards. Call generate() without `assistant_model`."
        )


def _ensure_cache(target: PreTrainedModel, model_kwargs: dict[str, Any]) -> Cache:
    """The call's cache; one of our own where the user asked for none."""
    if model_kwargs.get(CACHE) is None:
        logger.warning_once(
            "`use_cache=False`: speculative decoding verifies blocks against a cache, so it uses one of its own for the "
            "length of this call. The output is the same."
        )
        model_kwargs[CACHE] = DynamicCache(config=target.config.get_text_config(decoder=True))
        model_kwargs["use_cache"] = True
    return model_kwargs[CACHE]


def _rewind(context: DraftContext, past_length: int) -> bool:
    """Bring a kept context back to `past_length` target positions; False where it does not reach or cannot go back."""
    surplus = context.target_length - past_length
    if surplus < 0:
        return False
    if surplus:
        features, positions = context.take() if context.features else (None, None)
        pending = 0 if features is None else features.shape[1]
        if surplus - pending > context.cache.get_seq_length():
            return False
        if surplus < pending:
            context.add(features[:, : pending - surplus], positions[:, : pending - surplus])
        elif surplus > pending:
            drop_last(context.cache, surplus - pending)
        context.target_length = past_length
    return True


def _stream(streamer, decision: Decision, num_accepted: int) -> None:
    """Hand the emitted tokens over, one by one as plain generate() does; a streamer of rounds gets them at once."""
    if streamer is None:
        return
    tokens = decision.emitted_ids[0].cpu()  # one more synchronisation: a streamer reads the tokens on the host
    if hasattr(streamer, "put_round"):
        streamer.put_round(tokens, num_accepted)
    else:
        for token in tokens.split(1):
            streamer.put(token)


def _beam_search(target, input_ids, processors, criteria, config, streamer, model_kwargs):
    if streamer is not None:
        raise ValueError(
            "`streamer` cannot be used with beam search. Set `num_beams` to 1, or leave out the streamer."
        )
    warnings.warn(
        f"`num_beams={config.num_beams}`: beam search takes no draft, so this call runs transformers' plain beam search.",
        stacklevel=2,
    )
    return type(target)._beam_search(target, input_ids, processors, criteria, config, **model_kwargs)
