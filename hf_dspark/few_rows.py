"""Linear layers of so few rows, a verified block of a sequence or two, that reading the weight is all they take."""

import functools
import math

import torch
from torch.nn import functional as F

from .dispatch import with_kernel

FEW_ROWS = 16


def _has_many_rows(states, weight, bias=None) -> str | None:
    """Why torch's own product is better than the Triton twin; None where it is not."""
    is_better = states.is_cuda and math.prod(states.shape[:-1]) > FEW_ROWS
    return f"cuBLAS is as fast from {FEW_ROWS + 1} rows on" if is_better else None


@functools.partial(with_kernel, unless=_has_many_rows)
def few_rows_linear(
    states: torch.Tensor,  # [..., K]
    weight: torch.Tensor,  # [N, K]
    bias: torch.Tensor | None = None,  # [N]
) -> torch.Tensor:
    """The linear layer's [..., N], as torch computes it. Its twin reads the weight once, in one launch."""
    return F.linear(states, weight, bias)
