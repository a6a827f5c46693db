"""Blocks for training: anchors sampled in the target's answers; their tokens, positions, weights, mask (section 5)."""

from dataclasses import dataclass

import torch

from ..configuration_dspark import DSparkConfig
from .answers import Sample


@dataclass(frozen=True, slots=True)
class Blocks:
    """A anchors of one sequence of S tokens, each with a block of g positions; all tensors on one device."""

    anchor_positions: torch.Tensor  # [A]
    block_ids: torch.Tensor  # [A, inputs]  draft inputs: the anchor, then masks
    previous_ids: torch.Tensor  # [A, g]  teacher forcing: x_{k-1}, the anchor for k = 1
    labels: torch.Tensor  # [A, g]  x_k
    target_rows: torch.Tensor  # [A, g]  position whose target logits predict x_k
    weights: torch.Tensor  # [A, g]  exp(-(k-1)/d) where supervised, else 0
    position_ids: torch.Tensor  # [1, S + A*inputs]  of the context, then of the blocks
    attention_mask: torch.Tensor  # [1, 1, A*inputs, S + A*inputs]  True where seen

    def to(self, device: torch.device) -> "Blocks":
        """The same on `device`."""
        return Blocks(*(getattr(self, name).to(device) for name in self.__slots__))


def sample_anchors(sample: Sample, num_anchors: int, generator: torch.Generator) -> torch.Tensor:
    """Up to `num_anchors` anchor positions [A] in the answers of `sample`, sorted, without repetition.

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
    ids = torch.tensor(sample.input_ids)
    length = len(ids)
    offset = torch.arange(block_size)
    positions = anchors.unsqueeze(-1) + offset  # [A, g]  of the tokens before the labels
    inputs = anchors.unsqueeze(-1) + torch.arange(block_size + first_slot)
    stops = torch.zeros(length, dtype=torch.long)
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
        position_ids=torch.cat([torch.arange(length), inputs.flatten()]).unsqueeze(0),
        attention_mask=_block_mask(anchors, length, inputs.shape[1], causal, window),
    )


def _block_mask(anchors: torch.Tensor, length: int, num_inputs: int, causal: bool, window: int | None) -> torch.Tensor:
    """Every block position sees the context before its anchor, and its block: [1, 1, A*inputs, S + A*inputs]."""
    block_of_row = torch.arange(len(anchors)).repeat_interleave(num_inputs)
    distance = anchors[block_of_row].unsqueeze(-1) - torch.arange(length)
    sees_context = (distance > 0) & (distance <= (length if window is None else window))
    sees_block = block_of_row.unsqueeze(-1) == block_of_row
    if causal:
        sees_block = sees_block.tril()
    return torch.cat([sees_context, sees_block], dim=-1)[None, None]
