"""Block attention's levels on a GPU: every case against the plain function in fp64, then what each takes. No pytest.

    python tests/gpu_levels.py

Shapes of Qwen3-8B, 8 tokens a row, bfloat16, microseconds a layer (medians, cold caches). "stock" is transformers'
sdpa of such a forward (keys repeated, a mask); "floor" reads keys and values once at the speed of a copy.
"""

from functools import partial

import torch
import triton
from attention_cases import CASES, TOLERANCES, in_double
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_dspark import attention, kernels

plain = attention.block_attention.__wrapped__
BATCHES, CONTEXTS, TOKENS = (1, 8, 32), (2048, 8192), 8
HEADS, KEY_HEADS, HEAD_DIM = 32, 8, 128


def level_1(query, key, value, *, lengths=None, is_causal, window=None, mask=None, **settings):
    """As the plain function where flash cannot serve."""
    if lengths is not None:
        is_own = (torch.arange(key.shape[2], device=key.device) < lengths.view(-1, 1))[:, None, :, None]
        key, value = (states.masked_fill(~is_own, 0) for states in (key, value))
    mask = attention.visible_keys(query, key, lengths, is_causal=is_causal, window=window)
    settings = {"softcap": None, "sinks": None} | settings
    return attention._packed(query, key, value, mask, **settings)


def level_2(query, key, value, *, lengths=None, softcap=None, sinks=None, **settings):
    """torch's flash attention."""
    return attention._flash(query, key, value, lengths, **settings | {"window": settings.get("window")})


def fits(level, states, settings) -> bool:
    """Whether a level takes these inputs."""
    if level is kernels.block_attention:
        return kernels.why_not_block_attention(*states, **settings) is None
    limits = {"mask": None, "softcap": settings["softcap"], "sinks": settings["sinks"]}
    return level is level_1 or attention.why_not_flash(*states, **limits) is None


def check(name: str, level) -> None:
    """Run all cases that the level takes; say which are wrong, and the largest difference of each type."""
    wrong, ran, largest = [], 0, dict.fromkeys(TOLERANCES, 0.0)
    for case in CASES:
        states, settings = case.inputs("cuda")
        if not fits(level, states, settings):
            continue
        ran += 1
        double_states, double_settings = in_double((states, settings))
        expected = plain(*double_states, **double_settings)
        difference = (level(*states, **settings).double().cpu() - expected).abs().max() / expected.abs().max()
        largest[case.dtype] = max(largest[case.dtype], difference.item())
        if not difference <= case.tolerance:
            wrong.append(f"{case.name} ({difference:.1e})")
    shares = ", ".join(f"{str(dtype)[6:]} {value:.1e}" for dtype, value in largest.items())
    print(f"{name}: {ran - len(wrong)} of {ran} cases right; largest difference {shares}; wrong: {wrong or 'none'}")


def check_bits() -> None:
    """Level 3: a row alone against the row among eight."""
    (query, key, value), settings = next(c for c in CASES if c.name == "ragged, bf16").inputs("cuda")
    together = kernels.block_attention(query, key, value, **settings)
    equal = 0
    for row in range(query.shape[2]):
        alone = settings | {"lengths": settings["lengths"] - query.shape[2] + 1 + row}
        equal += torch.equal(kernels.block_attention(query[:, :, [row]], key, value, **alone), together[:, :, [row]])
    print(f"triton: {equal} of {query.shape[2]} rows have the same bits alone as together")


def microseconds(function, *args, **kwargs) -> float:
    """Median of a call."""
    return 1000 * triton.testing.do_bench(partial(function, *args, **kwargs), warmup=10, rep=60, return_mode="median")


def stock(query, key, value, mask):
    """As transformers' sdpa does it, by the efficient kernel: keys repeated, a mask."""
    group = HEADS // KEY_HEADS
    key, value = (
        states[:, :, None].expand(-1, -1, group, -1, -1).reshape(states.shape[0], HEADS, -1, HEAD_DIM)
        for states in (key, value)
    )
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def time_levels() -> None:
    """The table. Ragged rows have between half and all of the keys."""
    print(f"{'B':>3} {'keys':>6} {'stock':>8} {'1':>8} {'2':>8} {'3':>8} {'2 ragged':>9} {'3 ragged':>9} {'floor':>8}")
    for batch_size in BATCHES:
        for context in CONTEXTS:
            options = {"device": "cuda", "dtype": torch.bfloat16}
            query = torch.randn(batch_size, TOKENS, HEADS, HEAD_DIM, **options).transpose(1, 2)
            key, value = torch.randn(2, batch_size, KEY_HEADS, context, HEAD_DIM, **options)
            lengths = torch.linspace(context // 2, context, batch_size, device="cuda").int()
            settings = {"scaling": HEAD_DIM**-0.5, "is_causal": True}
            mask = attention.visible_keys(query, key, is_causal=True)
            levels = (level_1, level_2, kernels.block_attention)
            row = [microseconds(stock, query, key, value, mask)]
            row += [microseconds(level, query, key, value, **settings) for level in levels]
            row += [microseconds(level, query, key, value, **settings, lengths=lengths) for level in levels[1:]]
            row.append(microseconds(torch.stack, (key, value)) / 2)  # which reads and writes them
            print(f"{batch_size:3d} {context:6d} " + " ".join(f"{v:8.1f}" for v in row[:4]), end=" ")
            print(" ".join(f"{v:9.1f}" for v in row[4:6]) + f" {row[6]:8.1f}")


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
    check("packed queries", level_1)
    check("flash", level_2)
    check("triton", kernels.block_attention)
    check_bits()
    time_levels()
