"""Caches that drafts and batches use, made of transformers' layers."""

from transformers import Cache
from transformers.cache_utils import DynamicSlidingWindowLayer


def window_cache(window: int, num_layers: int) -> Cache:
    """An empty cache that keeps the last `window` positions, and whatever was added since the last `crop`."""
    # Such a layer keeps one position less than it is wide, for it counts the query's own.
    cache = Cache([DynamicSlidingWindowLayer(window + 1) for _ in range(num_layers)])
    cache.activate_past_recording()
    return cache
