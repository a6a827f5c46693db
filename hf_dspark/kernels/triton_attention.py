"""Block attention in Triton: keys and values are read once for all queries that share them, in splits that run side by
side and are merged. What a row's result is made of, and in which order, does not depend on how many rows there are.
"""

import torch
import triton
import triton.language as tl

from .launch import FUSION, programs_side_by_side, shared_memory

MAX_ROWS = 64
SPLIT_STEP = 64  # keys: splits begin where steps of any size do
MAX_BLOCK_SPLITS = 32  # that are merged at once
LOG2_E = tl.constexpr(1.4426950408889634)


def block_attention(
    query, key, value, *, scaling, is_causal, lengths=None, mask=None, window=None, softcap=None, sinks=None
):
    """See `attention.block_attention`."""
    run = _as_one_operator if torch.compiler.is_compiling() else _launch
    return run(query, key, value, lengths, scaling, is_causal, window, softcap, sinks)


def _launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor | None,
    scaling: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    batch_size, num_heads, num_rows, head_dim = query.shape
    num_key_heads, num_keys = key.shape[1], key.shape[2]
    group = num_heads // num_key_heads
    split_size = size_of_splits(batch_size * num_key_heads, num_keys, programs_side_by_side(query.device))
    num_splits = triton.cdiv(num_keys, split_size)
    float32 = {"dtype": torch.float32, "device": query.device}
    partial = torch.empty(num_splits, batch_size, num_heads, num_rows, head_dim, **float32)
    # The largest score of a split, in powers of two, and the sum of the others relative to it.
    statistics = torch.empty(2, num_splits, batch_size, num_heads, num_rows, **float32)
    output = torch.empty(batch_size, num_rows, num_heads, head_dim, dtype=query.dtype, device=query.device)
    blocks = block_sizes(head_dim, query.element_size())
    tiles = triton.cdiv(num_rows * group, blocks["BLOCK_ROWS"])
    split_attention_kernel[num_splits, tiles, batch_size * num_key_heads](
        query,
        key,
        value,
        lengths,
        partial,
        statistics,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        num_rows,
        num_keys,
        split_size,
        scaling,
        0.0 if softcap is None else softcap,
        0 if window is None else window,
        NUM_KEY_HEADS=num_key_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        IS_CAUSAL=is_causal,
        HAS_LENGTHS=lengths is not None,
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        **blocks,
        **options(head_dim, query.element_size(), shared_memory(query.device)),
    )
    merge_splits_kernel[batch_size * num_heads * num_rows,](
        partial,
        statistics,
        sinks,
        output,
        num_splits,
        num_rows,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        HAS_SINKS=sinks is not None,
        **merge_options(head_dim, num_splits),
    )
    return output.transpose(1, 2)


# A trace cannot look into how the kernels are launched, and need not.
_as_one_operator = torch.library.custom_op("hf_dspark::block_attention", _launch, mutates_args=())


@_as_one_operator.register_fake
def _(query, key, value, lengths, scaling, is_causal, window, softcap, sinks):
    batch_size, num_heads, num_rows, head_dim = query.shape
    return query.new_empty(batch_size, num_rows, num_heads, head_dim).transpose(1, 2)


def why_not_block_attention(
    query, key, value, *, scaling, is_causal, lengths=None, mask=None, window=None, softcap=None, sinks=None
) -> str | None:
    """Why the kernel cannot serve; None where it can."""
    head_dim = query.shape[-1]
    states = (query, key, value)
    reasons = {
        "a mask is given": mask is not None,
        f"it is in {query.dtype}": query.dtype not in (torch.float16, torch.bfloat16, torch.float32),
        "queries, keys and values are of several types": len({state.dtype for state in states}) > 1,
        f"head size {head_dim}": head_dim not in (16, 32, 64, 128, 256) or value.shape[-1] != head_dim,
        f"{query.shape[2]} rows are no block": query.shape[2] > MAX_ROWS,
        "a gradient is asked for": torch.is_grad_enabled() and any(state.requires_grad for state in states),
        "channels do not lie side by side": any(state.stride(-1) != 1 for state in states),
    }
    return next((reason for reason, is_met in reasons.items() if is_met), None)


