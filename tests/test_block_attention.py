"""Block attention: the plain function is what it says, each level is the plain function, and the guards hold."""

import inspect
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attention_cases import CASES, Case, in_double
from kernel_cases import DEVICES, HAS_TRITON, NO_TRITON, assert_close, sum_in_one_order
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from hf_dspark import attention, dispatch
from hf_dspark.attention import block_attention, cuda_backends, visible_keys, why_not_flash

plain = block_attention.__wrapped__
ROOT = Path(__file__).resolve().parents[1]
BY_NAME = {case.name: case for case in CASES}
# Bytes of shared memory that a block may have on the part.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


def _by_definition(query, key, value, *, scaling, is_causal, lengths=None, window=None, softcap=None, sinks=None):
    """Query by query, key by key."""
    output = torch.zeros_like(query)
    batch_size, num_heads, num_rows, _ = query.shape
    for b in range(batch_size):
        length = key.shape[2] if lengths is None else int(lengths[b])
        for h in range(num_heads):
            shared = h // (num_heads // key.shape[1])
            for row in range(num_rows):
                position, scores, values = length - num_rows + row, [], []
                for j in range(length):
                    if (is_causal and j > position) or (window is not None and j <= position - window):
                        continue
                    score = float(query[b, h, row] @ key[b, shared, j]) * scaling
                    scores.append(score if softcap is None else softcap * math.tanh(score / softcap))
                    values.append(value[b, shared, j])
                if sinks is not None:
                    scores.append(float(sinks[h]))
                    values.append(torch.zeros_like(values[0]))
                output[b, h, row] = torch.tensor(scores, dtype=torch.double).softmax(0) @ torch.stack(values)
    return output


SMALL = {
    "causal": {},
    "bidirectional": {"is_causal": False},
    "window": {"window": 5},
    "bidirectional window": {"window": 5, "is_causal": False},
    "soft-cap": {"softcap": 0.5},
    "sinks": {"has_sinks": True},
    "one row": {"rows": 1, "window": 4},
    "no keys before the block": {"keys": 4},
    "ragged": {"lengths": (13, 4, 9)},
    "ragged and all flags": {"lengths": (13, 4, 9), "window": 5, "softcap": 0.5, "has_sinks": True},
}


@pytest.mark.core
@pytest.mark.parametrize("name", SMALL)
def test_plain_function_is_what_it_says(name):
    case = Case(name, **{"group": 2, "head_dim": 16, "rows": 4, "keys": 13, **SMALL[name]})
    (query, key, value), settings = in_double(case.inputs("cpu"))
    assert_close(plain(query, key, value, **settings), _by_definition(query, key, value, **settings), 1e-6)


@pytest.mark.core
@pytest.mark.parametrize("name", SMALL)
def test_plain_function_of_a_device_whose_lengths_cannot_be_read_is_the_same(name, monkeypatch):
    case = Case(name, **{"group": 2, "head_dim": 16, "rows": 4, "keys": 13, **SMALL[name]})
    (query, key, value), settings = in_double(case.inputs("cpu"))
    expected = plain(query, key, value, **settings)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_close(plain(query, key, value, **settings), expected, 1e-6)


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.bool, torch.double])
@pytest.mark.parametrize("heads", [1, 4])
def test_mask_stands_for_length_window_and_causality(dtype, heads):
    case = Case("masked", group=2, head_dim=16, rows=4, keys=13, window=5)
    states, settings = in_double(case.inputs("cpu"))
    mask = visible_keys(*states[:2], is_causal=True, window=5).expand(1, heads, 4, 13)
    if dtype == torch.double:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)
    expected = plain(*states, **settings)
    masked = plain(*states, scaling=settings["scaling"], is_causal=False, mask=mask)
    assert_close(masked, expected, 1e-12)
    capped = {"scaling": settings["scaling"], "softcap": 2.0}
    expected = plain(*states, **capped, is_causal=True, window=5)
    assert_close(plain(*states, **capped, is_causal=False, mask=mask), expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [64, 512, 2048])
def test_packed_queries_of_a_block_give_the_bits_of_repeated_keys(keys, dtype, monkeypatch):
    monkeypatch.setattr(attention, "_MULTIPLIES_BF16", False)
    (query, key, value), settings = Case("8 rows", keys=keys, head_dim=128, dtype=dtype).inputs("cpu")
    mask = visible_keys(query, key, is_causal=True)
    repeated = (states.repeat_interleave(4, dim=1) for states in (key, value))
    expected = F.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=settings["scaling"])
    assert torch.equal(plain(query, key, value, **settings), expected)


