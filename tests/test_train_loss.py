"""Loss terms, masks and weights against a slow reference written from the equations; training against generation."""

import math
import weakref

import pytest
import torch
from tiny import ScriptedDraft, make_tiny_draft, make_tiny_target, plain, random_prompt
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dspark.draft import draft_block
from hf_dspark.train.anchors import build_blocks, sample_anchors, stack_blocks
from hf_dspark.train.answers import Sample
from hf_dspark.train.loss import CHUNK_BYTES, CONFIDENCE_WEIGHT, _rows
from hf_dspark.train.step import TrainingStep
from hf_dspark.train.target import FrozenTarget, stack_states

BLOCK, DECAY, VOCAB, RANK = 4, 4.0, 64, 8
HEADS = ("none", "vanilla", "gated", "rnn")


@pytest.fixture
def sample():
    ids = random_prompt(VOCAB, 30, seed=3)[0].tolist()
    return Sample(0, ids, [(6, 17), (22, 30)])


def _setup(sample, *, num_anchors=6, chunk_rows=64, head="vanilla", target=None, **kwargs):
    target = target if target is not None else make_tiny_target("qwen3", seed=0, scale=1.5)
    draft = make_tiny_draft(target, block_size=BLOCK, head=head, **kwargs)
    draft.bind_target(target)
    draft.train()
    frozen = FrozenTarget(target, draft.config.target_layer_ids)
    anchors = sample_anchors(sample, num_anchors, torch.Generator().manual_seed(0))
    blocks = build_blocks(
        sample, anchors, block_size=BLOCK, mask_token_id=draft.config.mask_token_id, position_decay=DECAY
    )
    return draft, frozen, blocks, TrainingStep(draft, frozen, chunk_rows=chunk_rows)


def test_anchors_are_answer_tokens_with_a_next_one(sample):
    eligible = {*range(6, 16), *range(22, 29)}
    assert set(sample_anchors(sample, 99, torch.Generator().manual_seed(0)).tolist()) == eligible
    few = sample_anchors(sample, 5, torch.Generator().manual_seed(1)).tolist()
    assert len(set(few)) == 5
    assert few == sorted(few)


def test_block_tensors_are_as_written_out(sample):
    draft, _, blocks, _ = _setup(sample)
    ids, stop_of = sample.input_ids, {}
    for start, stop in sample.answer_spans:
        stop_of |= dict.fromkeys(range(start, stop), stop)
    for row, anchor in enumerate(blocks.anchor_positions.tolist()):
        assert blocks.block_ids[row].tolist() == [ids[anchor]] + [draft.config.mask_token_id] * (BLOCK - 1)
        for k in range(1, BLOCK + 1):
            supervised = anchor + k < stop_of[anchor]
            weight = math.exp(-(k - 1) / DECAY) if supervised else 0.0
            assert blocks.weights[row, k - 1].item() == pytest.approx(weight)
            if supervised:
                assert blocks.labels[row, k - 1] == ids[anchor + k]
                assert blocks.previous_ids[row, k - 1] == ids[anchor + k - 1]
                assert blocks.target_rows[row, k - 1] == anchor + k - 1
    assert (blocks.weights == 0).any()  # a block near the end of an answer is among them


def test_mask_shows_the_context_before_the_anchor_and_the_own_block(sample):
    _, _, blocks, _ = _setup(sample)
    length = len(sample.input_ids)
    mask = blocks.attention_mask[0, 0]
    for row in range(mask.shape[0]):
        block = row // BLOCK
        anchor = blocks.anchor_positions[block]
        for column in range(mask.shape[1]):
            if column < length:
                expected = column < anchor
            else:
                expected = (column - length) // BLOCK == block
            assert mask[row, column] == expected


