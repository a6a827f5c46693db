"""Acceptance and the token after it, from logits in three launches: statistics of tiles, decision, draw.

Reads each row once and one row's two laws a second time; nothing V wide is written.
"""

import torch
import triton
import triton.language as tl

from ..state import Choice
from .launch import FUSION
from .triton_search import find_share

BLOCK_V = 2048
OPTIONS = {"num_warps": 8, **FUSION}
# Columns behind which a row's list of tiles would be longer than a program holds.
MAX_VOCAB = BLOCK_V * 1024


def why_not_accept_and_draw(
    target_logits, draft_ids, draft_logits, uniforms, temperature, generator, limits=None
) -> str | None:
    """The reason why `accept_and_draw` cannot serve; None where it can."""
    tensors = (target_logits, draft_logits, uniforms)
    numbers = (draft_ids,) if limits is None else (draft_ids, limits)
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        return f"logits and uniforms of {', '.join(str(tensor.dtype) for tensor in tensors)}"
    if len({tensor.device for tensor in (*tensors, *numbers)}) > 1:
        return "its arguments are on several devices"
    if target_logits.shape[-1] != draft_logits.shape[-1]:
        return f"vocabularies of {target_logits.shape[-1]} and {draft_logits.shape[-1]} tokens"
    if target_logits.shape[-1] > MAX_VOCAB:
        return f"a vocabulary of more than {MAX_VOCAB} tokens"
    return None


def accept_and_draw(target_logits, draft_ids, draft_logits, uniforms, temperature, generator, limits=None) -> Choice:
    """Twin of `accept.accept_and_draw`; the token after the accepted ones takes one uniform number of `generator`."""
    num_rows, length = draft_ids.shape
    num_columns = target_logits.shape[-1]
    target_logits, draft_logits = (_with_whole_rows(logits) for logits in (target_logits, draft_logits))
    device = target_logits.device
    next_uniforms = torch.rand(num_rows, dtype=torch.float64, device=device, generator=generator)
    num_tiles, num_lines = triton.cdiv(num_columns, BLOCK_V), 2 * length + 1
    largest = torch.empty(num_rows, num_lines, num_tiles, device=device)
    masses = torch.empty_like(largest, dtype=torch.float64)
    num_accepted = draft_ids.new_empty(num_rows)
    norms = torch.empty(num_rows, 4, device=device)
    shares = torch.empty(num_rows, 2, num_tiles, dtype=torch.float64, device=device)
    token_ids = draft_ids.new_empty(num_rows, length + 1)
    strides = (target_logits.stride(0), draft_logits.stride(0))
    logits = (target_logits, draft_logits, *strides, float(temperature), length, num_columns)
    limits = None if limits is None else limits.contiguous()
    decision = (draft_ids.contiguous(), limits, num_accepted, norms, shares)
    blocks = {"BLOCK_V": BLOCK_V, **OPTIONS}
    tiles = blocks | {"BLOCK_TILES": triton.next_power_of_2(num_tiles)}
    # Blocks of up to 15 tokens share one compiled kernel.
    lines = tiles | {"BLOCK_LINES": max(16, triton.next_power_of_2(length + 1))}
    with torch.cuda.device_of(target_logits):
        summarise_kernel[num_tiles, num_lines, num_rows](*logits, largest, masses, **blocks)
        decide_kernel[num_tiles, num_rows](*logits, *decision, largest, masses, uniforms.contiguous(), **lines)
        draw_kernel[num_rows,](*logits, *decision, next_uniforms, token_ids, **tiles)
    return Choice(token_ids, num_accepted, None)


def _with_whole_rows(logits: torch.Tensor) -> torch.Tensor:
    """`logits` [B, L, V] with L rows behind one another; a batch stride may be larger."""
    is_whole = logits.stride(2) == 1 and logits.stride(1) == logits.shape[2]
    return logits if is_whole else logits.contiguous()


