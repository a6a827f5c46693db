"""Rounds of fixed shapes as graphs: `draft.compile_round(target)`.

Verification always covers a whole block, numbers of slots are rounded up, what is written stays where it is in memory
between calls, and rows that ended are not dropped. So the same graphs serve all rounds of all calls that need about as
many slots and as many rows. Prompts are read eagerly.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from .agreement import Agreement
from .dispatch import note, twins
from .features import FeatureTap
from .graphs import CopiedGraph, GraphedFunction, GraphSpace
from .layerwise import MAX_GRAPHS, LayerCompiler
from .model_state import has_hooks, state_of
from .rows import Columns
from .slots import PADDING, SlotCache
from .traced import Frame, draft_frame, verify_rows

_MIN_SLOTS = 256


class CompiledRound:
    """What is compiled for a target and its draft, and the tensors it works on.

    A round is two graphs, the draft's side and the target's; where it cannot be (`captured.why_not_captured`), the two
    forwards alone are graphs.

    Args:
        options: of torch.compile. On CUDA it compiles each kind of decoder layer once, and these functions are CUDA
            graphs; elsewhere it compiles them as wholes.
    """

    def __init__(self, target: PreTrainedModel, draft: PreTrainedModel, **options: Any):
        self.options = options
        forwards = (target.forward, draft.forward)
        self.is_graphed = is_graphed(target, draft)
        if self.is_graphed:
            if options.get("mode") in ("reduce-overhead", "max-autotune"):
                raise ValueError(
                    f"mode={options['mode']!r} makes CUDA graphs of what it compiles, and rounds are CUDA graphs "
                    'already. Leave it out, or use "max-autotune-no-cudagraphs".'
                )
            layers = LayerCompiler(target, draft, **options)
            make = partial(GraphedFunction, scope=layers, space=GraphSpace(target.device))
            self.target_forward, self.draft_forward = (CopiedGraph(make(forward)) for forward in forwards)
        else:
            make = partial(_compiled, **options)
            self.target_forward, self.draft_forward = map(make, forwards)
        self.draft_rows, self.verify_rows = make(draft_frame), make(verify_rows)
        self.state: tuple | None = None  # of the models and kernels that graphs were captured with; None: none yet
        self.notes: dict[str, dict[str, None]] = {}  # what ran in graphs, for `dispatch.remember`
        self._block_size = draft.config.block_size
        self._caches: dict[tuple, tuple[SlotCache, SlotCache]] = {}
        self._columns: dict[tuple, Columns] = {}
        self._frames: dict[tuple, Frame] = {}

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
            if self.is_graphed and self._is_short_of_memory(num_rows * num_slots):
                self._forget_all_but(key)
            draft_windows = [None] * num_draft_layers
            self._caches[key] = tuple(
                SlotCache(own, num_rows, num_slots, is_static=True) for own in (windows, draft_windows)
            )
        return self._caches[key]

    def _is_short_of_memory(self, num_slots: int) -> bool:
        """Whether caches of so many slots in all rows, and a tenth more, need what others hold."""
        caches = (cache for pair in self._caches.values() for cache in pair)
        layers = [layer for cache in caches for layer in cache.layers if layer.is_initialized]
        if not layers:
            return False
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        held_slots = sum(rows * slots for rows, slots in self._caches)
        return 1.1 * held * num_slots / held_slots > free_memory(layers[0].device)

    def _forget_all_but(self, key: tuple[int, int]) -> None:
        """Free the caches of all sizes, what goes with those of others, and the graphs that work on them."""
        for function in (self.draft_rows, self.verify_rows, self.target_forward, self.draft_forward):
            function.forget()
        self._caches.clear()
        self._frames.clear()
        self._columns = {own: columns for own, columns in self._columns.items() if own == key}

    def columns(self, num_rows: int, num_slots: int, device: torch.device) -> Columns:
        """The rows' tokens, likewise."""
        key = (num_rows, num_slots)
        if key not in self._columns:
            # With place for a block and one behind the last token, or they would grow out of their shape.
            columns = self._columns[key] = Columns(num_rows, num_slots + self._block_size + 1, device)
            _stay(columns.ids, columns.lengths, columns.slots, columns.last_slots, columns.shifts)
        return self._columns[key]

    def frame(self, columns: Columns, tap: FeatureTap, features: torch.Tensor) -> Frame:
        """What rounds keep beside them, with place for `features` [R, L+1, m*H], likewise."""
        key = (id(columns), features.shape, features.dtype)
        if key not in self._frames:
            slots = torch.full(features.shape[:2], PADDING, device=columns.ids.device)
            ended = torch.zeros(len(features), dtype=torch.bool, device=slots.device)
            frame = Frame(columns, tap, torch.empty_like(features), slots, ended)
            _stay(frame.features, frame.slots, frame.ended)
            self._frames[key] = frame
        return self._frames[key]


def _compiled(function: Callable, **options: Any) -> Callable:
    compiled = torch.compile(function, fullgraph=True, dynamic=False, **options)

    def call(*args, **kwargs):
        # By torch's own limit the ninth shape of a process would raise.
        with torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS):
            return compiled(*args, **kwargs)

    return call


def current_round(draft: PreTrainedModel, target: PreTrainedModel) -> CompiledRound | None:
    """The compiled rounds of a pair as its models are now; None where there are none, or hooks would be left out."""
    compiled = draft.compiled_rounds.get(target)
    if compiled is None:
        return None
    if has_hooks(target, draft):
        note("compiled round", "none: hooks are registered on modules, and no graph calls them")
        return None
    if compiled.is_graphed:
        state = (twins(), state_of(target, draft))
        if compiled.state not in (None, state):
            compiled = draft.compiled_rounds[target] = CompiledRound(target, draft, **compiled.options)
            state = (twins(), state_of(target, draft))  # weights were laid side by side again
        compiled.state = state
    return compiled


def is_graphed(target: PreTrainedModel, draft: PreTrainedModel) -> bool:
    """Whether rounds are CUDA graphs of their own, which need no trace."""
    return target.device.type == "cuda" and on_one_device(target, draft) and not Agreement(target).is_needed


def on_one_device(target: PreTrainedModel, draft: PreTrainedModel) -> bool:
    """Whether all layers of both models lie on the same device."""
    devices = {str(device) for device in getattr(target, "hf_device_map", {}).values()}
    return len(devices) < 2 and draft.device == target.device


def free_memory(device: torch.device) -> int:
    """Bytes that new tensors can have on a CUDA device."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def _stay(*tensors: torch.Tensor) -> None:
    """Graphs may write to them in place: they are the same in every call."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)
