"""compare(): what it measures is plain and speculative generation, and it finds where they part."""

import dataclasses

import pytest
import torch
from tiny import make_draft_of_quality, plain, random_prompt
from tiny_files import byte_tokenizer, trained_pair
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, StoppingCriteria, set_seed

from hf_dspark import DSparkDraftModel, FixedLength, compare

PROMPT = random_prompt(64, 7)


@pytest.fixture
def perfect_draft(target):
    """A draft that proposes what the target will say."""
    sequence = plain(target, PROMPT, max_new_tokens=40)[0].tolist()
    return make_draft_of_quality(target, sequence, "perfect")


@pytest.fixture
def unfaithful_target(target):
    """The target, except that blocks of several tokens lead it to say 5."""

    def push(module, args, logits):
        return logits + 1e4 * torch.nn.functional.one_hot(torch.tensor(5), 64) if logits.shape[1] > 1 else logits

    handle = target.lm_head.register_forward_hook(push)
    yield target
    handle.remove()


def test_equal_texts_are_reported_with_the_figures_of_both_calls(target, perfect_draft):
    comparison = compare(target, perfect_draft, PROMPT, max_new_tokens=30)
    expected = plain(target, PROMPT, max_new_tokens=30)[0, 7:].tolist()
    assert comparison.plain_ids == comparison.speculative_ids == expected
    assert comparison.is_equal is True
    assert comparison.first_difference is comparison.top2_gap is comparison.plain_token_id is None
    assert comparison.stats == perfect_draft.last_stats
    assert len(comparison.rounds) == comparison.stats.rounds == 6  # 29 tokens after the prefill's, 5 a round
    assert comparison.tau == comparison.stats.tau == 29 / 6
    assert comparison.plain_tokens_per_second == 30 / comparison.plain_seconds
    assert comparison.speculative_tokens_per_second == 30 / comparison.speculative_seconds
    assert comparison.ratio == pytest.approx(comparison.plain_seconds / comparison.speculative_seconds)
    assert comparison.summary.startswith("tau 4.83, ")
    assert comparison.summary.endswith("; the text equals plain generation's")


def test_first_differing_token_is_found_with_the_gap_of_the_logits_plain_generation_chose_by(unfaithful_target, draft):
    comparison = compare(unfaithful_target, draft, PROMPT, max_new_tokens=12)
    reference = plain(unfaithful_target, PROMPT, max_new_tokens=12, output_logits=True, return_dict_in_generate=True)
    assert reference.sequences[0, 8] != 5
    assert comparison.is_equal is False
    assert comparison.first_difference == 1  # the prefill's token is the same; the first verified one is pushed
    assert comparison.plain_token_id == reference.sequences[0, 8]
    assert comparison.speculative_token_id == 5
    best, second = reference.logits[1][0].topk(2).values.tolist()
    assert comparison.top2_gap == best - second
    assert f"parts from plain at token 1 (5 for {comparison.plain_token_id})" in comparison.summary


def test_tokenizer_names_the_differing_tokens(unfaithful_target, draft):
    tokenizer = byte_tokenizer()
    comparison = compare(unfaithful_target, draft, PROMPT, tokenizer=tokenizer, max_new_tokens=4)
    assert f"({tokenizer.decode([5])!r} for " in comparison.summary


@pytest.mark.parametrize(
    ("dtype", "logits", "verdict"),
    [
        (torch.bfloat16, (20.0, 19.875), "a tie of 0.12 logits; rounding in bfloat16"),
        (torch.bfloat16, (20.0, 17.0), "leads by 3 logits: more than rounding in bfloat16"),
        (torch.float32, (20.0, 19.875), "leads by 0.12 logits: more than rounding in float32"),
    ],
)
def test_summary_calls_a_gap_within_rounding_a_tie(unfaithful_target, draft, dtype, logits, verdict):
    comparison = compare(unfaithful_target, draft, PROMPT, max_new_tokens=4)
    comparison = dataclasses.replace(comparison, dtype=dtype, top2_logits=logits)
    assert comparison.summary.endswith(verdict)


