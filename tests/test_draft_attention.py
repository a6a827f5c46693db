"""What a draft's flags ask for: first slot, causal blocks, windows, sinks, interleaved rope; always lossless."""

import pytest
import torch
from tiny import make_tiny_draft, make_tiny_target, plain, random_prompt, speculate

from hf_dspark import DSparkConfig
from hf_dspark.attention import draft_masks
from hf_dspark.compat import CACHE, get_cache
from hf_dspark.draft import draft_block
from hf_dspark.train.anchors import build_blocks, sample_anchors
from hf_dspark.train.answers import Sample
from hf_dspark.train.step import TrainingStep
from hf_dspark.train.target import FrozenTarget

BLOCK = 4
FLAGS = {
    "first slot 1": {"first_slot": 1},
    "causal": {"causal": True},
    "window": {"sliding_window": 6},
    "causal window, first slot 1": {"causal": True, "sliding_window": 6, "first_slot": 1},
    "sinks": {"attention_sinks": True},
    "sinks in a window": {"attention_sinks": True, "sliding_window": 6, "causal": True},
    "interleaved rope": {"rope_interleaved": True},
}


@pytest.fixture(scope="module")
def target():
    return make_tiny_target("qwen3", seed=1)


def _draft(target, flags, **kwargs):
    draft = make_tiny_draft(target, block_size=BLOCK, **flags, **kwargs)
    if flags.get("attention_sinks"):
        with torch.no_grad():
            for layer in draft.layers:
                layer.self_attn.sinks.normal_(std=2.0, generator=torch.Generator().manual_seed(0))
    draft.bind_target(target)
    return draft


@pytest.mark.core
@pytest.mark.parametrize("name", FLAGS)
def test_output_is_plains(target, name):
    draft, prompt = _draft(target, FLAGS[name]), random_prompt(64, 9, seed=1)
    expected = plain(target, prompt, max_new_tokens=32)
    assert speculate(target, draft, prompt, max_new_tokens=32).tolist() == expected.tolist()


