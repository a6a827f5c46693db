"""Linear layers of few rows: the Triton twin is the plain function, says what it does not serve, and is chosen."""

from typing import NamedTuple

import pytest
import torch
from kernel_cases import DEVICES, assert_close, sum_in_one_order
from torch import nn

from hf_dspark import dispatch, few_rows
from hf_dspark.few_rows import FEW_ROWS, few_rows_linear

kernels = pytest.importorskip("hf_dspark.kernels")
plain = few_rows_linear.__wrapped__
on_devices = pytest.mark.parametrize("device", DEVICES)


class Case(NamedTuple):
    """A layer, and how far its output may be from the plain function's in fp64, relative to the largest."""

    shape: tuple[int, ...]  # of the states, without their channels
    num_columns: int = 64
    num_channels: int = 128
    dtype: torch.dtype = torch.bfloat16
    has_bias: bool = False
    is_strided: bool = False  # neither rows nor channels of the states lie side by side
    tolerance: float = 2**-8 + 1e-5
    reason: str = "the result is rounded to bf16, and the sums before it are in fp32"

    def inputs(self, device: str):
        """States, weight, bias."""
        generator = torch.Generator().manual_seed(3)
        states = torch.randn(self.num_channels, *reversed(self.shape), generator=generator).to(self.dtype).to(device)
        states = states.permute(*reversed(range(states.dim())))
        if not self.is_strided:
            states = states.contiguous()
        weight = torch.randn(self.num_columns, self.num_channels, generator=generator).to(self.dtype).to(device)
        bias = torch.randn(self.num_columns, generator=generator).mul(30).to(self.dtype).to(device)
        return states, weight, bias if self.has_bias else None


FP16 = {"dtype": torch.float16, "tolerance": 2**-11 + 1e-5, "reason": "likewise, to fp16"}
CASES = {
    "one row": Case((1,)),
    "a row by itself": Case(()),
    "seven rows, several tiles": Case((7,), 320, 256),
    "a block": Case((8,), 192, 1280),
    "sixteen rows, bias": Case((16,), 320, 1280, has_bias=True),
    "one row, bias": Case((1,), 64, 1280, has_bias=True),
    "two sequences of eight": Case((2, 8), 192, 384, has_bias=True),
    "three axes, strided": Case((2, 7), 192, 384, is_strided=True),
    "strided, bias": Case((8,), 128, 256, is_strided=True, has_bias=True),
    "fp16": Case((8,), 320, 1280, **FP16),
    "fp16, bias": Case((1, 16), 128, 1280, has_bias=True, **FP16),
    "fp16, strided": Case((3, 5), 128, 256, is_strided=True, **FP16),
}


def _in_double(states, weight, bias):
    return plain(states.double(), weight.double(), None if bias is None else bias.double())


@on_devices
@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_plain_function(name, device):
    case = CASES[name]
    inputs = case.inputs(device)
    assert inputs[0].is_contiguous() != case.is_strided
    assert kernels.why_not_few_rows_linear(*inputs) is None
    output = kernels.few_rows_linear(*inputs)
    assert output.dtype == case.dtype
    assert_close(output.double(), _in_double(*inputs), case.tolerance)


@on_devices
def test_bias_is_added_before_the_sum_is_rounded(device):
    """It cancels all but what rounding would have cut off; of that, fp32's errors are a larger share, 1e-3."""
    states, weight, _ = CASES["a block"].inputs(device)
    bias = -plain(states[0].double(), weight.double()).bfloat16()
    output = kernels.few_rows_linear(states[:1], weight, bias)
    assert_close(output.double(), _in_double(states[:1], weight, bias), 2**-8 + 1e-3)


@on_devices
def test_a_rows_bits_do_not_depend_on_how_many_rows_there_are(device, monkeypatch):
    """The sums cancel, so that all that is left is what fp32 has rounded."""
    if device == "cpu":
        sum_in_one_order(monkeypatch)
    states, weight, _ = Case((16,), 64, 640).inputs(device)
    order = torch.randperm(1280, generator=torch.Generator().manual_seed(4)).to(device)
    states, weight = torch.cat([states, states], -1)[:, order], torch.cat([weight, -weight], -1)[:, order]
    together = kernels.few_rows_linear(states, weight)
    assert (together != 0).float().mean() > 0.5
    for row in range(16):
        assert torch.equal(kernels.few_rows_linear(states[row : row + 1], weight), together[row : row + 1])
    for num_rows in (7, 8):
        assert torch.equal(kernels.few_rows_linear(states[-num_rows:], weight), together[-num_rows:])
    other = torch.arange(1279, -1, -1, device=device)
    assert not torch.equal(kernels.few_rows_linear(states[:, other], weight[:, other]), together)


class _Quantised(nn.Parameter):
    """Stands for the classes of weights that are no plain numbers."""


