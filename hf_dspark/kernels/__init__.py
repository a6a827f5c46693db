"""Triton twins of flat functions, under the same names; `dispatch.py` finds them here. Needs the extra `kernels`."""

from .triton_acceptance import accept_and_draw, why_not_accept_and_draw
from .triton_sampling import sample_block, why_not_sample_block

__all__ = ["accept_and_draw", "sample_block", "why_not_accept_and_draw", "why_not_sample_block"]
