"""Caches that drafts and batches use: windows made of transformers' layers, and slots with a length for every row.

In a slot cache the n-th token of a sequence lies in slot n of its row, whatever the other rows do. A rejected token's
slot is overwritten in the next round, so that rolling back costs nothing; masks hide slots behind a row's length.
Attention that reads no such masks gets rows with padding in front, as in a batch of prompts (`SlotCache.pad_rows`).
"""

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from .packing import Packing

GROWTH = 256  # slots; caches grow by at least so many, on a CPU by a quarter of it
PADDING = 2**62  # the slot of what is in no slot; as a float it is the same number
_MANY_TOKENS = 64
READ_SLOT_MASKS = {"eager", "sdpa", "dspark"}  # attention that takes `slot_masks`


def window_cache(window: int, num_layers: int) -> Cache:
    """An empty cache that keeps the last `window` positions, and whatever was added since the last `crop`."""
    # Such a layer keeps one position less than it is wide, for it counts the query's own.
    cache = Cache([DynamicSlidingWindowLayer(window + 1) for _ in range(num_layers)])
    cache.activate_past_recording()
    return cache


class SlotCache(Cache):
    """Keys and values of up to `num_rows` sequences. `place` says where the next forward's tokens go.

    Args:
        windows: the sliding window of each layer, None where it sees everything. Slots exist for all tokens.
        num_slots: of a row to begin with, one of them for tokens without a slot; it grows when needed.
        is_static: all slots are read in every forward, and layers stay where they are in memory.
    """

    def __init__(self, windows: list[int | None], num_rows: int, num_slots: int, *, is_static: bool = False):
        self.windows, self.num_rows = windows, num_rows
        self.num_slots, self.is_static = num_slots, is_static
        self.first_row, self.start, self.stop = 0, None, 0
        self.num_placed, self.num_tokens = 0, 0  # rows that the next forward reads, and its tokens of each
        # Of these tokens [R, T], packed [1, T].
        self.rows: torch.Tensor | None = None
        self.slots: torch.Tensor | None = None
        self.columns: torch.Tensor | None = None  # [R, C]  slots in the order they are read; None: slots before `stop`
        self._places: dict[torch.Size, tuple[torch.Tensor, torch.Tensor]] = {}  # rows and slots, of static caches
        super().__init__(layers=[SlotLayer(self) for _ in windows])

    def place(
        self,
        slots: torch.Tensor,
        stop: int,
        *,
        first_row: int = 0,
        start: int | None = None,
        packing: Packing | None = None,
    ) -> None:
        """The next forward writes to `slots` [R, T] of rows from `first_row` on, and reads slots before `stop`.

        Tokens whose slot is not below `stop` are written to the last slot of their row, which nothing sees. With
        `start` the slots of each row lie side by side from there on. With `packing` tokens come packed.
        """
        by_masks = reads_by_masks(slots.device)
        if stop >= self.num_slots and not self.is_static:
            growth = max(GROWTH // 4, self.num_slots // 16) if by_masks else max(GROWTH, self.num_slots // 8)
            self.num_slots = max(stop + 1, self.num_slots + growth)
        self.first_row, self.start, self.columns = first_row, start, None
        self.num_placed, self.num_tokens = slots.shape
        if start is None:
            last = self.num_slots - 1
            rows = torch.arange(first_row, first_row + len(slots), device=slots.device).unsqueeze(-1)
            self.rows, self.slots = rows.expand(slots.shape), torch.where(slots < min(stop, last), slots, last)
            if packing is not None:
                self.rows, self.slots = packing.pack(self.rows), packing.pack(self.slots)
            if self.is_static and not torch.compiler.is_compiling():  # graphs of forwards read them where they were
                if slots.shape not in self._places:
                    self._places[slots.shape] = (torch.empty_like(slots), torch.empty_like(slots))
                own = self._places[slots.shape]
                self.rows, self.slots = own[0].copy_(self.rows), own[1].copy_(self.slots)
        reads_all = self.is_static or (by_masks and 2 * stop > self.num_slots)
        self.stop = self.num_slots if reads_all else stop

    def pad_rows(self, lengths: torch.Tensor) -> torch.Tensor:
        """The next forward, already placed, reads rows of `lengths` [R] tokens with padding in front of them.

        Returns its mask [R, C], 0 where padded. Every row ends in the last column, so windows count right and flash
        attention unpads them. All rows have padding: without any, positions of a single row that repeat (behind its
        last) would count as sequences packed together. Each layer copies the keys and values that it reads, which
        flash attention's unpadding does, too.
        """
        columns = torch.arange(-1, self.stop, device=lengths.device) - (self.stop - lengths).unsqueeze(-1)
        self.columns = columns.clamp_min(0)
        return (columns >= 0).long()

    @property
    def num_columns(self) -> int:
        """Keys of a row in the next forward."""
        return self.stop if self.columns is None else self.columns.shape[1]

    def swap_rows(self, row: int, other: int) -> None:
        """Exchange two rows."""
        for layer in self.layers:
            if layer.is_initialized and row != other:
                for states in (layer.keys, layer.values):
                    states[[row, other]] = states[[other, row]]


class SlotLayer(CacheLayerMixin):
    """One layer of a SlotCache: keys and values [rows, heads, slots, head size]."""

    is_croppable = True

    def __init__(self, placement: SlotCache):
        super().__init__()
        self._placement = placement

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._empty(key_states), self._empty(value_states)
        self.is_initialized = True
        if self._placement.is_static:
            for states in (self.keys, self.values):
                # Without a guard on the address, by which each layer would be compiled by itself.
                torch._dynamo.mark_static_address(states, guard=False)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write states [R or 1, heads, T, head size] to their slots; all that the rows may see of theirs."""
        place = self._placement
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.keys.shape[2] < place.num_slots:
            self.keys, self.values = self._grown(self.keys), self._grown(self.values)
        own = slice(place.first_row, place.first_row + place.num_placed)
        if place.start is None:
            rows, slots = place.rows.to(key_states.device), place.slots.to(key_states.device)
            self.keys[rows, :, slots] = key_states.transpose(1, 2)
            self.values[rows, :, slots] = value_states.transpose(1, 2)
        else:
            side_by_side = slice(place.start, place.start + key_states.shape[2])
            _copy(key_states, self.keys[own, :, side_by_side])
            _copy(value_states, self.values[own, :, side_by_side])
        if place.columns is not None:
            columns = place.columns.to(self.device)
            row = torch.arange(own.start, own.stop, device=self.device).unsqueeze(-1)
            return self.keys[row, :, columns].transpose(1, 2), self.values[row, :, columns].transpose(1, 2)
        return self.keys[own, :, : place.stop], self.values[own, :, : place.stop]

    def get_seq_length(self) -> int:
        return self._placement.num_columns - self._placement.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._placement.num_columns, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing to do: what a row has forgotten is hidden by masks, and overwritten."""

    def _empty(self, states: torch.Tensor) -> torch.Tensor:
        place = self._placement
        return states.new_zeros(place.num_rows, states.shape[1], place.num_slots, states.shape[3])

    def _grown(self, states: torch.Tensor) -> torch.Tensor:
        grown = self._empty(states)
        grown[:, :, : states.shape[2] - 1] = states[:, :, :-1]
        return grown


def _copy(states: torch.Tensor, into: torch.Tensor) -> None:
    if states.is_cuda and states.shape[2] >= _MANY_TOKENS:  # strided numbers are copied one by one there
        states, into = _as_wide_numbers(states, into)
    into.copy_(states)


def _as_wide_numbers(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same memory seen as numbers of 16 bytes, to be copied; as it is where one does not lie so."""
    for tensor in tensors:
        offsets = (*tensor.stride()[:-1], tensor.shape[-1], tensor.storage_offset())
        if tensor.stride(-1) != 1 or any(offset * tensor.element_size() % 16 for offset in offsets):
            return tensors
    if len({tensor.dtype for tensor in tensors}) > 1:
        return tensors
    return tuple(tensor.view(torch.complex128) for tensor in tensors)


def reads_by_masks(device: torch.device) -> bool:
    """Whether all slots are read, and masks made once for all layers hide some.

    Keys are then side by side in memory: a CPU multiplies them twice as fast as it copies and multiplies others. On
    CUDA attention stops where a row ends.
    """
    return device.type != "cuda"


def why_not_in_slots(cache: Cache) -> str | None:
    """Why a cache's content cannot be moved into slots; None where it can."""
    if getattr(cache, "offloading", False):
        return "its cache is offloaded layer by layer"
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"its cache has a {type(layer).__name__}, which keeps more than keys and values of every token"
    return None


def has_windows(config) -> bool:
    """Whether a target of this config forgets what lies behind a sliding window."""
    return any(getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers)


def windows_of(cache: Cache, config) -> list[int | None]:
    """The sliding window of each layer of a dynamic cache, which a user may have made without the model's config."""
    layers = DynamicCache(config=config).layers
    windows = [getattr(layer, "sliding_window", None) for layer in layers] + [None] * len(cache.layers)
    return [getattr(layer, "sliding_window", w) for layer, w in zip(cache.layers, windows, strict=False)]


def move_into_slots(
    cache: Cache, slots: torch.Tensor, into: SlotCache, stop: int, *, first_row: int = 0, is_unpadded: bool = False
) -> None:
    """Move a dynamic cache of R rows and n columns to slots [R, n], all below `stop`; padding's slot is PADDING.

    `is_unpadded`: these are 0 to n - 1. No more than one layer is held twice. The cache is empty afterwards.
    """
    into.place(slots, stop, first_row=first_row, start=0 if is_unpadded else None)
    rows, placed = into.rows, into.slots
    for source, layer in zip(cache.layers, into.layers, strict=True):
        if source.is_initialized:
            num_columns = source.keys.shape[2]  # a sliding layer has only the last
            if is_unpadded:
                into.start = slots.shape[1] - num_columns
            else:
                into.rows, into.slots = rows[:, -num_columns:], placed[:, -num_columns:]
            layer.update(source.keys, source.values)
            _release(source)


def move_out_of_slots(source: SlotCache, slots: torch.Tensor, into: Cache, rows: torch.Tensor) -> None:
    """Move to an empty dynamic cache the columns of `rows` [R] whose slots [R, n] are given; one without a slot is 0.

    No more than one layer is held twice. The slots are empty afterwards, but for static ones.
    """
    num_columns = slots.shape[1]
    into.layers = into.layers or [DynamicLayer() for _ in source.layers]
    for layer, target in zip(source.layers, into.layers, strict=True):
        if not layer.is_initialized:
            continue
        own = slots.to(layer.device)
        window = getattr(target, "sliding_window", None)
        if window is not None:
            own = own[:, -window + 1 :]
            target.cumulative_length = num_columns
        is_there = own < source.num_slots
        row = rows.to(own.device).unsqueeze(-1)
        index = torch.where(is_there, own, 0)
        for name in ("keys", "values"):
            columns = getattr(layer, name)[row, :, index] * is_there[..., None, None]
            setattr(target, name, columns.transpose(1, 2).contiguous())
        target.is_initialized, target.dtype, target.device = True, layer.dtype, layer.device
        if not source.is_static:
            _release(layer)


def _release(layer: CacheLayerMixin) -> None:
    layer.keys = layer.values = None
    layer.is_initialized = False
    if hasattr(layer, "cumulative_length"):  # of a sliding window
        layer.cumulative_length = 0


def slot_masks(
    slots: torch.Tensor,  # [R, T]  of the queries
    stop: int,
    windows: list[int | None],
    *,
    dtype: torch.dtype | None,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Masks [R, 1, T, stop] of a forward over tokens in `slots`: each sees its own slot and those before it.

    Bool, True where seen; with `dtype` a number to be added to scores. A tensor where all layers see alike, else a
    tensor for each layer type.
    """
    keys = torch.arange(stop, device=slots.device)
    distance = slots.unsqueeze(-1) - keys
    masks = {}
    for window in dict.fromkeys(windows):
        seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        if dtype is not None:
            seen = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
        masks["full_attention" if window is None else "sliding_attention"] = seen.unsqueeze(1)
    return masks if len(masks) > 1 else next(iter(masks.values()))


def draft_slot_masks(
    anchor_slots: torch.Tensor,  # [R]
    first_slots: torch.Tensor,  # [R]  the context begins there
    num_inputs: int,
    stop: int,
    layer_types: list[str],
    *,
    causal: bool,
    window: int | None,
) -> dict[str, torch.Tensor]:
    """`attention.draft_masks` for rows of a slot cache: masks [R, 1, num_inputs, stop] for each layer type."""
    keys = torch.arange(stop, device=anchor_slots.device)
    start = anchor_slots.view(-1, 1, 1)
    rows = start + torch.arange(num_inputs, device=keys.device).view(1, -1, 1)
    masks = {}
    for layer_type in set(layer_types):
        is_sliding = layer_type == "sliding_attention"
        is_causal = causal and (is_sliding or "sliding_attention" not in layer_types)
        first = first_slots.view(-1, 1, 1)
        if is_sliding:
            first = torch.maximum(first, start - window)
        last = rows if is_causal else start + num_inputs - 1
        seen = (keys >= first) & (keys <= last)
        masks[layer_type] = seen.expand(-1, num_inputs, -1).unsqueeze(1)
    return masks
