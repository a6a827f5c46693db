"""Attention over a block: what its positions see, and how it is computed.

`block_attention` has three levels, the best that fits is taken: 1. grouped queries packed into rows, on any device;
2. torch's flash attention, on CUDA; 3. its Triton twin. `attention_interface.py` leads models to it.
"""

import functools
from contextlib import nullcontext

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .dispatch import note, with_kernel

_HALF = (torch.float16, torch.bfloat16)
# Such a CPU multiplies bf16 matrices twice as fast as torch's sdpa, which does it in fp32.
_MULTIPLIES_BF16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
_flash_forward = torch.ops.aten._flash_attention_forward


def _is_flash_sooner(
    query, key, value, *, lengths=None, mask=None, window=None, softcap=None, sinks=None, **settings
) -> str | None:
    """Why torch's flash attention is better than the Triton twin; None where it is not, or cannot serve.

    Triton's launches take the host 0.3 ms a layer, which graphs save; lengths on the device it must copy for.
    """
    if not query.is_cuda or lengths is not None or torch.compiler.is_compiling():
        return None
    limits = {"mask": mask, "softcap": softcap, "sinks": sinks}
    return "flash is launched sooner" if why_not_flash(query, key, value, **limits) is None else None


@functools.partial(with_kernel, unless=_is_flash_sooner)
def block_attention(
    query: torch.Tensor,  # [B, H, L, D]
    key: torch.Tensor,  # [B, Hkv, S, D]  in the order of their positions, the block's last
    value: torch.Tensor,  # [B, Hkv, S, Dv]
    *,
    scaling: float,
    is_causal: bool,
    lengths: torch.Tensor | None = None,  # [B]  keys of each row, the block's included; None: S
    mask: torch.Tensor | None = None,  # [B or 1, H or 1, L, S]  True where seen, or additive
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [H]  logit of one more key, whose value is zero
) -> torch.Tensor:
    """Attention [B, H, L, Dv] of L queries to the keys before them and to each other.

    Query l of a row of n keys stands at position p = n - L + l. It sees key j where j < n, j <= p if `is_causal`, and
    j > p - `window`; slots from n on may hold anything. A `mask` says what is seen instead of all these.
    """
    if query.is_cuda:
        reason = why_not_flash(query, key, value, mask=mask, softcap=softcap, sinks=sinks)
        if reason is None:
            note("block_attention", "flash")
            return _flash(query, key, value, lengths, scaling=scaling, is_causal=is_causal, window=window)
        note("block_attention", f"not flash: {reason}")
    note("block_attention", "packed queries")
    settings = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
    if lengths is not None:
        is_own = (torch.arange(key.shape[2], device=key.device) < lengths.view(-1, 1))[:, None, :, None]
        key, value = (states.masked_fill(~is_own, 0) for states in (key, value))  # zero times NaN is not zero
    if mask is None:
        mask = visible_keys(query, key, lengths, is_causal=is_causal, window=window)
    return _packed(query, key, value, mask, **settings)


def visible_keys(
    query: torch.Tensor,
    key: torch.Tensor,
    lengths: torch.Tensor | None = None,
    *,
    is_causal: bool,
    window: int | None = None,
) -> torch.Tensor | None:
    """What `block_attention` says is seen, as a mask [B or 1, 1, L, S]; None where everything is."""
    num_rows, num_keys, device = query.shape[2], key.shape[2], key.device
    if lengths is None and not (is_causal and num_rows > 1) and (window is None or num_keys <= window):
        return None
    end = num_keys if lengths is None else lengths.view(-1, 1, 1, 1)
    columns = torch.arange(num_keys, device=device)
    positions = end - num_rows + torch.arange(num_rows, device=device).view(1, 1, -1, 1)
    seen = columns < end
    if is_causal:
        seen = seen & (columns <= positions)
    if window is not None:
        seen = seen & (columns > positions - window)
    return seen.expand(-1, 1, num_rows, -1)


def _packed(query, key, value, mask, *, scaling: float, softcap: float | None, sinks: torch.Tensor | None):
    """Level 1: the queries that share a key are rows of one matrix, so keys and values are not repeated."""
    batch_size, num_heads, num_rows, head_dim = query.shape
    num_key_heads = key.shape[1]
    group = num_heads // num_key_heads
    rows = query.reshape(batch_size, num_key_heads, group * num_rows, head_dim)
    if mask is not None:
        mask = mask.reshape(mask.shape[0], -1, 1 if mask.shape[1] == 1 else group, *mask.shape[2:])
    backends = None if not query.is_cuda else cuda_backends(query.dtype, head_dim, value.shape[-1])
    is_faster_by_products = _MULTIPLIES_BF16 and query.device.type == "cpu" and query.dtype == torch.bfloat16
    if softcap is None and sinks is None and backends != [] and not is_faster_by_products:
        mask = None if mask is None else mask.expand(-1, -1, group, -1, -1).flatten(2, 3)
        with nullcontext() if backends is None else sdpa_kernel(backends):
            output = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    else:
        output = _attend(rows, key, value, mask, group, scaling=scaling, softcap=softcap, sinks=sinks)
    return output.reshape(batch_size, num_heads, num_rows, -1)


