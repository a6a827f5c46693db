"""Rounds of fixed shapes through torch.compile: `draft.compile_round(target)`.

Verification always covers a whole block, numbers of slots are rounded up, caches stay where they are in memory between
calls, and rows that ended are not dropped. So one graph serves all rounds of all calls that need about as many slots
and as many rows; on CUDA it is captured as a CUDA graph. Prompts are read eagerly.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from .slots import SlotCache

_MIN_SLOTS = 256


class CompiledRound:
    """The compiled forwards of a target and its draft, and the caches they run on.

    Args:
        options: of torch.compile; default is CUDA graphs on CUDA, and torch's default elsewhere.
    """

    def __init__(self, target: PreTrainedModel, draft: PreTrainedModel, **options: Any):
        if not options and target.device.type == "cuda":
            options = {"mode": "reduce-overhead"}
        self.target_forward = _compiled(target.forward, options)
        self.draft_forward = _compiled(draft.forward, options)
        self._caches: dict[tuple, tuple[SlotCache, SlotCache]] = {}

    def num_slots(self, needed: int) -> int:
        """Slots of the caches for rows of `needed` tokens: eight sizes from one power of two to the next."""
        step = max(_MIN_SLOTS, 1 << max(0, needed.bit_length() - 4))
        return -(-needed // step) * step

    def caches(
        self, windows: list[int | None], num_draft_layers: int, num_rows: int, num_slots: int
    ) -> tuple[SlotCache, SlotCache]:
        """Caches of the target and of the draft; the same as in the last call of these sizes."""
        key = (num_rows, num_slots)
        if key not in self._caches:
            draft_windows = [None] * num_draft_layers
            self._caches[key] = tuple(
                SlotCache(own, num_rows, num_slots, is_static=True) for own in (windows, draft_windows)
            )
        return self._caches[key]


def _compiled(forward: Callable, options: dict[str, Any]) -> Callable:
    return torch.compile(forward, fullgraph=True, dynamic=False, **options)
