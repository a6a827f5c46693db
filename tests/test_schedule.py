"""How many drafted tokens are verified; and that this never looks ahead."""

import pytest
import torch
from tiny import ScriptedDraft, make_tiny_draft, make_tiny_target, plain, random_prompt, speculate

from hf_dspark import ConfidenceThreshold, FixedLength
from hf_dspark.schedule import Schedule


def _confidence(rows, length, seed=0):
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("num_tokens", "length"), [(None, 5), (0, 0), (3, 3), (5, 5), (9, 5)])
def test_fixed_length_is_what_it_says_up_to_the_block(num_tokens, length):
    assert FixedLength(num_tokens)(_confidence(3, 5)).tolist() == [length] * 3


@pytest.mark.parametrize(
    ("confidence", "threshold", "length"),
    [
        ([0.9, 0.8, 0.7], 0.0, 3),
        ([0.9, 0.8, 0.7], 0.8, 2),
        ([0.9, 0.5, 0.9], 0.6, 1),
        ([0.1, 0.9, 0.9], 0.6, 0),
        ([1.0, 1.0, 0.99], 1.0, 2),
    ],
)
def test_threshold_stops_before_the_first_confidence_below_it(confidence, threshold, length):
    assert ConfidenceThreshold(threshold)(torch.tensor([confidence])).tolist() == [length]


def test_threshold_reads_each_row_alone_and_keeps_to_its_maximum():
    confidence = torch.tensor([[0.9, 0.9, 0.9], [0.9, 0.1, 0.9], [0.1, 0.9, 0.9]])
    assert ConfidenceThreshold(0.5)(confidence).tolist() == [3, 1, 0]
    assert ConfidenceThreshold(0.5, num_tokens=2)(confidence).tolist() == [2, 1, 0]
    assert ConfidenceThreshold(0.5, num_tokens=0)(confidence).tolist() == [0, 0, 0]


@pytest.mark.parametrize("wrong", [-0.1, 1.1])
def test_threshold_that_is_no_probability_is_refused(wrong):
    with pytest.raises(ValueError, match="threshold"):
        ConfidenceThreshold(wrong)


@pytest.mark.parametrize("make", [FixedLength, lambda n: ConfidenceThreshold(0.5, num_tokens=n)])
def test_negative_number_of_tokens_is_refused(make):
    with pytest.raises(ValueError, match="num_tokens"):
        make(-1)


@pytest.mark.core
@pytest.mark.parametrize(
    "schedule",
    [FixedLength(), FixedLength(2), *(ConfidenceThreshold(t) for t in (0.0, 0.3, 0.7)), ConfidenceThreshold(0.5, 3)],
    ids=repr,
)
def test_confidence_of_a_token_or_of_later_ones_never_decides_about_tokens_before_it(schedule):
    """Token j is verified if the length is above j: changing c_k, c_k+1, ... must not change that for any j < k."""
    length = 6
    for seed in range(50):
        confidence = _confidence(4, length, seed)
        verified = schedule(confidence)
        for k in range(length):
            changed = confidence.clone()
            changed[:, k:] = _confidence(4, length - k, 1000 + seed)
            assert torch.equal(schedule(changed).clamp_max(k), verified.clamp_max(k))


@pytest.mark.core
@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_confidence_of_a_token_does_not_depend_on_the_token_itself(target, head):
    """c_k reads tokens before k: another token at k changes c_k+1, and nothing up to c_k."""
    prompt = random_prompt(64, 6)
    draft = make_tiny_draft(target, head=head, draft_class=ScriptedDraft)

    def confidence(proposals):
        draft.proposals = proposals
        kwargs = {"max_new_tokens": 20, "return_dict_in_generate": True}
        return speculate(target, draft, prompt, **kwargs).rounds[0].confidence

    block = dict(zip(range(7, 11), [5, 6, 7, 8], strict=True))  # the anchor stands at position 6
    before = confidence(block)
    for k in range(4):
        after = confidence(block | {7 + k: 50})
        assert after[: k + 1] == before[: k + 1]
        if k < 3:
            assert after[k + 1] != before[k + 1]


