"""The training loss (paper section 5): 0.1 CE + 0.9 L1 + 1.0 confidence, each a weighted mean over supervised rows.

Logits exist for one chunk of rows at a time, in the forward pass only: the gradient of a row's loss in its logits is
known in closed form, so it goes through the heads at once and only gradients of their inputs stay. Peak memory of such
tensors, in bytes, for chunks of C rows and a draft of V tokens: `CHUNK_BYTES * C * V`. (Reading the target adds its
whole vocabulary in fp32 for 64 rows, before.)

Where the draft has a vocabulary of its own, what the target gives to other tokens counts in full in the L1, and a
label outside has no cross entropy.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

CE_WEIGHT, L1_WEIGHT, CONFIDENCE_WEIGHT = 0.1, 0.9, 1.0
# Per row and token: draft logits and target probabilities in fp32, their parts in the heads' dtype and a copy while
# they are made, and the gradient in the heads' dtype (at most fp32). tests/test_train_loss.py counts them.
CHUNK_BYTES = 6 * 4


@dataclass(frozen=True, slots=True)
class RowOutcomes:
    """What is known of each row [R], without gradient."""

    cross_entropy: torch.Tensor  # -log p_draft(label); 0 for labels that the draft cannot propose
    overlap: torch.Tensor  # 1 - 1/2 ||p_draft - p_target||_1: probability that a sampled token is accepted
    agrees: torch.Tensor  # the two argmaxes are one: a greedy token is accepted


def block_loss(
    draft_logits_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    target_probs_of: Callable[[torch.Tensor], torch.Tensor],
    hidden_states: torch.Tensor,  # [R, H]  of the draft
    latents: torch.Tensor,  # [R, r]  what the sequential head projects to its bias; r = 0 without one
    bias_weight: torch.Tensor | None,  # [V, r]  of that projection, used by `draft_logits_of`
    target_rows: torch.Tensor,  # [R]  what `target_probs_of` is asked for
    labels: torch.Tensor,  # [R]  the next token of the text as a token of the draft; -1: the draft has none for it
    best_ids: torch.Tensor,  # [R]  the target's argmax, likewise
    confidence_logits: torch.Tensor | None,  # [R]
    weights: torch.Tensor,  # [R]
    *,
    chunk_rows: int,
) -> tuple[torch.Tensor, RowOutcomes]:
    """The weighted sum of the rows' losses (not yet divided by a sum of weights), and their outcomes."""
    loss, *outcomes = _LogitsLoss.apply(
        hidden_states,
        latents,
        bias_weight,
        (draft_logits_of, target_probs_of, target_rows, labels, best_ids, weights.float(), chunk_rows),
    )
    outcomes = RowOutcomes(*outcomes)
    if confidence_logits is not None:
        # The label is the analytic acceptance; no gradient flows into it.
        rows = nn.functional.binary_cross_entropy_with_logits(confidence_logits, outcomes.overlap, reduction="none")
        loss = loss + CONFIDENCE_WEIGHT * (rows * weights).sum()
    return loss, outcomes


class _LogitsLoss(torch.autograd.Function):
    """Sum of weights * (0.1 CE + 0.9 L1) over rows; gradients are made chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx, hidden_states, latents, bias_weight, arguments):
        draft_logits_of, target_probs_of, target_rows, labels, best_ids, weights, chunk_rows = arguments
        inputs = [hidden_states, latents] if bias_weight is None else [hidden_states, latents, bias_weight]
        gradients = [torch.zeros_like(tensor) for tensor in inputs]
        needed = [tensor.requires_grad for tensor in inputs]
        losses, outcomes = [], []
        for start in range(0, len(labels), chunk_rows):
            rows = slice(start, start + chunk_rows)
            leaves = [hidden_states[rows].detach(), latents[rows].detach()]
            leaves += inputs[2:]
            with torch.enable_grad():
                for leaf, is_needed in zip(leaves[:2], needed[:2], strict=True):
                    leaf.requires_grad_(is_needed)
                logits = draft_logits_of(*leaves[:2])
            loss, gradient, *outcome = _rows(
                logits.detach(), target_probs_of(target_rows[rows]), labels[rows], best_ids[rows], weights[rows]
            )
            losses.append(loss)
            outcomes.append(outcome)
            wanted = [leaf for leaf, is_needed in zip(leaves, needed, strict=True) if is_needed]
            if wanted:
                found = iter(torch.autograd.grad(logits, wanted, gradient, allow_unused=True))
                for index, is_needed in enumerate(needed):
                    part = next(found) if is_needed else None
                    if part is not None:
                        gradients[index][rows if index < 2 else slice(None)] += part
        ctx.save_for_backward(*gradients)
        joined = [torch.cat(parts) for parts in zip(*outcomes, strict=True)]
        ctx.mark_non_differentiable(*joined)
        return (torch.stack(losses).sum(), *joined)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        gradients = [gradient * grad_loss for gradient in ctx.saved_tensors]
        return (*gradients, *[None] * (4 - len(gradients)))


def _rows(
    draft_logits: torch.Tensor,
    target_probs: torch.Tensor,
    labels: torch.Tensor,
    best_ids: torch.Tensor,
    weights: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Loss, its gradient in the draft logits [C, V], and CE, overlap and agreement of each row. Overwrites its inputs.

    d CE / d z = p - e_label; d ||p - q||_1 / d z = p * (s - <s, p>) with s = sign(p - q).
    """
    is_known = labels >= 0
    labels, weights = labels.clamp_min(0).unsqueeze(-1), weights.unsqueeze(-1)
    ce_weights = CE_WEIGHT * weights * is_known.unsqueeze(-1)
    agrees = draft_logits.argmax(-1) == best_ids
    label_logits = draft_logits.gather(-1, labels)
    draft_probs, log_normaliser = _softmax_(draft_logits)
    cross_entropy = (log_normaliser - label_logits) * is_known.unsqueeze(-1)
    mass_outside = (1 - target_probs.sum(-1, keepdim=True)).clamp_min(0)
    sign = target_probs.neg_().add_(draft_probs)
    l1 = torch.linalg.vector_norm(sign, ord=1, dim=-1, keepdim=True) + mass_outside
    sign.sign_()
    mean_sign = torch.linalg.vecdot(sign, draft_probs).unsqueeze(-1)
    gradient = sign.sub_(mean_sign).mul_(L1_WEIGHT * weights).add_(ce_weights).mul_(draft_probs)
    gradient.scatter_add_(-1, labels, -ce_weights)
    loss = (ce_weights * cross_entropy + L1_WEIGHT * weights * l1).sum()
    overlap = (1 - 0.5 * l1).clamp(0, 1)
    return loss, gradient, cross_entropy.squeeze(-1), overlap.squeeze(-1), agrees


def _softmax_(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax of `logits` [C, V] in their own memory, and the logarithm of its normaliser [C, 1]."""
    largest = logits.amax(-1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    return logits.div_(total), largest + total.log()
