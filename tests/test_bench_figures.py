"""run_benchmark: its arms are paired prompt by prompt, and its figures are those of their calls."""

import pytest
import torch
from tiny import make_tiny_draft, make_tiny_target, random_prompt
from transformers import BatchEncoding

from hf_dspark import RoundRecord
from hf_dspark.eval import PromptSet, benchmark, run_benchmark
from hf_dspark.eval.benchmark import Run
from hf_dspark.eval.metrics import pool_forwards, pool_rounds, quartiles

VOCABULARY = 6  # so small that this random draft is sometimes right
TOKENS = 16
ARMS = ["plain", "prompt_lookup", "small@transformers", "small"]


@pytest.fixture(scope="module")
def small_target():
    return make_tiny_target(vocab_size=VOCABULARY, seed=1)


@pytest.fixture(scope="module")
def small_draft(small_target):
    return make_tiny_draft(small_target)


@pytest.fixture(scope="module")
def measured(small_target, small_draft):
    """A greedy benchmark of the small pair on 5 prompts, with a sweep, and its calls: (arm, tokens, prompt)."""
    calls, run = [], benchmark._run

    def noted(target, arm, inputs, arguments, seed):
        calls.append((arm.name, arguments["max_new_tokens"], inputs["input_ids"].tolist()))
        return run(target, arm, inputs, arguments, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "_run", noted)
        patch.setattr(benchmark, "_WARM_UP_TOKENS", 3)
        return _measure(small_target, small_draft, num_prompts=5, threshold_sweep=True), calls


@pytest.fixture(scope="module")
def rounds_of_prompts(small_target, small_draft):
    """The rounds of each of these prompts, generated outside the benchmark."""
    return [
        small_target.generate(
            **_Numbers()(str(seed), "pt"),
            assistant_model=small_draft,
            do_sample=False,
            max_new_tokens=TOKENS,
            return_dict_in_generate=True,
        ).rounds
        for seed in range(5)
    ]


class _Numbers:
    """A tokenizer whose texts are seeds of random prompts."""

    chat_template = None

    def __call__(self, text, return_tensors):
        ids = random_prompt(VOCABULARY, 9, seed=int(text))
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _measure(target, draft, num_prompts, **options):
    prompts = PromptSet("numbers.jsonl", tuple(map(str, range(num_prompts))))
    return run_benchmark(target, {"small": draft}, _Numbers(), prompts, max_new_tokens=TOKENS, **options)


def _record(verified, accepted, emitted):
    return RoundRecord(torch.zeros(1, verified), torch.zeros(1, emitted), verified, accepted, None)


def test_figures_are_pooled_over_the_rounds_of_all_prompts(measured, rounds_of_prompts):
    arms = measured[0]["arms"]
    rounds = [one for rounds in rounds_of_prompts for one in rounds]
    assert 1 < arms["small"]["tau"] == sum(len(one.emitted) for one in rounds) / len(rounds)
    assert len({len(rounds) for rounds in rounds_of_prompts}) > 1  # else a mean of the prompts' tau would be the same
    verified = sum(one.verified for one in rounds)
    assert arms["small"]["verify_rate"] == 5 * (TOKENS - 1) / (verified + len(rounds))
    for k in range(1, 5):
        reached = [one for one in rounds if one.verified >= k]
        kept = [one for one in reached if one.accepted >= k]
        alive = [one for one in reached if one.accepted >= k - 1]
        assert arms["small"]["survival_at"][k - 1] == len(kept) / len(reached) > 0
        assert arms["small"]["acceptance_at"][k - 1] == len(kept) / len(alive)
    for name in ("tau", "verify_rate", "acceptance_at", "survival_at"):  # no stop token here: both loops see the same
        assert arms["small@transformers"][name] == arms["small"][name]


def test_pooled_rounds_follow_the_glossary():
    figures = pool_rounds([_record(3, 3, 4), _record(3, 1, 2), _record(1, 0, 1), _record(0, 0, 1)])
    assert figures == {
        "tau": 2.0,
        "acceptance_at": [2 / 3, 1 / 2, 1.0],  # conditional on all before
        "survival_at": [2 / 3, 1 / 2, 1 / 2],
        "verify_rate": 8 / (7 + 4),
    }


def test_position_that_no_accepted_prefix_reaches_has_no_acceptance():
    assert pool_rounds([_record(2, 0, 1)])["acceptance_at"] == [0.0, None]


def test_tau_of_prompt_lookup_counts_the_targets_forwards(measured, small_target, monkeypatch):
    calls = []
    forward = small_target.forward
    monkeypatch.setattr(small_target, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    for seed in range(5):
        inputs = _Numbers()(str(seed), "pt")
        small_target.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, prompt_lookup_num_tokens=10)
    assert 1 < measured[0]["arms"]["prompt_lookup"]["tau"] == 5 * (TOKENS - 1) / (len(calls) - 5)


