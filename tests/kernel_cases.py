"""What tests of Triton kernels share: where they run, and an interpreter that computes bfloat16.

Without a GPU the kernels run in Triton's interpreter (conftest.py sets TRITON_INTERPRET before anything imports
them); on a GPU the same cases run as compiled.
"""

import importlib.util

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
NO_TRITON = "Triton is not installed (pip install hf-dspark[kernels])"
# For `pytest.mark.parametrize("device", DEVICES)`.
DEVICES = [
    pytest.param("cpu", id="interpreter", marks=pytest.mark.skipif(HAS_GPU or not HAS_TRITON, reason=NO_TRITON)),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Largest difference at most `tolerance` times the largest expected value; nothing but numbers."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    actual, expected = actual.double(), expected.double()
    assert actual.isfinite().all()
    difference = (actual - expected).abs().max().item()
    assert difference <= tolerance * expected.abs().max().item(), f"differs by {difference:.2e}"


def teach_interpreter_bfloat16() -> None:
    """Make Triton's interpreter (3.6 to 3.9) compute bfloat16 as torch does.

    It keeps bfloat16 as 16-bit words and adds, multiplies and compares the words as integers; it narrows by cutting.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def wide(handle):
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    def narrow(values):
        words = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = (words + 0x7FFF + ((words >> 16) & 1)) >> 16  # to nearest, ties to even
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)

    def is_bf16(handle):
        return handle.dtype.scalar == tl.bfloat16

    def wrap(name, on_bf16):
        original = getattr(InterpreterBuilder, name)

        def patched(self, first, *args):
            return on_bf16(first, *args) if is_bf16(first) else original(self, first, *args)

        setattr(InterpreterBuilder, name, patched)

    def binary(lhs, rhs, op):
        result = op(wide(lhs), wide(rhs))
        return TensorHandle(result if result.dtype == np.bool_ else narrow(result), tl.bfloat16)

    def dot(a, b, d, *precision):
        return TensorHandle(np.matmul(wide(a), wide(b)) + d.data, d.dtype.scalar)

    cast = InterpreterBuilder.cast_impl

    def cast_impl(self, source, to, *rounding):
        if is_bf16(source) and to.scalar != tl.bfloat16:
            source = TensorHandle(wide(source), tl.float32)
        if to.scalar == tl.bfloat16 and not is_bf16(source):
            return TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        return source if source.dtype.scalar == to.scalar else cast(self, source, to)

    wrap("binary_op", binary)
    wrap("unary_op", lambda arg, op: TensorHandle(narrow(op(wide(arg))), tl.bfloat16))
    wrap("create_dot", dot)
    InterpreterBuilder.cast_impl = InterpreterBuilder.create_fp_to_fp = cast_impl


def sum_in_one_order(monkeypatch) -> None:
    """The interpreter's matrix product, which sums otherwise by shape and place, as a GPU's."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def wide(handle):
        if handle.data.dtype == np.uint16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data.astype(np.float32)

    def dot(self, a, b, d, *precision):
        return TensorHandle(np.einsum("ij,jk->ik", wide(a), wide(b), optimize=False) + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


if HAS_TRITON and not HAS_GPU:
    teach_interpreter_bfloat16()
