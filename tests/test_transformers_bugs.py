"""What transformers' own assisted decoding does wrong or refuses, and must be right here; and what we refuse by name.

Stops and streamers, which its loop also has wrong, are in test_stopping.py; caches in test_cache.py; zero-probability
tokens and empty residuals in test_accept.py and test_sampling_law.py.
"""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import (
    WINDOW,
    make_draft_of_quality,
    make_tiny_draft,
    make_tiny_target,
    plain,
    random_prompt,
    speculate,
)
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)

from hf_dspark import FixedLength
from hf_dspark.compat import CACHE
from hf_dspark.door import install

PROMPT_LENGTH, NEW_TOKENS = 9, 2 * WINDOW
EXTRAS = ("scores", "logits", "hidden_states", "attentions")


@pytest.fixture(scope="module")
def prompt():
    return random_prompt(64, PROMPT_LENGTH, seed=1)


@pytest.fixture(scope="module")
def noisy(target, prompt):
    """A draft of `target` that is right half of the time."""
    return make_draft_of_quality(target, plain(target, prompt, max_new_tokens=NEW_TOKENS)[0].tolist(), "noisy")


# What is returned beside the tokens.


def _flat(extra):
    """Tensors of nested tuples, in order."""
    return [extra] if isinstance(extra, torch.Tensor) else [tensor for part in extra for tensor in _flat(part)]


@pytest.mark.core
@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        *((kind, "eager") for kind in ("llama", "mistral", "gemma2", "gemma3_text", "gpt_oss", "mixtral", "lfm2")),
        ("gemma3_text", "sdpa"),  # plain generate() returns empty tuples of attentions there
    ],
)
@pytest.mark.parametrize("prompt_length", [3, 2 * WINDOW])
def test_scores_logits_hidden_states_and_attentions_are_plain_generates(kind, attention, prompt_length):
    target, prompt = make_tiny_target(kind, seed=1, attention=attention), random_prompt(64, prompt_length, seed=1)
    wants = {f"output_{name}": True for name in EXTRAS} | {"return_dict_in_generate": True, "repetition_penalty": 1.1}
    expected = plain(target, prompt, max_new_tokens=NEW_TOKENS, **wants)
    draft = make_draft_of_quality(target, expected.sequences[0].tolist(), "noisy", seed=1)
    output = speculate(target, draft, prompt, max_new_tokens=NEW_TOKENS, **wants)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert any(r.accepted for r in output.rounds)
    for name in EXTRAS:
        ours, theirs = getattr(output, name), getattr(expected, name)
        assert len(ours) == len(theirs) == NEW_TOKENS
        assert [t.shape for t in _flat(ours)] == [t.shape for t in _flat(theirs)]
        for i, (got, wanted) in enumerate(zip(_flat(ours), _flat(theirs), strict=True)):
            torch.testing.assert_close(
                got, wanted, atol=1e-4, rtol=1e-4, msg=lambda text, name=name, i=i: f"{name} {i}: {text}"
            )


@pytest.mark.parametrize("name", EXTRAS)
def test_each_extra_can_be_had_alone(prompt, name):
    target = make_tiny_target("qwen3", attention="eager")
    output = speculate(
        target,
        make_tiny_draft(target),
        prompt,
        max_new_tokens=6,
        return_dict_in_generate=True,
        **{f"output_{name}": True},
    )
    assert {other for other in EXTRAS if getattr(output, other) is not None} == {name}
    assert len(getattr(output, name)) == 6


def test_extras_without_a_dict_to_return_them_in_are_ignored_as_in_plain_generate(target, noisy, prompt):
    kwargs = {"output_hidden_states": True, "output_scores": True, "max_new_tokens": NEW_TOKENS}
    assert speculate(target, noisy, prompt, **kwargs).tolist() == plain(target, prompt, **kwargs).tolist()


def test_returned_scores_under_sampling_belong_to_the_tokens(target, noisy, prompt):
    """Each emitted token has a finite score, and scores are the processed logits of a forward over the sequence."""
    kwargs = {"do_sample": True, "top_k": 5, "temperature": 0.8, "return_dict_in_generate": True}
    torch.manual_seed(0)
    output = target.generate(
        prompt, assistant_model=noisy, max_new_tokens=NEW_TOKENS, output_scores=True, output_logits=True, **kwargs
    )
    rows = target(output.sequences).logits[0, PROMPT_LENGTH - 1 : -1]
    torch.testing.assert_close(torch.cat(output.logits), rows, atol=1e-4, rtol=1e-4)
    scores = torch.cat(output.scores)
    assert (scores.isfinite().sum(-1) == 5).all()
    new = output.sequences[0, PROMPT_LENGTH:]
    torch.testing.assert_close(scores[range(NEW_TOKENS), new], rows[range(NEW_TOKENS), new] / 0.8)


