"""Step 3, schedule: how many drafted tokens the target reads. A schedule never looks at the tokens themselves.

Whether token k is verified may depend on confidences up to c_k only, which read tokens before k: otherwise the
output's law changes (paper, Appendix A).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class FixedLength:
    """Verify `num_tokens` drafted tokens each round; None is the whole block, 0 never drafts."""

    num_tokens: int | None = None
    needs_confidence = False

    def __post_init__(self):
        _check_num_tokens(self.num_tokens)

    def __call__(self, confidence: torch.Tensor) -> torch.Tensor:
        """Verify lengths [B] for confidences [B, g]."""
        length = confidence.shape[1] if self.num_tokens is None else min(self.num_tokens, confidence.shape[1])
        return torch.full((confidence.shape[0],), length, device=confidence.device)


@dataclass(frozen=True, slots=True)
class ConfidenceThreshold:
    """Stop before the first position whose conditional confidence c_k is below `threshold` (paper section 4).

    A threshold of 0 verifies all that `num_tokens` allows (None: the whole block).
    """

    threshold: float
    num_tokens: int | None = None
    needs_confidence = True

    def __post_init__(self):
        _check_num_tokens(self.num_tokens)
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"`threshold` is a probability and must lie between 0 and 1, got {self.threshold}.")

    def __call__(self, confidence: torch.Tensor) -> torch.Tensor:
        """Verify lengths [B] for confidences [B, g]."""
        reached = (confidence >= self.threshold).long().cumprod(-1).sum(-1)
        return reached if self.num_tokens is None else reached.clamp_max(self.num_tokens)


def schedule_from(num_tokens: int | None, threshold: float | None) -> FixedLength | ConfidenceThreshold:
    """The schedule that `num_assistant_tokens` and `assistant_confidence_threshold` of a generation config ask for."""
    if threshold is None:
        return FixedLength(num_tokens)
    return ConfidenceThreshold(threshold, num_tokens)


def _check_num_tokens(num_tokens: int | None) -> None:
    if num_tokens is not None and num_tokens < 0:
        raise ValueError(f"`num_tokens` is a number of drafted tokens and must be at least 0, got {num_tokens}.")
