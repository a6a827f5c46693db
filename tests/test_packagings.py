"""Every packaging of a draft: it is recognised, drafts as it was trained to, is lossless, and survives a save."""

import json

import pytest
import torch
from packagings import PACKAGINGS, make_packaged
from safetensors.torch import load_file, save_file
from tiny import make_tiny_target, plain, random_prompt, speculate

from hf_dspark import DSparkDraftModel
from hf_dspark.cli import main
from hf_dspark.convert import convert
from hf_dspark.draft import draft_block

# Fields that say how a draft drafts, whatever the packaging calls them.
_MEANING = (
    "backbone_type",
    "block_size",
    "first_slot",
    "causal",
    "sliding_window",
    "layer_types",
    "attention_sinks",
    "rope_interleaved",
    "target_layer_ids",
    "mask_token_id",
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
    "draft_vocab_size",
    "embed_scale",
    "final_logit_softcapping",
    "confidence_temperatures",
)


@pytest.fixture(scope="module")
def target():
    return make_tiny_target("qwen3", seed=1)


def _block(draft):
    features = torch.randn(1, 9, draft.fc.in_features, generator=torch.Generator().manual_seed(0))
    cache = draft.new_cache()
    draft_block(draft, features[:, :6], torch.tensor([5]), cache)
    return draft_block(draft, features[:, 6:], torch.tensor([7]), cache)


@pytest.mark.core
@pytest.mark.parametrize("name", PACKAGINGS)
@torch.no_grad()
def test_packaging_loads_generates_and_survives_a_save(target, name, tmp_path, caplog):
    original = make_packaged(target, name, tmp_path / "theirs")
    draft = DSparkDraftModel.from_pretrained(tmp_path / "theirs", target=target)
    assert "layout" in caplog.text
    for field in _MEANING:
        assert getattr(draft.config, field) == getattr(original.config, field), field
    expected = _block(original)
    block = _block(draft)
    torch.testing.assert_close(block.draft_logits, expected.draft_logits)
    if draft.config.enable_confidence_head:
        torch.testing.assert_close(block.confidence, expected.confidence)
    prompt = random_prompt(64, 9, seed=1)
    output = speculate(target, draft, prompt, max_new_tokens=24)
    assert output.tolist() == plain(target, prompt, max_new_tokens=24).tolist()

    draft.save_pretrained(tmp_path / "ours")
    reloaded = DSparkDraftModel.from_pretrained(tmp_path / "ours", target=target)
    for field in _MEANING:
        assert getattr(reloaded.config, field) == getattr(original.config, field), field
    assert draft.state_dict().keys() == reloaded.state_dict().keys()
    for key, tensor in draft.state_dict().items():
        assert torch.equal(tensor, reloaded.state_dict()[key]), key
    torch.testing.assert_close(_block(reloaded).draft_logits, block.draft_logits)


def test_draft_in_a_subfolder_of_the_targets_repository(target, tmp_path):
    original = make_packaged(target, "F1 flat", tmp_path / "dspark")
    target.save_pretrained(tmp_path)
    draft = DSparkDraftModel.from_pretrained(tmp_path, subfolder="dspark", target=target)
    torch.testing.assert_close(_block(draft).draft_logits, _block(original).draft_logits)
    with pytest.raises(ValueError, match="no DSpark draft"):
        DSparkDraftModel.from_pretrained(tmp_path, target=target)