def size_of_splits(num_heads: int, num_keys: int, num_programs: int) -> int:
    """Keys a program reads, at least 128: as many splits as give all programs that run side by side some work.

    More would wait for others to end; where there is one for each head already, all its keys are read by it.
    """
    num_splits = max(1, num_programs // num_heads)
    return max(128, triton.cdiv(triton.cdiv(num_keys, num_splits), SPLIT_STEP) * SPLIT_STEP)


def block_sizes(head_dim: int, element_size: int) -> dict[str, int]:
    """Queries of a group in a tile, whatever their number, and keys in a step: two steps fit into 99 KiB."""
    return {
        "BLOCK_ROWS": 64 if element_size == 2 else 16,  # tensor cores for half precision only
        "BLOCK_KEYS": min(64, 8192 // head_dim) if element_size == 2 else min(32, 4096 // head_dim),
    }


def options(head_dim: int, element_size: int, shared_memory: int) -> dict:
    """How the first kernel is launched: a third step is on its way where the tile and all of them fit."""
    blocks = block_sizes(head_dim, element_size)
    step = 2 * blocks["BLOCK_KEYS"] * head_dim * element_size
    fits = blocks["BLOCK_ROWS"] * head_dim * element_size + 3 * step <= shared_memory
    num_warps = 8 if head_dim > 128 or element_size == 4 else 4
    return {"num_warps": num_warps, "num_stages": 3 if fits else 2, **FUSION}


def merge_options(head_dim: int, num_splits: int) -> dict:
    """How the second kernel is launched: no larger than its splits need."""
    block = min(triton.next_power_of_2(num_splits), MAX_BLOCK_SPLITS)
    return {"BLOCK_SPLITS": block, "num_warps": min(8, max(1, block * head_dim // 1024)), **FUSION}


@triton.jit(do_not_specialize=["num_rows", "num_keys", "window"])
def split_attention_kernel(
    query,
    key,
    value,
    lengths,
    partial,
    statistics,
    query_b,
    query_h,
    query_l,
    key_b,
    key_h,
    key_s,
    value_b,
    value_h,
    value_s,
    num_rows,
    num_keys,
    split_size,
    scaling,
    softcap,
    window,
    NUM_KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """One split of the keys for one tile of the queries that share them: attention, not yet normalised."""
    split, batch, head = tl.program_id(0), tl.program_id(2) // NUM_KEY_HEADS, tl.program_id(2) % NUM_KEY_HEADS
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = rows < num_rows * GROUP
    row, query_head = rows // GROUP, head * GROUP + rows % GROUP
    channels = tl.arange(0, HEAD_DIM)
    length = num_keys
    if HAS_LENGTHS:
        length = tl.load(lengths + batch).to(tl.int32)
    position = length - num_rows + row

    base = batch.to(tl.int64)
    query_row = query + base * query_b + query_head * query_h + row * query_l
    q = tl.load(query_row[:, None] + channels[None, :], mask=is_row[:, None], other=0.0)
    key += base * key_b + head.to(tl.int64) * key_h
    value += base * value_b + head.to(tl.int64) * value_h

    # Steps lie at multiples of BLOCK_KEYS from the first key on, whatever is seen: the order of sums stays the same.
    start = split * split_size
    stop = tl.minimum(start + split_size, length)
    if HAS_WINDOW:
        first_seen = tl.maximum(length - num_rows - window + 1, 0)
        start = tl.maximum(start, first_seen // BLOCK_KEYS * BLOCK_KEYS)
    largest = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    sums = tl.zeros([BLOCK_ROWS, HEAD_DIM], tl.float32)
    for first in range(start, stop, BLOCK_KEYS):
        column = first + tl.arange(0, BLOCK_KEYS)
        is_key = column < length
        offsets = column.to(tl.int64)[:, None]
        k = tl.load(key + offsets * key_s + channels[None, :], mask=is_key[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        if HAS_SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 / softcap) * LOG2_E) + 1.0))  # tanh
        seen = is_key[None, :]
        if IS_CAUSAL:
            seen = seen & (column[None, :] <= position[:, None])
        if HAS_WINDOW:
            seen = seen & (column[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores * LOG2_E, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        reference = tl.where(larger == -float("inf"), 0.0, larger)  # of a row that has seen no key yet
        weights = tl.exp2(scores - reference[:, None])
        rescale = tl.exp2(largest - reference)
        total = total * rescale + tl.sum(weights, 1)
        v = tl.load(value + offsets * value_s + channels[None, :], mask=is_key[:, None], other=0.0)
        sums = sums * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest = larger

    num_heads = NUM_KEY_HEADS * GROUP
    cell = (
        (split.to(tl.int64) * (tl.num_programs(2) // NUM_KEY_HEADS) + batch) * num_heads + query_head
    ) * num_rows + row
    cells = tl.num_programs(0).to(tl.int64) * tl.num_programs(2) * GROUP * num_rows
    tl.store(statistics + cell, largest, mask=is_row)
    tl.store(statistics + cells + cell, total, mask=is_row)
    if start < stop:  # the merge does not read the sums of a split without keys
        tl.store(partial + cell[:, None] * HEAD_DIM + channels[None, :], sums, mask=is_row[:, None])


@triton.jit(do_not_specialize=["num_splits", "num_rows"])
def merge_splits_kernel(
    partial,
    statistics,
    sinks,
    output,
    num_splits,
    num_rows,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """The splits of one query together, in their order, and a sink."""
    cell, cells = tl.program_id(0), tl.num_programs(0).to(tl.int64)
    head = cell // num_rows % NUM_HEADS
    batch, row = cell // num_rows // NUM_HEADS, cell % num_rows
    channels = tl.arange(0, HEAD_DIM)
    # A sink is one more key, whose value is zero.
    largest, total = -float("inf"), 0.0
    if HAS_SINKS:
        largest, total = tl.load(sinks + head).to(tl.float32) * LOG2_E, 1.0
    sums = tl.zeros([HEAD_DIM], tl.float32)
    for first in range(0, num_splits, BLOCK_SPLITS):
        splits = first + tl.arange(0, BLOCK_SPLITS)
        places = splits * cells + cell
        theirs = tl.load(statistics + places, mask=splits < num_splits, other=-float("inf"))
        is_seen = theirs > -float("inf")  # the query sees a key of this split
        totals = tl.load(statistics + num_splits * cells + places, mask=is_seen, other=0.0)
        offsets = places[:, None] * HEAD_DIM + channels[None, :]
        states = tl.load(partial + offsets, mask=is_seen[:, None], other=0.0)
        larger = tl.maximum(largest, tl.max(theirs, 0))
        reference = tl.where(larger == -float("inf"), 0.0, larger)
        rescale, weights = tl.exp2(largest - reference), tl.exp2(theirs - reference)
        total = total * rescale + tl.sum(weights * totals, 0)
        sums = sums * rescale + tl.sum(weights[:, None] * states, 0)
        largest = larger
    result = sums / total
    tl.store(
        output + ((batch * num_rows + row) * NUM_HEADS + head) * HEAD_DIM + channels,
        result.to(output.dtype.element_ty),
    )