@triton.jit(do_not_specialize=["length"])
def summarise_kernel(
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
def _norms(largest, masses, lines, is_line, num_tiles, temperature, BLOCK_TILES: tl.constexpr):
    """Largest logit and sum of exp((logit - largest) / temperature) of each of `lines`, from those of its tiles."""
    tiles = tl.arange(0, BLOCK_TILES)
    is_used = is_line[:, None] & (tiles < num_tiles)[None, :]
    places = lines[:, None] * num_tiles + tiles[None, :]
    tops = tl.load(largest + places, mask=is_used, other=-float("inf"))
    mass = tl.load(masses + places, mask=is_used, other=0.0)
    top = tl.where(is_line, tl.max(tops, 1), 0.0)
    total = tl.sum(mass * tl.exp((tops - top[:, None]) / temperature).to(tl.float64), 1)
    return top, tl.where(is_line, total.to(tl.float32), 1.0)


@triton.jit
def _probs(logits, places, is_used, top, total, temperature):
    """softmax(logits / temperature) at `places` behind the pointer `logits`; 0 where they are not used."""
    return tl.exp((tl.load(logits + places, mask=is_used, other=-float("inf")) - top) / temperature) / total


@triton.jit
def _laws_at(
    target_line,
    draft_line,
    columns,
    num_columns,
    num_rejected_columns,  # none after full acceptance
    temperature,
    target_top,
    target_total,
    draft_top,
    draft_total,
):
    """The target's law at `columns` and its residual, which is the law itself after full acceptance; in fp64."""
    target_probs = _probs(target_line, columns, columns < num_columns, target_top, target_total, temperature)
    is_rejected = columns < num_rejected_columns
    draft_probs = _probs(draft_line, columns, is_rejected, draft_top, draft_total, temperature)
    return target_probs.to(tl.float64), tl.maximum(target_probs - draft_probs, 0.0).to(tl.float64)


@triton.jit
def _limit_of(row, limits, length):
    limit = length
    if limits is not None:
        limit = tl.minimum(tl.load(limits + row), length).to(tl.int32)
    return limit


@triton.jit(do_not_specialize=["length"])
def decide_kernel(
    target_logits,
    draft_logits,
    target_stride,
    draft_stride,
    temperature,
    length,
    num_columns,
    draft_ids,  # [B, L]
    limits,  # [B]  drafted tokens that are considered; None: all
    num_accepted,  # [B]  written
    norms,  # [B, 4]  fp32, written: of the line behind the accepted tokens, largest logit and sum, target and draft
    shares,  # [B, 2, tiles]  fp64, written: mass of the target's law there, and of the residual
    largest,
    masses,
    uniforms,  # [B, L]
    BLOCK_V: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
):
    """All programs of a row come to the same decision; each weighs one tile of the laws that it leads to."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_tiles = tl.num_programs(0)
    k = tl.arange(0, BLOCK_LINES)
    limit = _limit_of(row, limits, length)
    is_drafted = k < limit
    line = row * (2 * length + 1) + k
    target_tops, target_totals = _norms(largest, masses, line, k <= length, num_tiles, temperature, BLOCK_TILES)
    line += length + 1
    draft_tops, draft_totals = _norms(largest, masses, line, is_drafted, num_tiles, temperature, BLOCK_TILES)
    target_logits += row * target_stride
    draft_logits += row * draft_stride
    places = k * num_columns + tl.load(draft_ids + row * length + k, mask=is_drafted, other=0)
    target_probs = _probs(target_logits, places, is_drafted, target_tops, target_totals, temperature)
    draft_probs = _probs(draft_logits, places, is_drafted, draft_tops, draft_totals, temperature)
    bounds = tl.load(uniforms + row * length + k, mask=is_drafted, other=0.0) * draft_probs
    kept = tl.min(tl.where(is_drafted & (bounds < target_probs), BLOCK_LINES, k), 0)
    is_here = k == kept
    target_top = tl.sum(tl.where(is_here, target_tops, 0.0), 0)
    target_total = tl.sum(tl.where(is_here, target_totals, 0.0), 0)
    draft_top = tl.sum(tl.where(is_here, draft_tops, 0.0), 0)
    draft_total = tl.sum(tl.where(is_here, draft_totals, 0.0), 0)
    target_mass, residual = _laws_at(
        target_logits + kept * num_columns,
        draft_logits + kept * num_columns,
        tile * BLOCK_V + tl.arange(0, BLOCK_V),
        num_columns,
        tl.where(kept < limit, num_columns, 0),
        temperature,
        target_top,
        target_total,
        draft_top,
        draft_total,
    )
    shares += row * 2 * num_tiles + tile
    tl.store(shares, tl.sum(target_mass, 0))
    tl.store(shares + num_tiles, tl.sum(residual, 0))
    if tile == 0:
        norms += row * 4
        tl.store(num_accepted + row, kept)
        tl.store(norms, target_top)
        tl.store(norms + 1, target_total)
        tl.store(norms + 2, draft_top)
        tl.store(norms + 3, draft_total)


@triton.jit(do_not_specialize=["length"])
def draw_kernel(
    target_logits,
    draft_logits,
    target_stride,
    draft_stride,
    temperature,
    length,
    num_columns,
    draft_ids,
    limits,
    num_accepted,
    norms,
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
    kept = tl.load(num_accepted + row)
    shares += row * 2 * num_tiles + tiles
    target_mass = tl.load(shares, mask=is_tile, other=0.0)
    residual_mass = tl.load(shares + num_tiles, mask=is_tile, other=0.0)
    has_residual = tl.sum(residual_mass, 0) > 0
    mass = tl.where(has_residual, residual_mass, target_mass)
    limit = _limit_of(row, limits, length)
    share = tl.load(uniforms + row) * tl.sum(mass, 0)
    tile, before = find_share(mass, share, BLOCK_TILES)
    norms += row * 4
    target_mass, residual = _laws_at(
        target_logits + row * target_stride + kept * num_columns,
        draft_logits + row * draft_stride + kept * num_columns,
        tile * BLOCK_V + tl.arange(0, BLOCK_V),
        num_columns,
        tl.where(kept < limit, num_columns, 0),
        temperature,
        tl.load(norms),
        tl.load(norms + 1),
        tl.load(norms + 2),
        tl.load(norms + 3),
    )
    column, _ = find_share(tl.where(has_residual, residual, target_mass), share - before, BLOCK_V)
    next_id = (tile * BLOCK_V + column).to(tl.int64)
    for k in range(length + 1):
        drafted = tl.load(draft_ids + row * length + k, mask=k < length, other=0)
        tl.store(token_ids + row * (length + 1) + k, tl.where(k < kept, drafted, next_id))
