"""One generate() call over rows, one or several: prefill, rounds of a RowBatch until all ended, what it returns.

Rows go on at their own pace. Where something sees all rows at once after each token (stopping criteria of the user's,
processors that keep a state, streamers, collected scores), they keep in step: a round adds to each as many tokens as
to the one that accepted fewest, which leaves each row's law as it is.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import Cache, GenerationConfig, PreTrainedModel

from .accept import choose_tokens
from .batch import RowBatch
from .candidate_generator import context_of
from .compiled import CompiledRound, current_round
from .dispatch import remember
from .features import FeatureTap
from .limits import check_batch, check_padding, check_prompt_length, refuse_batch
from .rows import Emission, Row, on_device, pad_ended, rows_of
from .schedule import Schedule
from .slots import PADDING, move_out_of_slots, why_not_in_slots
from .state import DecodeState, DraftBlock, RoundRecord, Verification
from .terms import Terms, Verdicts
from .verify import TOKEN_TYPES, extras_of_tokens


class BatchCall:
    """The call's rows, and after `run` what it collected."""

    def __init__(
        self,
        draft: PreTrainedModel,
        target: PreTrainedModel,
        input_ids: torch.Tensor,  # [B, n]
        terms: Terms,
        config: GenerationConfig,
        schedule: Schedule,
        watch,
    ):
        self.draft, self.target, self.input_ids = draft, target, input_ids
        self.terms, self.config, self.schedule, self.watch = terms, config, schedule, watch
        self.compiled: CompiledRound | None = None
        self.rows: list[Row] = []
        self.extras: dict[str, Any] = {}

    @property
    def records(self) -> tuple[RoundRecord, ...]:
        """All rows' rounds, row by row."""
        return tuple(record for row in self.rows for record in row.records)

    def run(
        self,
        model_kwargs: dict[str, Any],
        cache: Cache,
        tap: FeatureTap,
        streamer,
        *,
        attention: AbstractContextManager,
        returns_cache: bool,
    ) -> torch.Tensor:
        """Token ids [B, m] as plain generate() returns them; `cache` holds what its own would where it is returned.

        `attention` is open while rounds run.
        """
        self._check(model_kwargs)
        length = cache.get_seq_length()
        with self.watch.part("prefill"):
            arguments = model_kwargs | tap.forward_kwargs
            outputs = self.target._prefill(
                self.input_ids, self.config, arguments, is_first_iteration=not self.config.is_assistant
            )
        self.compiled = current_round(self.draft, self.target)  # while a GPU reads the prompt
        features = tap.take(outputs)
        check_prompt_length(self.target, cache, length + features.shape[1])
        with attention:
            slots = self._slots(model_kwargs, cache)
            batch = self._new_batch(slots, tap)
            try:
                self._admit(batch, model_kwargs, cache, slots, features)
                self._rounds(batch, outputs, streamer, keep=returns_cache)
            finally:  # also after a streamer or a criterion raised
                if returns_cache and batch.cache is not None:
                    self._give_back(batch, cache, slots)
        if streamer is not None:
            streamer.end()
        return self._sequences(batch)

    def _rounds(self, batch: RowBatch, outputs: Any, streamer, *, keep: bool) -> None:
        """From the prefill's outputs until all rows ended; with `keep` they may be taken back."""
        logits = outputs.logits[:, -1:].to(self.input_ids.device, torch.float32, copy=True)
        in_step = self._in_step(batch, streamer)
        emit = batch.emit if in_step is None else in_step.emit
        if self.compiled is not None and in_step is None:
            batch.capture()
        nothing = self.input_ids[:, :0]
        emission = emit(batch.rows, logits, nothing, None, None)
        batch.columns.append(batch.rows, emission)
        while True:
            if in_step is not None:
                in_step.collect(emission, logits, outputs)
                if in_step.is_over:
                    break
            elif self._end_rows(batch, emission, keep=keep):
                break
            emission, logits, outputs = batch.round(self.watch, emit)
        if self.compiled is not None:
            remember(self.compiled.notes)
        if in_step is not None:
            self.extras = {name: tuple(entries) for name, entries in in_step.state.extras.items()}

    def _end_rows(self, batch: RowBatch, emission: Emission, *, keep: bool) -> bool:
        """Whether no row is left; compiled rounds keep those that ended, for their shapes."""
        ended = [row for row, ends in zip(batch.rows, emission.finished, strict=True) if ends]
        for row in ended:
            row.ended = True
        if self.compiled is None:
            batch.drop(ended, keep=keep)
        return all(row.ended for row in batch.rows)

    def _new_batch(self, slots: torch.Tensor, tap: FeatureTap) -> RowBatch:
        counts = (slots[:, -1] + 1).tolist()
        length = self.input_ids.shape[1]
        self.rows = [Row(i, self.terms, self.terms.max_length, length, n) for i, n in enumerate(counts)]
        num_inputs = self.draft.config.num_block_inputs
        num_slots = max(counts) + num_inputs
        if self.compiled is not None:
            num_slots = self.compiled.num_slots(self.terms.max_length + num_inputs)
        sizes = {"num_rows": len(self.rows), "num_slots": num_slots}
        return RowBatch(self.draft, self.target, tap, self.schedule, **sizes, compiled=self.compiled)

    def _admit(self, batch: RowBatch, model_kwargs, cache: Cache, slots: torch.Tensor, features) -> None:
        position_ids = model_kwargs.get("position_ids")
        positions = slots[:, -1] if position_ids is None else position_ids[:, -1].to(slots.device)
        types = tuple(name for name in TOKEN_TYPES if model_kwargs.get(name) is not None)
        batch.admit(list(self.rows), self.input_ids, cache, slots, positions, features, types)
        self._take_over_context(batch, cache, slots, features.shape[1])

    def _take_over_context(self, batch: RowBatch, cache: Cache, slots: torch.Tensor, num_new: int) -> None:
        """Let the draft go on from an earlier call on this cache, whose columns have `slots` [B, n], the last new."""
        slots = slots[:, :-num_new]
        context = context_of(self.draft, cache, slots.shape[1])
        del self.draft.contexts[cache]  # its cache is emptied, as the target's
        if context.last_position is None or len(context.last_position) != len(slots):
            return
        num_known = context.cache.get_seq_length() + sum(part.shape[1] for part in context.features)
        if len(slots) == 1:  # of a single sequence it never reads the padding
            slots = slots[:, slots[0] < PADDING]
        if 0 < num_known <= slots.shape[1]:
            is_whole = batch.drafting.is_whole = num_known == slots.shape[1]
            is_unpadded = is_whole and all(row.num_slots == num_known + num_new for row in self.rows)
            batch.drafting.take_over(context, slots[:, -num_known:], is_unpadded=is_unpadded)

    def _slots(self, model_kwargs: dict[str, Any], cache: Cache) -> torch.Tensor:
        """The slot [B, C] of each column of the prefilled cache."""
        reason = why_not_in_slots(cache)
        if reason is not None:
            raise ValueError(
                f"{type(self.target).__name__} decodes one sequence at a time with a draft: {reason}. Call generate() "
                "for each prompt, or leave out `assistant_model`."
            )
        mask, length = model_kwargs.get("attention_mask"), cache.get_seq_length()
        if mask is None:
            return torch.arange(length, device=self.input_ids.device).expand(len(self.input_ids), length)
        mask = mask[:, :length].to(self.input_ids.device).bool()
        # Rows of the same tokens are laid out alike, however much padding stands in front of them.
        return torch.where(mask, mask.long().cumsum(-1) - 1, PADDING)

    def _in_step(self, batch: RowBatch, streamer) -> "_InStep | None":
        terms = self.terms
        if terms.has_other_criteria or terms.rule.is_stateful or terms.extras or streamer is not None:
            return _InStep(self, batch, streamer)
        return None

    def _check(self, model_kwargs: dict[str, Any]) -> None:
        check_batch(self.target, self.draft)
        position_ids = model_kwargs.get("position_ids")
        if "attentions" in self.terms.extras:
            refuse_batch("`output_attentions`")
        if position_ids is not None and position_ids.ndim > 2:
            refuse_batch("positions of several axes")
        mask = model_kwargs.get("attention_mask")
        if mask is not None:
            check_padding(mask.bool(), self.target.config.get_text_config(decoder=True))

    def _sequences(self, batch: RowBatch) -> torch.Tensor:
        length = max(row.length for row in self.rows)
        column = torch.arange(length, device=batch.columns.ids.device)
        places = [row.place for row in self.rows]
        lengths = on_device([row.length for row in self.rows], batch.columns.ids.device).unsqueeze(-1)
        sequences = torch.where(column < lengths, batch.columns.ids[places, :length], self.terms.pad_token_id)
        return sequences.to(self.input_ids.device)

    def _give_back(self, batch: RowBatch, cache: Cache, slots: torch.Tensor) -> None:
        """Fill the call's cache with all columns but the last, and keep the draft's context for the next turn.

        Before all rows ended, with as many columns as every row has. Padding behind ended rows holds zeros, plain
        generate()'s the states of its padding tokens; masks hide both.
        """
        batch.take_back(self.rows)
        is_over = all(row.ended for row in self.rows)
        num_new = (max if is_over else min)(row.length for row in self.rows) - self.input_ids.shape[1]
        features = None
        if any(row.num_emitted < num_new for row in self.rows):
            # The last token of each row, which no forward has read yet; a shape that compiled rounds do not have.
            _, outputs = batch.verify(self.input_ids[:, :0], self.target)
            features = batch.tap.take(outputs)
        new = torch.arange(max(num_new - 1, 0), device=slots.device) + slots[:, -1:] + 1
        counts = on_device([row.num_slots for row in self.rows], slots.device).unsqueeze(-1)
        columns = torch.cat([slots, torch.where(new < counts, new, PADDING)], dim=1)
        places = on_device([row.place for row in self.rows], slots.device)
        move_out_of_slots(batch.cache, columns, cache, places)
        self.draft.contexts[cache] = batch.drafting.hand_back(batch.rows, features, columns, places)