@pytest.mark.parametrize("by_products", [False, True])
@pytest.mark.parametrize("name", [case.name for case in CASES if case.dtype == torch.bfloat16])
def test_bf16_on_a_cpu_is_right_by_sdpa_and_by_matrix_products(name, by_products, monkeypatch):
    monkeypatch.setattr(attention, "_MULTIPLIES_BF16", by_products)
    case = BY_NAME[name]
    states, settings = case.inputs("cpu")
    expected_states, expected_settings = in_double((states, settings))
    expected = plain(*expected_states, **expected_settings)
    assert_close(plain(*states, **settings).double(), expected, case.tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_only_bf16_goes_by_matrix_products_where_the_cpu_multiplies_it(dtype, monkeypatch):
    monkeypatch.setattr(attention, "_MULTIPLIES_BF16", True)
    called, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kw: called.append(1) or sdpa(*args, **kw))
    states, settings = Case("8 rows", dtype=dtype).inputs("cpu")
    plain(*states, **settings)
    assert bool(called) == (dtype != torch.bfloat16)


def test_keys_are_not_repeated(monkeypatch):
    given = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *states, **kw: given.append(states) or states[0])
    (query, key, value), settings = Case("8 rows").inputs("cpu")
    plain(query, key, value, **settings)
    assert [states.shape for states in given[0]] == [(1, 2, 32, 64), (1, 2, 200, 64), (1, 2, 200, 64)]
    assert given[0][1] is key


@pytest.mark.parametrize(
    ("rows", "keys", "settings"),
    [
        (1, 50, {"is_causal": True}),
        (8, 50, {"is_causal": False}),
        (1, 50, {"is_causal": True, "window": 50}),
        (8, 50, {"is_causal": False, "window": 50}),
    ],
)
def test_no_mask_is_built_where_everything_is_seen(rows, keys, settings):
    (query, key, _), _ = Case("", rows=rows, keys=keys).inputs("cpu")
    assert visible_keys(query, key, **settings) is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BY_NAME)
def test_kernel_equals_plain_function(name, device):
    from hf_dspark import kernels

    case = BY_NAME[name]
    states, settings = case.inputs(device)
    assert kernels.why_not_block_attention(*states, **settings) is None
    expected_states, expected_settings = in_double((states, settings))
    expected = plain(*expected_states, **expected_settings).to(case.dtype)
    output = kernels.block_attention(*states, **settings).cpu()
    assert output.dtype == case.dtype
    assert_close(output.double(), expected.double(), case.tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_do_not_depend_on_how_many_rows_there_are(device, dtype, monkeypatch):
    from hf_dspark.kernels import triton_attention

    if device == "cpu":
        sum_in_one_order(monkeypatch)
    (query, key, value), settings = Case("ragged", keys=300, dtype=dtype, lengths=(300, 150)).inputs(device)
    together = triton_attention.block_attention(query, key, value, **settings)
    for row in range(8):
        alone = settings | {"lengths": settings["lengths"] - 7 + row}
        assert torch.equal(
            triton_attention.block_attention(query[:, :, [row]], key, value, **alone), together[:, :, [row]]
        )
    monkeypatch.setattr(triton_attention, "size_of_splits", lambda *sizes: 512)
    assert not torch.equal(triton_attention.block_attention(query, key, value, **settings), together)


@pytest.mark.skipif(not HAS_TRITON, reason=NO_TRITON)
@pytest.mark.parametrize(
    ("heads", "keys", "size"),
    [(8, 2304, 128), (8, 8448, 256), (64, 2304, 576), (64, 8448, 2112), (256, 2304, 2304), (1000, 8448, 8448)],
)
def test_splits_give_work_to_all_programs_that_run_side_by_side_and_to_no_more(heads, keys, size):
    from hf_dspark.kernels.triton_attention import SPLIT_STEP, block_sizes, size_of_splits

    assert size_of_splits(heads, keys, 264) == size
    assert size % SPLIT_STEP == 0
    for head_dim in (16, 64, 128, 256):
        for element_size in (2, 4):
            assert SPLIT_STEP % block_sizes(head_dim, element_size)["BLOCK_KEYS"] == 0
    num_programs = heads * -(-keys // size)
    assert num_programs <= max(264, heads)
    assert num_programs > 132 or size == 128


@pytest.mark.skipif(not HAS_TRITON, reason=NO_TRITON)
def test_twin_has_the_arguments_of_the_plain_function():
    from hf_dspark import kernels

    expected = list(inspect.signature(plain).parameters)
    for function in (kernels.block_attention, kernels.why_not_block_attention):
        assert sorted(inspect.signature(function).parameters) == sorted(expected)


@pytest.mark.skipif(not HAS_TRITON, reason=NO_TRITON)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.double}, "float64"),
        ({"head_dim": 80}, "head size 80"),
        ({"rows": 65}, "65 rows"),
    ],
)
def test_what_the_kernel_cannot_do_is_said(change, reason):
    from hf_dspark import kernels

    states, settings = Case("", **change).inputs("cpu")
    assert reason in kernels.why_not_block_attention(*states, **settings)


