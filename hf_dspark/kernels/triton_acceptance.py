"""Acceptance and the token after it, from logits in three launches: statistics of tiles, decision, draw.

Reads each row once and one row's two laws a second time; nothing V wide is written.
"""

import torch
import triton
import triton.language as tl

from ..state import Choice
from .triton_search import find_share

BLOCK_V = 2048
# Columns behind which a row's list of tiles would be longer than a program holds.
MAX_VOCAB = BLOCK_V * 1024


def why_not_accept_and_draw(target_logits, draft_ids, draft_logits, uniforms, temperature, generator) -> str | None:
    """The reason why `accept_and_draw` cannot serve; None where it can."""
    tensors = (target_logits, draft_logits, uniforms)
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        return f"logits and uniforms of {', '.join(str(tensor.dtype) for tensor in tensors)}"
    if len({tensor.device for tensor in (*tensors, draft_ids)}) > 1:
        return "its arguments are on several devices"
    if target_logits.shape[-1] != draft_logits.shape[-1]:
        return f"vocabularies of {target_logits.shape[-1]} and {draft_logits.shape[-1]} tokens"
    if target_logits.shape[-1] > MAX_VOCAB:
        return f"a vocabulary of more than {MAX_VOCAB} tokens"
    return None


def accept_and_draw(target_logits, draft_ids, draft_logits, uniforms, temperature, generator) -> Choice:
    """Twin of `accept.accept_and_draw`; the token after the accepted ones takes one uniform number of `generator`."""
    num_rows, length = draft_ids.shape
    num_columns = target_logits.shape[-1]
    target_logits, draft_logits = (_with_whole_rows(logits) for logits in (target_logits, draft_logits))
    device = target_logits.device
    next_uniforms = torch.rand(num_rows, dtype=torch.float64, device=device, generator=generator)
    num_tiles, num_lines = triton.cdiv(num_columns, BLOCK_V), 2 * length + 1
    largest = torch.empty(num_rows, num_lines, num_tiles, device=device)
    masses = torch.empty_like(largest, dtype=torch.float64)
    shares = torch.empty(num_rows, 2, num_tiles, dtype=torch.float64, device=device)
    num_accepted = draft_ids.new_empty(num_rows)
    token_ids = draft_ids.new_empty(num_rows, length + 1)
    strides = (target_logits.stride(0), draft_logits.stride(0))
    logits = (target_logits, draft_logits, *strides, float(temperature), length, num_columns)
    blocks = {"BLOCK_V": BLOCK_V, "num_warps": 8}
    draft_ids, uniforms = draft_ids.contiguous(), uniforms.contiguous()
    with torch.cuda.device_of(target_logits):
        _summarise[num_tiles, num_lines, num_rows](*logits, largest, masses, **blocks)
        decision = (largest, masses, draft_ids, num_accepted, shares)
        block_tiles = triton.next_power_of_2(num_tiles)
        _decide[num_tiles, num_rows](*logits, *decision, uniforms, BLOCK_TILES=block_tiles, **blocks)
        _draw[num_rows,](*logits, *decision, next_uniforms, token_ids, BLOCK_TILES=block_tiles, **blocks)
    return Choice(token_ids, num_accepted, None)


def _with_whole_rows(logits: torch.Tensor) -> torch.Tensor:
    """`logits` [B, L, V] with L rows behind one another; a batch stride may be larger."""
    is_whole = logits.stride(2) == 1 and logits.stride(1) == logits.shape[2]
    return logits if is_whole else logits.contiguous()


@triton.jit(do_not_specialize=["length"])
def _summarise(
    target_logits,  # [B, L+1, V]  fp32
    draft_logits,  # [B, L, V]  fp32
    target_stride,  # from one row of the batch to the next
    draft_stride,
    temperature,
    length,
    num_columns,
    largest,  # [B, L+1+L, tiles]  fp32, written: of the target's lines, then of the draft's
    masses,  # [B, L+1+L, tiles]  fp64, written: sums of exp((logit - largest) / temperature)
    BLOCK_V: tl.constexpr,
):
    tile, line, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if line <= length:
        start = target_logits + row * target_stride + line * num_columns
    else:
        start = draft_logits + row * draft_stride + (line - length - 1) * num_columns
    columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = tl.load(start + columns, mask=columns < num_columns, other=-float("inf"))
    top = tl.max(logits, 0)
    # A draft with a vocabulary of its own may propose none of a tile's tokens.
    finite_top = tl.where(top == -float("inf"), 0.0, top)
    mass = tl.sum(tl.exp((logits - finite_top) / temperature).to(tl.float64), 0)
    place = (row * tl.num_programs(1) + line) * tl.num_programs(0) + tile
    tl.store(largest + place, top)
    tl.store(masses + place, mass)


@triton.jit
def _probs_at(logits, columns, num_columns, largest, masses, line, num_tiles, temperature, BLOCK_TILES: tl.constexpr):
    """Probabilities of some columns of the logits' line that `logits` points to; 0 outside the vocabulary.

    `line` is where the statistics of that line's tiles are.
    """
    tiles = tl.arange(0, BLOCK_TILES)
    is_tile = tiles < num_tiles
    tops = tl.load(largest + line * num_tiles + tiles, mask=is_tile, other=-float("inf"))
    mass = tl.load(masses + line * num_tiles + tiles, mask=is_tile, other=0.0)
    top = tl.max(tops, 0)
    total = tl.sum(mass * tl.exp((tops - top) / temperature).to(tl.float64), 0).to(tl.float32)
    values = tl.load(logits + columns, mask=columns < num_columns, other=-float("inf"))
    return tl.exp((values - top) / temperature) / total