class _InStep:
    """Rounds that add the same number of tokens to all rows, for what looks at rows side by side.

    Ended rows stay, and get padding where the call has an EOS token, as in plain generate().
    """

    def __init__(self, call: BatchCall, batch: RowBatch, streamer):
        self.call, self.batch, self.terms, self.streamer = call, batch, call.terms, streamer
        self.state = DecodeState(call.input_ids, {}, 0, extras={name: [] for name in call.terms.extras})
        self.is_prefill = True

    @property
    def is_over(self) -> bool:
        return all(row.ended for row in self.call.rows)

    def emit(self, rows: list[Row], logits, draft_ids, block: DraftBlock | None, limits) -> Emission:
        """As `RowBatch.emit`, with the same count for all rows."""
        terms = self.terms
        ended = [row.ended for row in rows]
        live = on_device([not row.ended for row in rows], draft_ids.device)
        pads = terms.eos_ids is not None
        verdicts = Verdicts(terms, self.state) if terms.has_other_criteria else None
        stops = None if verdicts is None else lambda tokens, scores: verdicts.on_last(tokens, scores) & live
        own = None if block is None else rows_of(block, slice(None), self.batch.drafting.law_of(terms))
        settings = {"eos_ids": terms.eos_ids, "stops": stops, "limits": limits, "live": live if pads else None}
        choice = choose_tokens(terms.rule, self.state.input_ids, logits, draft_ids, own, **settings)
        tokens, counts, num_accepted, at_eos = self.batch.read(choice, rows)
        tokens = pad_ended(rows, tokens)
        going_on = [n for n, has_ended in zip(counts, ended, strict=True) if not (has_ended and pads)]
        count, stopped = min(*going_on, rows[0].room), [False] * len(rows)
        if verdicts is not None:
            count, stopped = verdicts.first_stop(tokens[:, :count], choice.scores, ended)
        is_full = count == rows[0].room
        reasons = zip(at_eos, counts, stopped, strict=True)
        finished = [is_full or stops or (eos and n <= count) for eos, n, stops in reasons]
        return Emission(tokens, [count] * len(rows), num_accepted, finished, choice.scores)

    def collect(self, emission: Emission, logits: torch.Tensor, outputs: Any) -> None:
        """Keep what was asked for of the tokens just committed, and stream them."""
        count = emission.counts[0]
        verification = Verification(logits, outputs)
        where = {"first_position": 0, "is_prefill": self.is_prefill}
        arguments = (self.terms.extras, self.call.target, verification, emission.scores, count)
        for name, entries in extras_of_tokens(*arguments, **where).items():
            self.state.extras[name] += entries
        self.is_prefill = False
        tokens = emission.token_ids[:, :count]
        self.state.input_ids = torch.cat([self.state.input_ids, tokens], dim=1)
        for row, ends in zip(self.call.rows, emission.finished, strict=True):
            row.ended = row.ended or ends
        stream(self.streamer, tokens, emission.num_accepted)


def stream(streamer, tokens: torch.Tensor, num_accepted: list[int]) -> None:
    """Hand tokens [B, m] over, one by one as plain generate() does; of one row a streamer of rounds gets them at once.

    `num_accepted` of the rows, before any stop.
    """
    if streamer is None:
        return
    tokens = tokens.cpu()  # one more synchronisation: a streamer reads the tokens on the host
    if len(tokens) == 1 and hasattr(streamer, "put_round"):
        streamer.put_round(tokens[0], num_accepted[0])
    else:
        for column in tokens.unbind(1):
            streamer.put(column)
