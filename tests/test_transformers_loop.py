"""The candidate generator in transformers' own assisted loop: the same output there, and its limits by name."""

import pytest
import torch
from tiny import KINDS, make_draft_of_quality, make_tiny_draft, make_tiny_target, plain, random_prompt
from transformers import LogitsProcessor, StoppingCriteria

from hf_dspark import ConfidenceThreshold, FixedLength

# The stock loop runs these past their sliding windows and with experts, in half a second each.
LOOP_KINDS = [kind for kind in KINDS if kind != "lfm2"]


def _stock(target, draft, prompt, *, loop="transformers", schedule=None, **kwargs):
    decode = draft.as_custom_generate(loop=loop, schedule=schedule)
    return target.generate(prompt, custom_generate=decode, **{"do_sample": False, **kwargs})


@pytest.mark.core
@pytest.mark.parametrize("kind", LOOP_KINDS)
def test_greedy_output_equals_plain_in_the_stock_loop(kind):
    target, prompt = make_tiny_target(kind, seed=3), random_prompt(64, 9)
    expected = plain(target, prompt, max_new_tokens=40)
    for quality in ("garbage", "near-perfect"):
        draft = make_draft_of_quality(target, expected[0].tolist(), quality, seed=2)
        assert _stock(target, draft, prompt, max_new_tokens=40).tolist() == expected.tolist()
    assert draft.last_stats.tau > 2
    assert draft.last_stats.tokens == 40


@pytest.mark.parametrize("schedule", [FixedLength(2), ConfidenceThreshold(0.5), FixedLength(0)])
def test_schedules_hold_in_the_stock_loop(target, draft, schedule):
    prompt = random_prompt(64, 9)
    output = _stock(target, draft, prompt, schedule=schedule, max_new_tokens=20, return_dict_in_generate=True)
    assert output.sequences.tolist() == plain(target, prompt, max_new_tokens=20).tolist()
    assert max(r.verified for r in output.rounds) <= (schedule.num_tokens or 4)


def test_left_padding_and_eos_hold_in_the_stock_loop(target, draft):
    prompt = random_prompt(64, 9)
    mask = torch.ones_like(prompt)
    mask[:, :3] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": [7, 9, 11, 13]}
    assert _stock(target, draft, prompt, **kwargs).tolist() == plain(target, prompt, **kwargs).tolist()


@pytest.mark.core
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 0.7, "top_k": 0, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 0, "repetition_penalty": 1.3},
        {"temperature": 1.2, "top_k": 0, "min_p": 0.05},
    ],
)
def test_the_same_seed_gives_the_same_tokens_in_both_loops(settings):
    # With temperature, top-k and top-p alone it does not: there our loop draws on the k best tokens, with less noise.
    target = make_tiny_target("qwen3", seed=0, scale=1.5)
    draft, prompt = make_tiny_draft(target), random_prompt(64, 9)
    for seed in range(5):
        sampled = []
        for loop in ("dspark", "transformers"):
            torch.manual_seed(seed)
            output = _stock(target, draft, prompt, loop=loop, max_new_tokens=20, do_sample=True, **settings)
            sampled.append(output.tolist())
        assert sampled[0] == sampled[1]


def test_candidates_come_with_the_logits_they_were_sampled_from(target, draft, monkeypatch):
    seen = []
    original = type(target)._assisted_decoding

    def spy(self, *args, **kwargs):
        generator = self._get_candidate_generator()
        get = generator.get_candidates

        def get_candidates(input_ids, **arguments):
            candidates = get(input_ids, **arguments)
            seen.append((input_ids, candidates, generator._last[0]))
            return candidates

        generator.get_candidates = get_candidates
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(target), "_assisted_decoding", spy)
    for settings in ({"top_k": 0}, {"top_k": 5, "temperature": 0.7, "top_p": 0.9}):
        seen.clear()
        _stock(target, draft, random_prompt(64, 9), max_new_tokens=12, do_sample=True, **settings)
        (prompt, (first_ids, first_logits), _), *rounds = seen
        assert first_logits is None
        assert first_ids.tolist() == prompt.tolist()
        for input_ids, (ids, logits), block in rounds:
            if logits is None:
                assert ids.tolist() == input_ids.tolist()
                continue
            drafted = ids[:, input_ids.shape[1] :]
            assert drafted.tolist() == block.token_ids[:, : drafted.shape[1]].tolist()
            law = block.distribution
            if law is None:  # the temperature is 1
                probs = block.draft_logits.softmax(-1)
            else:
                probs = torch.zeros_like(block.draft_logits).scatter(-1, law.support_ids, law.probs)
            torch.testing.assert_close(logits.softmax(-1), probs[:, : logits.shape[1]])


def test_stock_loop_returns_rounds_and_restores_the_target(target, draft):
    output = _stock(target, draft, random_prompt(64, 9), max_new_tokens=15, return_dict_in_generate=True)
    assert sum(r.accepted_length for r in output.rounds) == output.stats.tokens - 1 == 14
    assert "_get_candidate_generator" not in vars(target)


class _Counting(LogitsProcessor):
    calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores


class _Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"use_cache": False}, "use_cache=False"),
        ({"stopping_criteria": [_Never()]}, "stopping criteria"),
        ({"max_time": 5.0}, "max_time"),
        ({"logits_processor": [_Counting()]}, "keep a state"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"num_return_sequences": 2, "do_sample": True}, "several sequences at once"),
    ],
)
def test_limits_of_the_stock_loop_are_refused_by_name(target, draft, kwargs, message):
    with pytest.raises(ValueError, match=message):
        _stock(target, draft, random_prompt(64, 9), max_new_tokens=5, **kwargs)


def test_filled_cache_is_refused_in_the_stock_loop(target, draft):
    from hf_dspark.compat import CACHE

    prompt = random_prompt(64, 9)
    first = plain(target, prompt, max_new_tokens=5, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="already filled"):
        _stock(target, draft, first.sequences, max_new_tokens=5, **{CACHE: first[CACHE]})


def test_unknown_loop_is_refused(target, draft):
    with pytest.raises(ValueError, match=r'"dspark" \(the default\) or "transformers", got \'fast\''):
        _stock(target, draft, random_prompt(64, 9), loop="fast", max_new_tokens=5)
