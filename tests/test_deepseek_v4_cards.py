"""The cards of DeepSeek-V4's drafts: what the script renders, figures that were published, and scripts that run."""

import os
import re
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import check_device_map
from deepseek_v4_files import FIXTURE
from test_deepseek_v4_target import make_v4_target
from tiny import random_prompt
from tiny_files import ROOT
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from hf_dspark.compat import CACHE

needs_fixture = pytest.mark.skipif(not FIXTURE.exists(), reason="the parity fixture v4_flash_a is not here")
ARITHMETIC = SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / "deepseek_v4_arithmetic.py")))
RELEASES = {release.name: release for release in ARITHMETIC.releases()}
GIB = 2**30
# Tensors and bytes are exact; GiB, billions of parameters and of those used at a position are rounded.
PUBLISHED = {
    "Flash": {"draft": (4705, 10.12, 19.84, 37.0, 0.90), "all": (72317, 166_878_536_440)},
    "Pro": {"draft": (7009, 39.10, 77.5, 144.3, 2.45), "all": (149782, 892_727_580_904)},
}


def card(name):
    return (ROOT / "model_cards" / f"deepseek_v4_{name.lower()}_dspark.md").read_text(encoding="utf-8")


def scripts(name):
    return re.findall(r"```python\n(.+?)```", card(name), re.S)


@pytest.fixture(scope="module", params=RELEASES)
def release(request):
    return RELEASES[request.param]


@pytest.fixture(scope="module")
def target(release):
    """transformers' own target of the release's config.json, without memory."""
    config = {key: value for key, value in release.config.items() if key != "quantization_config"}
    with torch.device("meta"):
        return DeepseekV4ForCausalLM(DeepseekV4Config(**config))


def test_cards_are_what_the_script_renders(release):
    assert card(release.name) == ARITHMETIC.render(release)


def test_other_numbers_make_another_card(release):
    other = {**release.config, "moe_intermediate_size": 2 * release.config["moe_intermediate_size"]}
    changed = ARITHMETIC.Release(release.name, other, release.date, release.num_shards, release.gain)
    assert ARITHMETIC.render(changed) != card(release.name)


def test_arithmetic_gives_the_published_numbers(release):
    size, published = ARITHMETIC.size, PUBLISHED[release.name]
    draft, target = release.draft, release.target
    assert (len(draft) + len(target), size(draft) + size(target)) == published["all"]
    tensors, stored, parameters, expanded, active = published["draft"]
    assert (len(draft), round(size(draft) / GIB, 2)) == (tensors, stored)
    assert size(draft, ARITHMETIC.VALUES) / 1e9 == pytest.approx(parameters, abs=0.01)
    assert size(draft, ARITHMETIC.BF16) / GIB == pytest.approx(expanded, abs=0.1)
    used = re.search(r"billion; (\S+) used at a position", card(release.name))[1]
    assert float(used) == pytest.approx(active, abs=0.02)


def test_target_has_as_many_parameters_as_transformers_own(release, target):
    # The router's bias is a buffer there; the other buffers are tables of tokens and rotary frequencies.
    buffers = {name: buffer for name, buffer in target.named_buffers() if name.endswith("e_score_correction_bias")}
    theirs = sum(tensor.numel() for tensor in [*target.parameters(), *buffers.values()])
    assert ARITHMETIC.size(release.target, ARITHMETIC.VALUES) == theirs


def test_device_map_of_the_card_places_every_module_and_leaves_room_for_the_draft(release, target):
    lines = [line for line in scripts(release.name)[0].splitlines() if line.startswith("device_map")]
    namespace = {}
    exec("\n".join(lines), namespace)
    device_map = namespace["device_map"]
    if device_map == "auto":
        return
    check_device_map(target, device_map)
    size, layers = ARITHMETIC.size, release.config["num_hidden_layers"]
    used = dict.fromkeys(device_map.values(), 0)
    for i in range(layers):
        used[device_map[f"model.layers.{i}"]] += size(release.target, part=f"layers.{i}.")
    used[device_map["model.embed_tokens"]] += size(release.target, part=ARITHMETIC.EMBED)
    used[device_map["lm_head"]] += size(release.target, part=ARITHMETIC.HEAD) + release.held[release.form]
    assert len(used) == ARITHMETIC.NUM_GPUS
    extra = ARITHMETIC.RESERVE + ARITHMETIC.attention_bytes(release.config, ARITHMETIC.CONTEXT)
    assert max(used.values()) + extra <= ARITHMETIC.GPUS["H200 (141 GB)"]


