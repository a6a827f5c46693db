"""Greedy output equals plain generate()'s, whatever the draft is worth; and accepted lengths are what it is worth."""

import functools
import random

import pytest
import torch
from tiny import (
    HEADS,
    KINDS,
    QUALITIES,
    WINDOW,
    ScriptedDraft,
    make_draft_of_quality,
    make_tiny_draft,
    make_tiny_target,
    plain,
    random_prompt,
    scripted_rounds,
    speculate,
)

from hf_dspark import ConfidenceThreshold, DSparkDraftModel, FixedLength

PROMPT_LENGTH, NEW_TOKENS = 9, 4 * WINDOW
CASES_PER_KIND = 20


@functools.cache
def _reference(kind):
    """A target of `kind`, a prompt, and its plain greedy continuation."""
    target = make_tiny_target(kind, seed=1)
    prompt = random_prompt(64, PROMPT_LENGTH, seed=1)
    return target, prompt, plain(target, prompt, max_new_tokens=NEW_TOKENS)


def _rounds(target, draft, prompt, **kwargs):
    return speculate(target, draft, prompt, return_dict_in_generate=True, **kwargs)


@pytest.mark.core
@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_output_equals_plain_and_rounds_are_as_good_as_the_draft(kind, quality):
    target, prompt, expected = _reference(kind)
    draft = make_draft_of_quality(target, expected[0].tolist(), quality, seed=2)
    output = _rounds(target, draft, prompt, max_new_tokens=NEW_TOKENS)
    assert output.sequences.tolist() == expected.tolist()
    lengths = [r.accepted_length for r in output.rounds]
    assert sum(lengths) == NEW_TOKENS - 1  # the prefill emits the first
    assert draft.last_stats.tau == pytest.approx(sum(lengths) / len(lengths))
    if QUALITIES[quality] is not None:
        assert lengths == scripted_rounds(draft, PROMPT_LENGTH, expected.shape[1])


@pytest.mark.core
@pytest.mark.parametrize("block_size", [1, 4, 7])
def test_perfect_draft_has_every_block_accepted_whole(block_size):
    target, prompt, expected = _reference("qwen3")
    draft = make_draft_of_quality(target, expected[0].tolist(), "perfect", block_size=block_size)
    output = _rounds(target, draft, prompt, max_new_tokens=NEW_TOKENS)
    assert {r.accepted_length for r in output.rounds[:-1]} == {block_size + 1}
    assert all(r.accepted == r.verified == block_size for r in output.rounds[:-1])


@pytest.mark.core
def test_garbage_draft_has_almost_nothing_accepted():
    target, prompt, expected = _reference("qwen3")
    draft = make_tiny_draft(target, seed=2)
    assert speculate(target, draft, prompt, max_new_tokens=NEW_TOKENS).tolist() == expected.tolist()
    assert 1.0 <= draft.last_stats.tau < 1.3  # a token is right by chance once in 64


class _CountingDraft(DSparkDraftModel):
    """No opinion of its own: what it proposes is its Markov head's alone."""

    def compute_logits(self, hidden_states):
        return torch.zeros(*hidden_states.shape[:-1], self.config.vocab_size)


@pytest.mark.core
def test_each_drafted_token_decides_the_bias_on_the_next():
    """A transition table that says "one more": the block counts on from the anchor."""
    target, prompt, _ = _reference("qwen3")
    draft = make_tiny_draft(target, rank=64, draft_class=_CountingDraft)
    with torch.no_grad():
        draft.markov_head.markov_w1.weight.copy_(torch.eye(64))
        draft.markov_head.markov_w2.weight.copy_(torch.eye(64).roll(1, dims=0))
    output = _rounds(target, draft, prompt, max_new_tokens=NEW_TOKENS)
    anchor = output.sequences[0, PROMPT_LENGTH].item()
    for r in output.rounds[: -draft.config.block_size]:
        assert r.drafted == [(anchor + k) % 64 for k in range(1, draft.config.block_size + 1)]
        anchor = r.emitted[-1]


@pytest.mark.parametrize("head", HEADS)
def test_draft_that_is_always_wrong_costs_a_round_a_token(head):
    target, prompt, expected = _reference("qwen3")
    draft = make_tiny_draft(target, head=head, draft_class=ScriptedDraft)
    draft.follow(expected[0].tolist(), error_rate=1.0)
    output = _rounds(target, draft, prompt, max_new_tokens=NEW_TOKENS)
    assert output.sequences.tolist() == expected.tolist()
    assert [r.accepted_length for r in output.rounds] == [1] * (NEW_TOKENS - 1)
    assert draft.last_stats.tau == 1.0


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("taps", [(-1,), (3,), (-1, 0, 1, 2, 3)])
def test_every_head_and_tap_leaves_the_output_alone(head, taps):
    target, prompt, expected = _reference("gemma3_text")
    draft = make_draft_of_quality(target, expected[0].tolist(), "noisy", head=head, taps=taps, seed=3)
    output = _rounds(target, draft, prompt, max_new_tokens=NEW_TOKENS)
    assert output.sequences.tolist() == expected.tolist()
    assert [r.accepted_length for r in output.rounds] == scripted_rounds(draft, PROMPT_LENGTH, expected.shape[1])