@pytest.mark.skipif(not HAS_TRITON, reason=NO_TRITON)
def test_kernel_refuses_masks_gradients_and_mixed_types():
    from hf_dspark import kernels

    (query, key, value), settings = Case("").inputs("cpu")
    why_not = kernels.why_not_block_attention
    mask = visible_keys(query, key, is_causal=True)
    assert "mask" in why_not(query, key, value, **settings, mask=mask)
    assert "gradient" in why_not(query.clone().requires_grad_(), key, value, **settings)
    assert "several types" in why_not(query.half(), key, value, **settings)
    assert "side by side" in why_not(query, key.transpose(2, 3).contiguous().transpose(2, 3), value, **settings)
    assert "head size" in why_not(query, key, value[..., :32], **settings)


@pytest.mark.parametrize(
    ("change", "is_sooner"),
    [
        ({}, True),
        ({"window": 4}, True),
        ({"lengths": torch.ones(1)}, False),
        ({"mask": torch.ones(1)}, False),
        ({"sinks": torch.ones(1)}, False),
        ({"dtype": torch.float32}, False),
        ({"is_cuda": False}, False),
    ],
    ids=str,
)
def test_flash_is_better_than_the_kernel_where_it_serves_and_nothing_is_captured(change, is_sooner, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fields = {"is_cuda": True, "dtype": torch.bfloat16, "shape": (1, 4, 8, 64), "device": "cuda:0"}
    states = SimpleNamespace(**fields | {name: value for name, value in change.items() if name in fields})
    settings = {"scaling": 1.0, "is_causal": True} | {k: v for k, v in change.items() if k not in fields}
    assert (attention._is_flash_sooner(states, states, states, **settings) is not None) == is_sooner
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert attention._is_flash_sooner(states, states, states, **settings) is None


@pytest.mark.skipif(not HAS_TRITON, reason=NO_TRITON)
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_kernels_compile_ahead_of_time_for_each_part(capability):
    """Without a GPU, in a process that does not interpret."""
    sizes = (str(capability), str(SHARED_MEMORY[capability]))
    command = [sys.executable, str(ROOT / "tests/compile_kernels.py"), *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) >= 28
    for row in rows:
        assert row["stack"] <= 16, row  # single words: four
        assert row["shared"] <= SHARED_MEMORY[capability], row
        multiplies = row["kernel"].startswith(("attention", "add_bias", "linear"))
        assert row["tensor_cores"] > 0 or "fp32" in row["kernel"] or not multiplies, row


def _fake_flash(query, key, value, starts_q, starts_k, max_q, max_k, dropout, is_causal, debug, *, scale, **settings):
    """torch's flash attention as its source documents it: lower-right causal, windows to the left, groups."""
    assert (dropout, debug) == (0.0, False)
    window = settings.pop("window_size_left")
    used = settings.pop("seqused_k", None)
    assert not settings
    flags = {"scaling": scale, "is_causal": is_causal, "window": None if window is None else window + 1}
    if starts_q is None:
        assert (max_q, max_k) == (query.shape[1], key.shape[1])
        return (plain(*(x.transpose(1, 2) for x in (query, key, value)), **flags).transpose(1, 2),)
    outputs = []
    for i, (first, last) in enumerate(zip(starts_q[:-1].tolist(), starts_q[1:].tolist(), strict=True)):
        start = int(starts_k[i])
        keys = slice(start, start + int(used[i]))
        parts = (x.transpose(0, 1)[None] for x in (query[first:last], key[keys], value[keys]))
        outputs.append(plain(*parts, **flags)[0].transpose(0, 1))
    return (torch.cat(outputs),)


@pytest.mark.parametrize(
    "name", [c.name for c in CASES if c.dtype == torch.float32 and not c.has_sinks and not c.softcap]
)
def test_flash_is_given_the_same_question(name, monkeypatch):
    """Level 2 with torch's operator played on the CPU; on a GPU the case itself is run."""
    monkeypatch.setattr(attention, "_flash_forward", _fake_flash)
    states, settings = BY_NAME[name].inputs("cpu")
    del settings["softcap"], settings["sinks"]
    expected = plain(*states, **settings)
    assert_close(attention._flash(*states, settings.pop("lengths"), **settings), expected, 4e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BY_NAME)
def test_levels_without_kernels_on_a_gpu(name, monkeypatch):
    monkeypatch.setenv(dispatch.SWITCH, "0")
    dispatch.load_kernels()
    case = BY_NAME[name]
    states, settings = case.inputs("cuda")
    expected_states, expected_settings = in_double((states, settings))
    expected = plain(*expected_states, **expected_settings)
    output = block_attention(*states, **settings).cpu()
    assert_close(output.double(), expected, case.tolerance)
    has_flash = case.dtype != torch.float32 and not case.has_sinks and case.softcap is None
    assert ("flash" in dispatch.report()["block_attention"].split("; ")) == has_flash


@pytest.mark.parametrize(
    ("change", "given", "reason"),
    [
        ({}, {}, None),
        ({"head_dim": 80}, {}, None),
        ({"dtype": torch.float32}, {}, "float32"),
        ({"head_dim": 36}, {}, "head size 36"),
        ({"head_dim": 512}, {}, "head size 512"),
        ({}, {"mask": torch.ones(1, 1, 8, 200, dtype=torch.bool)}, "mask"),
        ({}, {"softcap": 3.0}, "soft-capped"),
        ({}, {"sinks": torch.zeros(8)}, "sinks"),
    ],
)
def test_what_flash_cannot_do_is_said(change, given, reason):
    states, _ = Case("", **{"dtype": torch.bfloat16, **change}).inputs("cpu")
    said = why_not_flash(*states, **{"mask": None, "softcap": None, "sinks": None, **given})
    assert said is None if reason is None else reason in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 36, 100, 512])
