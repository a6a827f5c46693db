"""Triton twins of flat functions, under the same names; `dispatch.py` finds them here. Needs the extra `kernels`."""

from .triton_attention import block_attention, why_not_block_attention

__all__ = ["block_attention", "why_not_block_attention"]
