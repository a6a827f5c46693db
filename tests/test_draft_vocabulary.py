"""A draft that proposes only some of the target's tokens: lossless, alike in training and decoding, and small."""

import pytest
import torch
from tiny import HEADS, make_tiny_draft, make_tiny_target, plain, random_prompt

from hf_dspark import DSparkConfig, DSparkDraftModel
from hf_dspark.draft import draft_block
from hf_dspark.train.anchors import build_blocks, sample_anchors
from hf_dspark.train.answers import Sample
from hf_dspark.train.shape import frequent_tokens
from hf_dspark.train.step import TrainingStep
from hf_dspark.train.target import FrozenTarget

VOCAB, TOKENS = 64, torch.tensor([1, 4, 5, 9, 20, 33, 40, 41, 50, 62])


@pytest.fixture(scope="module")
def target():
    return make_tiny_target("qwen3", seed=1)


def _draft(target, **kwargs):
    draft = make_tiny_draft(target, draft_vocab_size=len(TOKENS), **kwargs)
    draft.set_draft_tokens(TOKENS)
    draft.bind_target(target)
    return draft


@pytest.mark.core
@pytest.mark.parametrize("loop", ["dspark", "transformers"])
@pytest.mark.parametrize("head", HEADS)
def test_output_is_plains_and_only_the_drafts_tokens_are_proposed(target, head, loop):
    draft, prompt = _draft(target, head=head), random_prompt(VOCAB, 9, seed=1)
    expected = plain(target, prompt, max_new_tokens=32)
    door = draft.as_custom_generate(loop=loop)
    output = target.generate(prompt, custom_generate=door, max_new_tokens=32, do_sample=False)
    assert output.tolist() == expected.tolist()
    block = draft_block(draft, torch.randn(1, 3, draft.fc.in_features), torch.tensor([7]), draft.new_cache())
    assert set(block.token_ids.flatten().tolist()) <= set(TOKENS.tolist())
    outside = torch.ones(VOCAB, dtype=torch.bool).index_fill(0, TOKENS, False)
    assert (block.draft_logits[..., outside] == -torch.inf).all()
    assert block.draft_logits[..., TOKENS].isfinite().all()


def test_logits_are_the_targets_rows_and_follow_them(target):
    draft = _draft(target, head="none")
    hidden = torch.randn(2, 3, 32)
    whole = target.get_output_embeddings()(hidden)
    torch.testing.assert_close(draft.compute_logits(hidden), whole[..., TOKENS])
    head = target.get_output_embeddings()
    before = head.weight.detach().clone()
    with torch.no_grad():
        head.weight.mul_(2.0)
    torch.testing.assert_close(draft.compute_logits(hidden), 2 * whole[..., TOKENS])
    with torch.no_grad():
        head.weight.copy_(before)


def test_round_trip_through_a_folder_keeps_the_tokens(target, tmp_path):
    draft = _draft(target)
    draft.save_pretrained(tmp_path)
    loaded = DSparkDraftModel.from_pretrained(tmp_path, target=target)
    assert loaded.draft_token_ids.tolist() == TOKENS.tolist()
    assert loaded.lm_head is None
    hidden = torch.randn(1, 3, 32)
    assert torch.equal(loaded.compute_logits(hidden), draft.compute_logits(hidden))


@pytest.mark.parametrize("size", [0, 65])
def test_a_size_that_cannot_be_is_refused(size):
    with pytest.raises(ValueError, match="draft_vocab_size.*1 to"):
        DSparkConfig(
            vocab_size=64,
            target_layer_ids=[0],
            mask_token_id=3,
            draft_vocab_size=size,
            rope_parameters={"rope_theta": 1e4},
        )


@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_equal_the_equations_over_the_whole_vocabulary(target, head):
    """The draft's law is 0 outside its tokens; a label it cannot propose has an infinite CE, which is left out."""
    sample = Sample(0, random_prompt(VOCAB, 30, seed=3)[0].tolist(), [(6, 30)])
    sample.input_ids[9], sample.input_ids[10] = 20, 33  # some labels the draft has
    draft = _draft(target, head=head).train()
    frozen = FrozenTarget(target, draft.config.target_layer_ids, draft.draft_token_ids)
    anchors = sample_anchors(sample, 6, torch.Generator().manual_seed(0))
    blocks = build_blocks(sample, anchors, block_size=4, mask_token_id=63, position_decay=4.0)
    step = TrainingStep(draft, frozen, chunk_rows=5)
    states = frozen.read(sample.input_ids)
    loss, outcomes = step(states, blocks)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in draft.named_parameters() if p.grad is not None}
    draft.zero_grad()

    hidden, latents, confidence = step.block_outputs(states, blocks)
    all_logits = target(torch.tensor([sample.input_ids])).logits[0]
    expected, row, num_known = 0.0, 0, 0
    for a, k in (blocks.weights > 0).nonzero().tolist():
        logits = draft.compute_logits(hidden[a, k])
        if head != "none":
            logits = logits + draft.markov_head.markov_w2(latents[a, k])
        draft_probs = torch.zeros(VOCAB).scatter(0, TOKENS, logits.softmax(-1))
        target_probs = all_logits[blocks.target_rows[a, k]].softmax(-1)
        l1 = (draft_probs - target_probs).abs().sum()
        accept = (1 - 0.5 * l1).detach()
        c = confidence[a, k].sigmoid()
        term = 0.9 * l1 - (accept * c.log() + (1 - accept) * (1 - c).log())
        label = blocks.labels[a, k]
        if label in TOKENS:
            num_known += 1
            term = term - 0.1 * draft_probs[label].log()
        expected = expected + blocks.weights[a, k] * term
        assert outcomes.overlap[row].item() == pytest.approx(accept.item(), abs=1e-5)
        assert outcomes.agrees[row] == (draft_probs.argmax() == target_probs.argmax())
        row += 1
    assert 0 < num_known < row
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, p in draft.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_the_most_frequent_tokens_of_answers_are_taken():
    samples = [Sample(0, [9, 9, 9, 5, 5, 7, 3], [(3, 7)]), Sample(1, [1, 7, 7, 5], [(1, 4)])]
    assert frequent_tokens(samples, 2, 16).tolist() == [5, 7]
    assert frequent_tokens(samples, 5, 16).tolist() == [0, 1, 3, 5, 7]  # then the first of those that never occur


def test_tokens_that_are_chosen_once_a_target_is_bound_are_drafted_from():
    target = make_tiny_target("qwen3", seed=1)
    before, after = (make_tiny_draft(target, seed=1, draft_vocab_size=len(TOKENS)) for _ in range(2))
    before.set_draft_tokens(TOKENS)
    after.bind_target(target)
    states = torch.randn(1, 3, target.config.hidden_size)
    for draft in (before, after):
        draft.bind_target(target)
        draft.compute_logits(states)
    after.set_draft_tokens(TOKENS)
    assert torch.equal(after.compute_logits(states), before.compute_logits(states))
