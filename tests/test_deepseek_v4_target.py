"""DeepSeek-V4 targets: output as plain generate()'s, and compressed cache layers as if nothing had been drafted.

The indexers have many heads: with few, exact ties at score 0 make top-k differ between call shapes, without drafting.
"""

import functools

import pytest
import torch
from interrupts import Interrupt, RaisingCriterion, RaisingStreamer, converse
from test_sampling_law import _draw_many
from tiny import (
    QUALITIES,
    make_draft_of_quality,
    make_tiny_draft,
    make_tiny_target,
    plain,
    random_prompt,
    scripted_rounds,
    speculate,
)
from tiny_law import FALSE_ALARM, enumerate_law, p_value
from transformers import DynamicCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

from hf_dspark.compat import CACHE
from hf_dspark.features import FeatureTap

SLIDING, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
MIXES = {
    "sliding": (SLIDING, SLIDING),
    "hca": (HCA, HCA),
    "csa": (CSA, CSA),
    "csa and hca": (CSA, HCA),
    "mixed": (SLIDING, CSA, HCA, CSA),
}
WINDOW, RATES = 16, (4, 16)
PROMPT_LENGTH, NEW_TOKENS = 9, 60


def make_v4_target(mix="mixed", seed=0, vocab_size=64, *, window=WINDOW, rates=RATES, **fields):
    """A random V4 target; its first experts are routed by a table of tokens, the others by scores."""
    layers = MIXES[mix]
    target = make_tiny_target(
        "deepseek_v4",
        seed,
        vocab_size,
        layer_types=list(layers),
        num_hidden_layers=len(layers),
        mlp_layer_types=["hash_moe"] + ["moe"] * (len(layers) - 1),
        compress_rates={CSA: rates[0], HCA: rates[1]},
        sliding_window=window,
        num_key_value_heads=1,
        head_dim=16,
        partial_rotary_factor=0.5,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=8,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        index_n_heads=64,
        index_head_dim=8,
        **{"index_topk": 4, "max_position_embeddings": 512, **fields},
    )
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*target.named_parameters(), *target.named_buffers()]:
        if "position_bias" in name:  # initialised to zero
            tensor.data.normal_(generator=generator)
        elif "tid2eid" in name:
            tensor.copy_(torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(vocab_size)]))
    return target


@functools.cache
def _reference(mix, seed=1, prompt_length=PROMPT_LENGTH):
    target, prompt = make_v4_target(mix, seed), random_prompt(64, prompt_length, seed=seed)
    return target, prompt, plain(target, prompt, max_new_tokens=NEW_TOKENS)


def _taps(target):
    return (0, target.config.num_hidden_layers - 1)


def _draft_for(target, sequence, quality="noisy", **kwargs):
    return make_draft_of_quality(target, sequence[0].tolist(), quality, taps=_taps(target), **{"seed": 2, **kwargs})


def _assert_equal_caches(got, expected):
    """Layer by layer: the class, the attributes and all tensors."""
    assert got.get_seq_length() == expected.get_seq_length()
    assert [type(layer) for layer in got.layers] == [type(layer) for layer in expected.layers]
    for ours, theirs in zip(got.layers, expected.layers, strict=True):
        assert vars(ours).keys() == vars(theirs).keys()
        for name, value in vars(theirs).items():
            if isinstance(value, (torch.Tensor, dict)):
                message = functools.partial("{}: {}".format, name)
                torch.testing.assert_close(vars(ours)[name], value, atol=2e-4, rtol=2e-4, msg=message)
            else:
                assert vars(ours)[name] == value, name
        if hasattr(ours, "entry_count"):
            assert ours.values is ours.keys


@torch.no_grad()
def _prefilled(target, input_ids):
    cache = DynamicCache(config=target.config)
    target(input_ids, **{CACHE: cache})
    return cache