@pytest.mark.core
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 99])
def test_fixed_length_decides_how_many_drafted_tokens_a_round_verifies(target, draft, num_tokens):
    prompt = random_prompt(64, 6)
    output = speculate(
        target, draft, prompt, max_new_tokens=20, schedule=FixedLength(num_tokens), return_dict_in_generate=True
    )
    assert output.sequences.tolist() == plain(target, prompt, max_new_tokens=20).tolist()
    block_size = draft.config.block_size
    assert {r.verified for r in output.rounds[:-block_size]} == {min(num_tokens, block_size)}
    if num_tokens == 0:
        assert len(output.rounds) == 19
        assert not any(r.drafted for r in output.rounds)


@pytest.mark.core
def test_threshold_verifies_exactly_the_tokens_above_it(target, draft):
    schedule = ConfidenceThreshold(0.45)
    prompt = random_prompt(64, 6)
    output = speculate(target, draft, prompt, max_new_tokens=40, schedule=schedule, return_dict_in_generate=True)
    assert output.sequences.tolist() == plain(target, prompt, max_new_tokens=40).tolist()
    drafting = [r for r in output.rounds if r.drafted]
    for r in drafting:
        assert r.verified == schedule(torch.tensor([r.confidence])).item()
    assert len({r.verified for r in drafting}) > 1


@pytest.mark.parametrize(("num_tokens", "threshold"), [(2, None), (None, 0.45), (2, 0.45)])
def test_generation_config_of_the_draft_sets_the_schedule(target, num_tokens, threshold):
    draft = make_tiny_draft(target)
    draft.generation_config.num_assistant_tokens = num_tokens
    draft.generation_config.assistant_confidence_threshold = threshold
    schedule = FixedLength(2) if threshold is None else ConfidenceThreshold(threshold, num_tokens)
    kwargs = {"max_new_tokens": 30, "return_dict_in_generate": True}
    by_config = speculate(target, draft, random_prompt(64, 6), **kwargs)
    by_argument = speculate(target, make_tiny_draft(target), random_prompt(64, 6), schedule=schedule, **kwargs)
    assert [r.verified for r in by_config.rounds] == [r.verified for r in by_argument.rounds]


def test_threshold_without_a_confidence_head_is_refused_by_name(target):
    draft = make_tiny_draft(target, confidence=False)
    with pytest.raises(ValueError, match="confidence head"):
        speculate(target, draft, random_prompt(64, 6), max_new_tokens=4, schedule=ConfidenceThreshold(0.5))


class _Said(Schedule):
    """Says whatever it is told to."""

    needs_confidence, num_tokens = True, None

    def __init__(self, *lengths):
        self.lengths = lengths

    def __call__(self, confidence):
        return torch.tensor(self.lengths)


@pytest.mark.parametrize("lengths", [(1.5,), (-1,), (2, 2), ()], ids=str)
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_schedule_of_the_users_own_that_says_what_cannot_be_is_named(kind, lengths):
    target = make_tiny_target(kind)
    draft = make_tiny_draft(target)
    with pytest.raises(ValueError, match=r"_Said.*gave verify lengths.*values from 0 to 4"):
        speculate(target, draft, random_prompt(64, 5), max_new_tokens=8, schedule=_Said(*lengths))


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_more_than_was_drafted_is_all_of_it(kind):
    target, prompt = make_tiny_target(kind), random_prompt(64, 5)
    draft = make_tiny_draft(target)
    settings = {"max_new_tokens": 30, "return_dict_in_generate": True}
    whole = speculate(target, draft, prompt, **settings)
    more = speculate(target, draft, prompt, schedule=_Said(9), **settings)
    assert more.sequences.tolist() == whole.sequences.tolist()
    assert [(r.verified, r.accepted) for r in more.rounds] == [(r.verified, r.accepted) for r in whole.rounds]
