"""What a call leaves behind: the target's cache as if nothing had been drafted, and a context for the next turn."""

import gc
import weakref

import pytest
import torch
from interrupts import Interrupt, RaisingCriterion, RaisingDraft, RaisingStreamer
from tiny import (
    KINDS,
    WINDOW,
    ScriptedDraft,
    make_draft_of_quality,
    make_tiny_draft,
    make_tiny_target,
    plain,
    random_prompt,
    speculate,
)
from transformers import DynamicCache

from hf_dspark.compat import CACHE

PROMPT_LENGTH, NEW_TOKENS = 7, 3 * WINDOW
SLIDING = ("gemma3_text", "gemma4_text", "gpt_oss", "mistral", "cohere2")


def _fresh(target):
    return DynamicCache(config=target.config.get_text_config(decoder=True))


@torch.no_grad()
def _prefilled(target, input_ids):
    cache = _fresh(target)
    target(input_ids, **{CACHE: cache}, use_cache=True)
    return cache


def _tensors(layer):
    """Every tensor a cache layer keeps of the sequence."""
    tensors = {name: getattr(layer, name) for name in ("keys", "values") if getattr(layer, name, None) is not None}
    tensors |= {f"conv{i}": state for i, state in getattr(layer, "conv_states", {}).items()}
    return tensors


def _assert_as_prefilled(target, cache, input_ids):
    expected = _prefilled(target, input_ids)
    assert cache.get_seq_length() == input_ids.shape[1]
    assert len(cache.layers) == len(expected.layers)
    for i, (got, wanted) in enumerate(zip(cache.layers, expected.layers, strict=True)):
        if hasattr(wanted, "get_seq_length"):
            assert got.get_seq_length() == wanted.get_seq_length() == input_ids.shape[1]
        ours, theirs = _tensors(got), _tensors(wanted)
        assert ours.keys() == theirs.keys()
        assert ours
        for name, tensor in theirs.items():
            torch.testing.assert_close(
                ours[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda text, i=i, name=name: f"layer {i} {name}: {text}"
            )


def _draft_for(target, prompt, quality="noisy", new_tokens=NEW_TOKENS, **kwargs):
    sequence = plain(target, prompt, max_new_tokens=new_tokens)
    return make_draft_of_quality(target, sequence[0].tolist(), quality, seed=3, **kwargs), sequence


@pytest.mark.core
@pytest.mark.parametrize("quality", ["noisy", "perfect"])
@pytest.mark.parametrize("kind", KINDS)
def test_rejected_blocks_leave_the_cache_as_if_never_drafted(kind, quality):
    target, prompt = make_tiny_target(kind, seed=1), random_prompt(64, PROMPT_LENGTH, seed=1)
    draft, sequence = _draft_for(target, prompt, quality)
    output = speculate(target, draft, prompt, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True)
    assert output.sequences.tolist() == sequence.tolist()
    _assert_as_prefilled(target, getattr(output, CACHE), sequence[:, :-1])
    if quality != "perfect":
        assert any(r.accepted < r.verified for r in output.rounds)


@pytest.mark.core
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("new_tokens", [1, 2, 4, 5, 6])
def test_cache_is_exact_wherever_the_call_ends(kind, new_tokens):
    """Inside a block, at its end, after the prefill alone; within the window and at its edge."""
    target = make_tiny_target(kind, seed=1)
    for prompt_length in (3, WINDOW - 3, WINDOW, 2 * WINDOW):
        prompt = random_prompt(64, prompt_length, seed=2)
        draft, sequence = _draft_for(target, prompt, "perfect", new_tokens=new_tokens + 6)
        stop = sequence[:, : prompt_length + new_tokens]
        limited = speculate(target, draft, prompt, max_new_tokens=new_tokens, return_dict_in_generate=True)
        _assert_as_prefilled(target, getattr(limited, CACHE), stop[:, :-1])
        kwargs = {"eos_token_id": stop[0, -1].item(), "max_new_tokens": new_tokens + 6, "pad_token_id": 0}
        stopped = speculate(target, draft, prompt, return_dict_in_generate=True, **kwargs)
        _assert_as_prefilled(target, getattr(stopped, CACHE), stopped.sequences[:, :-1])


@pytest.mark.core
def test_padded_prompt_leaves_the_cache_plain_generate_leaves(sliding_target):
    prompt = random_prompt(64, PROMPT_LENGTH)
    mask = torch.ones_like(prompt)
    mask[:, :3] = 0
    prompt = prompt * mask
    kwargs = {"attention_mask": mask, "pad_token_id": 0, "max_new_tokens": 30, "return_dict_in_generate": True}
    expected = plain(sliding_target, prompt, **kwargs)
    draft = make_draft_of_quality(sliding_target, expected.sequences[0, 3:].tolist(), "noisy")
    output = speculate(sliding_target, draft, prompt, **kwargs)
    assert output.sequences.tolist() == expected.sequences.tolist()
    for got, wanted in zip(getattr(output, CACHE).layers, getattr(expected, CACHE).layers, strict=True):
        assert got.get_seq_length() == wanted.get_seq_length()
        torch.testing.assert_close(got.keys, wanted.keys, atol=1e-5, rtol=1e-5)


def _raise_in_streamer(target, sequence):
    return {"streamer": RaisingStreamer(10)}


def _raise_in_criterion(target, sequence):
    return {"stopping_criteria": [RaisingCriterion(PROMPT_LENGTH + 20)]}


def _raise_in_draft(target, sequence):
    return {}


def _raise_in_target(target, sequence):
    """In the fourth forward, when half of its layers have updated their caches."""
    calls = []

    def hook(module, args):
        calls.append(1)
        if len(calls) == 4:
            handle.remove()
            raise Interrupt

    handle = target.get_decoder().layers[2].register_forward_pre_hook(hook)
    return {}


@pytest.mark.core
@pytest.mark.parametrize("place", [_raise_in_streamer, _raise_in_criterion, _raise_in_draft, _raise_in_target])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "gemma4_text", "gpt_oss"])
def test_cache_is_exact_after_an_exception_in_the_middle(kind, place):
    """The cache holds a beginning of the sequence, as a prefill of it would; the call can be taken up from there."""
    target, prompt = make_tiny_target(kind, seed=1), random_prompt(64, PROMPT_LENGTH, seed=1)
    draft_class = RaisingDraft if place is _raise_in_draft else ScriptedDraft
    sequence = plain(target, prompt, max_new_tokens=NEW_TOKENS)
    draft = make_tiny_draft(target, draft_class=draft_class).follow(sequence[0].tolist(), error_rate=0.3)
    cache = _fresh(target)
    with pytest.raises(Interrupt):
        speculate(target, draft, prompt, max_new_tokens=NEW_TOKENS, **{CACHE: cache}, **place(target, sequence))
    length = cache.get_seq_length()
    assert PROMPT_LENGTH < length < sequence.shape[1] - 1
    _assert_as_prefilled(target, cache, sequence[:, :length])
    assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
    remaining = sequence.shape[1] - length - 1
    resumed = speculate(target, draft, sequence[:, : length + 1], max_new_tokens=remaining, **{CACHE: cache})
    assert resumed.tolist() == sequence.tolist()