@pytest.mark.core
@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("mix", ["sliding", "hca", "csa", "mixed"])
def test_greedy_output_and_final_cache_equal_plains(mix, seed, quality):
    target, prompt, expected = _reference(mix, seed)
    draft = _draft_for(target, expected, quality)
    output = speculate(target, draft, prompt, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True)
    assert output.sequences.tolist() == expected.tolist()
    if QUALITIES[quality] is not None:
        lengths = [r.accepted_length for r in output.rounds]
        assert lengths == scripted_rounds(draft, PROMPT_LENGTH, expected.shape[1])
    _assert_equal_caches(getattr(output, CACHE), _prefilled(target, expected[:, :-1]))


@pytest.mark.parametrize("quality", ["noisy", "near-perfect"])
def test_rates_and_window_of_the_released_models_over_several_windows(quality):
    target = make_v4_target(seed=1, window=128, rates=(4, 128), index_topk=512)
    prompt = random_prompt(64, 40, seed=1)
    expected = plain(target, prompt, max_new_tokens=280, return_dict_in_generate=True)
    draft = _draft_for(target, expected.sequences, quality)
    output = speculate(target, draft, prompt, max_new_tokens=280, return_dict_in_generate=True)
    assert output.sequences.tolist() == expected.sequences.tolist()
    _assert_equal_caches(getattr(output, CACHE), getattr(expected, CACHE))


@pytest.mark.core
@pytest.mark.parametrize("prompt_length", [1, 4, WINDOW, 3 * WINDOW + 5])
def test_prompts_shorter_and_longer_than_the_windows(prompt_length):
    target, prompt, expected = _reference("mixed", 1, prompt_length)
    for block_size in (1, 2, 7, 11):  # 11 and the anchor: three windows of the small rate in one verification
        draft = _draft_for(target, expected, block_size=block_size)
        output = speculate(target, draft, prompt, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True)
        assert output.sequences.tolist() == expected.tolist()
        _assert_equal_caches(getattr(output, CACHE), _prefilled(target, expected[:, :-1]))


def test_chunked_prefill_and_no_cache_of_the_users(recwarn):
    target, prompt, expected = _reference("mixed", 1, 3 * WINDOW + 5)
    for kwargs in ({"prefill_chunk_size": 10}, {"use_cache": False}):
        draft = _draft_for(target, expected)
        assert speculate(target, draft, prompt, max_new_tokens=NEW_TOKENS, **kwargs).tolist() == expected.tolist()


@pytest.mark.core
def test_new_caches_are_made_of_the_same_layers_after_a_call():
    target, prompt, expected = _reference("mixed")
    before = dict(DYNAMIC_LAYER_TYPE_MAPPING)
    speculate(target, _draft_for(target, expected), prompt, max_new_tokens=8)
    assert before == DYNAMIC_LAYER_TYPE_MAPPING


@pytest.mark.core
@pytest.mark.parametrize(
    ("first", "second"), [("speculative", "plain"), ("plain", "speculative"), ("speculative", "speculative")]
)
def test_second_turn_on_the_same_cache_equals_plain_then_plain(first, second):
    target, prompt, _ = _reference("mixed")
    draft = make_tiny_draft(target, taps=_taps(target))
    turns = (("plain", "plain"), (first, second))
    expected, got = (converse(target, draft, prompt, turn, max_new_tokens=21) for turn in turns)
    assert got.sequences.tolist() == expected.sequences.tolist()
    _assert_equal_caches(getattr(got, CACHE), getattr(expected, CACHE))


def _interrupt_at(target, path, call):
    """Raise in the `call`-th call of a module of the target."""
    calls = []

    def hook(module, args):
        calls.append(1)
        if len(calls) == call:
            handle.remove()
            raise Interrupt

    handle = target.get_submodule(path).register_forward_pre_hook(hook)


# With an even chance of errors the fourth to sixth forwards are verifications in the middle of the call.
PLACES = {
    "before a layer": ("model.layers.2", 4),
    "keys updated, compressor not": ("model.layers.2.self_attn.compressor", 5),
    "keys updated, compressor not, and rows in the buffer": ("model.layers.1.self_attn.compressor", 6),
    "compressor updated, indexer not": ("model.layers.1.self_attn.compressor.indexer", 4),
    "compressor's window taken, its entry not stored": ("model.layers.1.self_attn.compressor.kv_norm", 4),
    "indexer's window taken, its entry not stored": ("model.layers.3.self_attn.compressor.indexer.kv_norm", 4),
    "after all layers": ("model.norm", 5),
}