def test_transformers_splits_what_the_card_says(release, target):
    assert {name for name in target.ep_plan if "mlp.experts" not in name} == set()
    split = {name for name in target.tp_plan if "mlp.experts" not in name}
    assert split == {"lm_head", "model.embed_tokens"}
    whole = ARITHMETIC.size(release.target) - ARITHMETIC.rank_bytes(release)
    parts = (ARITHMETIC.EXPERTS, ARITHMETIC.EMBED, ARITHMETIC.HEAD)
    assert whole == sum(ARITHMETIC.size(release.target, part=part) for part in parts) * 7 / 8


@pytest.mark.parametrize("num_tokens", [3, 16, 57, 128])
def test_cache_has_the_computed_size(num_tokens):
    window, rates = 16, (4, 128)
    target = make_v4_target("mixed", window=window, rates=rates)
    fields = target.config.to_dict() | {"compress_ratios": [0, 4, 128, 4], "sliding_window": window}
    fields |= {"num_hidden_layers": 4}
    prompt = random_prompt(64, num_tokens)
    with torch.no_grad():
        layers = getattr(target(prompt), CACHE).layers
    held = 0
    for layer in layers:
        held += layer.keys.numel() * (1 if hasattr(layer, "compressed_kv") else 2)
        if hasattr(layer, "compressed_kv"):
            states = (layer.compressed_kv, layer.buffer_kv, layer.buffer_gate)
            held += sum(tensor.numel() for state in states for tensor in state.values())
    computed = ARITHMETIC.cache_bytes(fields, num_tokens) / 2
    open_windows = sum((rate - 1) * 2 * (64 if rate == 4 else 16) for rate in (4, 128, 4))
    one_row = 16 * 5  # a layer keeps one row less than its window
    assert 0 <= computed - held <= open_windows + one_row


def test_experts_hit_are_those_of_a_simulation(release):
    generator = torch.Generator().manual_seed(0)
    experts, chosen = release.config["n_routed_experts"], release.config["num_experts_per_tok"]
    assert ARITHMETIC.distinct_experts(release.config, 1) == pytest.approx(chosen)
    picks = torch.rand(2000, 6, experts, generator=generator).topk(chosen).indices.flatten(1)
    mean = sum(len(row.unique()) for row in picks) / len(picks)
    assert ARITHMETIC.distinct_experts(release.config, 6) == pytest.approx(mean, abs=0.2)


def test_a_round_reads_more_the_more_it_verifies_and_ranks_share_only_experts_and_head(release):
    reads = [ARITHMETIC.target_reads(release, n) for n in range(1, 7)]
    assert reads == sorted(reads)
    assert ARITHMETIC.target_reads(release, 10**6) < ARITHMETIC.size(release.target)
    split = ARITHMETIC.target_reads(release, 6, ARITHMETIC.NUM_GPUS)
    assert reads[-1] / ARITHMETIC.NUM_GPUS < split < reads[-1]


def _run(tmp_path, script, *prefix):
    """Run a script of the Flash card on the tiny repository, where its output must be plain generation's in fp32."""
    script = script.replace("deepseek-ai/DeepSeek-V4-Flash-DSpark", str(FIXTURE / "repo"))
    script = script.replace("draft = ", "target.float()\ndraft = ")  # bf16 has near-ties
    plain = "plain = target.generate(**inputs, max_new_tokens=64, do_sample=False)\n"
    script = script.replace("output = ", f"{plain}output = ") + "assert plain.tolist() == output.tolist()\n"
    file = tmp_path / "script.py"
    file.write_text(script, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *prefix, str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_fixture
def test_script_for_one_process_runs(tmp_path):
    assert "GenerationStats(tau=" in _run(tmp_path, scripts("Flash")[0])


@needs_fixture
def test_script_for_a_process_a_gpu_runs(tmp_path):
    prefix = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    printed = _run(tmp_path, scripts("Flash")[1], *prefix)
    assert printed.count("GenerationStats(tau=") == 1