@pytest.mark.core
@pytest.mark.parametrize("kind", SLIDING)
@pytest.mark.parametrize("before", [False, True])
def test_recording_of_the_past_is_as_it_was_before_the_call(kind, before):
    target, prompt = make_tiny_target(kind, seed=1), random_prompt(64, PROMPT_LENGTH, seed=1)
    draft, _ = _draft_for(target, prompt)
    cache = _fresh(target)
    if before:
        cache.activate_past_recording()
    speculate(target, draft, prompt, max_new_tokens=NEW_TOKENS, **{CACHE: cache})
    flags = [layer.record_past for layer in cache.layers if hasattr(layer, "record_past")]
    assert flags
    assert set(flags) == {before}


@pytest.mark.core
@pytest.mark.parametrize("kind", SLIDING)
def test_sliding_layers_keep_to_their_window_in_a_following_plain_generate(kind):
    target, prompt = make_tiny_target(kind, seed=1), random_prompt(64, PROMPT_LENGTH, seed=1)
    draft, _ = _draft_for(target, prompt)
    output = speculate(target, draft, prompt, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True)
    cache = getattr(output, CACHE)
    plain(target, output.sequences, max_new_tokens=NEW_TOKENS, **{CACHE: cache})
    held = [layer.keys.shape[-2] for layer in cache.layers if getattr(layer, "is_sliding", False)]
    assert held
    assert set(held) == {WINDOW - 1}


def _turn(generate, prompt, cache, **kwargs):
    """One turn of a conversation: the whole sequence, and the cache of all turns before."""
    return generate(
        prompt, max_new_tokens=20, return_dict_in_generate=True, **({} if cache is None else {CACHE: cache}), **kwargs
    )


@pytest.mark.core
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "gpt_oss", "deepseek_v3", "lfm2"])
@pytest.mark.parametrize(
    ("first", "second"), [("speculative", "plain"), ("plain", "speculative"), ("speculative", "speculative")]
)
def test_second_turn_on_the_same_cache_equals_plain_then_plain(kind, first, second):
    target, prompt = make_tiny_target(kind, seed=1), random_prompt(64, PROMPT_LENGTH, seed=1)
    draft = make_tiny_draft(target)
    generate = {
        "plain": lambda ids, **kwargs: plain(target, ids, **kwargs),
        "speculative": lambda ids, **kwargs: speculate(target, draft, ids, **kwargs),
    }
    question = random_prompt(64, 5, seed=9)

    def conversation(*turns):
        answer = _turn(generate[turns[0]], prompt, None)
        longer = torch.cat([answer.sequences, question], dim=-1)
        return _turn(generate[turns[1]], longer, getattr(answer, CACHE))

    expected, got = conversation("plain", "plain"), conversation(first, second)
    assert got.sequences.tolist() == expected.sequences.tolist()
    _assert_as_prefilled(target, getattr(got, CACHE), expected.sequences[:, :-1])