@pytest.mark.core
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("loop", ["dspark", "transformers"])
def test_unpatched_door_gives_the_same_output_on_either_loop(kind, loop):
    target, prompt, expected = _reference(kind)
    draft = make_draft_of_quality(target, expected[0].tolist(), "near-perfect", seed=4)
    decode = draft.as_custom_generate(loop=loop)
    got = target.generate(prompt, custom_generate=decode, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert got.tolist() == expected.tolist()
    expected_rounds = scripted_rounds(draft, PROMPT_LENGTH, expected.shape[1])
    assert draft.last_stats.rounds == len(expected_rounds)
    assert draft.last_stats.tau == pytest.approx(sum(expected_rounds) / len(expected_rounds))


def _random_target(rng, kind):
    vocab_size = rng.choice([5, 12, 211])
    arguments = {"seed": rng.randrange(10**6), "vocab_size": vocab_size, "attention": rng.choice(["eager", None])}
    return make_tiny_target(kind, **arguments), arguments


def _random_request(rng, target, vocab_size, *, with_eos):
    """A prompt and the arguments of generate()."""
    prompt = random_prompt(vocab_size, rng.choice([1, 2, rng.randrange(3, 31)]), seed=rng.randrange(10**6))
    new_tokens = rng.choice([1, rng.randrange(2, 8), *(rng.randrange(10, 32) for _ in range(4))])
    kwargs = {"max_new_tokens": new_tokens, "pad_token_id": 0}
    if rng.random() < 0.3 and prompt.shape[1] > 1:
        mask = torch.ones_like(prompt)
        mask[:, : rng.randrange(1, prompt.shape[1])] = 0
        prompt, kwargs["attention_mask"] = prompt * mask, mask
    if rng.random() < 0.3:
        kwargs["repetition_penalty"] = rng.choice([1.1, 1.5])
    if rng.random() < 0.2:
        kwargs["no_repeat_ngram_size"] = 3
    if with_eos:
        unstopped = plain(target, prompt, **kwargs)[0, prompt.shape[1] :].tolist()
        late = max(rng.choices(unstopped, k=3), key=unstopped.index)
        kwargs["eos_token_id"] = [late, *rng.choices(range(vocab_size), k=rng.choice([0, 0, 1, 2]))]
        if rng.random() < 0.4:
            kwargs["min_new_tokens"] = rng.randrange(1, kwargs["max_new_tokens"] + 1)
    return prompt, kwargs


def _random_draft(rng, target, sequence):
    head, confidence = rng.choice(HEADS), rng.random() < 0.6
    draft = make_draft_of_quality(
        target,
        sequence,
        rng.choice(["garbage", "noisy", "noisy", "near-perfect", "near-perfect", "perfect"]),
        seed=rng.randrange(10**6),
        head=head,
        confidence=confidence,
        block_size=rng.randrange(1, 8),
        taps=rng.choice([(0, 2), (1,), (-1, 1), (0, 1, 3)]),
    )
    schedules = [None] * 4 + [FixedLength(0), FixedLength(1), FixedLength(3)]
    if confidence:
        schedules += [ConfidenceThreshold(rng.uniform(0.1, 0.6)), ConfidenceThreshold(0.5, num_tokens=2)]
    return draft, rng.choice(schedules)


def _first_difference(target, prompt, expected, got):
    """Where two outputs part, and how near the target's two best logits are there."""
    for i, (one, other) in enumerate(zip(expected[0].tolist(), got[0].tolist(), strict=False)):
        if one != other:
            best = target(expected[:, :i]).logits[0, -1].topk(2).values
            return f"differs at {i} (prompt {prompt.shape[1]}): {one} became {other}; raw gap {best[0] - best[1]:.1e}"
    return f"lengths {expected.shape[1]} and {got.shape[1]}"


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_fuzzed_requests_equal_plain(kind):
    """20 cases a kind, 300 in all, with accepted and rejected tokens and stop tokens among them."""
    rng = random.Random(f"fuzz {kind}")
    accepted = rejected = stopped = 0
    for case in range(CASES_PER_KIND):
        if case % 3 == 0:
            target, arguments = _random_target(rng, kind)
        prompt, kwargs = _random_request(rng, target, arguments["vocab_size"], with_eos=case % 2 == 1)
        expected = plain(target, prompt, **kwargs)
        unmasked = expected[0, (prompt == 0).sum() :].tolist()
        draft, schedule = _random_draft(rng, target, unmasked)
        extra = {} if schedule is None else {"schedule": schedule}
        output = _rounds(target, draft, prompt, **kwargs, **extra)
        if output.sequences.tolist() != expected.tolist():
            difference = _first_difference(target, prompt, expected, output.sequences)
            block = draft.config.block_size
            raise AssertionError(f"case {case}: {kind} {arguments} block {block} {extra} {kwargs}: {difference}")
        accepted += sum(r.accepted for r in output.rounds)
        rejected += sum(r.accepted < r.verified for r in output.rounds)
        stopped += expected.shape[1] - prompt.shape[1] < kwargs["max_new_tokens"]
    assert accepted > 10
    assert rejected > 5
    assert stopped >= 2