W, B = torch.zeros(64, 128).bfloat16(), torch.zeros(64).bfloat16()
REFUSED = {
    "more than 16 rows": {"states": torch.zeros(17, 128).bfloat16()},
    "more than 16 rows, of several sequences": {"states": torch.zeros(3, 6, 128).bfloat16()},
    "there are no rows": {"states": torch.zeros(2, 0, 128).bfloat16()},
    "it is in torch.float32": {"states": torch.zeros(8, 128), "weight": W.float(), "bias": B.float()},
    "it is in torch.float64": {"states": torch.zeros(8, 128).double(), "weight": W.double(), "bias": None},
    "several types: the weight": {"weight": W.half()},
    "several types: the bias": {"bias": B.float()},
    "several devices": {"weight": W.to("meta")},
    "a weight of 96 x 128": {"weight": torch.zeros(96, 128).bfloat16(), "bias": None},
    "a weight of 64 x 192": {"states": torch.zeros(8, 192).bfloat16(), "weight": torch.zeros(64, 192).bfloat16()},
    "the shapes do not match": {"states": torch.zeros(8, 256).bfloat16()},
    "the shapes do not match: the bias": {"bias": torch.zeros(128).bfloat16()},
    "one after another": {"weight": torch.zeros(128, 64).bfloat16().T},
    "one after another: a slice": {"weight": torch.zeros(64, 256).bfloat16()[:, :128]},
    "a gradient is asked for": {"weight": nn.Parameter(W)},
    "a gradient is asked for: the states": {"states": torch.zeros(8, 128).bfloat16().requires_grad_()},
    "a gradient is asked for: the bias": {"bias": nn.Parameter(B)},
    "quantised or sharded": {"weight": _Quantised(W, requires_grad=False)},
    "quantised or sharded: the bias": {"bias": _Quantised(B, requires_grad=False)},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_does_not_serve_is_said(name):
    served = {"states": torch.zeros(8, 128).bfloat16(), "weight": W, "bias": B}
    assert kernels.why_not_few_rows_linear(**served) is None
    assert name.split(":")[0].split(",")[0] in kernels.why_not_few_rows_linear(**served | REFUSED[name])


@torch.no_grad()
def test_parameters_are_served_where_no_gradient_is_asked_for():
    assert kernels.why_not_few_rows_linear(torch.zeros(8, 128).bfloat16(), nn.Parameter(W), nn.Parameter(B)) is None


def test_kernel_takes_all_rows_that_are_few():
    assert FEW_ROWS == kernels.triton_linear.MAX_ROWS


@pytest.mark.parametrize(("kibibytes", "stages"), [(99, 4), (163, 6), (227, 6)])
def test_as_many_steps_are_on_their_way_as_fit(kibibytes, stages):
    assert kernels.triton_linear.options(kibibytes * 1024)["num_stages"] == stages


class _OnCuda(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


@on_devices
def test_few_rows_run_by_the_kernel_and_many_by_the_plain_function_without_a_warning(
    device, kernels_everywhere, monkeypatch
):
    warned = []
    monkeypatch.setattr(dispatch.logger, "warning_once", warned.append)
    monkeypatch.setattr(few_rows, "MANY_COLUMNS", 64)
    states, weight, bias = Case((17,), has_bias=True).inputs(device)
    if device == "cpu":
        states = states.as_subclass(_OnCuda)
    assert few_rows_linear(states[:16], weight, bias).shape == (16, 64)
    assert dispatch.report()["few_rows_linear"] == "Triton"
    assert few_rows_linear(states, weight, bias=bias).tolist() == plain(states, weight, bias).tolist()
    few_rows_linear(states[:8], weight[:32])
    few_rows_linear(states[:8, :96], weight[:, :96])
    said = (
        "more than 16 rows are cuBLAS's",
        "fewer than 64 columns would leave multiprocessors idle",
        "a weight of 64 x 96",
    )
    assert dispatch.report()["few_rows_linear"] == "; ".join(("Triton", *(f"not Triton: {text}" for text in said)))
    assert warned == []


def test_tensors_on_a_cpu_run_plainly_for_the_usual_reason(kernels_everywhere, monkeypatch):
    monkeypatch.setattr(dispatch, "_devices", frozenset({torch.device("cuda", 0)}))
    for num_rows in (8, 17):
        inputs = Case((num_rows,)).inputs("cpu")
        assert torch.equal(few_rows_linear(*inputs), plain(*inputs))
    assert dispatch.report()["few_rows_linear"] == "not Triton: it is on cpu"


@on_devices
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("has_bias", [False, True])
@torch.no_grad()
def test_kernel_is_one_operator_of_a_trace(has_bias, backend, device, kernels_everywhere, monkeypatch):
    monkeypatch.setattr(few_rows, "MANY_COLUMNS", 128)
    states, weight, bias = Case((2, 8), 128, 256, has_bias=has_bias, is_strided=True).inputs(device)
    weight = nn.Parameter(weight)

    def double(states):
        return few_rows_linear(states, weight, bias) * 2

    output = torch.compile(double, backend=backend, fullgraph=True, dynamic=False)(states)
    assert torch.equal(output, kernels.few_rows_linear(states, weight, bias) * 2)
    assert dispatch.report()["few_rows_linear"] == "Triton"


@on_devices
def test_operator_is_what_it_says_to_a_trace(device):
    states, weight, bias = Case((2, 8), has_bias=True, is_strided=True).inputs(device)
    torch.library.opcheck(torch.ops.hf_dspark.few_rows_linear.default, (states, weight, bias))