def _attend_slowly(draft, features, block_ids):
    """One layer of attention, key by key, from the flags' definitions."""
    config, layer = draft.config, draft.layers[0]
    attention, head_dim = layer.self_attn, config.head_dim
    context = draft.hidden_norm(draft.fc(features))
    hidden = draft._embed(block_ids)
    rows = torch.cat([context, layer.input_layernorm(hidden)], dim=1)[0]
    length, total = context.shape[1], rows.shape[0]
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2) / head_dim)

    def rotate(vector, position):
        angles = position * inv_freq
        even = (vector[::2], vector[1::2]) if config.rope_interleaved else vector.chunk(2)
        return torch.cat(
            [even[0] * angles.cos() - even[1] * angles.sin(), even[1] * angles.cos() + even[0] * angles.sin()]
        )

    groups = config.num_attention_heads // config.num_key_value_heads
    result = []
    for query_position in range(length, total):
        heads = []
        for head in range(config.num_attention_heads):
            channels = slice(head * head_dim, (head + 1) * head_dim)
            query = attention.q_norm(attention.q_proj(rows[query_position])[channels])
            query = rotate(query, query_position)
            scores, values = [], []
            for key_position in range(total):
                if config.causal and key_position > query_position:
                    continue
                if config.sliding_window is not None and key_position < length - config.sliding_window:
                    continue
                shared = slice(head // groups * head_dim, (head // groups + 1) * head_dim)
                key = rotate(attention.k_norm(attention.k_proj(rows[key_position])[shared]), key_position)
                scores.append(query @ key / head_dim**0.5)
                values.append(attention.v_proj(rows[key_position])[shared])
            if config.attention_sinks:
                scores.append(attention.sinks[head])
                values.append(torch.zeros(head_dim))
            heads.append(torch.stack(scores).softmax(-1) @ torch.stack(values))
        result.append(attention.o_proj(torch.cat(heads)))
    hidden = hidden + torch.stack(result)
    hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return draft.norm(hidden)


@torch.no_grad()
@pytest.mark.parametrize("name", FLAGS)
def test_attention_is_as_the_flags_define_it(target, name):
    draft = _draft(target, FLAGS[name])
    features = torch.randn(1, 9, draft.fc.in_features, generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor([[7] + [draft.config.mask_token_id] * (draft.config.num_block_inputs - 1)])
    expected = _attend_slowly(draft, features, inputs)
    first = draft.config.first_slot
    cache = draft.new_cache()
    block = draft_block(
        draft, features[:, :5], torch.tensor([7]), cache
    )  # an earlier round: the context comes in parts
    block = draft_block(draft, features[:, 5:], torch.tensor([7]), cache)
    torch.testing.assert_close(block.hidden_states, expected[:, first : first + BLOCK], atol=1e-5, rtol=1e-4)
    assert block.token_ids.shape == (1, BLOCK)


@torch.no_grad()
@pytest.mark.parametrize("name", FLAGS)
def test_training_sees_what_decoding_sees(target, name):
    draft = _draft(target, FLAGS[name])
    config = draft.config
    sample = Sample(0, random_prompt(64, 24, seed=3)[0].tolist(), [(6, 24)])
    frozen = FrozenTarget(target, config.target_layer_ids)
    anchors = sample_anchors(sample, 9, torch.Generator().manual_seed(0))
    flags = {"first_slot": config.first_slot, "causal": config.causal, "window": config.sliding_window}
    blocks = build_blocks(sample, anchors, block_size=BLOCK, mask_token_id=63, position_decay=4.0, **flags)
    states = frozen.read(sample.input_ids)
    hidden, _, _ = TrainingStep(draft, frozen).block_outputs(states, blocks)
    for a, anchor in enumerate(anchors.tolist()):
        anchor_ids = torch.tensor([sample.input_ids[anchor]])
        block = draft_block(draft, states.features[:, :anchor], anchor_ids, draft.new_cache())
        torch.testing.assert_close(block.hidden_states[0], hidden[a], atol=1e-5, rtol=1e-4)


def test_mixed_layers_have_a_mask_each():
    types = ["full_attention", "sliding_attention"]
    masks = draft_masks(types, 2, 6, causal=True, window=3, device=torch.device("cpu"))
    assert masks["full_attention"] is None
    assert masks["sliding_attention"][0, 0].int().tolist() == [[0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]]
    assert draft_masks(types, 2, 5, causal=False, window=3, device=torch.device("cpu")) == dict.fromkeys(types)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first_slot": 2}, "first_slot.*0 .*or 1"),
        ({"sliding_window": 0}, "sliding_window.*at least 1"),
        ({"layer_types": ["full_attention"]}, "layer_types.*each of 2 layers"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window. must say how wide"),
    ],
)
def test_flags_that_cannot_be_are_refused(fields, message):
    common = {
        "target_layer_ids": [0],
        "mask_token_id": 3,
        "num_hidden_layers": 2,
        "rope_parameters": {"rope_theta": 1e4},
    }
    with pytest.raises(ValueError, match=message):
        DSparkConfig(**common, **fields)


def test_draft_with_a_window_keeps_no_more_of_the_context_and_drafts_the_same(target):
    draft = _draft(target, {"sliding_window": 6})
    features = torch.randn(1, 40, 32 * len(draft.config.target_layer_ids), generator=torch.Generator().manual_seed(2))
    grown, read = draft.new_cache(), 0
    for length in (3, 4, 9, 25, 26, 40):
        positions = torch.arange(read, length + draft.config.num_block_inputs).unsqueeze(0)
        anchor = torch.tensor([length % 7])
        block = draft_block(draft, features[:, read:length], anchor, grown, position_ids=positions)
        fresh = draft_block(draft, features[:, :length], anchor, draft.new_cache())
        torch.testing.assert_close(block.draft_logits, fresh.draft_logits, atol=1e-5, rtol=0)
        assert grown.layers[0].keys.shape[2] == min(length, 6)
        read = length


def test_a_turn_that_goes_back_in_the_cache_is_lossless_with_a_window(target):
    draft, prompt = _draft(target, {"sliding_window": 6}), random_prompt(64, 9, seed=3)
    settings = {"max_new_tokens": 24, "do_sample": False}
    texts = []
    for assistant in ({}, {"assistant_model": draft}):
        output = target.generate(prompt, return_dict_in_generate=True, **settings, **assistant)
        cache = get_cache(output)
        cache.crop(-10)
        regenerated = target.generate(output.sequences[:, :-9], **{CACHE: cache}, **settings, **assistant)
        texts.append(regenerated.tolist())
    assert texts[0] == texts[1]
