"""Quantised blocks of DeepSeek-V4's files -> floating point, bit for bit: fp8 with block scales, fp4 with row scales.

Products of an e4m3 or e2m1 value and a power of two are exact in bfloat16, so nothing is lost by either.
"""

import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FP4_GROUP = 32  # columns that share a scale


def decode_e8m0(scale: torch.Tensor) -> torch.Tensor:
    """Powers of two 2^(b-127) in fp32 from bytes b, stored as float8_e8m0fnu or uint8; 255 is NaN."""
    return scale.contiguous().view(torch.float8_e8m0fnu).float()


def dequantize_fp8(
    weight: torch.Tensor,  # [rows, columns]  float8_e4m3fn
    scale: torch.Tensor,  # [ceil(rows / block rows), ceil(columns / block columns)]  e8m0
    block_size: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """weight[i, j] * scale[i // block rows, j // block columns] in `dtype`; the last blocks may be cut short."""
    rows, columns = weight.shape
    height, width = block_size
    factors = decode_e8m0(scale).repeat_interleave(width, dim=1)[:, :columns]
    values = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    for i, factor in enumerate(factors):  # a row of blocks at a time: no second copy in fp32
        part = slice(i * height, (i + 1) * height)
        values[part] = weight[part].float() * factor
    return values


def dequantize_fp4(
    packed: torch.Tensor,  # [rows, columns / 2]  a byte holds two e2m1 codes, the even column's in its low bits
    scale: torch.Tensor,  # [rows, columns / 32]  e8m0
    dtype: torch.dtype,
) -> torch.Tensor:
    """Values [rows, columns] in `dtype`: each code's value times the scale of its row's 32 columns."""
    codes = torch.tensor(E2M1, dtype=dtype, device=packed.device)
    pairs = torch.cartesian_prod(codes, codes).flip(-1)  # byte -> its two columns
    values = torch.nn.functional.embedding(packed.view(torch.uint8).int(), pairs)  # [rows, columns / 2, 2]
    factors = decode_e8m0(scale).to(dtype).unsqueeze(-1)
    return (values.reshape(packed.shape[0], -1, FP4_GROUP) * factors).flatten(1)