def test_noise_of_the_targets_config_is_not_the_drafts(target, tmp_path):
    original = make_packaged(target, "F1 flat", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [1, 1, 2]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    draft = DSparkDraftModel.from_pretrained(tmp_path, target=target)
    torch.testing.assert_close(_block(draft).draft_logits, _block(original).draft_logits)


def _config(change):
    def spoil(folder):
        file = folder / "config.json"
        config = json.loads(file.read_text())
        change(config)
        file.write_text(json.dumps(config))

    return spoil


def _tensors(change):
    def spoil(folder):
        file = folder / "model.safetensors"
        state = load_file(file)
        save_file(change(state) or state, file)

    return spoil


def _truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _cut_header(folder):
    (folder / "model.safetensors").write_bytes(b"\x10\x00")


def _only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _absent_shard(folder):
    (folder / "model.safetensors").unlink()
    weight_map = {"fc.weight": "model-00001-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _rename(old, new):
    return _tensors(lambda state: {name.replace(old, new): tensor for name, tensor in state.items()})


SPOILED = {
    "truncated": ("F1 flat", _truncate, "no complete safetensors file"),
    "cut in the header": ("F1 flat", _cut_header, "no complete safetensors file"),
    "pickle only": ("F1 flat", _only_pickle, "pickle files .* are not read"),
    "absent shard": ("F1 flat", _absent_shard, "model-00001-of-00002"),
    "no config": ("F1 flat", lambda folder: (folder / "config.json").unlink(), "config.json"),
    "no weights": ("F1 flat", lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors"),
    "config is no JSON": ("F1 flat", lambda f: (f / "config.json").write_text("{"), "config.json.*no valid JSON"),
    "NaN": (
        "F1 flat",
        _tensors(lambda s: s | {"fc.weight": torch.full_like(s["fc.weight"], torch.nan)}),
        "NaN or infinity .fc.weight",
    ),
    "tensor twice": ("F1 flat", _tensors(lambda s: s | {"model.norm.weight": s["norm.weight"].clone()}), "twice"),
    "no taps, F2": ("F2 nested", _config(lambda c: c["dflash_config"].pop("target_layer_ids")), "`target_layer_ids`"),
    "no taps, F3": ("F3 silent", _config(lambda c: c.pop("aux_hidden_state_layer_ids")), "`target_layer_ids`"),
    "no mask": ("F2 nested", _config(lambda c: c["dflash_config"].pop("mask_token_id")), "`mask_token_id`"),
    "no block size": ("F3 silent", _config(lambda c: c.pop("block_size")), "`block_size`"),
    "no theta": ("F3 silent", _config(lambda c: c["transformer_layer_config"].pop("rope_theta")), "`rope_theta`"),
    "taps that differ": (
        "F4 NVIDIA",
        _config(lambda c: c.update(eagle_aux_hidden_state_layer_ids=[0, 2])),
        "one more each",
    ),
    "rank 0 with Markov tensors": ("F2 nested", _config(lambda c: c["dflash_config"].update(markov_rank=0)), "rank 8"),
    "head of another type": (
        "F2 nested",
        _config(lambda c: c["dflash_config"].update(markov_head_type="rnn")),
        "'rnn', but its tensors are those of a 'vanilla'",
    ),
    "half a Markov head": (
        "F1 flat",
        _tensors(lambda s: {n: t for n, t in s.items() if n != "markov_head.markov_w2.weight"}),
        "missing: markov_head.markov_w2.weight",
    ),
    "confidence without tensors": ("F2 nested", _rename("confidence_head.proj.weight", "other"), "enable_confidence"),
    "sinks without tensors": ("F4 NVIDIA", _rename("attention_sink_bias", "other"), "attention_sink_bias"),
    "window without a width": (
        "F4 NVIDIA",
        _config(lambda c: c["dflash_config"].pop("swa_window_size")),
        "`swa_window_size`",
    ),
    "tokens that no block has": (
        "F3 anchor drafts",
        _config(lambda c: c.update(block_size=9)),
        "`block_size` 9 and 4 `speculative_tokens`",
    ),
    "quantised": ("F1 flat", _config(lambda c: c.update(quantization_config={"quant_algo": "NVFP4"})), "NVFP4"),
    "gated attention": (
        "F1 flat",
        _tensors(lambda s: s | {"layers.0.self_attn.q_proj.weight": torch.zeros(64, 32)}),
        "twice as wide",
    ),
    "fc of another width": (
        "F1 flat",
        _tensors(lambda s: s | {"fc.weight": torch.zeros(32, 96)}),
        r"fc.weight \(32, 96\)",
    ),
    "tokens beyond the vocabulary": (
        "F3 vocabulary",
        _tensors(lambda s: s | {"d2t": s["d2t"] + 40}),
        "`d2t` does not name",
    ),
    "another model": ("F1 flat", _rename("fc.weight", "model.layers.0.weight"), "no DSpark draft"),
    "a V4 checkpoint": ("F1 flat", _tensors(lambda s: {"mtp.0.main_proj.weight": torch.zeros(1)}), "DeepSeek-V4"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_wrong_or_incomplete_files_are_named_errors(target, name, tmp_path):
    packaging, spoil, message = SPOILED[name]
    make_packaged(target, packaging, tmp_path)
    spoil(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        DSparkDraftModel.from_pretrained(tmp_path, target=target)


_GEMMA = {"F1 gemma4", "F1 gemma4 k=v"}
_SLOT_OR_FLAGS = {"F3 anchor reserved", "F3 silent", "F3 sliding", "F3 sliding, non-causal", "F3 vocabulary"}
_SLOT_OR_FLAGS |= {"F4 NVIDIA", "F5 interleaved", "DFlash, z-lab's"}
REFUSED = {
    "deepspec": _SLOT_OR_FLAGS,
    "specforge": _SLOT_OR_FLAGS | _GEMMA,
    "speculators": _GEMMA | {"F4 NVIDIA", "F5 interleaved"},
}


@pytest.mark.parametrize("layout", REFUSED)
@pytest.mark.parametrize("name", PACKAGINGS)
@torch.no_grad()
def test_export_and_reimport_give_the_same_draft_to_the_bit(target, name, layout, tmp_path):
    make_packaged(target, name, tmp_path / "theirs")
    draft = DSparkDraftModel.from_pretrained(tmp_path / "theirs", target=target)
    if name in REFUSED[layout]:
        with pytest.raises(ValueError, match=f"'{layout}' cannot describe this draft"):
            convert(draft, layout, tmp_path / "exported", target=target)
        assert not (tmp_path / "exported").exists()
        return
    convert(draft, layout, tmp_path / "exported", target=target)
    config = draft.config
    back = DSparkDraftModel.from_pretrained(tmp_path / "exported", target=target)
    for field in (*_MEANING, "num_target_layers"):
        assert getattr(back.config, field) == getattr(config, field), field
    assert back.state_dict().keys() == draft.state_dict().keys()
    for key, tensor in draft.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor), key
    torch.testing.assert_close(_block(back).draft_logits, _block(draft).draft_logits)
    stored = load_file(tmp_path / "exported" / "model.safetensors")
    assert ("embed_tokens.weight" in stored) == (layout == "deepspec")


def test_export_asks_for_the_target_it_needs(target, tmp_path):
    make_packaged(target, "F1 flat", tmp_path / "theirs")
    draft = DSparkDraftModel.from_pretrained(tmp_path / "theirs")
    for layout in ("deepspec", "speculators"):
        with pytest.raises(ValueError, match="give `--target`"):
            convert(draft, layout, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    with pytest.raises(ValueError, match="one of .*'specforge'"):
        convert(draft, "gguf", tmp_path / "exported")


def test_convert_command(target, tmp_path, capsys):
    target.save_pretrained(tmp_path / "target")
    original = make_packaged(target, "F2 nested", tmp_path / "theirs")
    arguments = ["--to", "speculators", "--output", str(tmp_path / "out"), "--target", str(tmp_path / "target")]
    assert main(["convert", str(tmp_path / "theirs"), *arguments]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["speculators_config"]["verifier"] == {
        "name_or_path": str(tmp_path / "target"),
        "architectures": ["Qwen3ForCausalLM"],
    }
    back = DSparkDraftModel.from_pretrained(tmp_path / "out", target=target)
    torch.testing.assert_close(_block(back).draft_logits, _block(original).draft_logits)
    arguments[1] = "deepspec"
    assert main(["convert", str(tmp_path / "theirs"), *arguments[:4]]) == 2
    assert "give `--target`" in capsys.readouterr().err
