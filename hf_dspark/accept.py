"""Step 5, accept: the longest accepted prefix and the law of the token after it (paper section 2.1). Pure, batched."""

import torch

from .state import Acceptance, Distribution


def accept_prefix(
    draft_ids: torch.Tensor,  # [B, L]
    draft_probs: torch.Tensor,  # [B, L, V]  the law each token was drawn from
    target_probs: torch.Tensor,  # [B, L+1, V]
    uniforms: torch.Tensor,  # [B, L]  in [0, 1)
) -> Acceptance:
    """Keep drafted tokens left to right with probability min(1, p_target / p_draft); then the residual law.

    The comparison is strict, so a uniform of exactly 0 never accepts a token the target gives probability 0.
    Where the residual (p_target - p_draft)+ has no mass (equal laws up to rounding), the target's law is used.
    """
    tokens = draft_ids.unsqueeze(-1)
    kept = uniforms * draft_probs.gather(-1, tokens).squeeze(-1) < target_probs[:, :-1].gather(-1, tokens).squeeze(-1)
    num_accepted = kept.long().cumprod(-1).sum(-1)

    row = num_accepted.view(-1, 1, 1).expand(-1, 1, target_probs.shape[-1])
    target_row = target_probs.gather(1, row).squeeze(1)
    # After full acceptance nothing is subtracted: the bonus token comes from the target's own last row.
    padded = torch.cat([draft_probs, torch.zeros_like(target_probs[:, :1])], dim=1)
    residual = (target_row - padded.gather(1, row).squeeze(1)).clamp_min(0)
    mass = residual.sum(-1, keepdim=True)
    from_residual = (num_accepted < draft_ids.shape[1]).unsqueeze(-1) & (mass > 0)
    return Acceptance(num_accepted, torch.where(from_residual, residual / mass, target_row))


def accept_greedy(draft_ids: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
    """Number of drafted tokens [B] that equal the target's own choice: `draft_ids` [B, L], `target_ids` [B, L+1].

    The same rule with one-hot laws; the token after them is `target_ids` at that position.
    """
    return (draft_ids == target_ids[:, :-1]).long().cumprod(-1).sum(-1)


def on_common_support(
    draft_ids: torch.Tensor,  # [B, L]
    draft: Distribution,  # L positions
    target: Distribution,  # L+1 positions
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Drafted columns [B, L], draft probabilities [B, L, K] and target probabilities [B, L+1, K] over one support.

    The support is the target's, with one more column for every token outside it: the target gives it probability 0,
    so it can neither be accepted nor be drawn, and its draft probability matters only to be positive.
    """
    if target.support_ids is None:
        return draft_ids, _dense(draft, vocab_size), target.probs
    ids = target.support_ids[:, :-1]
    if draft.support_ids is None:
        draft_probs = draft.probs.gather(-1, ids)
    else:
        same = ids.unsqueeze(-1) == draft.support_ids.unsqueeze(-2)  # [B, L, K_target, K_draft]
        draft_probs = (same * draft.probs.unsqueeze(-2)).sum(-1)
    outside = torch.ones_like(draft_probs[..., :1])
    hit = ids == draft_ids.unsqueeze(-1)
    columns = torch.where(hit.any(-1), hit.long().argmax(-1), ids.shape[-1])
    target_probs = torch.cat([target.probs, torch.zeros_like(target.probs[..., :1])], dim=-1)
    return columns, torch.cat([draft_probs, outside], dim=-1), target_probs


def _dense(distribution: Distribution, vocab_size: int) -> torch.Tensor:
    if distribution.support_ids is None:
        return distribution.probs
    probs = distribution.probs
    return probs.new_zeros(*probs.shape[:-1], vocab_size).scatter(-1, distribution.support_ids, probs)
