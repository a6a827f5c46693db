"""The rounds of sequences, one or several, as rows of slot caches, each with a length of its own.

The steps and their order are those of `generate.py`. Rows come in (`admit`) and go out when they end, so that an ended
row costs nothing; one that verified fewer tokens, or had fewer accepted, does not hold the others up.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel

from .accept import choose_tokens
from .agreement import Agreement
from .attention_interface import NAME as BLOCK_ATTENTION
from .batch_draft import BatchDraft
from .captured import CapturedRounds, why_not_captured
from .compat import CACHE
from .compiled import CompiledRound
from .dispatch import note
from .features import FeatureTap
from .packing import Packing
from .rows import (
    Columns,
    Emission,
    Emit,
    Row,
    advance,
    groups_of,
    on_device,
    pad_ended,
    places_of,
    rows_of,
    up_to_stop,
)
from .sampling import Prefixes
from .schedule import Schedule, checked_lengths
from .slots import SlotCache, move_into_slots, windows_of
from .state import Choice, DecodeState, DraftBlock, RoundRecord
from .terms import Verdicts
from .traced import attention_to_slots

_FREE_ON_CUDA = 256  # tokens; up to there a forward takes as long as one over a single token, so padding costs nothing


class RowBatch:
    """The rows of a batch, their caches, and the rounds over them.

    Args:
        draft: bound to `target`.
        tap: open while rows are admitted and rounds run.
        num_rows: at most so many rows at a time.
        num_slots: of a row to begin with.
        compiled: rounds of fixed shapes, for rows that all come in at once and stay.
        is_refilled: rows that end make place for others, so none waits for the last. Blocks are whole also where all
            rows end sooner, so that a row draws as many random numbers as it would alone.
    """

    def __init__(
        self,
        draft: PreTrainedModel,
        target: PreTrainedModel,
        tap: FeatureTap,
        schedule: Schedule,
        *,
        num_rows: int,
        num_slots: int,
        is_refilled: bool = False,
        compiled: CompiledRound | None = None,
    ):
        self.draft, self.target, self.tap, self.schedule = draft, target, tap, schedule
        self.compiled, self.is_refilled = compiled, is_refilled
        self.forward = target if compiled is None else compiled.target_forward
        if compiled is not None and compiled.is_graphed and tap.by_hooks:  # which a replay does not call
            self.forward = target
        self.agreement = Agreement(target)
        self.rows: list[Row] = []
        self.token_types: tuple[str, ...] = ()  # arguments of the target that name a type for every token
        sizes = (num_rows, num_slots, target.get_input_embeddings().weight.device)
        self.columns = Columns(*sizes) if compiled is None else compiled.columns(*sizes)
        self.captured: CapturedRounds | None = None
        self.cache: SlotCache | None = None  # the target's; its layers are known after the first prefill
        self.drafting = BatchDraft(
            draft,
            self.columns,
            SlotCache([None] * draft.config.num_hidden_layers, num_rows, num_slots),
            schedule,
            self.agreement,
            whole_blocks=is_refilled or compiled is not None,
            compiled=compiled,
        )
        self._lengths: list[int] = []  # of the last round, verify lengths
        self._calls: dict[int, list[Row]] = {}  # all rows of each call that goes on, where processors see them

    # rows in and out

    def admit(self, rows: list[Row], input_ids, cache, slots, positions, features, token_types=()) -> None:
        """Take in the rows of one prefill, whose first new token is still to be chosen.

        Args:
            input_ids: [k, n], with padding.
            cache: the prefill's dynamic cache, of C columns; it may hold more than this prompt.
            slots: [k, C] of its columns; PADDING where a column is none of a row's tokens.
            positions: [k] of the last column.
            features: [k, n, m*H] of the last n columns.
            token_types: arguments of the target that name a type for every token.
        """
        first = len(self.rows)
        if self.cache is None:
            self.cache = self._new_cache(cache)
        for place, row in enumerate(rows, first):
            row.place = place
        is_unpadded = all(row.num_slots == slots.shape[1] for row in rows)
        move_into_slots(cache, slots, self.cache, slots.shape[1], first_row=first, is_unpadded=is_unpadded)
        self.token_types = token_types
        self.columns.put(rows, input_ids, slots[:, -1], positions)
        for row in rows:
            if not row.terms.rule.is_prefix_free:
                self._calls.setdefault(id(row.terms), []).append(row)
        self.rows += rows
        self.drafting.admit(rows, features, slots)

    def _new_cache(self, prefilled: Cache) -> SlotCache:
        """Slots for the target's layers; compiled rounds bring both caches with them."""
        windows = windows_of(prefilled, self.target.config.get_text_config(decoder=True))
        sizes = (len(self.columns.lengths), self.drafting.cache.num_slots)
        if self.compiled is None:
            return SlotCache(windows, *sizes)
        cache, self.drafting.cache = self.compiled.caches(windows, self.draft.config.num_hidden_layers, *sizes)
        return cache

    def capture(self) -> None:
        """Make graphs of whole rounds from now on, where the rule of the one call that the rows are of allows it."""
        arguments = (self.target, self.draft, self.tap)
        reason = why_not_captured(*arguments, self.rows[0].terms, self.agreement)
        note("compiled round", "whole" if reason is None else f"the forwards alone: {reason}")
        if reason is None:
            rows = (self.columns, self.rows, self.token_types)
            self.captured = CapturedRounds(self.compiled, *arguments, *rows, is_whole=self.drafting.is_whole)
            self.drafting.captured = self.captured

    def drop(self, finished: list[Row], *, keep: bool = False) -> None:
        """Move ended rows behind the others; they stay as they are until another row takes their place.

        With `keep` they may be taken back, and the draft's context with them.
        """
        if not finished:
            return
        order = list(range(len(self.rows)))
        for row in sorted(finished, key=lambda row: -row.place):
            place, moved = row.place, self.rows.pop()
            last = moved.place
            if place != last:
                self.cache.swap_rows(place, last)
                self.drafting.cache.swap_rows(place, last)
                self.rows[place], moved.place, row.place = moved, place, last
                order[place], order[last] = order[last], order[place]
        going_on = {id(row.terms) for row in self.rows}
        self._calls = {call: rows for call, rows in self._calls.items() if call in going_on}
        index = on_device(order, self.columns.ids.device)
        self.columns.reorder(index)
        self.drafting.reorder(index, len(self.rows), finished, keep=keep)

    def take_back(self, rows: list[Row]) -> None:
        """Count dropped rows again, all that ever came in; they were dropped with `keep`."""
        self.rows = sorted(rows, key=lambda row: row.place)

    # a round

    def round(self, watch, emit: Emit | None = None) -> tuple[Emission, torch.Tensor, Any]:
        """Draft, schedule, verify, accept and commit, for all rows; parts of it are timed by `watch`.

        `emit` is called in place of this class's own, with the same arguments. Returns what was emitted, and the
        target's logits and outputs (None where the round is a graph).
        """
        start = watch.host_seconds()
        with watch.part("draft"):
            block = self.drafting.propose(self.rows, self._own_prefixes())
            limits, self._lengths = self._verify_lengths(block)
        width = max(self._lengths)
        if self.compiled is not None and block is not None:
            width = block.token_ids.shape[1]
        rooms, packing = [row.room for row in self.rows], self._packing()
        if self.captured is not None and block is not None:
            emission, logits, outputs = self._captured(block, limits, watch), None, None
        else:
            draft_ids = self._draft_ids(block, width)
            with watch.part("verify"):
                logits, outputs = self.verify(draft_ids, packing=packing)
            emission = (emit or self.emit)(self.rows, logits, draft_ids, block, limits)
            features = self.tap.take(outputs)
            self.drafting.hand_over(self.rows, features if packing is None else packing.unpack(features), emission)
            self.columns.append(self.rows, emission)
        for place, (row, count) in enumerate(zip(self.rows, emission.counts, strict=True)):
            if row.ended:
                continue
            emitted = emission.token_ids[place : place + 1, :count]
            figures = (self._lengths[place], emission.num_accepted[place], emitted)
            row.records.append(RoundRecord.of(block, *figures, row=row.index, row_of_block=place))
        verified = None
        if block is not None:
            verified = width * len(self.rows) if packing is None else sum(self._lengths)
        measured = {"seconds": None if self.agreement.is_needed else watch.host_seconds() - start}
        rooms = None if self.is_refilled else _rooms_after(self.rows, rooms, emission)
        measured |= {"num_requests": len(self.rows), "rooms": rooms}
        self.schedule.observe(sum(emission.counts), verified, **measured)
        return emission, logits, outputs

    def _draft_ids(self, block: DraftBlock | None, width: int) -> torch.Tensor:
        """The first `width` drafted tokens [R, L] of a block; padding in rows that ended."""
        if block is None:
            return self.columns.ids[: len(self.rows), :0]
        return pad_ended(self.rows, block.token_ids[:, :width].to(self.columns.ids.device))

    def verify(
        self,
        draft_ids: torch.Tensor,
        forward: Callable[..., Any] | None = None,
        *,
        packing: Packing | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """Logits [R, L+1, V] of the target, in fp32, after the anchors and each of `draft_ids` [R, L]; its outputs.

        `forward` is called in place of the rounds' own. With `packing` the target reads, and outputs, packed tokens.
        """
        columns = torch.arange(draft_ids.shape[1] + 1, device=self.columns.ids.device)
        slots = self.columns.anchor_slots(self.rows).unsqueeze(-1) + columns
        longest = max(row.num_slots for row in self.rows)
        start = longest - 1 if len(self.rows) == 1 and self.compiled is None else None
        settings = {"first_row": self.rows[0].place, "start": start, "packing": packing}
        self.cache.place(slots, longest + draft_ids.shape[1], **settings)
        tokens = torch.cat([self.columns.anchors(self.rows).unsqueeze(-1), draft_ids], dim=1)
        last = self.columns.last_slots[places_of(self.rows)]  # a position behind it may not exist
        of_tokens = {"input_ids": tokens, "position_ids": self.columns.positions(slots, last, self.rows)}
        of_tokens |= {name: torch.zeros_like(tokens) for name in self.token_types}
        arguments = {CACHE: self.cache, "use_cache": True, **self.tap.forward_kwargs}
        arguments |= attention_to_slots(self.target, self.cache, slots)
        if packing is not None:
            of_tokens = {name: packing.pack(values) for name, values in of_tokens.items()}
            arguments["packing"] = packing
        if "hidden_states" in self.rows[0].terms.extras:  # which only a call by itself collects
            arguments["output_hidden_states"] = True
        with self.target._optimize_model_for_decode():
            outputs = (forward or self.forward)(**of_tokens, **arguments, return_dict=True)
        logits = outputs.logits.to(self.columns.ids.device, torch.float32)
        return logits if packing is None else packing.unpack(logits), outputs

    def emit(self, rows: list[Row], logits, draft_ids, block: DraftBlock | None, limits) -> Emission:
        """Accept, add the target's own token, and stop where plain generate() would.

        `limits` [R]: how many of a row's drafted tokens are considered; None: all.
        """
        choice = self._choose(rows, logits, draft_ids, block, limits)
        tokens, counts, num_accepted, at_eos = self.read(choice, rows)
        finished = [n >= row.room or stop for n, stop, row in zip(counts, at_eos, rows, strict=True)]
        counts = [min(n, row.room) for n, row in zip(counts, rows, strict=True)]
        for i, row in enumerate(rows):
            if row.ended:
                counts[i], finished[i] = 0, True
            elif row.terms.has_other_criteria:
                counts[i], stops = self._first_stop(row, tokens[i : i + 1, : counts[i]])
                finished[i] = finished[i] or stops
        return Emission(tokens, counts, num_accepted, finished, choice.scores)

    def read(self, choice: Choice, rows: list[Row]) -> tuple[torch.Tensor, list[int], list[int], list[bool]]:
        """Tokens [R, L+1] of a choice, and on the host of each row: tokens up to EOS, accepted ones, is EOS there."""
        tokens, num_accepted = choice.token_ids, choice.num_accepted
        is_eos = torch.zeros_like(tokens, dtype=torch.bool)
        for terms, group in groups_of(rows):
            if terms.eos_ids is not None:
                is_eos[group] = torch.isin(tokens[group], terms.eos_ids)
        counts, at_eos = up_to_stop(choice, is_eos)
        figures = torch.stack([counts, num_accepted, at_eos.long()])
        if self.agreement.is_needed:
            tokens, figures = self.agreement.of_first(tokens), self.agreement.of_first(figures)
        # The one synchronisation of every round: which rows go on, and where they stand.
        counts, num_accepted, at_eos = figures.tolist()
        return tokens, counts, num_accepted, [bool(stop) for stop in at_eos]

    def _first_stop(self, row: Row, tokens: torch.Tensor) -> tuple[int, bool]:
        """How many of `tokens` [1, m] come before the criteria of a row's own call stop it, and whether they do."""
        state = DecodeState(self.columns.ids[row.place : row.place + 1, : row.length], {}, 0)
        count, stops = Verdicts(row.terms, state).first_stop(tokens, None)
        return count, any(stops)

    # parts

    def _verify_lengths(self, block: DraftBlock | None) -> tuple[torch.Tensor | None, list[int]]:
        """How many of each row's tokens the target is to confirm: [R] (None: all), and on the host."""
        if block is None or not self.schedule.needs_confidence:
            return None, [0 if block is None else block.token_ids.shape[1]] * len(self.rows)
        schedule = self.schedule if self._can_pack() else self.schedule.padded
        limits = schedule(block.confidence).to(self.columns.ids.device)
        if self.agreement.is_needed:
            limits = self.agreement.of_first(limits)
        # The width of the verification is a shape, which the host must know: one synchronisation a round.
        return limits, checked_lengths(limits.tolist(), block.token_ids.shape, schedule)

    def _can_pack(self) -> bool:
        """Whether rows can go through the target without padding, and whether it may be worth it."""
        decoder = self.target.get_decoder()
        num_tokens = len(self.rows) * (self.draft.config.block_size + 1)
        return (
            self.compiled is None
            and decoder.config._attn_implementation == BLOCK_ATTENTION
            and decoder._supports_attention_backend  # it hands `packing` on
            and "hidden_states" not in self.rows[0].terms.extras
            and (num_tokens > _FREE_ON_CUDA or self.target.device.type != "cuda")
        )

    def _packing(self) -> Packing | None:
        """How the last block's tokens are packed; None where no row is shorter than another, or may not be."""
        if min(self._lengths) == max(self._lengths) or not self._can_pack():
            return None
        return Packing.of_lengths([length + 1 for length in self._lengths], self.columns.ids.device)

    def _captured(self, block: DraftBlock, limits: torch.Tensor | None, watch) -> Emission:
        """Verify, accept and commit in a graph."""
        with watch.part("verify"):
            self.captured.verify(self.cache, block, limits)
        with watch.part("draft"):
            self.captured.draft_ahead()
        emission = self.captured.read()
        self.drafting.pending = [self.captured.pending]
        advance(self.rows, emission.counts)
        return emission

    def _choose(self, rows: list[Row], logits, draft_ids, block: DraftBlock | None, limits) -> Choice:
        """`choose_tokens` for the rows of each call, by that call's rule."""
        groups, choices = groups_of(rows), []
        for terms, group in groups:
            is_all = len(group) == len(rows)
            index = slice(None) if is_all else on_device(group, logits.device)
            # A row by itself draws random numbers for its own tokens only, whatever others verify.
            width = self._lengths[group[0]] if len(group) == 1 and limits is not None else draft_ids.shape[1]
            prefixes = None
            if not terms.rule.is_prefix_free:
                self.columns.widen(max(row.length for row in rows) + width)
                prefixes = self._prefixes([rows[i] for i in group])
            own = None if block is None else rows_of(block, index, self.drafting.law_of(terms))
            arguments = (self.columns.ids[: len(group), :0], logits[index, : width + 1], draft_ids[index, :width], own)
            own_limits = None if limits is None else limits[index]
            choice = choose_tokens(terms.rule, *arguments, limits=own_limits, prefixes=prefixes)
            if is_all and width == draft_ids.shape[1]:
                return choice
            choices.append((pad(choice.token_ids, (0, draft_ids.shape[1] - width)), choice.num_accepted))
        order = on_device([i for _, group in groups for i in group], logits.device).argsort()
        tokens, num_accepted = (torch.cat(parts)[order] for parts in zip(*choices, strict=True))
        return Choice(tokens, num_accepted, None)

    def _own_prefixes(self) -> dict[int, Row]:
        """The rows that are alone in a call whose processors read what comes before, by call."""
        return {call: rows[0] for call, rows in self._calls.items() if len(rows) == 1}

    def _prefixes(self, rows: list[Row]) -> Prefixes:
        """The tokens of all rows of a call, in its order, for processors that count rows."""
        places = [row.place for row in sorted(self._calls[id(rows[0].terms)], key=lambda row: row.index)]
        return Prefixes(self.columns.ids[places], [row.index for row in rows], [row.length for row in rows])


def _rooms_after(rows: list[Row], rooms: list[int], emission: Emission) -> tuple[list[int], list[int]]:
    """How many tokens rows of `rooms` could emit before and after `emission`; those that end now, no more than it."""
    before, after = [], []
    for row, room, count, ends in zip(rows, rooms, emission.counts, emission.finished, strict=True):
        goes_on = not (row.ended or ends)
        before.append(room if goes_on else count * (not row.ended))
        after.append(room - count if goes_on else 0)
    return before, after
