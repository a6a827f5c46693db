"""The draft's side of a batch: its slot cache, features it has not read yet, and a block for every row.

What `candidate_generator.py` is for one sequence.
"""

from dataclasses import replace

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from .agreement import Agreement
from .captured import CapturedRounds
from .compiled import CompiledRound
from .draft import join_laws
from .rows import Columns, Emission, Row, groups_of, on_device, places_of
from .schedule import Schedule
from .slots import PADDING, SlotCache, move_into_slots, move_out_of_slots
from .state import Distribution, DraftBlock, DraftContext
from .terms import Terms
from .traced import draft_rows


class BatchDraft:
    """Drafts for the rows of a RowBatch, whose columns it shares.

    Args:
        whole_blocks: also where all rows end sooner.
    """

    def __init__(
        self,
        draft: PreTrainedModel,
        columns: Columns,
        cache: SlotCache,
        schedule: Schedule,
        agreement: Agreement,
        *,
        whole_blocks: bool,
        compiled: CompiledRound | None,
    ):
        self.draft, self.columns, self.cache = draft, columns, cache
        self.schedule, self.agreement = schedule, agreement
        self.whole_blocks, self.compiled = whole_blocks, compiled
        self.captured: CapturedRounds | None = None
        self.starts = torch.zeros_like(columns.lengths)  # the slot where a row's context begins
        # What the host knows of contexts: there is one, without padding; each begins with its row's first token.
        self.is_single, self.is_whole = cache.num_rows == 1 and not whole_blocks, True
        # Features [R, w, m*H] that the draft has not read, and their slots [R, w].
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.fresh: list[tuple[Row, torch.Tensor, torch.Tensor]] = []  # the same of rows that came in behind others
        self.set_aside: list[tuple[Row, torch.Tensor, torch.Tensor]] = []  # and of ended rows that may be asked for
        self._laws: dict[int, list[Distribution | None]] = {}  # of the last block's tokens, by call

    def admit(self, rows: list[Row], features: torch.Tensor, slots: torch.Tensor) -> None:
        """Take in new rows, which have `slots` [k, C], and the features [k, n, m*H] of the last n of these."""
        self.is_whole &= features.shape[1] == slots.shape[1]
        has_padding, slots = slots.shape[1] > rows[0].num_slots, slots[:, -features.shape[1] :]
        if self.is_single and has_padding:  # for which a draft of one row has no use
            features, slots = features[:, slots[0] < PADDING], slots[:, slots[0] < PADDING]
        self.starts[places_of(rows)] = slots.min(-1).values
        if rows[0].place == 0:
            self.pending, self.fresh = [(features, slots)], []
            return
        num_new = (0, len(rows))
        self.pending = [
            (pad(part, (0, 0, 0, 0, *num_new)), pad(places, (0, 0, *num_new), value=PADDING))
            for part, places in self.pending
        ]
        # By themselves, or the features of all other rows would be padded to this prompt's length.
        self.fresh += zip(rows, features.split(1), slots.split(1), strict=True)

    def take_over(self, context: DraftContext, slots: torch.Tensor, *, is_unpadded: bool) -> None:
        """Go on with what the draft read in an earlier call: tokens in `slots` [R, n] of the rows just admitted.

        `is_unpadded`: these are 0 to n - 1.
        """
        num_read = context.cache.get_seq_length()
        if num_read:
            settings = {"stop": self.cache.num_slots, "is_unpadded": is_unpadded}
            move_into_slots(context.cache, slots[:, :num_read], self.cache, **settings)
        if context.features:
            self.pending.insert(0, (torch.cat(context.features, dim=1), slots[:, num_read:]))
        self.starts[: len(slots)] = slots.min(-1).values

    def hand_back(
        self, rows: list[Row], anchor_features: torch.Tensor | None, slots: torch.Tensor, places: torch.Tensor
    ) -> DraftContext:
        """What the draft read of the tokens in `slots` [R, C] of the rows in `places` [R], for a later call.

        `rows` are the same by place, dropped ones among them, with features [R, 1, m*H] of their last tokens, where
        these are among the slots.
        """
        pending = [_one_behind_the_other(self.pending)] if self.pending else []
        pending += [part[1:] for part in sorted(self.set_aside, key=lambda part: part[0].place)]
        if pending:
            features, pending_slots = _side_by_side(pending)
            if anchor_features is not None:
                features = torch.cat([features, anchor_features], 1)
                pending_slots = torch.cat([pending_slots, self.columns.anchor_slots(rows).unsqueeze(-1)], 1)
            self._read(features, pending_slots, rows)
            self.pending = []
        context = DraftContext(DynamicCache(), target_length=slots.shape[1])
        if len(slots) == 1:  # of a single sequence it never reads the padding
            slots = slots[:, slots[0] < PADDING]
        is_first = slots == self.starts[places].unsqueeze(-1)
        move_out_of_slots(self.cache, slots[:, is_first.int().argmax(-1).min() :], context.cache, places)
        context.last_position = slots[:, -1:] + self.columns.shifts[places].unsqueeze(-1)
        return context

    def reorder(self, order: torch.Tensor, num_rows: int, gone: list[Row], *, keep: bool) -> None:
        """What was in place `order[i]` is in place i now, and only the first `num_rows` go on.

        With `keep`, what the others had pending is set aside for `hand_back`.
        """
        if keep:
            for row in gone:
                index = order[row.place : row.place + 1]
                own = [(features[index.to(features.device)], slots[index]) for features, slots in self.pending]
                self.set_aside.append((row, *_one_behind_the_other(own)))
        self.starts[: len(order)] = self.starts[: len(order)][order]
        kept = order[:num_rows]
        self.pending = [(features[kept.to(features.device)], slots[kept]) for features, slots in self.pending]
        self.fresh = [part for part in self.fresh if part[0] not in gone]

    def hand_over(self, rows: list[Row], features: torch.Tensor, emission: Emission) -> None:
        """Keep the features [R, L+1, m*H] of tokens that stay for the draft; call before these are committed."""
        width, device = max(emission.counts), self.columns.ids.device
        columns = torch.arange(width, device=device)
        slots = self.columns.anchor_slots(rows).unsqueeze(-1) + columns
        if min(emission.counts) < width:
            slots = torch.where(columns < on_device(emission.counts, device).unsqueeze(-1), slots, PADDING)
        self.pending.append((features[:, :width], slots))

    def propose(self, rows: list[Row], own_prefixes: dict[int, Row]) -> DraftBlock | None:
        """Draft a block for every row; None where there is nothing to draft.

        `own_prefixes`: the rows that are alone in their call, whose processors read what comes before, by call.
        """
        config, schedule = self.draft.config, self.schedule
        limit = config.block_size if schedule.num_tokens is None else schedule.num_tokens
        num_tokens = min(config.block_size, limit)
        if not self.whole_blocks:
            num_tokens = min(num_tokens, max(row.room for row in rows) - 1)
        if num_tokens < 1 or not schedule.should_draft():
            return None
        for row, *context in self.fresh:
            self._read(*context, [row])
        self.fresh = []
        features, slots = _one_behind_the_other(self.pending)
        if self.compiled is not None:
            features, slots = self._of_one_width(rows, features, slots, num_tokens + 1)
        if self.captured is not None:
            starts, self.pending = self.starts[: len(rows)], []
            return self.captured.propose(self.cache, starts, features, slots, num_tokens)
        self._laws = {}
        block = self._draft(
            features, slots, rows, num_tokens=num_tokens, sampler=self._sampler(rows, num_tokens, own_prefixes)
        )
        self.pending = []  # only now, for what an exception kept from being read is read again
        token_ids = block.token_ids
        if self.agreement.is_needed:
            token_ids = self.agreement.of_first(token_ids)
        return replace(block, token_ids=token_ids)

    def law_of(self, terms: Terms) -> Distribution | None:
        """The law of the last block's tokens in the rows of a call."""
        return join_laws(self._laws.get(id(terms), [None]))

    def _read(self, features: torch.Tensor, slots: torch.Tensor, rows: list[Row]) -> None:
        """Context `features` [R, w, m*H] of `rows`, which lie side by side, goes to `slots`; nothing is drafted."""
        device = self.draft.device
        slots = pad(slots, (0, 1), value=PADDING)  # a block of one input, which the draft's forward asks for
        self.cache.place(slots, max(row.num_slots for row in rows), first_row=rows[0].place)
        positions = self.columns.positions(slots, self.columns.anchor_slots(rows), rows)
        anchors = self.columns.anchors(rows).unsqueeze(-1)
        self.draft(features.to(device), anchors.to(device), positions.to(device), self.cache)

    def _draft(self, features, slots, rows: list[Row], *, num_tokens: int, sampler) -> DraftBlock:
        """A block for `rows`, which lie side by side; their new context `features` [R, w, m*H] goes to `slots`."""
        return draft_rows(
            self.draft,
            self.columns,
            self.cache,
            places_of(rows),
            self.starts[places_of(rows)],
            features,
            slots,
            stop=max(row.num_slots for row in rows) - 1 + self.draft.config.num_block_inputs,
            is_single=self.is_single,
            is_whole=self.is_whole,
            num_tokens=num_tokens,
            sampler=sampler,
            forward=None if self.compiled is None else self.compiled.draft_forward,
        )

    def _of_one_width(self, rows: list[Row], features, slots, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pending context of `width` positions; more than these, a prompt's, are read at once."""
        if features.shape[1] > width or not self.cache.is_initialized:
            self._read(features, slots, rows)
            features, slots = features[:, :0], slots[:, :0]
        missing = width - features.shape[1]
        if missing == 0:
            return features, slots
        return pad(features, (0, 0, 0, missing)), pad(slots, (0, missing), value=PADDING)

    def _sampler(self, rows: list[Row], num_tokens: int, own_prefixes: dict[int, Row]):
        """The rules of the rows' calls: one sampler for the whole block where they are one and allow it."""
        groups = groups_of(rows)
        ids = self.columns.ids[: len(rows)]
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
                    prefix = self._prefix_of(own_prefixes.get(id(terms)), drafted_ids)
                    tokens[group], law = terms.rule.draft_token(logits[group], prefix)
                self._laws.setdefault(id(terms), []).append(law)
            return tokens, None

        return sample

    def _prefix_of(self, row: Row | None, drafted_ids: torch.Tensor) -> torch.Tensor | None:
        """The tokens [1, n] of a row, with those drafted so far."""
        if row is None:
            return None
        return torch.cat([self.columns.ids[row.place, : row.length], drafted_ids[row.place]]).unsqueeze(0)


def _one_behind_the_other(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [R, w, m*H] and slots [R, w] of the same rows in one part."""
    if len(parts) == 1:
        return parts[0]
    features, slots = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
    return features, slots


def _side_by_side(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of different rows."""
    width = max(slots.shape[1] for _, slots in parts)
    features = torch.cat([pad(part, (0, 0, 0, width - part.shape[1])) for part, _ in parts])
    slots = torch.cat([pad(part, (0, width - part.shape[1]), value=PADDING) for _, part in parts])
    return features, slots