@pytest.mark.parametrize("flags", [{}, {"first_slot": 1, "causal": True}, {"window": 6}])
def test_sequences_in_one_forward_have_the_loss_and_gradients_of_each_alone(sample, flags):
    shape = {"sliding_window": 6, "layer_types": ["sliding_attention"]} if "window" in flags else flags
    draft, frozen, _, step = _setup(sample, **shape)
    others = [Sample(1, random_prompt(VOCAB, n, seed=n)[0].tolist(), [(3, n)]) for n in (12, 41)]
    samples = [others[0], sample, others[1]]  # the longest context, and the most blocks, are not the first
    settings = {"block_size": BLOCK, "mask_token_id": draft.config.mask_token_id, "position_decay": DECAY} | flags
    blocks = [
        build_blocks(s, sample_anchors(s, 6 + s.index, torch.Generator().manual_seed(0)), **settings) for s in samples
    ]
    alone = [step(frozen.read(s.input_ids), b)[0] for s, b in zip(samples, blocks, strict=True)]
    sum(alone).backward()
    gradients = {name: p.grad.clone() for name, p in draft.named_parameters() if p.grad is not None}
    draft.zero_grad()

    together, _ = step(stack_states(frozen.read_all([s.input_ids for s in samples])), stack_blocks(blocks))
    together.backward()
    torch.testing.assert_close(together, sum(alone))
    for name, gradient in gradients.items():
        torch.testing.assert_close(draft.get_parameter(name).grad, gradient, msg=name, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk_rows", [3, 64])
def test_loss_and_gradients_equal_the_equations(sample, head, chunk_rows):
    draft, frozen, blocks, step = _setup(sample, head=head, chunk_rows=chunk_rows)
    states = frozen.read(sample.input_ids)
    loss, outcomes = step(states, blocks)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in draft.named_parameters() if p.grad is not None}
    draft.zero_grad()

    hidden, latents, confidence = step.block_outputs(states, blocks)
    expected, row = 0.0, 0
    for a in range(len(blocks.anchor_positions)):
        for k in range(BLOCK):
            weight = blocks.weights[a, k]
            if weight == 0:
                continue
            logits = draft.compute_logits(hidden[a, k])
            if head != "none":
                logits = logits + draft.markov_head.markov_w2(latents[a, k])
            draft_probs = logits.softmax(-1)
            target_probs = frozen.probs(states, blocks.target_rows[a, k][None])[0]
            cross_entropy = -draft_probs[blocks.labels[a, k]].log()
            l1 = (draft_probs - target_probs).abs().sum()
            accept = (1 - 0.5 * l1).detach()
            c = confidence[a, k].sigmoid()
            bce = -(accept * c.log() + (1 - accept) * (1 - c).log())
            expected = expected + weight * (0.1 * cross_entropy + 0.9 * l1 + 1.0 * bce)
            assert outcomes.overlap[row].item() == pytest.approx(accept.item(), abs=1e-5)
            assert outcomes.overlap[row].item() == pytest.approx(
                torch.minimum(draft_probs, target_probs).sum().item(), abs=1e-5
            )
            assert outcomes.cross_entropy[row].item() == pytest.approx(cross_entropy.item(), abs=1e-4)
            assert outcomes.agrees[row] == (draft_probs.argmax() == target_probs.argmax())
            row += 1
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert row == len(outcomes.overlap) == (blocks.weights > 0).sum()
    trained = {name: p.grad for name, p in draft.named_parameters() if p.grad is not None}
    assert trained.keys() == gradients.keys()
    for name, gradient in trained.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_closed_form_gradient_is_autograds():
    draft_logits = torch.randn(5, 11, dtype=torch.double, requires_grad=True)
    target_logits, labels = torch.randn(5, 11, dtype=torch.double), torch.randint(0, 11, (5,))
    weights = torch.rand(5, dtype=torch.double)
    log_probs = draft_logits.log_softmax(-1)
    l1 = (log_probs.exp() - target_logits.softmax(-1)).abs().sum(-1)
    cross_entropy = -log_probs.gather(-1, labels[:, None]).squeeze(-1)
    expected = (weights * (0.1 * cross_entropy + 0.9 * l1)).sum()
    (gradient,) = torch.autograd.grad(expected, draft_logits)
    loss, ours, *_ = _rows(draft_logits.detach().clone(), target_logits.softmax(-1), labels, labels, weights)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(ours, gradient)


