"""Blocks for training: anchors sampled in the target's answers; their tokens, positions, weights, mask (section 5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from ..configuration_dspark import DSparkConfig
from .answers import Sample


@dataclass(frozen=True, slots=True)
class Blocks:
    """A anchors of B sequences of S tokens, each with a block of g positions; all tensors on the anchors' device.

    B is 1 but for `stack_blocks`; every sequence has A/B of the anchors.
    """

    anchor_positions: torch.Tensor  # [A]
    block_ids: torch.Tensor  # [A, inputs]  draft inputs: the anchor, then masks
    previous_ids: torch.Tensor  # [A, g]  teacher forcing: x_{k-1}, the anchor for k = 1
    labels: torch.Tensor  # [A, g]  x_k
    target_rows: torch.Tensor  # [A, g]  position, of all B*S, whose target logits predict x_k
    weights: torch.Tensor  # [A, g]  exp(-(k-1)/d) where supervised, else 0
    position_ids: torch.Tensor  # [B, S + A/B*inputs]  of the context, then of the blocks
    attention_mask: torch.Tensor  # [B, 1, A/B*inputs, S + A/B*inputs]  True where seen


def sample_anchors(sample: Sample, num_anchors: int, generator: torch.Generator) -> torch.Tensor:
    """Up to `num_anchors` anchor positions [A] in the answers of `sample`, sorted, without repetition; on a CPU.

    An anchor is a token of an answer whose next token belongs to the same answer, as in decoding.
    """
    eligible = torch.cat([torch.arange(start, stop - 1) for start, stop in sample.answer_spans])
    chosen = torch.randperm(len(eligible), generator=generator)[:num_anchors]
    return eligible[chosen].sort().values


def blocks_of_draft(config: DSparkConfig, sample: Sample, anchors: torch.Tensor, *, position_decay: float) -> Blocks:
    """Blocks of `anchors` [A] as a draft of this config reads them; its layers must be of one type."""
    return build_blocks(
        sample,
        anchors,
        block_size=config.block_size,
        mask_token_id=config.mask_token_id,
        position_decay=position_decay,
        first_slot=config.first_slot,
        causal=config.causal,
        window=config.sliding_window if "sliding_attention" in config.layer_types else None,
    )


def build_blocks(
    sample: Sample,
    anchors: torch.Tensor,
    *,
    block_size: int,
    mask_token_id: int,
    position_decay: float,
    first_slot: int = 0,
    causal: bool = False,
    window: int | None = None,
) -> Blocks:
    """Blocks of `anchors` [A]. Supervision of a block stops at the end of its answer.

    `first_slot`, `causal` and `window` are the draft's (DSparkConfig).
    """
    ids = torch.tensor(sample.input_ids, device=anchors.device)
    length = len(ids)
    offset = torch.arange(block_size, device=anchors.device)
    positions = anchors.unsqueeze(-1) + offset  # [A, g]  of the tokens before the labels
    inputs = anchors.unsqueeze(-1) + torch.arange(block_size + first_slot, device=anchors.device)
    stops = torch.zeros(length, dtype=torch.long, device=anchors.device)
    for start, stop in sample.answer_spans:
        stops[start:stop] = stop
    supervised = positions + 1 < stops[anchors].unsqueeze(-1)
    padded = torch.cat([ids, ids.new_zeros(block_size)])
    block_ids = torch.full_like(inputs, mask_token_id)
    block_ids[:, 0] = ids[anchors]
    return Blocks(
        anchor_positions=anchors,
        block_ids=block_ids,
        previous_ids=padded[positions],
        labels=padded[positions + 1],
        target_rows=positions.clamp_max(length - 1),
        weights=supervised * torch.exp(-offset / position_decay),
        position_ids=torch.cat([torch.arange(length, device=anchors.device), inputs.flatten()]).unsqueeze(0),
        attention_mask=_block_mask(anchors, length, inputs.shape[1], causal, window),
    )


def stack_blocks(parts: Sequence[Blocks]) -> Blocks:
    """Blocks of single sequences as one batch, for states stacked likewise.

    Shorter sequences are padded with blocks of weight 0 that see only themselves.
    """
    if len(parts) == 1:
        return parts[0]
    count = max(len(part.weights) for part in parts)
    length = max(_context_length(part) for part in parts)
    padded = [_padded(part, count, length) for part in parts]
    stacked = {name: torch.cat([getattr(part, name) for part in padded]) for name in Blocks.__slots__}
    offsets = torch.arange(len(parts), device=stacked["target_rows"].device).repeat_interleave(count) * length
    stacked["target_rows"] += offsets.unsqueeze(-1)
    return Blocks(**stacked)


def _context_length(blocks: Blocks) -> int:
    return blocks.position_ids.shape[1] - blocks.block_ids.numel()


def _padded(blocks: Blocks, count: int, length: int) -> Blocks:
    """A single sequence's blocks with `count` of them behind a context of `length`."""
    missing, gap = count - len(blocks.weights), length - _context_length(blocks)
    inputs, num_inputs = blocks.block_ids.numel(), missing * blocks.block_ids.shape[1]
    context, positions = blocks.position_ids.split([length - gap, inputs], dim=1)
    sees_context, sees_blocks = blocks.attention_mask.split([length - gap, inputs], dim=-1)
    mask = pad(torch.cat([pad(sees_context, (0, gap)), sees_blocks], dim=-1), (0, num_inputs, 0, num_inputs))
    mask[..., inputs:, length + inputs :].diagonal(dim1=-2, dim2=-1).fill_(True)  # a row needs one key at least
    rows = ("block_ids", "previous_ids", "labels", "target_rows", "weights")
    return Blocks(
        **{name: pad(getattr(blocks, name), (0, 0, 0, missing)) for name in rows},
        anchor_positions=pad(blocks.anchor_positions, (0, missing)),
        position_ids=torch.cat([pad(context, (0, gap)), pad(positions, (0, num_inputs))], dim=1),
        attention_mask=mask,
    )


def _block_mask(anchors: torch.Tensor, length: int, num_inputs: int, causal: bool, window: int | None) -> torch.Tensor:
    """Every block position sees the context before its anchor, and its block: [1, 1, A*inputs, S + A*inputs]."""
    block_of_row = torch.arange(len(anchors), device=anchors.device).repeat_interleave(num_inputs)
    distance = anchors[block_of_row].unsqueeze(-1) - torch.arange(length, device=anchors.device)
    sees_context = (distance > 0) & (distance <= (length if window is None else window))
    sees_block = block_of_row.unsqueeze(-1) == block_of_row
    if causal:
        sees_block = sees_block.tril()
    return torch.cat([sees_context, sees_block], dim=-1)[None, None]
