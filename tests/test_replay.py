"""Targets with a recurrent state: a rejection restores a copy of the state, and accepted tokens are read again."""

import functools

import pytest
import torch
from interrupts import Interrupt, RaisingCriterion, RaisingDraft, RaisingStreamer, converse
from test_sampling_law import _draw_many
from tiny import (
    QUALITIES,
    ScriptedDraft,
    make_draft_of_quality,
    make_tiny_draft,
    make_tiny_target,
    plain,
    random_prompt,
    scripted_rounds,
    speculate,
)
from tiny_law import FALSE_ALARM, enumerate_law, p_value
from transformers import CONFIG_MAPPING, DynamicCache

from hf_dspark import DSparkDraftModel
from hf_dspark.candidate_generator import DSparkCandidateGenerator
from hf_dspark.compat import CACHE
from hf_dspark.features import FeatureTap
from hf_dspark.rollback import MAX_PENDING, UNDOABLE

PROMPT_LENGTH, NEW_TOKENS, WINDOW = 9, 40, 12

_LAYERS = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
_DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
    "layer_types": _LAYERS,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
_LATENT = {
    "num_key_value_heads": 4,
    "layer_types": _LAYERS,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
}
# Every architecture that is replayed, but DeepSeek-V4.
REPLAYED = {
    "qwen3_next": {**_DELTA, **_EXPERTS},
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": {**_DELTA, **_EXPERTS},
    "olmo_hybrid": _DELTA,
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "granitemoehybrid": {
        **_MAMBA,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
    },
    "kimi_linear": {**_LATENT, "linear_head_dim": 8, "linear_num_heads": 4},
    "bailing_hybrid": {**_LATENT, "n_group": 1, "topk_group": 1},
    "lara_mini": {
        **_DELTA,
        **_EXPERTS,
        "sliding_window": WINDOW,
        "layer_types": ["linear_attention", "sliding_attention", "linear_attention", "full_attention"],
    },
    "zaya": {"moe_intermediate_size": 16, "num_experts": 4, "router_hidden_size": 16},
}
MAIN = ("qwen3_next", "qwen3_5_text")
_MAMBA1 = {"mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}
# Refused: several tokens in one forward are not each of them in turn, or the state lies elsewhere.
REFUSED = {
    "jamba": {**_MAMBA1, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2},
    "zamba": {**_MAMBA1, "attn_layer_period": 2, "attn_layer_offset": 1, "n_mamba_heads": 2, "attention_head_dim": 16},
    "nemotron_h": {
        "hybrid_override_pattern": "M*M-",
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "ssm_state_size": 8,
        "chunk_size": 16,
        "expand": 2,
    },
    "zamba2": {
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "chunk_size": 16,
        "adapter_rank": 4,
    },
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 16},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
    "recurrent_gemma": {
        "lru_width": 32,
        "attention_window_size": 16,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv": {"attention_hidden_size": 32},
    "bamba": {**REPLAYED["bamba"], "time_step_limit": (0.001, 0.1)},
}


def _known(kinds):
    """Those this version of transformers has."""
    return [kind for kind in kinds if kind in CONFIG_MAPPING]


def _target(kind, seed=1, vocab_size=64, **fields):
    target = make_tiny_target(kind, seed, vocab_size, **REPLAYED.get(kind, {}) | fields)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in target.named_parameters():
        if "A_log" in name:  # initialised so that a random state is forgotten within a few tokens
            parameter.data.uniform_(-5.0, -1.0, generator=generator)
        elif not parameter.any():
            parameter.data.normal_(std=0.5, generator=generator)
    return target


@functools.cache
def _reference(kind, seed=1):
    """A target, a prompt, and what plain generate() returns for it."""
    target, prompt = _target(kind, seed), random_prompt(64, PROMPT_LENGTH, seed=seed)
    return target, prompt, plain(target, prompt, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True)


def _draft_for(target, sequence, quality="noisy", **kwargs):
    return make_draft_of_quality(target, sequence[0].tolist(), quality, **{"seed": 2, "taps": (0, 3), **kwargs})


def _tensors(layer):
    tensors = {name: getattr(layer, name, None) for name in ("keys", "values")}
    for name in ("conv_states", "recurrent_states"):
        tensors |= {f"{name} {i}": state for i, state in getattr(layer, name, {}).items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _assert_equal_caches(got, expected):
    assert got.get_seq_length() == expected.get_seq_length()
    for i, (ours, theirs) in enumerate(zip(got.layers, expected.layers, strict=True)):
        assert getattr(ours, "record_past", None) == getattr(theirs, "record_past", None)
        ours, theirs = _tensors(ours), _tensors(theirs)
        assert ours.keys() == theirs.keys()
        for name, wanted in theirs.items():
            scale, message = wanted.abs().max(), functools.partial("layer {} {}: {}".format, i, name)
            torch.testing.assert_close(ours[name] / scale, wanted / scale, atol=5e-5, rtol=1e-4, msg=message)


@torch.no_grad()
def _prefilled(target, input_ids):
    cache = DynamicCache(config=target.config)
    target(input_ids, **{CACHE: cache}, use_cache=True)
    return cache


def _state_difference(cache, other):
    """Of the recurrent states, relative to the largest number of each."""
    pairs = [(_tensors(a), _tensors(b)) for a, b in zip(cache.layers, other.layers, strict=True)]
    return max(
        ((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item()
        for ours, theirs in pairs
        for name in ours
        if name.startswith("recurrent")
    )


@torch.no_grad()
def _continued(target, ids, *stops, forget=False):
    """Logits and cache of ten tokens behind a prefill of ten, in several forwards."""
    cache, logits = _prefilled(target, ids[:, :10]), []
    for layer in cache.layers if forget else ():
        for name, state in _tensors(layer).items():
            if name.startswith("recurrent"):
                state.zero_()
    for start, stop in zip((10, *stops), (*stops, 20), strict=True):
        positions = torch.arange(start, stop).unsqueeze(0)
        logits.append(target(ids[:, start:stop], position_ids=positions, **{CACHE: cache}).logits)
    return torch.cat(logits, dim=1), cache


@pytest.mark.core
@pytest.mark.parametrize("kind", _known(REPLAYED))
def test_forward_over_several_tokens_goes_on_from_the_state(kind):
    """What replaying relies on; without the state the outcome is another."""
    target, ids = _target(kind), random_prompt(64, 20)
    expected, one_by_one = _continued(target, ids, *range(11, 20))

    def difference(logits, cache):
        return max(_state_difference(cache, one_by_one), ((logits - expected).abs().max() / expected.std()).item())

    assert all(difference(*_continued(target, ids, *stops)) < 2e-5 for stops in ((), (13,), (12, 13, 18)))
    assert difference(*_continued(target, ids, forget=True)) > 2e-4


@pytest.mark.core
@pytest.mark.parametrize("kind", ["jamba", "zamba", "nemotron_h", "zamba2"])
def test_some_are_refused_because_several_tokens_are_not_each_in_turn(kind):
    """And not by rounding: should this fail, transformers has changed, and they can be replayed."""
    target, ids = make_tiny_target(kind, **REFUSED[kind]), random_prompt(64, 20)
    _, one_by_one = _continued(target, ids, *range(11, 20))
    _, cache = _continued(target, ids)
    assert _state_difference(cache, one_by_one) > 5e-4


GRID = [(kind, seed, quality) for kind in MAIN for seed in (1, 2, 3) for quality in QUALITIES]
GRID += [(kind, 1, quality) for kind in _known(REPLAYED) if kind not in MAIN for quality in ("noisy", "perfect")]


@pytest.mark.core
@pytest.mark.parametrize(("kind", "seed", "quality"), GRID)
def test_greedy_output_and_final_cache_equal_plains(kind, seed, quality):
    target, prompt, expected = _reference(kind, seed)
    draft = _draft_for(target, expected.sequences, quality)
    output = speculate(target, draft, prompt, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True)
    assert output.sequences.tolist() == expected.sequences.tolist()
    if QUALITIES[quality] is not None:
        lengths = [r.accepted_length for r in output.rounds]
        assert lengths == scripted_rounds(draft, PROMPT_LENGTH, expected.sequences.shape[1])
    _assert_equal_caches(getattr(output, CACHE), getattr(expected, CACHE))


def test_all_that_is_undoable_is_tested():
    assert {*REPLAYED, "deepseek_v4"} == UNDOABLE


@pytest.mark.core
def test_rejections_cost_no_forward_of_their_own_until_many_tokens_are_pending():
    target, prompt, expected = _reference("qwen3_next")
    draft = make_tiny_draft(target, draft_class=ScriptedDraft).follow(expected.sequences[0].tolist(), error_rate=1.0)
    widths = []
    hook = (
        target.get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda module, args, kwargs: widths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
            with_kwargs=True,
        )
    )
    speculate(target, draft, prompt, max_new_tokens=NEW_TOKENS)
    hook.remove()
    block, rounds = draft.config.block_size + 1, NEW_TOKENS - 1
    assert widths[0] == PROMPT_LENGTH
    assert widths[1:4] == [block, block + 1, block + 2]  # one token is right a round: the target's own
    assert max(widths) == MAX_PENDING + block
    assert len(widths) == 1 + rounds + rounds // (MAX_PENDING + 1)


@pytest.mark.core
@pytest.mark.parametrize("taps", [(0, 2), (1, 3)], ids=["list", "hooks"])
def test_draft_gets_the_features_of_every_position_once(taps, monkeypatch):
    target, prompt, expected = _reference("qwen3_5_text")
    draft, seen = make_tiny_draft(target, taps=taps, draft_class=ScriptedDraft), []
    draft.follow(expected.sequences[0].tolist(), error_rate=0.9)  # some forwards are over pending tokens alone
    observe = DSparkCandidateGenerator.observe

    def recorded(self, features):
        seen.append(features)
        observe(self, features)

    monkeypatch.setattr(DSparkCandidateGenerator, "observe", recorded)
    speculate(target, draft, prompt, max_new_tokens=NEW_TOKENS)
    read = expected.sequences[:, :-1]
    with torch.no_grad(), FeatureTap(target, list(taps)) as tap:
        features = tap.take(target(read, **tap.forward_kwargs))
    torch.testing.assert_close(torch.cat(seen, dim=1), features[:, PROMPT_LENGTH:], atol=1e-3, rtol=1e-3)


@pytest.mark.core
@pytest.mark.parametrize("kind", MAIN)
def test_stops_inside_a_block_leave_the_cache_plain_generate_leaves(kind):
    target, prompt, reference = _reference(kind)
    tokens = reference.sequences[0, PROMPT_LENGTH:].tolist()
    for quality in ("noisy", "perfect"):
        for length in (2, 11, 26):
            stops = [{"max_new_tokens": length}, {"eos_token_id": tokens[length], "pad_token_id": 0}]
            for kwargs in stops:
                kwargs = {"max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True, **kwargs}
                expected = plain(target, prompt, **kwargs)
                output = speculate(target, _draft_for(target, reference.sequences, quality), prompt, **kwargs)
                assert output.sequences.tolist() == expected.sequences.tolist()
                _assert_equal_caches(getattr(output, CACHE), getattr(expected, CACHE))


@pytest.mark.core
@pytest.mark.parametrize("kind", MAIN)
def test_padded_and_chunked_prompts_and_calls_without_a_cache(kind):
    target = _target(kind)
    prompt = random_prompt(64, 14, seed=1)
    mask = torch.ones_like(prompt)
    mask[:, :3] = 0
    padded = {"attention_mask": mask, "pad_token_id": 0}
    for ids, kwargs in (
        (prompt * mask, padded),
        (prompt, {"prefill_chunk_size": 5}),
        (prompt, {"use_cache": False}),
    ):
        kwargs = {"max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True, **kwargs}
        expected = plain(target, ids, **kwargs)
        draft = _draft_for(target, expected.sequences[:, (ids == 0).sum() :])
        output = speculate(target, draft, ids, **kwargs)
        assert output.sequences.tolist() == expected.sequences.tolist()
        if kwargs.get("use_cache", True):
            _assert_equal_caches(getattr(output, CACHE), getattr(expected, CACHE))


@pytest.mark.core
@pytest.mark.parametrize("kind", [*MAIN, "falcon_h1"])
@pytest.mark.parametrize(
    ("first", "second"), [("speculative", "plain"), ("plain", "speculative"), ("speculative", "speculative")]
)
def test_second_turn_on_the_same_cache_equals_plain_then_plain(kind, first, second):
    target, prompt, _ = _reference(kind)
    draft = make_tiny_draft(target)
    turns = (("plain", "plain"), (first, second))
    expected, got = (converse(target, draft, prompt, turn, max_new_tokens=20) for turn in turns)
    assert got.sequences.tolist() == expected.sequences.tolist()
    _assert_equal_caches(getattr(got, CACHE), getattr(expected, CACHE))


def _interrupt_in(module, call):
    """Raise behind the `call`-th call of a module."""
    calls = []

    def hook(module, args, output):
        calls.append(1)
        if len(calls) == call:
            handle.remove()
            raise Interrupt

    handle = module.register_forward_hook(hook)


@pytest.mark.core
@pytest.mark.parametrize("error_rate", [0.4, 1.0])
@pytest.mark.parametrize("place", ["streamer", "criterion", "draft", "layer 0", "layer 2", "last layer"])
@pytest.mark.parametrize("kind", [*MAIN, "falcon_h1", "lfm2"])
def test_cache_is_consistent_after_an_exception_in_the_middle(kind, place, error_rate):
    """It holds a beginning of the sequence (not all that was streamed, where tokens are pending), and goes on."""
    target, prompt, reference = _reference(kind)
    sequence, kwargs = reference.sequences, {}
    draft_class = RaisingDraft if place == "draft" else ScriptedDraft
    draft = make_tiny_draft(target, draft_class=draft_class).follow(sequence[0].tolist(), error_rate=error_rate)
    cache = DynamicCache(config=target.config)
    if place == "streamer":
        kwargs = {"streamer": RaisingStreamer(11)}
    elif place == "criterion":
        kwargs = {"stopping_criteria": [RaisingCriterion(PROMPT_LENGTH + 20)]}
    elif place != "draft":
        _interrupt_in(target.get_decoder().layers[{"layer 0": 0, "layer 2": 2, "last layer": -1}[place]], 5)
    with pytest.raises(Interrupt):
        speculate(target, draft, prompt, max_new_tokens=NEW_TOKENS, **{CACHE: cache}, **kwargs)
    length = cache.get_seq_length()
    assert PROMPT_LENGTH <= length < sequence.shape[1] - 1
    _assert_equal_caches(cache, _prefilled(target, sequence[:, :length]))
    draft = make_tiny_draft(target)
    for generate in (plain, lambda target, ids, **kwargs: speculate(target, draft, ids, **kwargs)):
        resumed = generate(target, sequence[:, : length + 3], max_new_tokens=4, **{CACHE: cache})
        assert resumed.tolist() == sequence[:, : length + 7].tolist()
        length = cache.get_seq_length()


@pytest.mark.core
@pytest.mark.parametrize("kind", MAIN)
def test_scores_states_and_attentions_are_plains(kind):
    target, prompt = _target(kind, attention="eager"), random_prompt(64, PROMPT_LENGTH, seed=1)
    names = ("scores", "logits", "hidden_states", "attentions")
    kwargs = {f"output_{name}": True for name in names}
    kwargs |= {"max_new_tokens": 24, "return_dict_in_generate": True}
    expected = plain(target, prompt, **kwargs)
    output = speculate(target, _draft_for(target, expected.sequences), prompt, **kwargs)
    assert output.sequences.tolist() == expected.sequences.tolist()
    for name in names:
        torch.testing.assert_close(getattr(output, name), getattr(expected, name), atol=1e-3, rtol=1e-3)


def test_sampled_continuations_follow_the_targets_law():
    """A false alarm has probability 1e-4 for a choice of seed."""
    target, prompt = _target("qwen3_5_text", 3, 5), random_prompt(5, 3)
    draft = make_tiny_draft(target, draft_class=DSparkDraftModel)
    arguments = {"new_tokens": 4, "temperature": 1.2}
    processors = _draw_many(target, draft, prompt, 0, **arguments).processors
    law = enumerate_law(target, prompt, processors, 4)
    torch.manual_seed(1)
    assert p_value(law, _draw_many(target, draft, prompt, 250, **arguments).sequences) > FALSE_ALARM


@pytest.mark.core
@pytest.mark.parametrize("kind", _known(REFUSED))
def test_states_that_cannot_be_brought_back_are_refused_by_name_before_any_forward(kind):
    fields = REFUSED[kind] | ({"num_hidden_layers": 3} if kind == "recurrent_gemma" else {})
    target = make_tiny_target(kind, **fields)
    calls = []
    target.register_forward_pre_hook(lambda module, args: calls.append(1))
    for kwargs in ({}, {"use_cache": False}):
        with pytest.raises(ValueError, match=type(target).__name__ if kind != "bamba" else "time_step_limit"):
            speculate(target, make_tiny_draft(target, taps=(0,)), random_prompt(64, 5), max_new_tokens=4, **kwargs)
    assert not calls
