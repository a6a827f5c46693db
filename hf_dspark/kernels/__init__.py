"""Triton twins of flat functions, under the same names; `dispatch.py` finds them here. Needs the extra `kernels`."""

from .triton_acceptance import accept_and_draw, why_not_accept_and_draw
from .triton_attention import block_attention, why_not_block_attention
from .triton_linear import few_rows_linear, why_not_few_rows_linear
from .triton_sampling import sample_block, why_not_sample_block

__all__ = [
    "accept_and_draw",
    "block_attention",
    "few_rows_linear",
    "sample_block",
    "why_not_accept_and_draw",
    "why_not_block_attention",
    "why_not_few_rows_linear",
    "why_not_sample_block",
]