def test_text_that_ends_earlier_parts_at_its_end(target, draft):
    class StopsTheFirstRun(StoppingCriteria):
        done = False

        def __call__(self, input_ids, scores, **kwargs):
            stop = not self.done and input_ids.shape[1] == 7 + 3
            self.done |= stop
            return torch.tensor([stop])

    comparison = compare(target, draft, PROMPT, max_new_tokens=12, stopping_criteria=[StopsTheFirstRun()])
    assert (len(comparison.speculative_ids), len(comparison.plain_ids)) == (3, 12)
    assert comparison.is_equal is False
    assert comparison.first_difference == 3
    assert comparison.speculative_token_id is None
    assert comparison.plain_token_id == comparison.plain_ids[3]
    assert f"at token 3 (the end for {comparison.plain_ids[3]})" in comparison.summary


def test_mapping_and_tensor_are_the_same_inputs(target, draft):
    mapping = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}
    assert compare(target, draft, mapping, max_new_tokens=9).plain_ids == (
        compare(target, draft, PROMPT, max_new_tokens=9).plain_ids
    )


def test_sampling_compares_speed_only_and_keeps_the_text_a_seed_gives_generate(target, draft):
    set_seed(3)
    expected = target.generate(PROMPT, assistant_model=draft, do_sample=True, max_new_tokens=20)
    set_seed(3)
    comparison = compare(target, draft, PROMPT, do_sample=True, max_new_tokens=20)
    assert comparison.speculative_ids == expected[0, 7:].tolist()
    assert comparison.is_equal is comparison.first_difference is comparison.top2_gap is None
    assert comparison.summary.endswith("; sampled, so the text is another than plain generation's")


def test_sampling_may_be_asked_for_by_a_generation_config(target, draft):
    config = GenerationConfig(do_sample=True, max_new_tokens=5)
    assert compare(target, draft, PROMPT, generation_config=config).is_equal is None


def test_greedy_even_where_the_targets_own_config_samples(target, draft, monkeypatch):
    monkeypatch.setattr(target.generation_config, "do_sample", True)
    assert compare(target, draft, PROMPT, max_new_tokens=9).is_equal is True


def test_schedule_goes_to_the_speculative_call(target, draft):
    comparison = compare(target, draft, PROMPT, schedule=FixedLength(0), max_new_tokens=9)
    assert comparison.is_equal is True
    assert [round_.verified for round_ in comparison.rounds] == [0] * 8


def test_streamer_gets_the_speculative_run_once(target, draft):
    class Tokens(list):
        def put(self, value):
            self.append(value)

        def put_round(self, tokens, num_accepted):
            self.extend(tokens.tolist())

        def end(self):
            self.append("end")

    streamer = Tokens()
    comparison = compare(target, draft, PROMPT, streamer=streamer, max_new_tokens=9)
    assert torch.equal(streamer[0], PROMPT)
    assert streamer[1:] == [*comparison.speculative_ids, "end"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (PROMPT.repeat(2, 1), r"one prompt at a time .* got \[2, 7\]"),
        (PROMPT[0], r"shape \[1, n\], got \[7\]"),
        (PROMPT[:, :0], r"got \[1, 0\]"),
        ({"input_ids": PROMPT.tolist()}, "got dict with list"),
        ("Once upon a time", "got str"),
    ],
)
def test_inputs_that_are_not_one_prompt_are_refused(target, draft, inputs, message):
    with pytest.raises(ValueError, match=message):
        compare(target, draft, inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 3}, "`num_beams=3`"),
        ({"generation_config": GenerationConfig(do_sample=True, num_return_sequences=2)}, "`num_return_sequences=2`"),
        ({"assistant_model": object()}, "no `assistant_model`"),
        ({"past_key_values": object()}, "no `past_key_values`"),
    ],
)
def test_arguments_that_leave_nothing_to_compare_are_refused(target, draft, arguments, message):
    with pytest.raises(ValueError, match=message):
        compare(target, draft, PROMPT, **arguments)


def test_trained_pair_accepts_drafts_and_parts_from_plain_only_at_ties():
    pair = trained_pair()
    tokenizer = AutoTokenizer.from_pretrained(pair.target)
    target = AutoModelForCausalLM.from_pretrained(pair.target, dtype="auto")
    draft = DSparkDraftModel.from_pretrained(pair.draft, target=target, dtype="auto")
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    comparison = compare(target, draft, inputs, tokenizer=tokenizer, max_new_tokens=64)
    assert comparison.is_equal or comparison.is_tie
    assert comparison.tau > 2
