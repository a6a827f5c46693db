"""The rows of a batch, and what a round adds to them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from .state import Distribution, DraftBlock, RoundRecord
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


def groups_of(rows: list[Row]) -> list[tuple[Terms, list[int]]]:
    """The rows of each call, by their index in `rows`."""
    groups: dict[int, tuple[Terms, list[int]]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(id(row.terms), (row.terms, []))[1].append(index)
    return list(groups.values())


def rows_of(block: DraftBlock, index, law: Distribution | None) -> DraftBlock:
    """Some rows of a block, as far as acceptance reads them."""
    return replace(block, token_ids=block.token_ids[index], draft_logits=block.draft_logits[index], distribution=law)
