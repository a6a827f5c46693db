"""Step 6, roll back: the only file that crops caches or knows what a cache layer can undo."""

import functools
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf

import torch
from transformers import Cache
from transformers.cache_utils import (
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    QuantizedLayer,
    StaticLayer,
)

# Architectures that transformers calls stateful (and refuses in its own assisted decoding) whose whole state lies in
# cache layers that can be brought back here, and whose forward over several tokens is that over each of them in turn.
# Neither can be seen from outside: Jamba, Zamba, Mamba and RecurrentGemma start such a forward from an empty state;
# NemotronH and Zamba2 bound time steps from below in it, and not in a forward over one token.
UNDOABLE = {
    "bailing_hybrid",
    "bamba",
    "deepseek_v4",
    "falcon_h1",
    "granitemoehybrid",
    "kimi_linear",
    "lara_mini",
    "olmo_hybrid",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
    "zaya",
}
# Accepted tokens that are read again in front of a block; when there are more, they are read once by themselves.
MAX_PENDING = 16


def drop_last(cache: Cache, num_positions: int) -> None:
    """Remove the last `num_positions` positions of every layer; 0 still shrinks sliding layers to their window."""
    cache.crop(-num_positions)


def why_not_reversible(target, cache: Cache | None, *, before_prefill: bool) -> str | None:
    """Why this target's cache cannot be rolled back exactly; None where it can, or only the prefill will tell.

    A `cache` of None is one that is still to be made.
    """
    layers = cache.layers if cache is not None else []
    config = target.config.get_text_config(decoder=True)
    is_undoable = config.model_type in UNDOABLE
    if getattr(target, "_is_stateful", False):
        if not is_undoable:
            return f"{type(target).__name__} keeps a state that cannot be brought back exactly"
        if tuple(getattr(config, "time_step_limit", None) or (0, inf)) != (0, inf):
            return "`time_step_limit` in its config bounds forwards over several tokens, and not those over one"
    for layer in layers:
        name = type(layer).__name__
        if isinstance(layer, (StaticLayer, QuantizedLayer)):
            return f"{name} is not supported yet (use the default dynamic cache)"
        is_restored = is_undoable and _is_recurrent(layer) and not isinstance(layer, DynamicSlidingWindowLayer)
        if not before_prefill and not is_restored and not getattr(layer, "is_croppable", True):
            return f"{name} cannot forget positions"
    return None


@contextmanager
def recording_past(cache: Cache):
    """Layers keep what a rollback needs while this is open; afterwards they are as they were before."""
    before = [(layer, layer.record_past) for layer in cache.layers if hasattr(layer, "record_past")]
    compressed = [(layer, type(layer)) for layer in cache.layers if _is_compressed(layer)]
    cache.activate_past_recording()
    for layer in filter(_is_recurrent, cache.layers):
        layer.record_past = False  # restored from copies, so they need no record and may go their usual way
    for layer, layer_class in compressed:
        layer.__class__ = _recording_class(layer_class)
        layer.journals = {}
    try:
        yield
    finally:
        for layer, record_past in before:
            layer.record_past = record_past
        for layer, layer_class in compressed:
            layer.__class__ = layer_class
            del layer.journals


