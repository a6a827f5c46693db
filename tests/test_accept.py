"""Prefix acceptance as a pure function: its law, its edges, and rows that do not touch each other."""

import pytest
import torch

from hf_dspark.accept import accept_greedy, accept_prefix, on_common_support
from hf_dspark.state import Distribution

VOCAB = 6


def _laws(*shape, seed=0, zeros=0.0):
    """Random laws; a share `zeros` of the entries has probability 0."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(*shape, VOCAB, generator=generator, dtype=torch.float64)
    probs = probs * (torch.rand(*shape, VOCAB, generator=generator) >= zeros)
    probs[..., 0] += 1e-3
    return probs / probs.sum(-1, keepdim=True)


def _ids(*tokens):
    return torch.tensor([list(tokens)])


@pytest.mark.core
def test_one_position_has_exactly_the_targets_law():
    """Summed over drafted tokens and a grid of uniforms; the acceptance bound is read off the function itself."""
    grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    for seed in range(20):
        draft_law, target_law = _laws(1, seed=seed, zeros=0.3), _laws(1, seed=100 + seed, zeros=0.3)
        emitted = torch.zeros(VOCAB, dtype=torch.float64)
        for token in range(VOCAB):
            rows = len(grid)
            acceptance = accept_prefix(
                torch.full((rows, 1), token),
                draft_law.expand(rows, 1, -1),
                torch.cat([target_law, target_law]).expand(rows, -1, -1),
                grid.unsqueeze(-1),
            )
            is_accepted = acceptance.num_accepted == 1
            emitted[token] += draft_law[0, token] * is_accepted.double().mean()
            emitted += draft_law[0, token] * (acceptance.next_probs * ~is_accepted.unsqueeze(-1)).mean(0)
        torch.testing.assert_close(emitted, target_law[0], atol=2e-3, rtol=0)


@pytest.mark.core
def test_equal_laws_accept_every_token_whatever_the_uniforms():
    laws = _laws(3, 5)
    almost_one = torch.full((3, 4), 1 - 2.0**-24)
    draft_ids = torch.randint(0, VOCAB, (3, 4), generator=torch.Generator().manual_seed(0))
    acceptance = accept_prefix(draft_ids, laws[:, :4], laws, almost_one.double())
    assert acceptance.num_accepted.tolist() == [4, 4, 4]
    assert torch.equal(acceptance.next_probs, laws[:, 4])


@pytest.mark.core
def test_rejection_without_residual_mass_falls_back_to_the_targets_law():
    """Laws equal up to rounding: target nowhere above draft, so that the residual is 0/0."""
    target_law = torch.tensor([[[0.25, 0.25, 0.5], [0.2, 0.3, 0.5]]])
    draft_law = target_law[:, :1] * (1 + 2.0**-20)
    acceptance = accept_prefix(_ids(0), draft_law, target_law, torch.tensor([[1 - 2.0**-24]]))
    assert acceptance.num_accepted.tolist() == [0]
    assert torch.equal(acceptance.next_probs, target_law[:, 0])


@pytest.mark.core
def test_uniform_of_zero_rejects_a_token_of_target_probability_zero():
    target_law = torch.tensor([[[0.0, 0.4, 0.6], [1.0, 0.0, 0.0]]])
    draft_law = torch.tensor([[[0.9, 0.1, 0.0]]])
    acceptance = accept_prefix(_ids(0), draft_law, target_law, torch.zeros(1, 1))
    assert acceptance.num_accepted.tolist() == [0]
    assert acceptance.next_probs[0, 0] == 0


def test_uniform_of_zero_accepts_a_token_the_target_can_produce():
    target_law = torch.tensor([[[1e-30, 1.0], [0.5, 0.5]]])
    acceptance = accept_prefix(_ids(0), torch.tensor([[[1.0, 0.0]]]), target_law, torch.zeros(1, 1))
    assert acceptance.num_accepted.tolist() == [1]


def test_full_acceptance_takes_the_bonus_token_from_the_last_row_unchanged():
    laws = _laws(1, 4)
    acceptance = accept_prefix(_ids(1, 2, 3), laws[:, :3].flip(-1), laws, torch.zeros(1, 3).double())
    assert acceptance.num_accepted.tolist() == [3]
    assert torch.equal(acceptance.next_probs, laws[:, 3])


def test_nothing_drafted_leaves_the_targets_law():
    laws = _laws(2, 1)
    empty = torch.empty(2, 0)
    acceptance = accept_prefix(empty.long(), laws[:, :0], laws, empty.double())
    assert acceptance.num_accepted.tolist() == [0, 0]
    assert torch.equal(acceptance.next_probs, laws[:, 0])


def test_token_after_a_rejected_one_is_never_accepted():
    target_law = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    draft_law = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]])
    acceptance = accept_prefix(_ids(1, 0), draft_law, target_law, torch.zeros(1, 2))
    assert acceptance.num_accepted.tolist() == [0]
    assert acceptance.next_probs.tolist() == [[1.0, 0.0]]


def test_residual_is_taken_from_the_row_of_the_first_rejection():
    draft_law, target_law = _laws(1, 3, seed=1), _laws(1, 4, seed=2)
    uniforms = torch.tensor([[0.0, 1 - 1e-9, 0.0]]).double()
    worst = (draft_law[0, 1] - target_law[0, 1]).argmax().item()  # rejected, unless the uniform is small
    acceptance = accept_prefix(_ids(0, worst, 0), draft_law, target_law, uniforms)
    residual = (target_law[:, 1] - draft_law[:, 1]).clamp_min(0)
    assert acceptance.num_accepted.tolist() == [1]
    torch.testing.assert_close(acceptance.next_probs, residual / residual.sum())


@pytest.mark.core
def test_rows_of_a_batch_are_decided_each_for_itself():
    batch, length = 16, 5
    draft_law, target_law = _laws(batch, length, seed=3), _laws(batch, length + 1, seed=4)
    generator = torch.Generator().manual_seed(5)
    draft_ids = torch.randint(0, VOCAB, (batch, length), generator=generator)
    uniforms = torch.rand(batch, length, generator=generator, dtype=torch.float64)
    together = accept_prefix(draft_ids, draft_law, target_law, uniforms)
    assert len(set(together.num_accepted.tolist())) > 2
    for i in range(batch):
        row = slice(i, i + 1)
        alone = accept_prefix(draft_ids[row], draft_law[row], target_law[row], uniforms[row])
        assert torch.equal(alone.num_accepted, together.num_accepted[row])
        assert torch.equal(alone.next_probs, together.next_probs[row])


def test_next_law_is_always_a_law():
    for seed in range(30):
        draft_law, target_law = _laws(8, 3, seed=seed, zeros=0.4), _laws(8, 4, seed=50 + seed, zeros=0.4)
        uniforms = torch.rand(8, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        draft_ids = draft_law.flatten(0, 1).multinomial(1).view(8, 3)
        next_probs = accept_prefix(draft_ids, draft_law, target_law, uniforms).next_probs
        assert (next_probs >= 0).all()
        torch.testing.assert_close(next_probs.sum(-1), torch.ones(8, dtype=torch.float64))


@pytest.mark.core
def test_greedy_keeps_drafted_tokens_up_to_the_first_that_differs():
    draft_ids = torch.tensor([[1, 2, 3], [1, 9, 3], [9, 2, 3], [1, 2, 9]])
    target_ids = torch.tensor([[1, 2, 3, 4]]).expand(4, -1)
    assert accept_greedy(draft_ids, target_ids).tolist() == [3, 1, 0, 2]
    assert accept_greedy(draft_ids[:, :0], target_ids[:, :1]).tolist() == [0, 0, 0, 0]


def _short(laws, width):
    """The same laws over their `width` likeliest tokens, which hold all the mass."""
    probs, ids = laws.topk(width)
    return Distribution(probs, ids)


def _cut(laws, width):
    """Laws with only their `width` likeliest tokens."""
    probs, ids = laws.topk(width)
    return torch.zeros_like(laws).scatter(-1, ids, probs / probs.sum(-1, keepdim=True))


@pytest.mark.core
@pytest.mark.parametrize("draft_is_short", [True, False])
def test_short_supports_decide_as_the_whole_vocabulary_does(draft_is_short):
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        draft_law, target_law = _cut(_laws(4, 3, seed=seed), 3), _cut(_laws(4, 4, seed=50 + seed), 4)
        draft_ids = draft_law.flatten(0, 1).multinomial(1, generator=generator).view(4, 3)
        uniforms = torch.rand(4, 3, generator=generator, dtype=torch.float64)
        whole = accept_prefix(draft_ids, draft_law, target_law, uniforms)
        draft = _short(draft_law, 3) if draft_is_short else Distribution(draft_law)
        target = _short(target_law, 5)
        short = accept_prefix(*on_common_support(draft_ids, draft, target, VOCAB), uniforms)
        assert short.num_accepted.tolist() == whole.num_accepted.tolist()
        assert (short.next_probs[:, 5:] == 0).all()  # the column of tokens outside the support
        ids = target.support_ids[torch.arange(4), short.num_accepted]
        restored = torch.zeros_like(whole.next_probs).scatter(-1, ids, short.next_probs[:, :5])
        torch.testing.assert_close(restored, whole.next_probs)
