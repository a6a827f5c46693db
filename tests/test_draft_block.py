"""draft_block against the authors' reference code (fixtures), and against the paper's formulas written out."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_tiny_draft, make_tiny_target

from hf_dspark import DSparkDraftModel
from hf_dspark.draft import draft_block

FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
BLOCK = 4


@pytest.fixture
def bound_draft(target):
    def make(**kwargs):
        draft = make_tiny_draft(target, block_size=BLOCK, **kwargs)
        draft.bind_target(target)
        return draft

    return make


def _features(draft, length, seed=0):
    width = len(draft.config.target_layer_ids) * draft.config.hidden_size
    return torch.randn(1, length, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.core
@pytest.mark.parametrize("name", ["qwen3_vanilla", "gemma4_vanilla"])
@torch.no_grad()
def test_three_rounds_reproduce_the_reference(name):
    if not FIXTURES.is_dir():
        pytest.skip("no ../shared/fixtures beside the repository")
    draft = DSparkDraftModel.from_pretrained(FIXTURES / name, dtype=torch.float32)
    expected = load_file(FIXTURES / name / "expected.safetensors")
    cache = draft.new_cache()
    for i in range(3):
        block = draft_block(draft, expected[f"r{i}.features"], expected[f"r{i}.anchor"], cache)
        assert block.token_ids.tolist() == expected[f"r{i}.tokens"].tolist()
        for ours, name in (
            (block.hidden_states, "block_hidden"),
            (block.base_logits, "base_logits"),
            (block.draft_logits, "draft_logits"),
            (block.confidence_logits, "confidence_logits"),
        ):
            torch.testing.assert_close(ours, expected[f"r{i}.{name}"].view_as(ours), atol=1e-4, rtol=0)
        assert cache.get_seq_length() == expected[f"r{i}.context_length"].item()


@torch.no_grad()
def test_context_in_pieces_gives_the_same_block_as_at_once(bound_draft):
    draft = bound_draft()
    features, anchor = _features(draft, 9), torch.tensor([5])
    whole = draft_block(draft, features, anchor, draft.new_cache())
    cache = draft.new_cache()
    draft_block(draft, features[:, :6], torch.tensor([7]), cache)
    pieces = draft_block(draft, features[:, 6:], anchor, cache)
    torch.testing.assert_close(pieces.draft_logits, whole.draft_logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_every_block_position_sees_the_block_behind_it(bound_draft, monkeypatch):
    draft = bound_draft()
    features, anchor = _features(draft, 5), torch.tensor([5])
    before = draft_block(draft, features, anchor, draft.new_cache()).hidden_states
    original = draft._embed

    def other_last_mask(ids):
        embedded = original(ids).clone()
        embedded[:, -1] += 1.0
        return embedded

    monkeypatch.setattr(draft, "_embed", other_last_mask)
    after = draft_block(draft, features, anchor, draft.new_cache()).hidden_states
    assert (before[:, 0] - after[:, 0]).abs().max() > 1e-4


@torch.no_grad()
def test_fewer_tokens_are_the_first_of_the_whole_block(bound_draft):
    draft = bound_draft()
    features, anchor = _features(draft, 5), torch.tensor([5])
    whole = draft_block(draft, features, anchor, draft.new_cache())
    short = draft_block(draft, features, anchor, draft.new_cache(), num_tokens=2)
    assert short.token_ids.tolist() == whole.token_ids[:, :2].tolist()
    torch.testing.assert_close(short.draft_logits, whole.draft_logits[:, :2])


@torch.no_grad()
def test_rows_of_a_batch_are_drafted_as_alone(bound_draft):
    draft = bound_draft(head="rnn")
    features = torch.cat([_features(draft, 5, seed) for seed in (1, 2)])
    both = draft_block(draft, features, torch.tensor([5, 9]), draft.new_cache())
    for row, anchor in enumerate((5, 9)):
        alone = draft_block(draft, features[row : row + 1], torch.tensor([anchor]), draft.new_cache())
        assert both.token_ids[row].tolist() == alone.token_ids[0].tolist()
        torch.testing.assert_close(both.confidence_logits[row], alone.confidence_logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.core
@pytest.mark.parametrize("head", ["none", "vanilla", "gated", "rnn"])
@torch.no_grad()
def test_sequential_head_adds_the_papers_bias(bound_draft, head):
    draft = bound_draft(head=head, rank=6)
    block = draft_block(draft, _features(draft, 5), torch.tensor([5]), draft.new_cache())
    previous = [5, *block.token_ids[0, :-1].tolist()]
    state = torch.zeros(6)
    for k, token in enumerate(previous):
        hidden, bias = block.hidden_states[0, k], torch.zeros(draft.config.vocab_size)
        if head != "none":
            module = draft.markov_head
            w1, w2 = module.markov_w1.weight[token], module.markov_w2.weight
            if head == "vanilla":
                bias = w2 @ w1
            elif head == "gated":
                gate = torch.sigmoid(module.gate_proj.weight @ torch.cat([hidden, w1]) + module.gate_proj.bias)
                bias = w2 @ (gate * w1)
            else:
                joint = module.joint_proj.weight @ torch.cat([state, w1, hidden]) + module.joint_proj.bias
                gate, candidate, output = joint[:6].sigmoid(), joint[6:12].tanh(), joint[12:].tanh()
                state = gate * state + (1 - gate) * candidate
                bias = w2 @ output
        torch.testing.assert_close(block.draft_logits[0, k] - block.base_logits[0, k], bias, atol=1e-4, rtol=1e-4)
        assert block.draft_logits[0, k].argmax() == block.token_ids[0, k]


@pytest.mark.parametrize("with_markov", [True, False])
@torch.no_grad()
def test_confidence_reads_the_hidden_state_and_the_previous_token(bound_draft, with_markov, target):
    draft = bound_draft()
    if not with_markov:
        config = draft.config.to_dict() | {"confidence_head_with_markov": False}
        draft = DSparkDraftModel(type(draft.config)(**config)).eval()
        draft.bind_target(target)
    block = draft_block(draft, _features(draft, 5), torch.tensor([5]), draft.new_cache())
    previous = [5, *block.token_ids[0, :-1].tolist()]
    proj = draft.confidence_head.proj
    for k, token in enumerate(previous):
        inputs = block.hidden_states[0, k]
        if with_markov:
            inputs = torch.cat([inputs, draft.markov_head.markov_w1.weight[token]])
        torch.testing.assert_close(block.confidence_logits[0, k], proj.weight[0] @ inputs + proj.bias[0])
    assert block.confidence_logits.dtype == torch.float32


@torch.no_grad()
def test_block_on_an_unbound_draft_names_the_remedy(target):
    draft = make_tiny_draft(target)
    with pytest.raises(ValueError, match="target="):
        draft_block(draft, _features(draft, 3), torch.tensor([1]), draft.new_cache())


def test_logits_are_fp32_also_of_a_bf16_draft(target):
    draft = make_tiny_draft(target).to(torch.bfloat16)
    draft.bind_target(make_tiny_target("qwen3", seed=0).to(torch.bfloat16))
    block = draft_block(draft, _features(draft, 3), torch.tensor([1]), draft.new_cache())
    assert block.base_logits.dtype == block.draft_logits.dtype == torch.float32