def _attend(
    rows: torch.Tensor,  # [B, Hkv, G*L, D]
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,  # [B or 1, Hkv or 1, G or 1, L, S]
    group: int,
    *,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,  # [H]
) -> torch.Tensor:
    """Attention [B, Hkv, G*L, Dv] as it is defined, in two matrix products and with what torch's own has not."""
    scores = (rows @ key.transpose(-1, -2)).float().mul_(scaling)
    scores = scores.view(*scores.shape[:2], group, -1, scores.shape[-1])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        if mask.dtype == torch.bool:  # the same for all heads, so that filling it is cheaper than filling scores
            hidden = torch.finfo(scores.dtype).min
            mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, hidden)
        scores = scores.add_(mask)
    if sinks is None:
        probs = scores.softmax(-1)
    else:
        sinks = sinks.float().view(1, key.shape[1], group, 1, 1).expand(*scores.shape[:-1], 1)
        probs = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    return probs.flatten(2, 3).to(value.dtype) @ value


def cuda_backends(dtype: torch.dtype, head_dim: int, value_dim: int) -> list[SDPBackend]:
    """What torch's sdpa may use on CUDA; empty where none of it serves.

    Never its math backend, which repeats and upcasts; never cuDNN, which plans for every new number of keys.
    """
    widths = {size * dtype.itemsize % 16 for size in (head_dim, value_dim)}
    if dtype not in (*_HALF, torch.float32) or widths != {0}:
        return []
    return [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def why_not_flash(query, key, value, *, mask, softcap, sinks) -> str | None:
    """Why torch's flash attention cannot serve; None where it can."""
    head_dim = query.shape[-1]
    is_old = query.is_cuda and torch.cuda.get_device_capability(query.device) < (8, 0)
    reasons = {
        "it is not in this build of torch": query.is_cuda and not torch.backends.cuda.is_flash_attention_available(),
        "the GPU is too old": is_old or torch.version.hip is not None,
        "a mask is given": mask is not None,
        "it is soft-capped": softcap is not None,
        "it has sinks": sinks is not None,
        f"it is in {query.dtype}": query.dtype not in _HALF,
        f"head size {head_dim}": head_dim % 8 != 0 or head_dim > 256 or value.shape[-1] != head_dim,
    }
    return next((reason for reason, is_met in reasons.items() if is_met), None)


def _flash(query, key, value, lengths, *, scaling: float, is_causal: bool, window: int | None) -> torch.Tensor:
    """Level 2: torch's flash attention, whose causal mask ends at the lower right; it knows groups of queries."""
    batch_size, num_heads, num_rows, head_dim = query.shape
    num_key_heads, num_keys = key.shape[1], key.shape[2]
    settings = {"scale": scaling, "window_size_left": None if window is None else window - 1}
    if lengths is None:
        states = (states.transpose(1, 2) for states in (query, key, value))
        output = _flash_forward(*states, None, None, num_rows, num_keys, 0.0, is_causal, False, **settings)[0]
        return output.transpose(1, 2)
    # Every head of keys is a sequence of its own: so lie the keys in memory, and nothing is copied.
    num_sequences, group = batch_size * num_key_heads, num_heads // num_key_heads
    starts = torch.arange(num_sequences + 1, dtype=torch.int32, device=query.device)
    grouped = query.reshape(num_sequences, group, num_rows, head_dim).transpose(1, 2).reshape(-1, group, head_dim)
    keys, values = (states.reshape(-1, 1, head_dim) for states in (key, value))
    used = lengths.to(torch.int32).repeat_interleave(num_key_heads)
    lengths_of = (starts * num_rows, starts * num_keys, num_rows, num_keys)
    output = _flash_forward(grouped, keys, values, *lengths_of, 0.0, is_causal, False, **settings, seqused_k=used)[0]
    return output.view(-1, num_rows, group, head_dim).transpose(1, 2).reshape(query.shape)


def draft_masks(
    layer_types: list[str],
    num_inputs: int,
    num_keys: int,
    *,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> dict[str, torch.Tensor | None]:
    """For each layer type a mask [1, 1, num_inputs, num_keys], True where seen; None where every position sees all.

    Sliding layers see the last `window` positions of the context, counted from the anchor, and the block. `causal`
    hides the rest of the block; where full and sliding layers are mixed, in the sliding ones only (so speculators and
    DeepSeek-V4 train them).
    """
    start = num_keys - num_inputs  # of the block
    columns = torch.arange(num_keys, device=device)
    rows = columns[start:].unsqueeze(-1)
    masks: dict[str, torch.Tensor | None] = {}
    for layer_type in set(layer_types):
        is_sliding = layer_type == "sliding_attention"
        is_causal = causal and (is_sliding or "sliding_attention" not in layer_types)
        mask = None
        if is_causal or (is_sliding and start > window):
            first = start - window if is_sliding else 0
            last = rows if is_causal else num_keys - 1
            mask = ((columns >= first) & (columns <= last)).expand(num_inputs, -1)[None, None]
        masks[layer_type] = mask
    return masks