class Rewinder:
    """Takes tokens out of a target's cache again, while `recording_past` is open.

    Layers that can forget positions are cropped. A recurrent state cannot: it goes back to a copy from before the
    forward, and all layers with it; the tokens that should have been kept are left pending, to be read again in front
    of the next block, so that a rejection costs no forward of its own.
    """

    def __init__(self, cache: Cache):
        self._layers = cache.layers
        self._linear = [layer for layer in cache.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
        self._is_recurrent = any(map(_is_recurrent, self._linear))
        self._copies: list[dict[tuple[str, int], torch.Tensor]] | None = None  # of their states; None: outdated

    def before_forward(self) -> None:
        """Call before a forward that may have to be taken back."""
        if self._copies is None:
            self._copies = [_copy_states(layer) for layer in self._linear]

    def keep(self, num_kept: int, num_read: int) -> int:
        """Keep the first `num_kept` of the `num_read` tokens of the last forward; how many must be read again."""
        if self._is_recurrent and num_kept < num_read:
            self._restore()
            for layer in self._layers:
                _crop_keys(layer, num_read)
            return num_kept
        for layer in self._layers:
            if not _is_recurrent(layer):
                layer.crop(num_kept - num_read)
        self._copies = None
        return 0

    def cut_to_length(self, length: int) -> None:
        """Back to `length`, what the last `keep` left, also where an exception left a forward half done."""
        self._restore()
        for layer in self._layers:
            if getattr(layer, "is_initialized", False) and hasattr(layer, "get_seq_length"):
                _crop_keys(layer, max(layer.get_seq_length() - length, 0))

    def _restore(self) -> None:
        if self._copies is None:
            return
        for layer, copies in zip(self._linear, self._copies, strict=True):
            for (name, index), copy in copies.items():
                states = getattr(layer, name)
                if states[index].shape == copy.shape:
                    states[index].copy_(copy)
                else:  # a convolution's state that recorded the past
                    states[index] = copy.clone()


def _is_recurrent(layer) -> bool:
    """Whether a layer keeps a state that each token overwrites; it may have keys and values beside it."""
    return any(getattr(layer, "is_recurrent_states_initialized", {}).values())


def _copy_states(layer) -> dict[tuple[str, int], torch.Tensor]:
    """Copies of a linear layer's states: updates write in place."""
    return {
        (name, index): state.clone()
        for name in ("conv_states", "recurrent_states")
        for index, state in getattr(layer, name).items()
        if state is not None
    }


def _crop_keys(layer, num_positions: int) -> None:
    """Remove the last positions of a layer's keys and values; states beside them are left alone."""
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        layer.crop(-num_positions)
    elif hasattr(layer, "keys"):
        super(LinearAttentionCacheLayerMixin, layer).crop(-num_positions)


def _is_compressed(layer) -> bool:
    """Whether a layer pools windows of tokens besides its sliding keys, as DeepSeek-V4's do.

    These layers call themselves croppable and are not: only while `recording_past` is open can they be cropped.
    """
    return hasattr(layer, "store_compression_weights")


@dataclass(slots=True)
class _Journal:
    """What one compressor of a layer was given since the last crop."""

    start: int  # position of the first row
    kv: list[torch.Tensor]  # rows [B, n, ...] of consecutive positions
    gate: list[torch.Tensor]
    # By index of the window: its half that the next window reads, as the layer would keep it.
    overlaps: dict[int, tuple[torch.Tensor | None, torch.Tensor | None]] = field(default_factory=dict)


class _RecordingCompressor(DynamicSlidingWindowLayer):
    """Put in front of a compressed layer's class: the layer can be cropped back to its last crop, without recomputing.

    An entry of a window depends on tokens up to the window's end alone. Entries of windows within the kept prefix
    stay; the open window's rows and the overlap with the window before it come from the journal.
    """

    journals: dict[str, _Journal]  # by the compressor's name

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        # The layer's own update trims to the window at once. Keys are the values, in one storage.
        keys, _ = DynamicSlidingWindowLayer.update(self, key_states, value_states, *args, **kwargs)
        self.values = self.keys
        return keys, keys

    def store_compression_weights(self, name: str, kv: torch.Tensor, gate: torch.Tensor):
        if name not in self.journals:
            rows, gates = self.buffer_kv[name], self.buffer_gate[name]
            start = self.entry_count[name] * self.compress_rate
            self.journals[name] = _Journal(start, *([], []) if rows is None else ([rows], [gates]))
        self.journals[name].kv.append(kv)
        self.journals[name].gate.append(gate)
        return super().store_compression_weights(name, kv, gate)

    def update_overlap_state(self, name: str, chunk_kv: torch.Tensor, chunk_gate: torch.Tensor, head_dim: int):
        overlaps, first = self.journals[name].overlaps, self.entry_count[name]
        overlaps.setdefault(first - 1, (self.overlap_kv[name], self.overlap_gate[name]))
        for i in range(chunk_kv.shape[1]):
            overlaps[first + i] = chunk_kv[:, i, :, :head_dim], chunk_gate[:, i, :, :head_dim]
        return super().update_overlap_state(name, chunk_kv, chunk_gate, head_dim)

    def crop(self, tokens_to_remove: int) -> None:
        DynamicSlidingWindowLayer.crop(self, tokens_to_remove)
        self.values = self.keys
        if tokens_to_remove:
            for name, journal in self.journals.items():
                self._rewind(name, journal)
        self.journals.clear()

    def _rewind(self, name: str, journal: _Journal) -> None:
        """Bring one compressor to the keys' length. One that an exception kept from its tokens has no journal."""
        length = self.get_seq_length()
        num_entries = length // self.compress_rate
        self.entry_count[name] = num_entries
        if self.compressed_kv[name] is not None:
            self.compressed_kv[name] = self.compressed_kv[name][:, :num_entries]
        open_window = slice(num_entries * self.compress_rate - journal.start, length - journal.start)
        self.buffer_kv[name] = torch.cat(journal.kv, dim=1)[:, open_window]
        self.buffer_gate[name] = torch.cat(journal.gate, dim=1)[:, open_window]
        if journal.overlaps:
            kv, gate = journal.overlaps[num_entries - 1]
            self.overlap_kv[name] = None if kv is None else kv.clone()
            self.overlap_gate[name] = None if gate is None else gate.clone()


@functools.cache
def _recording_class(layer_class: type) -> type:
    # Without a `_layer_type` of its own the new class would take the old one's place in new caches.
    return type(f"Recording{layer_class.__name__}", (_RecordingCompressor, layer_class), {"_layer_type": None})