@pytest.mark.core
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_second_turn_drafts_as_if_the_whole_conversation_had_been_its_prompt(kind):
    """The draft's context holds both turns; a cache that plain generate() filled leaves it without the first."""
    target, prompt = make_tiny_target(kind, seed=1), random_prompt(64, PROMPT_LENGTH, seed=1)
    draft, question = make_tiny_draft(target), random_prompt(64, 5, seed=9)

    def speculative(ids, **kwargs):
        return speculate(target, draft, ids, **kwargs)

    answer = _turn(speculative, prompt, None)
    longer = torch.cat([answer.sequences, question], dim=-1)
    continued = _turn(speculative, longer, getattr(answer, CACHE))
    afresh = _turn(speculative, longer, None)
    without = _turn(speculative, longer, _prefilled(target, answer.sequences[:, :-1]))
    assert continued.sequences.tolist() == afresh.sequences.tolist() == without.sequences.tolist()
    assert [r.drafted for r in continued.rounds] == [r.drafted for r in afresh.rounds]
    assert [r.drafted for r in without.rounds] != [r.drafted for r in afresh.rounds]
    for one, other in zip(continued.rounds, afresh.rounds, strict=True):
        assert one.confidence == pytest.approx(other.confidence, abs=1e-4)


@pytest.mark.core
def test_third_turn_drafts_as_well_as_the_first(target):
    prompt = random_prompt(64, PROMPT_LENGTH, seed=1)
    draft, cache = make_tiny_draft(target), _fresh(target)
    for turn in range(3):
        output = _turn(lambda ids, **kwargs: speculate(target, draft, ids, **kwargs), prompt, cache)
        afresh = _turn(lambda ids, **kwargs: speculate(target, draft, ids, **kwargs), prompt, None)
        assert [r.drafted for r in output.rounds] == [r.drafted for r in afresh.rounds]
        prompt = torch.cat([output.sequences, random_prompt(64, 4, seed=20 + turn)], dim=-1)


@pytest.mark.core
@pytest.mark.parametrize("cut", [1, 6, 15, 22])
def test_last_turn_taken_back_by_a_crop_takes_the_drafts_context_back(target, cut):
    """The user edits the end of the conversation: less than a round, some rounds, into the prompt."""
    prompt = random_prompt(64, PROMPT_LENGTH, seed=1)
    draft = make_tiny_draft(target)

    def speculative(ids, **kwargs):
        return speculate(target, draft, ids, **kwargs)

    answer = _turn(speculative, prompt, None)
    cache = getattr(answer, CACHE)
    cache.crop(-cut)
    edited = torch.cat([answer.sequences[:, : cache.get_seq_length()], random_prompt(64, 3, seed=11)], dim=-1)
    continued, afresh = _turn(speculative, edited, cache), _turn(speculative, edited, None)
    assert continued.sequences.tolist() == plain(target, edited, max_new_tokens=20).tolist()
    assert [r.drafted for r in continued.rounds] == [r.drafted for r in afresh.rounds]


def test_two_conversations_in_turns_do_not_mix(target):
    draft = make_tiny_draft(target)
    prompts = [random_prompt(64, 8, seed=s) for s in (1, 2)]
    caches = [_fresh(target), _fresh(target)]
    for turn in range(2):
        for i in range(2):  # the other conversation comes between the turns of one
            output = _turn(lambda ids, **kwargs: speculate(target, draft, ids, **kwargs), prompts[i], caches[i])
            afresh = _turn(lambda ids, **kwargs: speculate(target, draft, ids, **kwargs), prompts[i], None)
            assert [r.drafted for r in output.rounds] == [r.drafted for r in afresh.rounds]
            prompts[i] = torch.cat([output.sequences, random_prompt(64, 4, seed=30 + turn)], dim=-1)


def test_one_draft_context_dies_with_its_cache(target, monkeypatch):
    draft, made = make_tiny_draft(target), []
    new_cache = draft.new_cache

    def recorded():
        cache = new_cache()
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(draft, "new_cache", recorded)
    output = _turn(lambda ids, **kwargs: speculate(target, draft, ids, **kwargs), random_prompt(64, 6), None)
    assert made
    del output
    gc.collect()
    assert all(reference() is None for reference in made)


@pytest.mark.core
def test_cache_is_known_by_either_of_its_names(target, draft):
    prompt = random_prompt(64, PROMPT_LENGTH)
    expected = plain(target, prompt, max_new_tokens=8).tolist()
    for name in ("cache", "past_" + "key_values"):
        cache = _fresh(target)
        assert speculate(target, draft, prompt, max_new_tokens=8, **{name: cache}).tolist() == expected
        assert cache.get_seq_length() == len(expected[0]) - 1
