"""Linear layers of few rows in Triton: each program walks over whole rows of the weight, with many steps on their way,
and reads them once. All states lie in one tile: a row's sums do not depend on how many rows there are.
"""

import math

import torch
import triton
import triton.language as tl

from .launch import FUSION, shared_memory

MAX_ROWS = 16  # of the one tile
BLOCK_N, BLOCK_K = 64, 128
BLOCKS = {"BLOCK_ROWS": MAX_ROWS, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K}  # whatever the number of rows
MAX_STAGES = 6  # steps on their way: so an H200 reads the weight at 3.4 to 4.0 TB/s


def few_rows_linear(states, weight, bias=None):
    """See `few_rows.few_rows_linear`."""
    run = _as_one_operator if torch.compiler.is_compiling() else _launch
    return run(states, weight, bias)


def _launch(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    num_columns, num_channels = weight.shape
    rows = states.reshape(-1, num_channels).contiguous()
    output = states.new_empty(*states.shape[:-1], num_columns)
    few_rows_kernel[num_columns // BLOCK_N,](
        rows,
        weight,
        None if bias is None else bias.contiguous(),
        output,
        rows.shape[0],
        num_columns,
        num_channels,
        **BLOCKS,
        **options(shared_memory(states.device)),
    )
    return output


# A trace cannot look into how the kernel is launched, and need not.
_as_one_operator = torch.library.custom_op("hf_dspark::few_rows_linear", _launch, mutates_args=())


@_as_one_operator.register_fake
def _(states, weight, bias):
    return states.new_empty(*states.shape[:-1], weight.shape[0])


def why_not_few_rows_linear(states, weight, bias=None) -> str | None:
    """Why the kernel cannot serve; None where it can."""
    parameters = (weight,) if bias is None else (weight, bias)
    if any(type(parameter) not in (torch.Tensor, torch.nn.Parameter) for parameter in parameters):
        return "the weights are quantised or sharded"
    num_columns, num_channels = weight.shape
    num_rows = math.prod(states.shape[:-1])
    tensors = (states, *parameters)
    expected = (num_channels, num_channels, num_columns)[: len(tensors)]
    reasons = {
        f"more than {MAX_ROWS} rows": num_rows > MAX_ROWS,
        "there are no rows": num_rows == 0,
        f"it is in {states.dtype}": states.dtype not in (torch.float16, torch.bfloat16),
        "states and weights are of several types": len({tensor.dtype for tensor in tensors}) > 1,
        "states and weights are on several devices": len({tensor.device for tensor in tensors}) > 1,
        f"a weight of {num_columns} x {num_channels}": num_columns % BLOCK_N != 0 or num_channels % BLOCK_K != 0,
        "the shapes do not match": tuple(x.shape[-1] for x in tensors) != expected,
        "the weight's rows do not lie one after another": weight.stride() != (num_channels, 1),
        "a gradient is asked for": torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
    }
    return next((reason for reason, is_met in reasons.items() if is_met), None)


def options(shared_memory: int) -> dict:
    """How the kernel is launched: as many steps are on their way as fit, up to MAX_STAGES."""
    step = (BLOCK_N + MAX_ROWS) * BLOCK_K * 2
    return {"num_warps": 4, "num_stages": min(MAX_STAGES, shared_memory // step), **FUSION}


@triton.jit(do_not_specialize=["num_rows"])
def few_rows_kernel(
    states,  # [M, K]
    weight,  # [N, K]
    bias,  # [N]; None: there is none
    output,  # [M, N]  written
    num_rows,
    num_columns,
    num_channels,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All rows of BLOCK_N columns. The weight stands first: tensor cores multiply 64 rows of it at once."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, channels = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_K)
    is_row = (rows < num_rows)[None, :]
    their_weight = weight + columns.to(tl.int64)[:, None] * num_channels + channels[None, :]
    their_states = states + rows[None, :] * num_channels + channels[:, None]
    sums = tl.zeros([BLOCK_N, BLOCK_ROWS], tl.float32)
    for first in range(0, num_channels, BLOCK_K):
        w = tl.load(their_weight + first)
        x = tl.load(their_states + first, mask=is_row, other=0.0)
        sums = tl.dot(w, x, sums)
    if bias is not None:
        sums += tl.load(bias + columns).to(tl.float32)[:, None]
    places = output + rows[None, :] * num_columns + columns[:, None]
    tl.store(places, sums.to(output.dtype.element_ty), mask=is_row)
