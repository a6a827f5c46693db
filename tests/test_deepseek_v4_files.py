"""Loading from DeepSeek-V4 repositories: damaged ones are refused by name, only the draft's shards are fetched, and
memory stays at the draft's size; saved drafts load without the repository."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from deepseek_v4_files import draft_tensors, native_config, write_repository
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DeepseekV4Config

from hf_dspark import DSparkDraftModel, hub
from hf_dspark.cli import main
from hf_dspark.dialects_deepseek_v4 import stored_tensors


def edit_tensors(change):
    """A damage to the stored tensors, before they are written."""

    def damage(folder):
        config = native_config()
        tensors = draft_tensors(config)
        change(tensors)
        write_repository(folder, config, tensors)

    return damage


def edit_config(**changes):
    """A config.json that says something else than the tensors."""

    def damage(folder):
        write_repository(folder)
        (folder / "config.json").write_text(json.dumps(native_config(**changes)))

    return damage


def edit_index(change):
    def damage(folder):
        write_repository(folder)
        file = folder / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        change(index["weight_map"])
        file.write_text(json.dumps(index))

    return damage


def drop(pattern):
    def change(tensors):
        for name in [name for name in tensors if re.search(pattern, name)]:
            del tensors[name]

    return edit_tensors(change)


def put(name, tensor):
    return edit_tensors(lambda tensors: tensors.update({name: tensor}))


def truncate(folder):
    shard = folder / write_repository(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def lose_shard(folder):
    (folder / write_repository(folder)[1]).unlink()


def no_json_index(folder):
    write_repository(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {')


def text_config(folder):
    write_repository(folder)
    config = native_config()
    nested = {key: config.pop(key) for key in list(config) if key.startswith("dspark_")}
    (folder / "config.json").write_text(json.dumps(config | {"text_config": nested}))


def undecodable_scale(folder):
    config = native_config()
    tensors = draft_tensors(config)
    tensors["mtp.0.attn.wq_a.scale"].view(torch.uint8)[0, 0] = 255
    write_repository(folder, config, tensors)


def undecodable_expert_scale(folder):
    config = native_config()
    tensors = draft_tensors(config)
    tensors["mtp.2.ffn.experts.3.w2.scale"].view(torch.uint8)[0, 0] = 255
    write_repository(folder, config, tensors)


FP8 = torch.zeros(32, 64).to(torch.float8_e4m3fn)
BROKEN = {
    "last stage missing": (drop(r"^mtp\.2\."), r"stages \[0, 1\] .* but 3 from 0 on"),
    "middle stage missing": (drop(r"^mtp\.1\."), r"stages \[0, 2\] .* but 3 from 0 on"),
    "no draft at all": (drop(r"^mtp\."), "holds no `mtp"),
    "an expert's weight missing": (drop(r"^mtp\.1\.ffn\.experts\.2\.w1\.weight$"), r"lacks 1 of .*experts\.2\.w1"),
    "an expert's scale missing": (drop(r"^mtp\.0\.ffn\.experts\.1\.w2\.scale$"), r"lacks 1 of .*w2\.scale"),
    "all fp4 scales missing": (drop(r"experts\.\d+\.w.\.scale$"), r"lacks 36 of"),
    "an fp8 scale missing": (drop(r"^mtp\.0\.attn\.wkv\.scale$"), r"lacks 1 of .*wkv\.scale"),
    "shared expert missing": (drop(r"shared_experts"), r"lacks 18 of"),
    "confidence head missing": (drop(r"confidence_head"), r"lacks 1 of .*confidence_head"),
    "Markov head missing": (drop(r"markov_w2"), r"lacks 1 of .*markov_w2"),
    "collapse of the streams missing": (drop(r"hc_head_fn"), r"lacks 1 of .*hc_head_fn"),
    "projection of the context missing": (drop(r"main_proj\.weight"), r"lacks 1 of .*main_proj"),
    "sinks missing": (drop(r"^mtp\.1\.attn\.attn_sink"), r"lacks 1 of .*attn_sink"),
    "scale of another shape": (
        put("mtp.0.attn.wq_b.scale", torch.zeros(1, 1, dtype=torch.uint8)),
        r"`mtp\.0\.attn\.wq_b\.scale` has shape \(1, 1\), but config.json asks for \(2, 1\)",
    ),
    "expert's scale for another group": (
        put("mtp.0.ffn.experts.0.w1.scale", torch.zeros(64, 4, dtype=torch.uint8)),
        r"w1\.scale` has shape \(64, 4\)",
    ),
    "weight of another shape": (put("mtp.0.attn.wq_a.weight", FP8[:16]), r"wq_a\.weight` has shape \(16, 64\)"),
    "dense weight that is no fp8": (put("mtp.0.attn.wq_a.weight", FP8.bfloat16()), r"stored as BF16, .*F8_E4M3"),
    "expert that is no fp4": (
        put("mtp.0.ffn.experts.0.w1.weight", torch.zeros(64, 32).to(torch.float8_e4m3fn)),
        r"stored as F8_E4M3, .*I8",
    ),
    "scale that is no power of two": (
        put("mtp.0.attn.wq_a.scale", torch.ones(1, 1)),
        r"wq_a\.scale` is stored as F32",
    ),
    "tensor that nothing accounts for": (put("mtp.0.attn.compressor.wkv.weight", FP8), r"1 tensors that config.json"),
    "more experts than config.json says": (edit_config(n_routed_experts=3), r"18 tensors that config.json"),
    "fewer experts than config.json says": (edit_config(n_routed_experts=5), r"lacks 18 of"),
    "more experts a token than there are": (edit_config(num_experts_per_tok=9), "`num_experts_per_tok` must be 1 to"),
    "another hidden size": (edit_config(hidden_size=96), "has shape"),
    "another rank": (edit_config(dspark_markov_rank=8), r"markov_w1\.weight` has shape"),
    "another number of taps": (edit_config(dspark_target_layer_ids=[0, 1, 2]), r"main_proj\.\w+` has shape"),
    "taps beyond the target": (edit_config(dspark_target_layer_ids=[1, 7]), r"target_layer_ids.*layer"),
    "taps not rising": (edit_config(dspark_target_layer_ids=[2, 1]), "strictly increasing"),
    "noise token beyond the vocabulary": (edit_config(dspark_noise_token_id=96), "mask_token_id"),
    "no taps": (edit_config(dspark_target_layer_ids=None), r"lacks `dspark_target_layer_ids`"),
    "no rank": (edit_config(dspark_markov_rank=None), r"lacks `dspark_markov_rank`"),
    "no noise token": (edit_config(dspark_noise_token_id=None), r"lacks `dspark_noise_token_id`"),
    "no block size": (edit_config(dspark_block_size=None), r"lacks `dspark_block_size`"),
    "no rope theta": (edit_config(rope_theta=None), r"lacks `rope_theta`"),
    "not quantised as V4": (edit_config(quantization_config=None), "`quantization_config` of config.json must be"),
    "experts in fp8": (edit_config(expert_dtype="fp8"), "`expert_dtype` must be fp4"),
    "block size 0": (edit_config(dspark_block_size=0), "`block_size` is the number of drafted tokens"),
    "V4.1": (text_config, r"DeepSeek-V4\.1"),
    "V4.1 by its label": (edit_config(model_type="deepseek_v41"), r"DeepSeek-V4\.1"),
    "no -DSpark repository": (
        edit_config(**{key: None for key in native_config() if key.startswith("dspark_")}),
        "classic multi-token prediction",
    ),
    "truncated shard": (truncate, "no complete safetensors file"),
    "shard missing": (lose_shard, "model-00003-of-00003.safetensors"),
    "index that is no JSON": (no_json_index, "no index of safetensors"),
    "index of another revision": (
        edit_index(lambda index: index.update({"mtp.0.extra.weight": index["mtp.0.attn_norm.weight"]})),
        r"names `mtp\.0\.extra\.weight` in .*which does not hold it",
    ),
    "index naming an absent file": (
        edit_index(lambda index: index.update({"mtp.0.attn_norm.weight": "model-00009-of-00009.safetensors"})),
        "model-00009-of-00009.safetensors",
    ),
    "index without a stage": (
        edit_index(lambda index: [index.pop(name) for name in list(index) if name.startswith("mtp.1.")]),
        r"stages \[0, 2\] .* but 3 from 0 on",
    ),
    "scale that is not a number": (undecodable_scale, "NaN or infinity"),
    "expert's scale that is not a number": (undecodable_expert_scale, r"mtp\.2\.ffn\.experts\.3\.w2\.scale"),
}


@pytest.mark.parametrize("experts", ["packed", "dequantized"])
@pytest.mark.parametrize("case", BROKEN)
def test_damaged_repository_is_refused_by_name(tmp_path, case, experts):
    damage, message = BROKEN[case]
    damage(tmp_path)
    with pytest.raises((ValueError, OSError), match=re.compile(message, re.DOTALL)):
        DSparkDraftModel.from_pretrained(tmp_path, experts=experts)


def test_tensors_that_drafting_text_does_not_need_are_left_out(tmp_path):
    config = native_config()
    tensors = draft_tensors(config)
    tensors["mtp.0.embed.weight"] = torch.zeros(96, 64)
    tensors["mtp.1.ffn.gate.bias_vl"] = torch.zeros(4)
    write_repository(tmp_path, config, tensors)
    assert DSparkDraftModel.from_pretrained(tmp_path).config.num_hidden_layers == 3


def test_fewer_experts_for_the_draft_than_for_the_target(tmp_path):
    config = native_config(dspark_n_routed_experts=3, dspark_num_experts_per_tok=1, n_routed_experts=8)
    write_repository(tmp_path, config)
    own = DSparkDraftModel.from_pretrained(tmp_path).config.backbone_config
    assert (own["n_routed_experts"], own["num_experts_per_tok"]) == (3, 1)


def test_a_repository_of_one_file_loads(tmp_path):
    tensors = draft_tensors(native_config()) | {"embed.weight": torch.zeros(96, 64)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(native_config()))
    assert DSparkDraftModel.from_pretrained(tmp_path).config.num_hidden_layers == 3


def test_what_was_found_is_said_in_one_line(tmp_path, caplog):
    write_repository(tmp_path)
    DSparkDraftModel.from_pretrained(tmp_path, experts="packed")
    line = next(record.message for record in caplog.records if "DSpark draft in" in record.message)
    for part in ("DeepSeek-V4 target's files", "3 stages", "4 packed experts", "rank 4", "block size 5", "window 16"):
        assert part in line


def test_experts_stay_packed_where_memory_is_short(tmp_path, monkeypatch):
    write_repository(tmp_path)
    assert DSparkDraftModel.from_pretrained(tmp_path).config.backbone_config["experts"] == "dequantized"
    monkeypatch.setattr("hf_dspark.loading.free_memory", lambda device: 100_000)
    draft = DSparkDraftModel.from_pretrained(tmp_path)
    assert draft.config.backbone_config["experts"] == "packed"
    assert draft.layers[0].mlp.experts.down_codes.dtype == torch.uint8
    with pytest.raises(ValueError, match='must be "packed" or "dequantized", got "fp4"'.replace('"fp4"', "'fp4'")):
        DSparkDraftModel.from_pretrained(tmp_path, experts="fp4")


@pytest.mark.parametrize("experts", ["packed", "dequantized"])
def test_converted_draft_loads_without_the_repository(tmp_path, experts):
    repository = tmp_path / "repository"
    write_repository(repository)
    draft = DSparkDraftModel.from_pretrained(repository, experts=experts)
    draft.save_pretrained(tmp_path / "standalone", include_code=True)
    shutil.rmtree(repository)
    again = DSparkDraftModel.from_pretrained(tmp_path / "standalone")
    assert again.config.backbone_config == draft.config.backbone_config
    for name, tensor in draft.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    shipped = {path.name for path in (tmp_path / "standalone").glob("*.py")}
    assert {"modeling_dspark.py", "backbone_deepseek_v4.py", "dequantize.py"} <= shipped
    with pytest.raises(ValueError, match="for the files of a DeepSeek-V4 target"):
        DSparkDraftModel.from_pretrained(tmp_path / "standalone", experts="packed")


def test_convert_command_writes_a_standalone_folder(tmp_path, capsys):
    write_repository(tmp_path / "repository")
    output = tmp_path / "standalone"
    assert not main(["convert", str(tmp_path / "repository"), "--to", "dspark", "--output", str(output)])
    assert json.loads((output / "config.json").read_text())["backbone_type"] == "deepseek_v4"
    assert DSparkDraftModel.from_pretrained(output).config.num_hidden_layers == 3
    for layout in ("deepspec", "speculators", "specforge"):
        assert main(["convert", str(output), "--to", layout, "--output", str(tmp_path / layout)]) != 0
        assert "layers of DeepSeek-V4" in capsys.readouterr().err
        assert not (tmp_path / layout).exists()


def test_draft_that_belongs_to_another_target_is_refused(tmp_path):
    write_repository(tmp_path)
    config = native_config(hidden_size=128, num_hidden_layers=3)
    config.pop("quantization_config")
    with torch.device("meta"):
        other = AutoModelForCausalLM.from_config(DeepseekV4Config(**config))
    with pytest.raises(ValueError, match="hidden size 64, but the target has 128"):
        DSparkDraftModel.from_pretrained(tmp_path, target=other)


MEASURE = """
import sys
import torch
from safetensors import safe_open
from hf_dspark import DSparkDraftModel
def peak():
    torch.zeros(1)
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
folder, experts = sys.argv[1:]
DSparkDraftModel.from_pretrained(sys.argv[1] + "_small", experts=experts)  # what the code itself takes
before = peak()  # what is resident now may be less: a kernel takes cold pages away, which come back later
open("/proc/self/clear_refs", "w").write("5")
draft = DSparkDraftModel.from_pretrained(folder, experts=experts)
size = sum(t.numel() * t.element_size() for t in draft.state_dict().values())
print("FIGURES", peak() - before, size)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize("experts", ["packed"])
def test_peak_memory_of_loading_is_the_draft_and_one_tensor(tmp_path, experts):
    # 2 GB of shards: 1.9 of routed experts, and a Markov table of 66 MB as the largest tensor.
    sizes = {"hidden_size": 2048, "moe_intermediate_size": 2048, "n_routed_experts": 96, "vocab_size": 64000}
    config = native_config(**sizes, dspark_markov_rank=512, dspark_noise_token_id=9)
    zeros = {"e8m0": torch.uint8, "fp4": torch.int8, "fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}
    wanted = stored_tensors(config, 3)
    one = {}  # one tensor of zeros for all of a kind and shape: the writer needs little memory
    tensors = {}
    for name, (kind, shape) in wanted.items():
        tensors[name] = one.setdefault((kind, shape), torch.zeros(shape, dtype=zeros.get(kind, torch.float32)))
    write_big(tmp_path / "big", config, tensors)
    write_repository(tmp_path / "big_small")
    total = sum(file.stat().st_size for file in (tmp_path / "big").glob("*.safetensors"))
    assert total > 2e9
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "big"), experts]
    output = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert output.returncode == 0, output.stderr[-2000:]
    grown, size = map(int, output.stdout.split("FIGURES")[1].split())
    largest = max(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    shutil.rmtree(tmp_path / "big")
    assert size > 1.9e9
    # 48 MB: the allocator's and the page cache's slack, of which up to 33 have been seen.
    assert grown <= size + largest + 48e6, (grown, size, largest)


def write_big(folder, config, tensors):
    """Two shards written tensor by tensor, with the header that safetensors has."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names, weight_map = sorted(tensors), {}
    half = len(names) // 2
    codes = {torch.uint8: "F8_E8M0", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}
    codes |= {torch.bfloat16: "BF16", torch.float32: "F32"}
    for file, part in (("a.safetensors", names[:half]), ("b.safetensors", names[half:])):
        header, start = {}, 0
        for name in part:
            stop = start + tensors[name].numel() * tensors[name].element_size()
            shape = list(tensors[name].shape)
            header[name] = {"dtype": codes[tensors[name].dtype], "shape": shape, "data_offsets": [start, stop]}
            start = stop
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + start)  # zeros, sparse on the disk
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


class _Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of a hub that downloading needs; counts the bytes of every file it sends."""

    root: Path
    sent: dict = {}

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def log_message(self, *args):
        pass

    def _answer(self, with_body):
        match = re.fullmatch(r"/org/d/resolve/main/(.+)", self.path)
        file = self.root / match[1] if match else None
        if file is None or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return
        body = file.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{file.name}"')
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            type(self).sent[file.name] = type(self).sent.get(file.name, 0) + len(body)
            self.wfile.write(body)


def test_only_the_shards_with_the_draft_are_downloaded(tmp_path):
    shards = write_repository(tmp_path / "repository")
    _Hub.root, _Hub.sent = tmp_path / "repository", {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = "import sys; from hf_dspark import DSparkDraftModel as D; D.from_pretrained('org/d', cache_dir=sys.argv[1])"
    address = f"http://127.0.0.1:{server.server_port}"
    online = {
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    for _ in range(2):  # the second time from the cache
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | online)
        assert run.returncode == 0, run.stderr[-2000:]
        sizes = {name: (tmp_path / "repository" / name).stat().st_size for name in shards}
        assert {name: count for name, count in _Hub.sent.items() if name.endswith(".safetensors")} == sizes
    server.shutdown()


def test_too_small_a_disk_is_told_before_the_download(tmp_path, monkeypatch):
    shards = write_repository(tmp_path / "repository")

    def fetch(name, file, **kwargs):
        assert file not in shards, "fetched although the disk is too small"
        path = tmp_path / "repository" / file
        return str(path) if path.exists() else None

    class Metadata:
        size = 30 * 2**30

    monkeypatch.setattr(hub, "cached_file", fetch)
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url, **kwargs: Metadata)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 2**30))
    with pytest.raises(OSError, match=r"need 60\.0 GiB on the disk of .*has 1\.0 GiB free.*cache_dir"):
        DSparkDraftModel.from_pretrained("org/draft", cache_dir=tmp_path / "cache")