def test_tau_from_forwards_leaves_out_each_prefill_and_its_token():
    assert pool_forwards([9, 5], [5, 3]) == 12 / 6
    assert pool_forwards([1], [1]) == 1.0


def test_quartiles_are_interpolated():
    assert quartiles([4.0, 1.0, 2.0, 3.0]) == {"median": 2.5, "p25": 1.75, "p75": 3.25}
    assert quartiles([2.0]) == {"median": 2.0, "p25": 2.0, "p75": 2.0}


def test_speed_is_total_tokens_by_total_seconds_and_ratios_are_paired_by_prompt():
    plain = [Run([1] * 10, 2.0, 10, None), Run([2] * 10, 4.0, 10, None)]
    other = [Run([1] * 10, 1.0, 5, ()), Run([2] * 5, 1.0, 5, ())]
    arm = benchmark._summarise(other, plain, is_greedy=True)
    assert arm["tokens_per_second"] == 15 / 2
    assert arm["ratio_to_plain"] == {"median": 2.0, "p25": 2.0, "p75": 2.0}
    assert arm["identical"] == [1, 2]


def test_texts_that_differ_from_plain_are_counted(small_target, small_draft):
    def push(module, args, logits):
        """Blocks of several tokens lead the target to say 3."""
        blocks = logits.shape[1] > 1
        return logits + 1e4 * torch.nn.functional.one_hot(torch.tensor(3), VOCABULARY) if blocks else logits

    handle = small_target.lm_head.register_forward_hook(push)
    arms = _measure(small_target, small_draft, num_prompts=2)["arms"]
    handle.remove()
    assert arms["plain"]["identical"] == [2, 2]
    assert arms["small"]["identical"] == [0, 2]


def test_arms_warm_up_once_and_rotate_from_prompt_to_prompt(measured):
    _, calls = measured
    assert [(name, tokens) for name, tokens, _ in calls[:4]] == [(name, 3) for name in ARMS]
    for index in range(5):
        of_prompt = calls[4 + 4 * index : 8 + 4 * index]
        start = index % 4
        assert [name for name, _, _ in of_prompt] == ARMS[start:] + ARMS[:start]
        assert all(tokens == TOKENS for _, tokens, _ in of_prompt)
        assert all(ids == _Numbers()(str(index), "pt")["input_ids"].tolist() for _, _, ids in of_prompt)
    assert {name for name, _, _ in calls[24:]}.isdisjoint(ARMS)  # the sweep, afterwards


def test_sampling_seeds_every_call_by_its_prompt_and_compares_no_texts(small_target, small_draft, monkeypatch):
    seeds = []
    set_seed = benchmark.set_seed
    monkeypatch.setattr(benchmark, "set_seed", lambda seed: seeds.append(seed) or set_seed(seed))
    measures = (_measure(small_target, small_draft, 2, temperature=1.0, seed=40) for _ in range(2))
    first, again = (result["arms"] for result in measures)
    assert seeds[4:12] == [40] * 4 + [41] * 4
    assert all(arm["identical"] is None for arm in first.values())
    assert first["small"]["acceptance_at"] == again["small"]["acceptance_at"]


def test_threshold_sweep_counts_what_becomes_of_verified_tokens(measured, rounds_of_prompts):
    sweep = measured[0]["threshold_sweep"]
    assert [row["threshold"] for row in sweep] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    assert all(set(row) == {"threshold", "accepted", "rejected"} for row in sweep)
    rounds = [one for rounds in rounds_of_prompts for one in rounds]
    accepted, verified = sum(one.accepted for one in rounds), sum(one.verified for one in rounds)
    assert sweep[0] == {"threshold": 0, "accepted": accepted, "rejected": verified - accepted}
    verified = [row["accepted"] + row["rejected"] for row in sweep]
    assert verified[0] > verified[6] > verified[8]


def test_draft_that_never_drafts_has_figures_without_positions(small_target):
    draft = make_tiny_draft(small_target)
    draft.generation_config.num_assistant_tokens = 0
    arm = _measure(small_target, draft, num_prompts=1)["arms"]["small"]
    assert (arm["tau"], arm["acceptance_at"], arm["verify_rate"]) == (1.0, [], 1.0)


def test_sweep_without_a_confidence_head_is_refused_before_anything_runs(small_target, monkeypatch):
    monkeypatch.setattr(benchmark, "_run", lambda *args: pytest.fail("ran"))
    draft = make_tiny_draft(small_target, confidence=False)
    with pytest.raises(ValueError, match="'small' has none"):
        _measure(small_target, draft, num_prompts=1, threshold_sweep=True)


def test_draft_with_the_name_of_another_arm_is_refused(small_target, small_draft):
    with pytest.raises(ValueError, match="cannot be called 'plain'"):
        run_benchmark(small_target, {"plain": small_draft}, _Numbers(), PromptSet("one", ("1",)))
