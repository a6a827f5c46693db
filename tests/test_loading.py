"""Loading, sharing and saving drafts; every mismatch is an error that names the thing and the remedy."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny_draft, make_tiny_target, plain, random_prompt, speculate
from transformers import AutoModel, Qwen3Model

from hf_dspark import DSparkConfig, DSparkDraftModel

NOISE = {"partial_rotary_factor": 0.5, "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}


@pytest.fixture
def flat_folder(tmp_path, target):
    """Write a draft in the authors' flat layout: the target's config copied, ours added, no auto_map."""

    def write(*, own_copies=True, prefix="", config=None, tensors=None, **draft_kwargs):
        draft = make_tiny_draft(target, **draft_kwargs)
        fields = draft.config.to_dict()
        for name in ("backbone_type", "has_embed_tokens", "has_lm_head", "model_type"):
            del fields[name]
        theta = fields.pop("rope_parameters")["rope_theta"]
        fields |= NOISE | {
            "architectures": ["Qwen3DSparkModel"],
            "model_type": "qwen3",
            "rope_theta": theta,
            "num_anchors": 16,
            "layer_types": ["full_attention"] * fields["num_hidden_layers"],
        }
        state = draft.state_dict()
        if own_copies:
            state["embed_tokens.weight"] = target.get_input_embeddings().weight.detach().clone()
            state["lm_head.weight"] = target.get_output_embeddings().weight.detach().clone()
        state |= tensors or {}
        fields |= config or {}
        fields = {name: value for name, value in fields.items() if value != "absent"}
        state = {prefix + name: value.contiguous() for name, value in state.items() if value is not None}
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(fields))
        return tmp_path

    return write


@pytest.mark.core
@pytest.mark.parametrize("prefix", ["", "model."])
def test_flat_layout_loads_with_its_own_copies(flat_folder, target, prefix):
    folder = flat_folder(prefix=prefix)
    draft = DSparkDraftModel.from_pretrained(folder)
    assert draft.config.model_type == "dspark"
    assert draft.config.rope_parameters["rope_theta"] == 10000.0
    assert torch.equal(draft.embed_tokens.weight, target.get_input_embeddings().weight)
    stored = load_file(folder / "model.safetensors")
    for name, parameter in draft.named_parameters():
        assert torch.equal(parameter, stored[prefix + name]), name


def test_flat_layout_says_what_was_decided(flat_folder, caplog):
    folder = flat_folder(head="gated")
    DSparkDraftModel.from_pretrained(folder)
    assert "authors' flat layout" in caplog.text
    assert "gated Markov head of rank 8" in caplog.text


def test_automodel_takes_a_flat_draft_for_a_plain_model_and_the_door_says_so(flat_folder, target):
    wrong = AutoModel.from_pretrained(flat_folder())
    assert type(wrong) is Qwen3Model
    with pytest.raises(ValueError, match=r"DSparkDraftModel\.from_pretrained"):
        target.generate(random_prompt(64, 4), assistant_model=wrong)


def test_equal_copies_are_dropped_for_the_targets(flat_folder, target):
    draft = DSparkDraftModel.from_pretrained(flat_folder(), target=target)
    assert draft.embed_tokens is None
    assert draft.lm_head is None
    assert not draft.config.has_embed_tokens
    assert draft._borrowed.get("embed_tokens") is target.get_input_embeddings()
    assert draft._borrowed.get("lm_head") is target.get_output_embeddings()


def test_copies_are_compared_in_the_checkpoints_dtype(flat_folder, target):
    rounded = {
        "embed_tokens.weight": target.get_input_embeddings().weight.detach().bfloat16(),
        "lm_head.weight": target.get_output_embeddings().weight.detach().bfloat16(),
    }
    draft = DSparkDraftModel.from_pretrained(flat_folder(tensors=rounded), target=target)
    assert draft.embed_tokens is None
    assert draft.lm_head is None


def test_other_copies_are_kept_and_that_is_said(flat_folder, target, caplog):
    other = {"lm_head.weight": target.get_output_embeddings().weight.detach() + 1}
    draft = DSparkDraftModel.from_pretrained(flat_folder(tensors=other), target=target)
    assert draft.embed_tokens is None
    assert torch.equal(draft.lm_head.weight, other["lm_head.weight"])
    assert "`lm_head` differs from the target's" in caplog.text


@pytest.mark.core
def test_draft_without_copies_binds_at_the_first_generate(flat_folder, target):
    draft = DSparkDraftModel.from_pretrained(flat_folder(own_copies=False))
    prompt = random_prompt(64, 6)
    assert (
        speculate(target, draft, prompt, max_new_tokens=8).tolist() == plain(target, prompt, max_new_tokens=8).tolist()
    )


def test_borrowing_draft_binds_anew_for_another_target(target):
    other = make_tiny_target("qwen3", seed=5)
    draft, prompt = make_tiny_draft(target), random_prompt(64, 6)
    speculate(target, draft, prompt, max_new_tokens=3)
    speculate(other, draft, prompt, max_new_tokens=3)
    assert draft._borrowed.get("lm_head") is other.get_output_embeddings()


def test_generate_never_compares_values_of_own_copies(flat_folder, target):
    other = {"embed_tokens.weight": torch.randn(64, 32), "lm_head.weight": torch.randn(64, 32)}
    draft = DSparkDraftModel.from_pretrained(flat_folder(tensors=other))
    speculate(target, draft, random_prompt(64, 6), max_new_tokens=3)
    assert torch.equal(draft.lm_head.weight, other["lm_head.weight"])


def test_converting_a_borrowing_draft_leaves_the_target_alone(target):
    draft = make_tiny_draft(target)
    draft.bind_target(target)
    draft.to(torch.bfloat16)
    copied = copy.deepcopy(draft)
    assert target.get_input_embeddings().weight.dtype == torch.float32
    assert copied._borrowed.get("lm_head") is target.get_output_embeddings()
    assert not any(name.startswith(("embed_tokens", "lm_head")) for name in draft.state_dict())


@pytest.mark.core
@pytest.mark.parametrize("shared", [True, False])
def test_save_and_load_round_trip(flat_folder, target, tmp_path, shared):
    draft = DSparkDraftModel.from_pretrained(flat_folder(), target=target if shared else None)
    draft.generation_config.num_assistant_tokens = 3
    draft.generation_config.assistant_confidence_threshold = 0.25
    saved = tmp_path / "saved"
    draft.save_pretrained(saved)
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "dspark"
    names = set(load_file(saved / "model.safetensors"))
    assert ("lm_head.weight" in names) is not shared  # what is the target's is not written
    again = DSparkDraftModel.from_pretrained(saved)
    assert again.generation_config.num_assistant_tokens == 3
    assert again.generation_config.assistant_confidence_threshold == 0.25
    for (name, before), (other, after) in zip(draft.named_parameters(), again.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(before, after)
    auto = AutoModel.from_pretrained(saved)
    assert type(auto) is DSparkDraftModel


def test_dtype_and_device_map_and_config_fields_work_as_in_transformers(flat_folder):
    folder = flat_folder()
    draft = DSparkDraftModel.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", block_size=3)
    assert draft.dtype == torch.bfloat16
    assert draft.device.type == "cpu"
    assert draft.config.block_size == 3
    draft, report = DSparkDraftModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]


def test_sharded_checkpoint_loads(flat_folder, tmp_path):
    draft = DSparkDraftModel.from_pretrained(flat_folder())
    draft.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    again = DSparkDraftModel.from_pretrained(tmp_path / "sharded")
    assert torch.equal(draft.lm_head.weight, again.lm_head.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"target_layer_ids": "absent"}}, "no `target_layer_ids`"),
        ({"config": {"mask_token_id": "absent"}}, "no `mask_token_id`"),
        ({"config": {"mask_token_id": 64}}, r"`mask_token_id` must be a token of the vocabulary \(0 to 63\), got 64"),
        ({"config": {"rope_theta": None}}, "`rope_theta`"),
        ({"config": {"markov_rank": 16}}, "`markov_rank` 16, but its tensors have rank 8"),
        ({"config": {"markov_rank": 0}}, "`markov_rank` 0, but its tensors have rank 8"),
        ({"config": {"block_size": 0}}, "`block_size`"),
        ({"config": {"target_layer_ids": [2, 0]}}, "strictly increasing"),
        ({"config": {"target_layer_ids": [0, 9]}}, "of 4 layers"),
        (
            {"config": {"markov_head_type": "transformer"}},
            "`markov_head_type` 'transformer', but its tensors are those of a 'vanilla' head",
        ),
        ({"config": {"target_layer_ids": [0, 1, 2]}}, "of another shape: fc.weight"),
        ({"tensors": {"norm.weight": None}}, "missing: norm.weight"),
        ({"tensors": {"layers.7.mlp.up_proj.weight": torch.zeros(1)}}, "unexpected: layers.7.mlp.up_proj.weight"),
        ({"tensors": {"fc.weight": None}}, "no DSpark draft"),
        ({"tensors": {"confidence_head.proj.weight": None}}, "`confidence_head.proj.weight`"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_it(flat_folder, changes, message):
    with pytest.raises(ValueError, match=message):
        DSparkDraftModel.from_pretrained(flat_folder(**changes))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 80}, "vocabulary size 80, but the target has 64"),
        ({"hidden_size": 64}, "hidden size 64, but the target has 32"),
        ({"num_target_layers": 9}, "9 layers, but this target has 4"),
        ({"num_target_layers": None, "target_layer_ids": [0, 6]}, "more than 6 layers, but this target has 4"),
    ],
)
def test_draft_of_another_target_is_refused_before_any_forward(target, fields, message, monkeypatch):
    config = make_tiny_draft(target).config.to_dict() | fields
    draft = DSparkDraftModel(DSparkConfig(**config))
    monkeypatch.setattr(target, "forward", lambda *args, **kwargs: pytest.fail("a forward ran"))
    with pytest.raises(ValueError, match=message):
        speculate(target, draft, random_prompt(64, 4), max_new_tokens=4)
    with pytest.raises(ValueError, match=message):
        draft.bind_target(target)


def test_folder_without_weights_says_so(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OSError, match="safetensors"):
        DSparkDraftModel.from_pretrained(tmp_path)
