"""Step 6, roll back: the only file that crops caches or knows what a cache layer can undo."""

from contextlib import contextmanager

from transformers import Cache
from transformers.cache_utils import QuantizedLayer, StaticLayer


def drop_last(cache: Cache, num_positions: int) -> None:
    """Remove the last `num_positions` positions of every layer; 0 still shrinks sliding layers to their window."""
    cache.crop(-num_positions)


def why_not_reversible(target, cache: Cache | None, *, before_prefill: bool) -> str | None:
    """Why this target's cache cannot be rolled back exactly; None where it can, or only the prefill will tell.

    A `cache` of None is one that is still to be made.
    """
    # DeepSeek-V4's compressed layers call themselves croppable and are not: the flag of the model comes first.
    if getattr(target, "_is_stateful", False):
        return f"{type(target).__name__} keeps a recurrent or compressed state"
    for layer in cache.layers if cache is not None else ():
        if isinstance(layer, (StaticLayer, QuantizedLayer)):
            return f"{type(layer).__name__} is not supported yet (use the default dynamic cache)"
        if not before_prefill and not getattr(layer, "is_croppable", True):
            return f"{type(layer).__name__} cannot forget positions"
    return None


@contextmanager
def recording_past(cache: Cache):
    """Sliding layers keep what a rollback needs while this is open; afterwards they are as they were before."""
    before = [(layer, layer.record_past) for layer in cache.layers if hasattr(layer, "record_past")]
    cache.activate_past_recording()
    try:
        yield
    finally:
        for layer, record_past in before:
            layer.record_past = record_past


def cut_to_length(cache: Cache, length: int) -> None:
    """Bring every layer to at most `length` positions, also where an exception left a forward half done."""
    for layer in cache.layers:
        if getattr(layer, "is_initialized", False) and hasattr(layer, "get_seq_length"):
            layer.crop(-max(layer.get_seq_length() - length, 0))