@triton.jit
def _laws_behind(
    target_logits,
    draft_logits,
    target_stride,
    draft_stride,
    temperature,
    length,
    num_columns,
    largest,
    masses,
    row,
    kept,
    tile,
    num_tiles,
    BLOCK_V: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """A tile of the target's law behind `kept` accepted tokens, and of its residual; the same after full acceptance."""
    columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    line = row * (2 * length + 1)
    start = target_logits + row * target_stride + kept * num_columns
    target_probs = _probs_at(
        start, columns, num_columns, largest, masses, line + kept, num_tiles, temperature, BLOCK_TILES
    )
    rejected = tl.minimum(kept, length - 1)
    line += length + 1 + rejected
    start = draft_logits + row * draft_stride + rejected * num_columns
    used_columns = tl.where(kept < length, num_columns, 0)
    draft_probs = _probs_at(start, columns, used_columns, largest, masses, line, num_tiles, temperature, BLOCK_TILES)
    return target_probs.to(tl.float64), tl.maximum(target_probs - draft_probs, 0.0).to(tl.float64)


@triton.jit(do_not_specialize=["length"])
def _decide(
    target_logits,
    draft_logits,
    target_stride,
    draft_stride,
    temperature,
    length,
    num_columns,
    largest,
    masses,
    draft_ids,  # [B, L]
    num_accepted,  # [B]  written
    shares,  # [B, 2, tiles]  fp64, written: mass of the target's law behind the accepted tokens, and of the residual
    uniforms,  # [B, L]
    BLOCK_V: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """All programs of a row come to the same decision; each weighs one tile of the laws that it leads to."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_tiles = tl.num_programs(0)
    line = row * (2 * length + 1)
    kept = 0
    goes_on = 1
    for k in range(length):
        token = tl.load(draft_ids + row * length + k)
        start = target_logits + row * target_stride + k * num_columns
        target_prob = _probs_at(
            start, token, num_columns, largest, masses, line + k, num_tiles, temperature, BLOCK_TILES
        )
        start = draft_logits + row * draft_stride + k * num_columns
        draft_line = line + length + 1 + k
        draft_prob = _probs_at(
            start, token, num_columns, largest, masses, draft_line, num_tiles, temperature, BLOCK_TILES
        )
        is_kept = tl.load(uniforms + row * length + k) * draft_prob < target_prob
        goes_on = goes_on * is_kept.to(tl.int32)
        kept += goes_on
    target_probs, residual = _laws_behind(
        target_logits,
        draft_logits,
        target_stride,
        draft_stride,
        temperature,
        length,
        num_columns,
        largest,
        masses,
        row,
        kept,
        tile,
        num_tiles,
        BLOCK_V,
        BLOCK_TILES,
    )
    tl.store(shares + row * 2 * num_tiles + tile, tl.sum(target_probs, 0))
    tl.store(shares + (row * 2 + 1) * num_tiles + tile, tl.sum(residual, 0))
    if tile == 0:
        tl.store(num_accepted + row, kept)


@triton.jit(do_not_specialize=["length"])
def _draw(
    target_logits,
    draft_logits,
    target_stride,
    draft_stride,
    temperature,
    length,
    num_columns,
    largest,
    masses,
    draft_ids,
    num_accepted,
    shares,
    uniforms,  # [B]  fp64
    token_ids,  # [B, L+1]  written
    BLOCK_V: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """The token behind the accepted ones: of the residual, or of the target's law where that has no mass."""
    row = tl.program_id(0).to(tl.int64)
    num_tiles = tl.cdiv(num_columns, BLOCK_V)
    tiles = tl.arange(0, BLOCK_TILES)
    is_tile = tiles < num_tiles
    kept = tl.load(num_accepted + row).to(tl.int32)
    target_mass = tl.load(shares + row * 2 * num_tiles + tiles, mask=is_tile, other=0.0)
    residual_mass = tl.load(shares + (row * 2 + 1) * num_tiles + tiles, mask=is_tile, other=0.0)
    has_residual = tl.sum(residual_mass, 0) > 0
    mass = tl.where(has_residual, residual_mass, target_mass)
    share = tl.load(uniforms + row) * tl.sum(mass, 0)
    tile, before = find_share(mass, share, BLOCK_TILES)
    target_probs, residual = _laws_behind(
        target_logits,
        draft_logits,
        target_stride,
        draft_stride,
        temperature,
        length,
        num_columns,
        largest,
        masses,
        row,
        kept,
        tile,
        num_tiles,
        BLOCK_V,
        BLOCK_TILES,
    )
    column, _ = find_share(tl.where(has_residual, residual, target_probs), share - before, BLOCK_V)
    next_id = (tile * BLOCK_V + column).to(tl.int64)
    for k in range(length + 1):
        drafted = tl.load(draft_ids + row * length + k, mask=k < length, other=0)
        tl.store(token_ids + row * (length + 1) + k, tl.where(k < kept, drafted, next_id))
