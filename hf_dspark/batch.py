"""The rounds of several sequences at once: rows of slot caches, each with a length of its own.

The steps and their order are those of `generate.py`. Rows come in (`admit`) and go out when they end, so that an ended
row costs nothing; one that verified fewer tokens, or had fewer accepted, does not hold the others up.
"""

from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from .accept import choose_tokens
from .agreement import Agreement
from .attention_interface import NAME as BLOCK_ATTENTION
from .compat import CACHE
from .compiled import CompiledRound
from .draft import draft_block, join_laws
from .features import FeatureTap
from .rows import Emission, Emit, Row, groups_of, rows_of
from .sampling import Prefixes
from .schedule import Schedule
from .slots import (
    GROWTH,
    PADDING,
    SlotCache,
    draft_slot_masks,
    move_into_slots,
    move_out_of_slots,
    slot_masks,
    windows_of,
)
from .state import Choice, DecodeState, Distribution, DraftBlock, DraftContext, RoundRecord
from .terms import Terms, Verdicts


class RowBatch:
    """The rows of a batch, their caches, and the rounds over them.

    Args:
        draft: bound to `target`.
        tap: open while rows are admitted and rounds run.
        num_rows: at most so many rows at a time.
        num_slots: of a row to begin with.
        compiled: forwards of fixed shapes, for rows that all come in at once and stay.
        whole_blocks: also where all rows end sooner, so that a row draws as many random numbers as it would alone.
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
        whole_blocks: bool = False,
        compiled: CompiledRound | None = None,
    ):
        self.draft, self.target, self.tap, self.schedule = draft, target, tap, schedule
        self.whole_blocks = whole_blocks or compiled is not None
        self.compiled = compiled
        self.forward = target if compiled is None else compiled.target_forward
        self.agreement = Agreement(target)
        self.rows: list[Row] = []
        self.cache: SlotCache | None = None  # the target's; its layers are known after the first prefill
        self.draft_cache = SlotCache([None] * draft.config.num_hidden_layers, num_rows, num_slots)
        self.token_types: tuple[str, ...] = ()  # arguments of the target that name a type for every token
        device = target.get_input_embeddings().weight.device
        self.ids = torch.zeros(num_rows, num_slots + 1, dtype=torch.long, device=device)  # the last column is junk
        # By place: columns; columns in no slot; what a position is above its slot; where the draft's context begins.
        columns = torch.zeros(4, num_rows, dtype=torch.long, device=device)
        self.lengths, self.paddings, self.shifts, self.starts = columns
        # Features [R, w, m*H] that the draft has not read, and their slots [R, w].
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.fresh: list[tuple[Row, torch.Tensor, torch.Tensor]] = []  # the same of rows that came in behind others
        self._laws: dict[int, list[Distribution | None]] = {}  # of the last block's tokens, by call
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
        first, last = len(self.rows), len(self.rows) + len(rows)
        if self.cache is None:
            windows = windows_of(cache, self.target.config.get_text_config(decoder=True))
            sizes = (len(self.ids), self.draft_cache.num_slots)
            self.cache = SlotCache(windows, *sizes)
            if self.compiled is not None:
                num_layers = self.draft.config.num_hidden_layers
                self.cache, self.draft_cache = self.compiled.caches(windows, num_layers, *sizes)
        move_into_slots(cache, slots, self.cache, slots.shape[1], first_row=first)
        self.token_types = token_types
        self._widen(input_ids.shape[1])
        self.ids[first:last, : input_ids.shape[1]] = input_ids
        self.lengths[first:last] = input_ids.shape[1]
        self.paddings[first:last] = input_ids.shape[1] - 1 - slots[:, -1]
        self.shifts[first:last] = positions - slots[:, -1]
        own = slots[:, -features.shape[1] :]
        self.starts[first:last] = own.min(-1).values
        for place, row in enumerate(rows, first):
            row.place = place
            if not row.terms.rule.is_prefix_free:
                self._calls.setdefault(id(row.terms), []).append(row)
        self.rows += rows
        if first == 0:
            self.pending, self.fresh = [(features, own)], []
            return
        num_new = (0, len(rows))
        self.pending = [
            (pad(part, (0, 0, 0, 0, *num_new)), pad(places, (0, 0, *num_new), value=PADDING))
            for part, places in self.pending
        ]
        # By themselves, or the features of all other rows would be padded to this prompt's length.
        self.fresh += zip(rows, features.split(1), own.split(1), strict=True)

    def take_over(self, context: DraftContext, slots: torch.Tensor) -> None:
        """Go on with what the draft read in an earlier call: tokens in `slots` [R, n] of the rows just admitted."""
        num_read = context.cache.get_seq_length()
        move_into_slots(context.cache, slots[:, :num_read], self.draft_cache, self.draft_cache.num_slots)
        if context.features:
            self.pending.insert(0, (torch.cat(context.features, dim=1), slots[:, num_read:]))
        self.starts[: len(slots)] = slots.min(-1).values

    def hand_back(self, columns: torch.Tensor) -> DraftContext | None:
        """What the draft read, for a later call, in `columns` [R, C] of slots; None where rows were dropped."""
        if any(len(features) < len(self.rows) for features, _ in self.pending):
            return None
        features = torch.cat([part for part, _ in self.pending], dim=1)
        slots = torch.cat([part for _, part in self.pending], dim=1)
        self._draft(features, slots, self.rows, num_tokens=1)
        context = DraftContext(DynamicCache(), target_length=columns.shape[1])
        places = torch.arange(len(columns), device=columns.device)
        move_out_of_slots(self.draft_cache, columns, context.cache, places)
        context.last_position = columns[:, -1:] + self.shifts[: len(columns), None]
        return context

    def drop(self, finished: list[Row]) -> None:
        """Move ended rows behind the others; they stay as they are until another row takes their place."""
        order = list(range(len(self.rows)))
        for row in sorted(finished, key=lambda row: -row.place):
            place, moved = row.place, self.rows.pop()
            last = moved.place
            if place != last:
                self.cache.swap_rows(place, last)
                self.draft_cache.swap_rows(place, last)
                self.rows[place], moved.place, row.place = moved, place, last
                order[place], order[last] = order[last], order[place]
        going_on = {id(row.terms) for row in self.rows}
        self._calls = {call: rows for call, rows in self._calls.items() if call in going_on}
        index = torch.tensor(order, device=self.ids.device)
        for buffer in (self.ids, self.lengths, self.paddings, self.shifts, self.starts):
            buffer[: len(order)] = buffer[: len(order)][index]
        kept = index[: len(self.rows)]
        self.pending = [(features[kept.to(features.device)], slots[kept]) for features, slots in self.pending]
        self.fresh = [part for part in self.fresh if part[0] not in finished]

    def take_back(self, rows: list[Row]) -> None:
        """Count dropped rows again, all that ever came in."""
        self.rows = sorted(rows, key=lambda row: row.place)

    # a round

    def round(self, watch, emit: Emit | None = None) -> tuple[Emission, torch.Tensor, Any]:
        """Draft, schedule, verify, accept and commit, for all rows; parts of it are timed by `watch`.

        `emit` is called in place of this class's own, with the same arguments. Returns what was emitted, and the
        target's logits and outputs.
        """
        start = watch.host_seconds()
        with watch.part("draft"):
            block = self.propose()
            limits, self._lengths = self._verify_lengths(block)
        width = max(self._lengths)
        if self.compiled is not None and block is not None:
            width = block.token_ids.shape[1]
        draft_ids = self.ids[: len(self.rows), :0] if block is None else block.token_ids[:, :width].to(self.ids.device)
        with watch.part("verify"):
            logits, outputs = self.verify(draft_ids)
        emission = (emit or self.emit)(self.rows, logits, draft_ids, block, limits)
        self.hand_over(self.tap.take(outputs), emission)
        self.commit(self.rows, emission)
        for place, (row, count) in enumerate(zip(self.rows, emission.counts, strict=True)):
            if row.ended:
                continue
            emitted = emission.token_ids[place : place + 1, :count]
            figures = (self._lengths[place], emission.num_accepted[place], emitted)
            row.records.append(RoundRecord.of(block, *figures, row=row.index, row_of_block=place))
        verified = None if block is None else width * len(self.rows)
        seconds = None if self.agreement.is_needed else watch.host_seconds() - start
        self.schedule.observe(sum(emission.counts), verified, num_requests=len(self.rows), seconds=seconds)
        return emission, logits, outputs

    def propose(self) -> DraftBlock | None:
        """Draft a block for every row; None where there is nothing to draft."""
        config, schedule = self.draft.config, self.schedule
        limit = config.block_size if schedule.num_tokens is None else schedule.num_tokens
        num_tokens = min(config.block_size, limit)
        if not self.whole_blocks:
            num_tokens = min(num_tokens, max(row.room for row in self.rows) - 1)
        if num_tokens < 1 or not schedule.should_draft():
            return None
        for row, *context in self.fresh:
            self._draft(*context, [row], num_tokens=1)
        self.fresh = []
        features = torch.cat([part for part, _ in self.pending], dim=1)
        slots = torch.cat([part for _, part in self.pending], dim=1)
        self.pending = []
        if self.compiled is not None:
            features, slots = self._of_one_width(features, slots, num_tokens + 1)
        self._laws = {}
        block = self._draft(features, slots, self.rows, num_tokens=num_tokens, sampler=self._sampler(num_tokens))
        token_ids = block.token_ids
        if self.agreement.is_needed:
            token_ids = self.agreement.of_first(token_ids)
        return replace(block, token_ids=token_ids)

    def verify(self, draft_ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Logits [R, L+1, V] of the target, in fp32, after the anchors and each of `draft_ids` [R, L]; its outputs."""
        columns = torch.arange(draft_ids.shape[1] + 1, device=self.ids.device)
        slots = self._anchor_slots(self.rows).unsqueeze(-1) + columns
        self.cache.place(slots, max(row.num_slots for row in self.rows) + draft_ids.shape[1])
        tokens = torch.cat([self._anchors(self.rows).unsqueeze(-1), draft_ids], dim=1)
        arguments = {"input_ids": tokens, CACHE: self.cache, "use_cache": True}
        arguments["position_ids"] = self._positions(slots, self.rows)
        arguments |= self._attention(slots) | self.tap.forward_kwargs
        arguments |= dict.fromkeys(self.token_types, torch.zeros_like(tokens))
        with self.target._optimize_model_for_decode():
            outputs = self.forward(**arguments, return_dict=True)
        return outputs.logits.to(self.ids.device, torch.float32), outputs

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
        column = torch.arange(tokens.shape[1], device=tokens.device)
        is_eos = torch.zeros_like(tokens, dtype=torch.bool)
        for terms, group in groups_of(rows):
            if terms.eos_ids is not None:
                is_eos[group] = torch.isin(tokens[group], terms.eos_ids)
        is_eos &= column <= num_accepted.unsqueeze(-1)
        at_eos = is_eos.any(-1)
        counts = torch.where(at_eos, is_eos.long().argmax(-1) + 1, num_accepted + 1)
        figures = torch.stack([counts, num_accepted, at_eos.long()])
        if self.agreement.is_needed:
            tokens, figures = self.agreement.of_first(tokens), self.agreement.of_first(figures)
        # The one synchronisation of every round: which rows go on, and where they stand.
        counts, num_accepted, at_eos = figures.tolist()
        return tokens, counts, num_accepted, [bool(stop) for stop in at_eos]

    def _first_stop(self, row: Row, tokens: torch.Tensor) -> tuple[int, bool]:
        """How many of `tokens` [1, m] come before the criteria of a row's own call stop it, and whether they do."""
        state = DecodeState(self.ids[row.place : row.place + 1, : row.length], {}, 0)
        count, stops = Verdicts(row.terms, state).first_stop(tokens, None)
        return count, any(stops)

    def law_of(self, terms: Terms) -> Distribution | None:
        """The law of the last block's tokens in the rows of a call."""
        return join_laws(self._laws.get(id(terms), [None]))

    def hand_over(self, features: torch.Tensor, emission: Emission) -> None:
        """Keep the features [R, L+1, m*H] of tokens that stay for the draft; call before `commit`."""
        columns = torch.arange(features.shape[1], device=self.ids.device)
        counts = torch.tensor(emission.counts, device=self.ids.device).unsqueeze(-1)
        slots = self._anchor_slots(self.rows).unsqueeze(-1) + columns
        self.pending.append((features, torch.where(columns < counts, slots, PADDING)))

    def commit(self, rows: list[Row], emission: Emission) -> None:
        """Make the emitted tokens part of `rows`, which lie side by side."""
        tokens, counts = emission.token_ids, torch.tensor(emission.counts, device=self.ids.device)
        own = slice(rows[0].place, rows[0].place + len(rows))
        self._widen(max(row.length for row in rows) + tokens.shape[1])
        offsets = torch.arange(tokens.shape[1], device=self.ids.device)
        columns = self.lengths[own, None] + offsets
        columns = torch.where(offsets < counts.unsqueeze(-1), columns, self.ids.shape[1] - 1)
        self.ids[own] = self.ids[own].scatter(1, columns, tokens)
        self.lengths[own] += counts
        for row, count in zip(rows, emission.counts, strict=True):
            row.length += count
            row.num_slots += count
            row.num_emitted += 0 if row.ended else count

    # parts

    def _draft(self, features, slots, rows: list[Row], *, num_tokens: int, sampler=None) -> DraftBlock:
        """A block for `rows`, which lie side by side; their new context `features` [R, w, m*H] goes to `slots`."""
        config, cache = self.draft.config, self.draft_cache
        device, own = self.draft.device, slice(rows[0].place, rows[0].place + len(rows))
        anchor_slots = self._anchor_slots(rows)
        inputs = anchor_slots.unsqueeze(-1) + torch.arange(config.num_block_inputs, device=self.ids.device)
        all_slots = torch.cat([slots, inputs], dim=1)
        stop = max(row.num_slots for row in rows) - 1 + config.num_block_inputs
        cache.place(all_slots, stop, first_row=rows[0].place)
        is_compiled = self.compiled is not None and sampler is not None
        settings = {"causal": config.causal, "window": config.sliding_window}
        masks = draft_slot_masks(
            anchor_slots, self.starts[own], config.num_block_inputs, cache.stop, config.layer_types, **settings
        )
        return draft_block(
            self.draft,
            features.to(device),
            self._anchors(rows).to(device),
            cache,
            position_ids=self._positions(all_slots, rows).to(device),
            num_tokens=num_tokens,
            sampler=sampler,
            attention_mask={name: mask.to(device) for name, mask in masks.items()},
            forward=self.compiled.draft_forward if is_compiled else None,
        )

    def _of_one_width(self, features, slots, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pending context of `width` positions; more than these, a prompt's, are read at once."""
        if features.shape[1] > width or not self.draft_cache.is_initialized:
            self._draft(features, slots, self.rows, num_tokens=1)
            features, slots = features[:, :0], slots[:, :0]
        missing = width - features.shape[1]
        return pad(features, (0, 0, 0, missing)), pad(slots, (0, missing), value=PADDING)

    def _sampler(self, num_tokens: int):
        """The rules of the rows' calls: one sampler for the whole block where they are one and allow it."""
        groups = groups_of(self.rows)
        ids = self.ids[: len(self.rows)]
        # Each draws its random numbers for the whole block, so that a row by itself draws what it would alone.
        samplers = [
            None if terms.rule.temperature is None else terms.rule.temperature_sampler(ids[: len(group)], num_tokens)
            for terms, group in groups
        ]
        if len(groups) == 1 and samplers[0] is not None:
            return samplers[0]

        def sample(logits: torch.Tensor, drafted_ids: torch.Tensor) -> tuple[torch.Tensor, None]:
            logits, drafted_ids = logits.to(ids.device), drafted_ids.to(ids.device)
            tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
            for (terms, group), sampler in zip(groups, samplers, strict=True):
                if sampler is not None:
                    tokens[group], law = sampler(logits[group], drafted_ids[group])
                else:
                    prefix = self._prefix_of(terms, group, drafted_ids)
                    tokens[group], law = terms.rule.draft_token(logits[group], prefix)
                self._laws.setdefault(id(terms), []).append(law)
            return tokens, None

        return sample

    def _prefix_of(self, terms: Terms, group: list[int], drafted_ids: torch.Tensor) -> torch.Tensor | None:
        """What a call's processors may read of its one row [1, n]; None where they need not, or it has several."""
        if terms.rule.is_prefix_free or len(self._calls[id(terms)]) > 1:
            return None
        row = self.rows[group[0]]
        return torch.cat([self.ids[row.place, : row.length], drafted_ids[group[0]]]).unsqueeze(0)

    def _verify_lengths(self, block: DraftBlock | None) -> tuple[torch.Tensor | None, list[int]]:
        """How many of each row's tokens the target is to confirm: [R] (None: all), and on the host."""
        if block is None or not self.schedule.needs_confidence:
            return None, [0 if block is None else block.token_ids.shape[1]] * len(self.rows)
        limits = self.schedule.padded(block.confidence).to(self.ids.device)
        if self.agreement.is_needed:
            limits = self.agreement.of_first(limits)
        # The width of the verification is a shape, which the host must know: one synchronisation a round.
        return limits, limits.tolist()

    def _choose(self, rows: list[Row], logits, draft_ids, block: DraftBlock | None, limits) -> Choice:
        """`choose_tokens` for the rows of each call, by that call's rule."""
        groups, choices = groups_of(rows), []
        for terms, group in groups:
            is_all = len(group) == len(rows)
            index = slice(None) if is_all else torch.tensor(group, device=logits.device)
            # A row by itself draws random numbers for its own tokens only, whatever others verify.
            width = self._lengths[group[0]] if len(group) == 1 and limits is not None else draft_ids.shape[1]
            prefixes = None
            if not terms.rule.is_prefix_free:
                self._widen(max(row.length for row in rows) + width)
                prefixes = self._prefixes([rows[i] for i in group])
            own = None if block is None else rows_of(block, index, self.law_of(terms))
            arguments = (self.ids[: len(group), :0], logits[index, : width + 1], draft_ids[index, :width], own)
            own_limits = None if limits is None else limits[index]
            choice = choose_tokens(terms.rule, *arguments, limits=own_limits, prefixes=prefixes)
            if is_all and width == draft_ids.shape[1]:
                return choice
            choices.append((pad(choice.token_ids, (0, draft_ids.shape[1] - width)), choice.num_accepted))
        order = torch.tensor([i for _, group in groups for i in group], device=logits.device).argsort()
        tokens, num_accepted = (torch.cat(parts)[order] for parts in zip(*choices, strict=True))
        return Choice(tokens, num_accepted, None)

    def _prefixes(self, rows: list[Row]) -> Prefixes:
        """The tokens of all rows of a call, in its order, for processors that count rows."""
        places = [row.place for row in sorted(self._calls[id(rows[0].terms)], key=lambda row: row.index)]
        return Prefixes(self.ids[places], [row.index for row in rows], [row.length for row in rows])

    def _attention(self, slots: torch.Tensor) -> dict[str, Any]:
        """What tells the target's attention which slots are seen."""
        implementation = self.target.get_decoder().config._attn_implementation
        if implementation == BLOCK_ATTENTION and not any(self.cache.windows):  # not all models hand a window on
            # Any mask of four axes keeps the model from making one of its own.
            no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=slots.device)
            return {"attention_mask": no_mask, "kv_lengths": slots[:, -1] + 1}
        dtype = self.target.dtype if implementation == "eager" else None
        return {"attention_mask": slot_masks(slots, self.cache.stop, self.cache.windows, dtype=dtype)}

    def _anchors(self, rows: list[Row]) -> torch.Tensor:
        own = slice(rows[0].place, rows[0].place + len(rows))
        return self.ids[own].gather(1, self.lengths[own, None] - 1).squeeze(1)

    def _anchor_slots(self, rows: list[Row]) -> torch.Tensor:
        own = slice(rows[0].place, rows[0].place + len(rows))
        return self.lengths[own] - 1 - self.paddings[own]

    def _positions(self, slots: torch.Tensor, rows: list[Row]) -> torch.Tensor:
        """Positions [R, T] of slots; what is in none, and drafted tokens behind the last that fits, are anywhere."""
        own = slice(rows[0].place, rows[0].place + len(rows))
        last = torch.tensor([row.num_slots + row.room - 1 for row in rows], device=slots.device).unsqueeze(-1)
        return torch.where(slots == PADDING, 0, torch.minimum(slots, last)) + self.shifts[own, None]

    def _widen(self, num_columns: int) -> None:
        if num_columns >= self.ids.shape[1]:
            self.ids = pad(self.ids, (0, num_columns - self.ids.shape[1] + 1 + GROWTH))