# Processors that keep a state.


class _Moody(LogitsProcessor):
    """Adds to a token that depends on how often it was called, and records the prefixes it was called with."""

    def __init__(self):
        self.prefixes = []

    def __call__(self, input_ids, scores):
        self.prefixes.append(input_ids.tolist())
        scores[:, (7 * len(self.prefixes)) % scores.shape[-1]] += 0.3
        return scores


class _OnLength(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def _stops(sequence):
    eos = next(t for i, t in enumerate(sequence) if i >= PROMPT_LENGTH + 6 and t not in sequence[PROMPT_LENGTH:i])
    return {
        "length": {},
        "stop token": {"eos_token_id": eos, "pad_token_id": 0},
        "criterion": {"stopping_criteria": [_OnLength(PROMPT_LENGTH + 7)]},
    }


@pytest.mark.core
@pytest.mark.parametrize("stop", ["length", "stop token", "criterion"])
@pytest.mark.parametrize("quality", ["noisy", "perfect"])
def test_stateful_processor_is_called_once_for_each_emitted_token_in_order(target, prompt, quality, stop):
    reference = plain(target, prompt, max_new_tokens=NEW_TOKENS, logits_processor=[_Moody()])[0].tolist()
    kwargs = {"max_new_tokens": NEW_TOKENS, **_stops(reference)[stop]}
    theirs, ours = _Moody(), _Moody()
    expected = plain(target, prompt, logits_processor=[theirs], **kwargs)
    draft = make_draft_of_quality(target, reference, quality, block_size=6, seed=1)
    got = speculate(target, draft, prompt, logits_processor=[ours], **kwargs)
    assert got.tolist() == expected.tolist()
    assert ours.prefixes == theirs.prefixes


@pytest.mark.core
def test_stateful_processor_under_sampling_sees_the_emitted_prefixes_alone(target, noisy, prompt):
    processor = _Moody()
    torch.manual_seed(0)
    kwargs = {"do_sample": True, "max_new_tokens": NEW_TOKENS, "logits_processor": [processor]}
    sequence = target.generate(prompt, assistant_model=noisy, **kwargs)[0].tolist()
    assert processor.prefixes == [[sequence[:i]] for i in range(PROMPT_LENGTH, PROMPT_LENGTH + NEW_TOKENS)]


@pytest.mark.core
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("quality", ["noisy", "perfect"])
def test_classifier_free_guidance_equals_plain(kind, quality, prompt):
    target = make_tiny_target(kind, seed=1)
    kwargs = {"guidance_scale": 1.7, "max_new_tokens": NEW_TOKENS}
    expected = plain(target, prompt, **kwargs)
    assert expected.tolist() != plain(target, prompt, max_new_tokens=NEW_TOKENS).tolist()
    draft = make_draft_of_quality(target, expected[0].tolist(), quality)
    assert speculate(target, draft, prompt, **kwargs).tolist() == expected.tolist()
    assert draft.last_stats.tau > 1.3


# Processors of transformers'.

PROCESSORS = [
    {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    {"prefix_allowed_tokens_fn": lambda row, ids: list(range(int(ids[-1]) % 7, 60))},
    {"bad_words_ids": [[51], [18, 55]]},
    {"suppress_tokens": [16, 18], "begin_suppress_tokens": [48]},
    {"forced_eos_token_id": 9, "eos_token_id": 9, "pad_token_id": 0},
    {"exponential_decay_length_penalty": (5, 1.5), "eos_token_id": 9, "pad_token_id": 0},
    {"sequence_bias": [[[18], -1.0], [[3], 0.5]]},
    {"renormalize_logits": True, "remove_invalid_values": True},
    {"watermarking_config": WatermarkingConfig(greenlist_ratio=0.3, bias=2.0)},
    {"encoder_no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.3},
]


@pytest.mark.core
@pytest.mark.parametrize("quality", ["noisy", "perfect"])
@pytest.mark.parametrize("kwargs", PROCESSORS, ids=lambda kwargs: next(iter(kwargs)))
def test_processors_act_on_each_prefix_as_in_plain_generate(target, prompt, kwargs, quality):
    expected = plain(target, prompt, max_new_tokens=NEW_TOKENS, **kwargs)
    draft = make_draft_of_quality(target, expected[0].tolist(), quality)
    assert speculate(target, draft, prompt, max_new_tokens=NEW_TOKENS, **kwargs).tolist() == expected.tolist()
    assert draft.last_stats.tau > 1.3


# Ways into generate().


@pytest.mark.core
def test_arguments_may_be_given_by_position(target, noisy, prompt):
    config = GenerationConfig(max_new_tokens=8, do_sample=False)
    criteria, processors = StoppingCriteriaList([_OnLength(PROMPT_LENGTH + 6)]), LogitsProcessorList([_Moody()])
    got = target.generate(prompt, config, processors, criteria, None, None, noisy)
    expected = plain(target, prompt, logits_processor=[_Moody()], max_new_tokens=6)
    assert got.tolist() == expected.tolist()


@pytest.mark.core
@pytest.mark.parametrize("offset", [0, 5])
def test_positions_of_the_users_own_are_kept(target, noisy, prompt, offset):
    kwargs = {"position_ids": torch.arange(PROMPT_LENGTH).unsqueeze(0) + offset, "max_new_tokens": NEW_TOKENS}
    assert speculate(target, noisy, prompt, **kwargs).tolist() == plain(target, prompt, **kwargs).tolist()


@pytest.mark.core
def test_custom_generate_of_another_kind_may_be_given_the_draft(target, noisy, prompt):
    """As `custom_generate="org/repo", assistant_model=draft` does, where the repository's code takes the draft."""

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        return input_ids

    got = target.generate(prompt, custom_generate=decode, assistant_model=noisy, max_new_tokens=4)
    assert got.tolist() == prompt.tolist()


def test_one_draft_serves_two_targets_in_turns(target, prompt):
    draft, other = make_tiny_draft(target), make_tiny_target("qwen3", seed=7)
    for model in (target, other, target):
        output = speculate(model, draft, prompt, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True)
        assert output.sequences.tolist() == plain(model, prompt, max_new_tokens=NEW_TOKENS).tolist()
        alone = speculate(
            model, make_tiny_draft(model), prompt, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True
        )
        assert [r.drafted for r in output.rounds] == [r.drafted for r in alone.rounds]


@pytest.mark.parametrize("taps", [(0, 2), (0, 3)], ids=["list form", "hooks"])
def test_threads_with_one_target_and_one_draft_do_not_mix(sliding_target, taps):
    draft = make_tiny_draft(sliding_target, taps=taps)
    prompts = [random_prompt(64, 6 + i, seed=i) for i in range(3)]

    def outcome(prompt):
        output = speculate(sliding_target, draft, prompt, max_new_tokens=2 * WINDOW, return_dict_in_generate=True)
        return output.sequences.tolist(), [r.drafted for r in output.rounds]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(outcome, prompts)) == [outcome(prompt) for prompt in prompts]


@pytest.mark.core
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_prefill_in_chunks_changes_neither_the_output_nor_what_is_drafted(kind, chunk):
    target, prompt = make_tiny_target(kind, seed=1), random_prompt(64, 2 * WINDOW, seed=1)
    draft = make_tiny_draft(target)
    whole = speculate(target, draft, prompt, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True)
    kwargs = {"max_new_tokens": NEW_TOKENS, "prefill_chunk_size": chunk}
    chunked = speculate(target, draft, prompt, return_dict_in_generate=True, **kwargs)
    assert chunked.sequences.tolist() == plain(target, prompt, **kwargs).tolist()
    assert [r.drafted for r in chunked.rounds] == [r.drafted for r in whole.rounds]


@pytest.mark.core
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_prompt_given_as_embeddings_equals_plain_and_is_drafted_from_as_from_tokens(kind, prompt):
    target = make_tiny_target(kind, seed=1)
    draft = make_tiny_draft(target)
    embedded = target.get_input_embeddings()(prompt).detach()
    kwargs = {"inputs_embeds": embedded, "max_new_tokens": NEW_TOKENS}
    expected = target.generate(do_sample=False, **kwargs)
    by_embeddings = target.generate(assistant_model=draft, do_sample=False, return_dict_in_generate=True, **kwargs)
    by_tokens = speculate(target, draft, prompt, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True)
    assert by_embeddings.sequences.tolist() == expected.tolist()
    assert [r.drafted for r in by_embeddings.rounds] == [r.drafted for r in by_tokens.rounds]


@pytest.mark.core
def test_call_without_a_cache_equals_plain_and_returns_none(target, noisy, prompt):
    kwargs = {"use_cache": False, "max_new_tokens": NEW_TOKENS}
    output = speculate(target, noisy, prompt, return_dict_in_generate=True, **kwargs)
    assert output.sequences.tolist() == plain(target, prompt, **kwargs).tolist()
    assert getattr(output, CACHE) is None


@pytest.mark.core
@pytest.mark.parametrize("place", ["front", "middle", "all over"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_padding_token_in_the_prompt_is_masked_as_in_plain_generate(kind, place, prompt):
    """Without a mask of the user's, transformers infers one from the padding token."""
    target, pad, prompt = make_tiny_target(kind, seed=1), 0, prompt.clone()
    prompt[:, {"front": slice(0, 3), "middle": slice(3, 5), "all over": slice(0, None, 2)}[place]] = pad
    kwargs = {"pad_token_id": pad, "eos_token_id": 63, "max_new_tokens": NEW_TOKENS}
    expected = plain(target, prompt, **kwargs)
    everything = torch.ones_like(prompt)
    assert expected.tolist() != plain(target, prompt, attention_mask=everything, **kwargs).tolist()
    sequence = expected[0].tolist()
    unmasked = [t for t in sequence[:PROMPT_LENGTH] if t != pad] + sequence[PROMPT_LENGTH:]
    draft = make_draft_of_quality(target, unmasked, "perfect")
    output = speculate(target, draft, prompt, return_dict_in_generate=True, **kwargs)
    assert output.sequences.tolist() == expected.tolist()
    assert {r.accepted_length for r in output.rounds[:-1]} == {draft.config.block_size + 1}


@pytest.mark.core
def test_masked_prompt_is_drafted_from_as_if_the_masked_tokens_were_not_there(target, prompt):
    draft = make_tiny_draft(target)
    mask = torch.ones_like(prompt)
    mask[:, :4] = 0
    kwargs = {"max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True}
    masked = speculate(target, draft, prompt, attention_mask=mask, pad_token_id=0, **kwargs)
    without = speculate(target, draft, prompt[:, 4:], **kwargs)
    assert masked.sequences[:, 4:].tolist() == without.sequences.tolist()
    assert [r.drafted for r in masked.rounds] == [r.drafted for r in without.rounds]


@pytest.mark.core
@pytest.mark.parametrize("sequences", [1, 2])
def test_beam_search_warns_and_runs_without_the_draft(target, noisy, prompt, sequences):
    kwargs = {"num_beams": 2, "num_return_sequences": sequences, "max_new_tokens": 12}
    with pytest.warns(UserWarning, match="num_beams"):
        got = speculate(target, noisy, prompt, **kwargs)
    assert got.tolist() == plain(target, prompt, **kwargs).tolist()


# What is refused, by name and before any forward.


def _forwards(target):
    calls = []
    return calls, target.register_forward_pre_hook(lambda *args: calls.append(1))


@pytest.mark.core
@pytest.mark.parametrize(
    "kwargs",
    [
        {"cache_implementation": "static"},
        {"synced_gpus": True},
    ],
    ids=["static cache", "synced gpus"],
)
def test_what_is_not_supported_is_refused_before_any_forward(target, noisy, prompt, kwargs):
    word = "StaticLayer|static" if "cache_implementation" in kwargs else "synced_gpus"
    calls, handle = _forwards(target)
    with pytest.raises(ValueError, match=word):
        speculate(target, noisy, prompt, max_new_tokens=4, **kwargs)
    handle.remove()
    assert not calls


@pytest.mark.core
@pytest.mark.parametrize("loop", ["dspark", "transformers"])
def test_target_with_a_recurrent_state_is_refused_by_name(prompt, monkeypatch, loop):
    target = make_tiny_target("llama")
    monkeypatch.setattr(type(target), "_is_stateful", True)
    decode = make_tiny_draft(target).as_custom_generate(loop=loop)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM|state"):
        target.generate(prompt, custom_generate=decode, max_new_tokens=4, do_sample=False)


@pytest.mark.core
@pytest.mark.parametrize(
    "kwargs",
    [
        {"stopping_criteria": [_OnLength(12)]},
        {"logits_processor": [_Moody()]},
        {"use_cache": False},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"output_attentions": True, "return_dict_in_generate": True},
        {"filled": True},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_transformers_own_loop_is_refused_where_it_is_wrong(prompt, kwargs):
    target = make_tiny_target("qwen3", attention="eager")
    kwargs = dict(kwargs)
    if kwargs.pop("filled", False):
        output = plain(target, prompt[:, :4], max_new_tokens=1, return_dict_in_generate=True)
        kwargs[CACHE] = getattr(output, CACHE)
    decode = make_tiny_draft(target).as_custom_generate(loop="transformers")
    with pytest.raises(ValueError, match="transformers"):
        target.generate(prompt, custom_generate=decode, max_new_tokens=4, do_sample=False, **kwargs)


def test_unknown_loop_is_refused(target, noisy, prompt):
    with pytest.raises(ValueError, match="loop"):
        target.generate(prompt, custom_generate=noisy.as_custom_generate(loop="mine"), max_new_tokens=4)


def test_draft_loaded_as_a_plain_model_is_refused(target, prompt):
    impostor = make_tiny_target("qwen3", seed=3)
    impostor.config.markov_rank, impostor.config.target_layer_ids = 8, [0, 2]
    with pytest.raises(ValueError, match="DSparkDraftModel.from_pretrained"):
        target.generate(prompt, assistant_model=impostor, max_new_tokens=4)


@pytest.mark.parametrize(
    ("fields", "word"), [({"hidden_size": 48}, "hidden size"), ({"vocab_size": 32}, "vocabulary")]
)
def test_draft_of_another_target_is_refused(target, prompt, fields, word):
    other = make_tiny_target("qwen3", **fields)
    with pytest.raises(ValueError, match=word):
        speculate(target, make_tiny_draft(other), prompt, max_new_tokens=4)


# Everything else goes through the door untouched.


def _without_the_door(target, prompt, **kwargs):
    return GenerationMixin.generate.__wrapped__(target, prompt, **kwargs)


@pytest.mark.core
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"do_sample": True, "temperature": 0.8},
        {"prompt_lookup_num_tokens": 3},
        {"prompt_lookup_num_tokens": 3, "do_sample": True},
        {"assistant": True},
        {"assistant": True, "do_sample": True},
        {"num_beams": 2},
    ],
    ids=str,
)
def test_calls_without_a_dspark_draft_are_as_if_the_door_were_not_there(target, prompt, kwargs):
    kwargs = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **kwargs}
    if kwargs.pop("assistant", False):
        kwargs["assistant_model"] = make_tiny_target("qwen3", seed=5, num_hidden_layers=2)
    outputs = []
    for generate in (_without_the_door, type(target).generate):
        torch.manual_seed(0)
        outputs.append(generate(target, prompt, **copy.copy(kwargs)).tolist())
    assert outputs[0] == outputs[1]


@pytest.mark.core
def test_ordinary_calls_after_a_speculative_one_are_as_before(target, noisy, prompt):
    kwargs = {"max_new_tokens": NEW_TOKENS}
    assistant = make_tiny_target("qwen3", seed=5, num_hidden_layers=2)

    def ordinary():
        assisted = plain(target, prompt, assistant_model=assistant, **kwargs)
        looked_up = plain(target, prompt, prompt_lookup_num_tokens=3, **kwargs)
        return [plain(target, prompt, **kwargs).tolist(), assisted.tolist(), looked_up.tolist()]

    before = ordinary()
    speculate(target, noisy, prompt, **kwargs)
    own_loop = noisy.as_custom_generate(loop="transformers")
    target.generate(prompt, custom_generate=own_loop, do_sample=False, **kwargs)
    assert "_get_candidate_generator" not in vars(target)
    assert ordinary() == before


def test_door_is_hung_once():
    generate = GenerationMixin.generate
    install()
    assert GenerationMixin.generate is generate
    assert not hasattr(generate.__wrapped__, "__wrapped__") or "hf_dspark" not in generate.__wrapped__.__module__


@pytest.mark.core
def test_speculative_call_raises_no_warning_of_a_deprecation(target, noisy, prompt):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        speculate(target, noisy, prompt, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True)
        speculate(target, noisy, prompt, max_new_tokens=NEW_TOKENS, schedule=FixedLength(0))


# Targets that would be wrong in silence.


@pytest.mark.core
@pytest.mark.parametrize("kind", ["roberta", "camembert", "megatron-bert"])
def test_target_that_attends_in_both_directions_is_refused_and_as_a_decoder_it_equals_plain(kind, prompt):
    target = make_tiny_target(kind, seed=1)
    with pytest.raises(ValueError, match="both directions"):
        speculate(target, make_tiny_draft(target), prompt, max_new_tokens=4)
    target = make_tiny_target(kind, seed=1, is_decoder=True)
    expected = plain(target, prompt, max_new_tokens=NEW_TOKENS)
    draft = make_draft_of_quality(target, expected[0].tolist(), "noisy")
    assert speculate(target, draft, prompt, max_new_tokens=NEW_TOKENS).tolist() == expected.tolist()


def test_target_that_puts_positions_of_its_own_in_front_is_refused(prompt):
    target = make_tiny_target("cpmant", seed=1)
    with pytest.raises(ValueError, match="positions of its own"):
        speculate(target, make_tiny_draft(target), prompt, max_new_tokens=4)