def test_sdpa_on_cuda_never_runs_its_math_nor_plans_by_cudnn(dtype, head_dim):
    backends = cuda_backends(dtype, head_dim, head_dim)
    assert not {SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION} & set(backends)
    is_served = dtype != torch.float64 and head_dim * dtype.itemsize % 16 == 0
    assert (SDPBackend.EFFICIENT_ATTENTION in backends) == is_served


class _OnCuda(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


def test_guard_is_up_while_sdpa_runs_on_cuda_and_down_after_it(monkeypatch):
    seen = []

    def sdpa(query, *args, **kwargs):
        flags = torch.backends.cuda
        seen.append((flags.math_sdp_enabled(), flags.cudnn_sdp_enabled(), flags.mem_efficient_sdp_enabled()))
        return query

    states, _ = Case("").inputs("cpu")
    expected = plain(*states, scaling=1.0, is_causal=False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    before = torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
    settings = {"scaling": 1.0, "softcap": None, "sinks": None}
    attention._packed(states[0].as_subclass(_OnCuda), *states[1:], None, **settings)
    assert seen == [(False, False, True)]
    assert before == (torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled())
    query, *others = (x.double() for x in states)
    output = attention._packed(query.as_subclass(_OnCuda), *others, None, **settings)
    assert len(seen) == 1  # neither of the two takes fp64: attention is computed as it is defined
    assert_close(output.as_subclass(torch.Tensor), expected.double(), 1e-5)


@pytest.mark.skipif(not HAS_TRITON, reason=NO_TRITON)
def test_interpreter_computes_bfloat16_as_torch_does():
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(a, b, out, N: tl.constexpr):
        i = tl.arange(0, N)
        x, y = tl.load(a + i), tl.load(b + i)
        tl.store(out + i, -(x * y + x - y) / y)
        tl.store(out + N + i, tl.where(x < y, x, y))
        tl.store(out + 2 * N + i, (x.to(tl.float32) * 1.234).to(tl.bfloat16))

    a, b = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty(3, 1024, dtype=torch.bfloat16)
    kernel[(1,)](a, b, out, 1024)
    assert torch.equal(out[0], -(a * b + a - b) / b)
    assert torch.equal(out[1], torch.minimum(a, b))
    assert torch.equal(out[2], (a.float() * 1.234).bfloat16())