@pytest.mark.core
@pytest.mark.parametrize("place", ["streamer", "criterion", *PLACES])
def test_cache_is_exact_after_an_exception_in_the_middle(place):
    """The cache holds a beginning of the sequence, as a prefill of it would; the call can be taken up from there."""
    target, prompt, sequence = _reference("mixed")
    draft, cache, kwargs = _draft_for(target, sequence), DynamicCache(config=target.config), {}
    if place == "streamer":
        kwargs = {"streamer": RaisingStreamer(11)}
    elif place == "criterion":
        kwargs = {"stopping_criteria": [RaisingCriterion(PROMPT_LENGTH + 20)]}
    else:
        _interrupt_at(target, *PLACES[place])
    with pytest.raises(Interrupt):
        speculate(target, draft, prompt, max_new_tokens=NEW_TOKENS, **{CACHE: cache}, **kwargs)
    length = cache.get_seq_length()
    assert PROMPT_LENGTH < length < sequence.shape[1] - 1
    _assert_equal_caches(cache, _prefilled(target, sequence[:, :length]))
    remaining = sequence.shape[1] - length - 1
    resumed = speculate(target, draft, sequence[:, : length + 1], max_new_tokens=remaining, **{CACHE: cache})
    assert resumed.tolist() == sequence.tolist()


def test_sampled_continuations_follow_the_targets_law():
    """Windows of both rates close within the drawn tokens. A false alarm has probability 1e-4 for a choice of seed."""
    target = make_v4_target("csa and hca", 3, 5, window=4, rates=(2, 4), hidden_size=16)
    draft, prompt = make_tiny_draft(target, taps=(0, 1)), random_prompt(5, 3)
    arguments = {"new_tokens": 4, "temperature": 1.5}
    processors = _draw_many(target, draft, prompt, 0, **arguments).processors
    law = enumerate_law(target, prompt, processors, 4)
    torch.manual_seed(1)
    assert p_value(law, _draw_many(target, draft, prompt, 400, **arguments).sequences) > FALSE_ALARM


@pytest.mark.core
@pytest.mark.parametrize("by_hooks", [False, True], ids=["list", "hooks"])
@torch.no_grad()
def test_features_are_the_mean_of_a_layers_streams(by_hooks):
    target, ids = make_v4_target(), random_prompt(64, 7)
    streams = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: streams.append(output))
        for layer in target.model.layers
    ]
    for taps in ([0, 2], [1], [0, 3], [-1, 3]):
        streams.clear()
        with FeatureTap(target, taps, by_hooks=by_hooks) as tap:
            features = tap.take(target(ids, **tap.forward_kwargs))
        assert {s.shape for s in streams} == {(1, 7, 4, 32)}
        expected = [target.model.embed_tokens(ids) if i == -1 else streams[i].mean(2) for i in taps]
        torch.testing.assert_close(features, torch.cat(expected, dim=-1))
    for handle in handles:
        handle.remove()


@pytest.mark.core
def test_transformers_own_loop_refuses_the_target_by_name():
    target, prompt, _ = _reference("mixed")
    decode = make_tiny_draft(target, taps=(0, 2)).as_custom_generate(loop="transformers")
    with pytest.raises(ValueError, match="state"):
        target.generate(prompt, custom_generate=decode, max_new_tokens=4, do_sample=False)


@pytest.mark.core
@pytest.mark.parametrize("mix", ["csa and hca", "mixed"])
def test_scores_states_and_attentions_are_plains(mix):
    target, prompt, _ = _reference(mix)
    names = ("scores", "logits", "hidden_states", "attentions")
    kwargs = {f"output_{name}": True for name in names} | {"return_dict_in_generate": True}
    expected = plain(target, prompt, max_new_tokens=40, **kwargs)
    output = speculate(target, _draft_for(target, expected.sequences), prompt, max_new_tokens=40, **kwargs)
    assert output.sequences.tolist() == expected.sequences.tolist()
    for name in names:
        torch.testing.assert_close(getattr(output, name), getattr(expected, name), atol=1e-3, rtol=1e-3)
