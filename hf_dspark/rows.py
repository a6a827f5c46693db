"""The rows of a batch: their tokens, where these lie, and what a round adds to them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch.nn.functional import pad

from .slots import GROWTH
from .state import Choice, Distribution, DraftBlock, RoundRecord
from .terms import Terms


@dataclass(slots=True, eq=False)
class Row:
    """One sequence. Its columns are its prompt, with padding, and its new tokens."""

    index: int  # in the call it belongs to
    terms: Terms  # of that call
    max_length: int  # columns
    length: int  # of them committed
    num_slots: int  # committed tokens; the last of them, the anchor, is in no cache yet
    place: int = -1  # in the batch's buffers
    num_emitted: int = 0  # new tokens
    ended: bool = False  # what is added now is padding
    records: list[RoundRecord] = field(default_factory=list)

    @property
    def room(self) -> int:
        """Tokens that may still be emitted."""
        return self.max_length - self.length


@dataclass(frozen=True, slots=True)
class Emission:
    """What one round adds to R rows."""

    token_ids: torch.Tensor  # [R, L+1]  accepted tokens and the target's own; only the first `counts` are emitted
    counts: list[int]
    num_accepted: list[int]
    finished: list[bool]
    scores: torch.Tensor | None  # as in Choice, where all rows are of one call


Emit = Callable[[list[Row], torch.Tensor, torch.Tensor, DraftBlock | None, torch.Tensor | None], Emission]


class Columns:
    """The tokens of a batch's rows, by place, and how columns, slots and positions go together.

    A row's columns are its prompt, with padding in front, and its new tokens. Tokens have slots from 0 on, padding has
    none. Functions that take rows take those that lie side by side, or their places.
    """

    def __init__(self, num_rows: int, num_columns: int, device: torch.device):
        self.ids = torch.zeros(num_rows, num_columns + 1, dtype=torch.long, device=device)  # the last column is junk
        # Of each row: columns that are there, the slot of the last, the last slot there is room for, and what a
        # position is above its slot.
        buffers = torch.zeros(4, num_rows, dtype=torch.long, device=device)
        self.lengths, self.slots, self.last_slots, self.shifts = buffers

    def put(self, rows: list[Row], input_ids: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """The prompts [k, n] of rows that just came in, with slots [k] and positions [k] of their last columns."""
        own = places_of(rows)
        self.widen(input_ids.shape[1])
        self.ids[own, : input_ids.shape[1]] = input_ids
        self.lengths[own], self.slots[own], self.shifts[own] = input_ids.shape[1], slots, positions - slots
        self.last_slots[own] = on_device([row.num_slots + row.room - 2 for row in rows], self.ids.device)

    def append(self, rows: list[Row], emission: Emission) -> None:
        """Commit the tokens that a round emitted."""
        tokens, counts = emission.token_ids, on_device(emission.counts, self.ids.device)
        self.widen(max(row.length for row in rows) + tokens.shape[1])
        self.write(places_of(rows), tokens, counts)
        advance(rows, emission.counts)

    def write(self, own: slice, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """Put the first `counts` [R] of `tokens` [R, T] behind what is there, for which there must be place."""
        offsets = torch.arange(tokens.shape[1], device=self.ids.device)
        columns = self.lengths[own, None] + offsets
        columns = torch.where(offsets < counts.unsqueeze(-1), columns, self.ids.shape[1] - 1)
        self.ids[own].scatter_(1, columns, tokens)
        self.lengths[own].add_(counts)
        self.slots[own].add_(counts)

    def reorder(self, order: torch.Tensor) -> None:
        """What was in place `order[i]` comes to place i."""
        for buffer in (self.ids, self.lengths, self.slots, self.last_slots, self.shifts):
            buffer[: len(order)] = buffer[: len(order)][order]

    def anchors(self, rows: list[Row] | slice) -> torch.Tensor:
        """The last token [R] of each row."""
        own = places_of(rows)
        return self.ids[own].gather(1, self.lengths[own, None] - 1).squeeze(1)

    def anchor_slots(self, rows: list[Row] | slice) -> torch.Tensor:
        """Their slots [R]; they change with the rows."""
        return self.slots[places_of(rows)]

    def positions(self, slots: torch.Tensor, last: torch.Tensor, rows: list[Row] | slice) -> torch.Tensor:
        """Positions [R, T] of slots; what is in none, or behind the slots `last` [R], has theirs."""
        return slots.minimum(last.unsqueeze(-1)) + self.shifts[places_of(rows), None]

    def widen(self, num_columns: int) -> None:
        """Make place for columns up to `num_columns`."""
        if num_columns >= self.ids.shape[1]:
            self.ids = pad(self.ids, (0, num_columns - self.ids.shape[1] + 1 + GROWTH))


def on_device(numbers: list[int], device: torch.device) -> torch.Tensor:
    """Numbers of the host as a tensor; on CUDA the host does not wait for what is under way there."""
    return torch.tensor(numbers, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def places_of(rows: list[Row] | slice) -> slice:
    """The places of rows that lie side by side."""
    return rows if isinstance(rows, slice) else slice(rows[0].place, rows[0].place + len(rows))


def advance(rows: list[Row], counts: list[int]) -> None:
    """Count the tokens that a round emitted."""
    for row, count in zip(rows, counts, strict=True):
        row.length += count
        row.num_slots += count
        row.num_emitted += 0 if row.ended else count


def up_to_eos(choice: Choice, eos_ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row [R]: how many tokens a round adds, the last one `eos_ids` has included, and whether one is there."""
    is_eos = torch.zeros_like(choice.token_ids, dtype=torch.bool)
    if eos_ids is not None:
        is_eos = torch.isin(choice.token_ids, eos_ids)
    return up_to_stop(choice, is_eos)


def up_to_stop(choice: Choice, is_stop: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`up_to_eos` where `is_stop` [R, L+1] says which tokens stop their row."""
    column = torch.arange(is_stop.shape[1], device=is_stop.device)
    is_stop = is_stop & (column <= choice.num_accepted.unsqueeze(-1))
    stops = is_stop.any(-1)
    return torch.where(stops, is_stop.long().argmax(-1) + 1, choice.num_accepted + 1), stops


def pad_ended(rows: list[Row], token_ids: torch.Tensor) -> torch.Tensor:
    """`token_ids` [R, L] with padding in rows that ended, which plain generate() puts where there are stop tokens."""
    fills = [row.terms.pad_token_id if row.ended and row.terms.eos_ids is not None else -1 for row in rows]
    if max(fills) < 0:
        return token_ids
    fills = on_device(fills, token_ids.device).unsqueeze(-1)
    return torch.where(fills < 0, token_ids, fills)


def groups_of(rows: list[Row]) -> list[tuple[Terms, list[int]]]:
    """The rows of each call, by their index in `rows`."""
    groups: dict[int, tuple[Terms, list[int]]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(id(row.terms), (row.terms, []))[1].append(index)
    return list(groups.values())


def rows_of(block: DraftBlock, index, law: Distribution | None) -> DraftBlock:
    """Some rows of a block, as far as acceptance reads them."""
    return replace(block, token_ids=block.token_ids[index], draft_logits=block.draft_logits[index], distribution=law)
