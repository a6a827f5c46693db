"""Linear layers of so few rows, a verified block of a sequence or two, that reading the weight is all they take."""

import functools
import math

import torch
from torch.nn import functional as F

from .dispatch import with_kernel

FEW_ROWS = 16
MANY_COLUMNS = 4096  # one program of the twin has 64 of them, and an H200 132 multiprocessors


def _why_not_sooner(states, weight, bias=None) -> str | None:
    """Why torch's own product is better than the Triton twin; None where it is not.

    On an H200 cuBLAS was faster than another tile of the twin for 64 rows.
    """
    if not states.is_cuda:
        return None
    if math.prod(states.shape[:-1]) > FEW_ROWS:
        return f"more than {FEW_ROWS} rows are cuBLAS's"
    if weight.shape[0] < MANY_COLUMNS:
        return f"fewer than {MANY_COLUMNS} columns would leave multiprocessors idle"
    return None


@functools.partial(with_kernel, unless=_why_not_sooner, is_slower=False)
def few_rows_linear(
    states: torch.Tensor,  # [..., K]
    weight: torch.Tensor,  # [N, K]
    bias: torch.Tensor | None = None,  # [N]
) -> torch.Tensor:
    """The linear layer's [..., N], as torch computes it. Its twin reads the weight once, in one launch."""
    return F.linear(states, weight, bias)
