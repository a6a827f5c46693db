"""Triton twins of flat functions, under the same names; `dispatch.py` finds them here. Needs the extra `kernels`."""