def test_confidence_label_gets_no_gradient(sample):
    assert CONFIDENCE_WEIGHT == 1.0
    draft, frozen, blocks, step = _setup(sample)
    loss, _ = step(frozen.read(sample.input_ids), blocks)
    loss.backward()
    with_confidence = draft.markov_head.markov_w2.weight.grad.clone()
    other, frozen, blocks, step = _setup(sample, confidence=False)
    state = {n: v for n, v in draft.state_dict().items() if not n.startswith("confidence_head")}
    other.load_state_dict(state)
    loss, _ = step(frozen.read(sample.input_ids), blocks)
    loss.backward()
    torch.testing.assert_close(with_confidence, other.markov_head.markov_w2.weight.grad)


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_teacher_forced_logits_equal_generation_time_logits(sample, head):
    """The same text, tapped and drafted as in decoding, block by block with the draft's own cache."""
    draft, frozen, blocks, step = _setup(sample, head=head, num_anchors=17)
    draft.eval()
    states = frozen.read(sample.input_ids)
    hidden, latents, confidence = step.block_outputs(states, blocks)
    for a, anchor in enumerate(blocks.anchor_positions.tolist()):
        forced = iter(blocks.labels[a].tolist())
        block = draft_block(
            draft,
            states.features[:, :anchor],
            torch.tensor([sample.input_ids[anchor]]),
            draft.new_cache(),
            sampler=lambda logits, drafted, forced=forced: (torch.tensor([next(forced)]), None),
        )
        known = (blocks.weights[a] > 0).sum()
        torch.testing.assert_close(block.hidden_states[0], hidden[a], atol=1e-5, rtol=1e-4)
        logits = draft.compute_logits(hidden[a])
        if head != "none":
            logits = logits + draft.markov_head.markov_w2(latents[a])
        torch.testing.assert_close(block.draft_logits[0, :known], logits[:known], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(block.confidence_logits[0, :known], confidence[a, :known], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_perfect_draft_has_overlap_one_and_every_block_accepted(sample):
    class Perfect(ScriptedDraft):
        """Its hidden state is the target's at the position, so that the shared lm_head gives the target's law."""

        def forward(self, features, block_ids, position_ids, cache=None, attention_mask=None):
            super().forward(features, block_ids, position_ids, cache, attention_mask)
            return self.final[position_ids[0, features.shape[1] :].clamp_max(len(self.final) - 1)][None]

    target = make_tiny_target("qwen3", seed=0)
    prompt = random_prompt(VOCAB, 8)
    text = plain(target, prompt, max_new_tokens=24)
    written = Sample(0, text[0].tolist(), [(8, 32)])
    _, frozen, _, _ = _setup(written, target=target)
    draft = make_tiny_draft(target, block_size=BLOCK, head="none", draft_class=Perfect)
    draft.bind_target(target)
    states = frozen.read(written.input_ids)
    draft.final = states.final
    anchors = sample_anchors(written, 99, torch.Generator())
    blocks = build_blocks(written, anchors, block_size=BLOCK, mask_token_id=63, position_decay=DECAY)
    _, outcomes = TrainingStep(draft, frozen)(states, blocks)
    assert outcomes.agrees.all()
    torch.testing.assert_close(outcomes.overlap, torch.ones_like(outcomes.overlap), atol=1e-5, rtol=0)
    output = target.generate(
        prompt,
        assistant_model=draft,
        max_new_tokens=1 + 4 * (BLOCK + 1),
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert output.stats.tau == BLOCK + 1


class _VocabularyMemory(TorchDispatchMode):
    """Bytes of the tensors [rows, V] that live at once, at their peak; weights and their gradients do not count."""

    def __init__(self, weights):
        super().__init__()
        self._known = {weight.untyped_storage().data_ptr() for weight in weights}
        self._live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[1:] == (VOCAB,) and tensor.shape[0] != RANK:
                pointer = tensor.untyped_storage().data_ptr()
                if pointer not in self._known and pointer not in self._live:
                    self._live[pointer] = tensor.untyped_storage().nbytes()
                    weakref.finalize(tensor, self._live.pop, pointer, None)
        self.peak = max(self.peak, sum(self._live.values()))
        return result


@pytest.mark.parametrize("chunk_rows", [4, 9])
def test_peak_memory_of_full_vocabulary_logits_is_as_stated(sample, chunk_rows):
    # Three taps: with two, features would be as wide as the vocabulary.
    draft, frozen, blocks, step = _setup(sample, num_anchors=17, chunk_rows=chunk_rows, taps=(0, 1, 2))
    states = frozen.read(sample.input_ids)
    weights = [frozen.model.get_output_embeddings().weight, draft.markov_head.markov_w2.weight]
    assert (blocks.weights > 0).sum() > 4 * chunk_rows
    with _VocabularyMemory(weights) as seen:
        loss, _ = step(states, blocks)
        loss.backward()
    assert 2 * 4 * chunk_rows * VOCAB <= seen.peak <= CHUNK_BYTES * chunk_rows * VOCAB
