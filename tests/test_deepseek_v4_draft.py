"""The draft inside a DeepSeek-V4 repository against the reference's values: every round, and every mutant fails."""

import math
from contextlib import ExitStack

import pytest
import torch
from deepseek_v4_files import FIXTURE, NUM_STAGES, draft_tensors, native_config, write_repository
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_dspark import DSparkDraftModel
from hf_dspark import backbone_deepseek_v4 as backbone
from hf_dspark.compat import CACHE, get_cache
from hf_dspark.dequantize import E2M1, dequantize_fp4, dequantize_fp8
from hf_dspark.dialects_deepseek_v4 import stored_tensors
from hf_dspark.draft import draft_block

needs_fixture = pytest.mark.skipif(not FIXTURE.exists(), reason="the parity fixture v4_flash_a is not here")
# Of the fixture's README, for fp32 and the given features.
TOLERANCES = {"hidden": 2e-4, "base_logits": 3e-5, "draft_logits": 3e-5, "confidence_logits": 3e-5}
DRAFT_TENSORS = {"Flash": (4705, 10.12), "Pro": (7009, 39.10)}  # published: tensors, GiB


@pytest.fixture(scope="module")
def target():
    # In bfloat16, then fp32: transformers' loader leaves norms in bfloat16 where it is asked for fp32 at once.
    return AutoModelForCausalLM.from_pretrained(FIXTURE / "repo").float().eval()


@pytest.fixture(scope="module")
def expected():
    return load_file(FIXTURE / "expected.safetensors")


def load(target, experts="dequantized", dtype=torch.float32):
    return DSparkDraftModel.from_pretrained(FIXTURE / "repo", target=target, experts=experts, dtype=dtype)


def run_round(draft, expected, number, shift=0):
    length = int(expected["rounds.context_len"][number])
    features, anchor = expected["features"][None, :length], expected["sequence_ids"][length][None]
    positions = torch.arange(length + draft.config.num_block_inputs)
    positions[length:] += shift
    cache = draft.new_cache()
    return draft_block(draft, features, anchor, cache, position_ids=positions[None])


def deviations(draft, expected, shift=0):
    """Largest difference of each quantity over all rounds; tokens count the wrong ones."""
    worst = dict.fromkeys([*TOLERANCES, "tokens"], 0.0)
    for number in range(len(expected["rounds.context_len"])):
        block = run_round(draft, expected, number, shift)
        found = {
            "hidden": block.hidden_states,
            "base_logits": block.base_logits,
            "draft_logits": block.draft_logits,
            "confidence_logits": block.confidence_logits,
        }
        for name, value in found.items():
            worst[name] = max(worst[name], float((value[0].detach() - expected[f"rounds.{name}"][number]).abs().max()))
        worst["tokens"] += int((block.token_ids[0] != expected["rounds.draft_tokens"][number]).sum())
    return worst


def is_within(worst):
    return worst["tokens"] == 0 and all(worst[name] <= tolerance for name, tolerance in TOLERANCES.items())


@needs_fixture
@pytest.mark.parametrize("experts", ["packed", "dequantized"])
def test_every_round_agrees_with_the_reference(target, expected, experts):
    worst = deviations(load(target, experts), expected)
    assert is_within(worst), worst


@needs_fixture
def test_context_and_streams_agree_with_the_reference(target, expected):
    draft = load(target)
    for name, number in (("first", 0), ("long", 8)):
        cache, outputs = draft.new_cache(), []
        with ExitStack() as hooks:
            for module in (draft.hidden_norm, *draft.layers):
                hook = module.register_forward_hook(lambda module, args, output, kept=outputs: kept.append(output[0]))
                hooks.callback(hook.remove)
            length = int(expected["rounds.context_len"][number])
            assert length == expected[f"probe.{name}.main_x"].shape[0]
            draft_block(draft, expected["features"][None, :length], expected["sequence_ids"][length][None], cache)
        torch.testing.assert_close(outputs[0], expected[f"probe.{name}.main_x"], atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.stack(outputs[1:]), expected[f"probe.{name}.streams"], atol=1e-4, rtol=0)
        rows = torch.stack([layer.keys[0, 0] for layer in cache.layers])
        torch.testing.assert_close(rows, expected[f"probe.{name}.context_kv"], atol=1e-4, rtol=0)


@needs_fixture
def test_a_cache_that_grows_by_rounds_drafts_as_a_fresh_one(target, expected):
    draft = load(target)
    fresh, grown = draft.new_cache(), draft.new_cache()
    sequence, features = expected["sequence_ids"], expected["features"]
    read = 0
    for length in (12, 13, 17, 23, 127, 128, 129, 150, 197):
        block = draft_block(draft, features[None, read:length], sequence[length][None], grown)
        read = length
        fresh = draft.new_cache()
        expected_block = draft_block(draft, features[None, :length], sequence[length][None], fresh)
        torch.testing.assert_close(block.draft_logits, expected_block.draft_logits, atol=2e-5, rtol=0)
        assert grown.layers[0].keys.shape[2] == min(length, draft.config.sliding_window)


@needs_fixture
@pytest.mark.parametrize("experts", ["packed", "dequantized"])
def test_generate_with_the_draft_is_the_targets_text_and_accepts_as_the_reference(target, expected, experts):
    prompt, sequence = expected["prompt_ids"][None], expected["sequence_ids"]
    output = target.generate(
        prompt,
        assistant_model=load(target, experts),
        max_new_tokens=len(sequence) - prompt.shape[1],
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert output.sequences[0].tolist() == sequence.tolist()
    accepted = expected["rollout.n_accepted"].tolist()
    assert [r.num_accepted for r in output.rounds][: len(accepted)] == accepted
    assert [r.drafted for r in output.rounds][: len(accepted)] == expected["rollout.draft_tokens"].tolist()


@needs_fixture
def test_second_turn_on_the_kept_cache_is_plain_text(target, expected):
    draft, settings = load(target), {"do_sample": False, "max_new_tokens": 30}
    first = {"return_dict_in_generate": True, **settings}
    turn = torch.tensor([[17, 40, 23, 9, 31]])
    texts = []
    for assistant in ({}, {"assistant_model": draft}):
        output = target.generate(expected["prompt_ids"][None], **first, **assistant)
        prompt = torch.cat([output.sequences, turn], dim=1)
        texts.append(target.generate(prompt, **{CACHE: get_cache(output)}, **settings, **assistant).tolist())
    assert texts[0] == texts[1]
    assert draft.last_stats.tau > 1.2


def _post_norm_confidence(draft, monkeypatch):
    original = draft.confidence_head.forward
    monkeypatch.setattr(draft.confidence_head, "forward", lambda h, previous: original(draft.norm(h), previous))


def _window(width):
    def change(draft, monkeypatch):
        monkeypatch.setattr(draft.config, "sliding_window", width)

    return change


def _causal(draft, monkeypatch):
    monkeypatch.setattr(draft.config, "causal", True)


def _no_sinks(draft, monkeypatch):
    for layer in draft.layers:
        layer.self_attn.sinks.data.fill_(-1e9)


def _rope_kept_on_output(draft, monkeypatch):
    original = backbone.apply_rotary_pos_emb
    calls = []

    def rotate(x, cos, sin, **kwargs):
        calls.append(x)
        return x if len(calls) % 3 == 0 else original(x, cos, sin, **kwargs)  # query, keys, output

    monkeypatch.setattr(backbone, "apply_rotary_pos_emb", rotate)


def _rope_in_halves(draft, monkeypatch):
    original = backbone.apply_rotary_pos_emb

    def rotate(x, cos, sin, **kwargs):
        width = 2 * cos.shape[-1]
        order = torch.arange(width).view(2, -1).T.flatten()
        mixed = torch.cat([x[..., :-width], x[..., -width:][..., order]], -1)
        rotated = original(mixed, cos, sin, **kwargs)
        return torch.cat([rotated[..., :-width], rotated[..., -width:][..., order.argsort()]], -1)

    monkeypatch.setattr(backbone, "apply_rotary_pos_emb", rotate)


def _yarn(draft, monkeypatch):
    draft.rotary_emb.main_inv_freq.mul_(0.5)


def _no_query_norm(draft, monkeypatch):
    for layer in draft.layers:
        monkeypatch.setattr(layer.self_attn, "q_b_norm", torch.nn.Identity())


def _no_router_bias(draft, monkeypatch):
    for layer in draft.layers:
        layer.mlp.gate.e_score_correction_bias.zero_()


def _no_routed_scaling(draft, monkeypatch):
    for layer in draft.layers:
        layer.mlp.gate.routed_scaling_factor = 1.0


def _no_swiglu_limit(draft, monkeypatch):
    for layer in draft.layers:
        layer.mlp.experts.limit = layer.mlp.shared_experts.limit = math.inf


def _unclamped_shared_expert(draft, monkeypatch):
    for layer in draft.layers:
        layer.mlp.shared_experts.limit = math.inf


def _no_shared_expert(draft, monkeypatch):
    for layer in draft.layers:
        layer.mlp.shared_experts.down_proj.weight.data.zero_()


def _gate_and_up_swapped(draft, monkeypatch):
    for layer in draft.layers:
        weight = layer.mlp.experts.gate_up_proj
        weight.data.copy_(torch.cat(weight.data.chunk(2, dim=1)[::-1], dim=1))


def _sinkhorn_iterations(count):
    def change(draft, monkeypatch):
        for layer in draft.layers:
            layer.attn_hc.hc_sinkhorn_iters = layer.ffn_hc.hc_sinkhorn_iters = count

    return change


def _streams_mixed_transposed(draft, monkeypatch):
    for layer in draft.layers:
        original = layer.attn_hc.forward

        def transposed(streams, original=original):
            post, comb, collapsed = original(streams)
            return post, comb.transpose(-1, -2), collapsed

        monkeypatch.setattr(layer.attn_hc, "forward", transposed)


def _context_normed_as_the_block(draft, monkeypatch):
    for layer in draft.layers:
        original = layer.self_attn.forward

        def normed(states, context, *args, layer=layer, original=original, **kwargs):
            return original(states, layer.input_layernorm(context), *args, **kwargs)

        monkeypatch.setattr(layer.self_attn, "forward", normed)


def _no_main_norm(draft, monkeypatch):
    monkeypatch.setattr(draft, "hidden_norm", torch.nn.Identity())


def _markov_of_the_anchor_only(draft, monkeypatch):
    original = draft.markov_head.forward
    seen = []

    def forward(previous, hidden_states, state):
        seen.append(previous)
        return original(seen[0], hidden_states, state)

    monkeypatch.setattr(draft.markov_head, "forward", forward)


def _mean_instead_of_head(draft, monkeypatch):
    monkeypatch.setattr(draft.hc_head, "forward", lambda streams: streams.mean(2))


def _stages_swapped(draft, monkeypatch):
    for name in ("sinks",):
        first, second = (getattr(draft.layers[i].self_attn, name).data for i in (0, 1))
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)


MUTANTS = [
    _post_norm_confidence,
    _window(127),
    _window(64),
    _causal,
    _no_sinks,
    _rope_kept_on_output,
    _rope_in_halves,
    _yarn,
    _no_query_norm,
    _no_router_bias,
    _no_routed_scaling,
    _no_swiglu_limit,
    _unclamped_shared_expert,
    _no_shared_expert,
    _gate_and_up_swapped,
    _sinkhorn_iterations(1),
    _streams_mixed_transposed,
    _context_normed_as_the_block,
    _no_main_norm,
    _markov_of_the_anchor_only,
    _mean_instead_of_head,
    _stages_swapped,
]


@needs_fixture
@pytest.mark.parametrize("mutant", range(len(MUTANTS)), ids=lambda i: f"{i} {MUTANTS[i].__qualname__}")
def test_a_mutant_does_not_agree(target, expected, mutant, monkeypatch):
    draft = load(target)
    with torch.no_grad():
        MUTANTS[mutant](draft, monkeypatch)
    assert not is_within(deviations(draft, expected))


@needs_fixture
def test_a_block_one_position_early_does_not_agree(target, expected):
    draft = load(target)
    assert is_within(deviations(draft, expected))
    assert not is_within(deviations(draft, expected, shift=-1))


def test_fp8_is_dequantised_as_torch_casts_it():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = codes.repeat(10, 1)[:, :192]  # ragged: the last block is 64 wide, the last row of blocks 2 high
    scale_bytes = torch.tensor([[120, 127], [1, 254], [130, 100]], dtype=torch.uint8)
    scale = torch.tensor([[2.0 ** (int(b) - 127) for b in row] for row in scale_bytes])
    reference = weight.float() * scale.repeat_interleave(4, 0)[:10].repeat_interleave(128, 1)[:, :192]
    for stored in (scale_bytes, scale_bytes.view(torch.float8_e8m0fnu)):
        for dtype in (torch.float32, torch.bfloat16):
            values = dequantize_fp8(weight, stored, (4, 128), dtype)
            torch.testing.assert_close(values, reference.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_fp4_is_dequantised_by_the_table_low_nibble_first():
    packed = torch.arange(256, dtype=torch.uint8).view(8, 32).view(torch.int8)
    scale = torch.randint(110, 140, (8, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    values = dequantize_fp4(packed, scale, torch.bfloat16)
    assert values.shape == (8, 64)
    for row in range(8):
        for column in range(64):
            byte = int(packed.view(torch.uint8)[row, column // 2])
            code = byte >> 4 if column % 2 else byte & 15
            assert float(values[row, column]) == E2M1[code] * 2.0 ** (int(scale[row, column // 32]) - 127)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_experts_compute_what_dequantised_ones_do(tmp_path, dtype):
    write_repository(tmp_path)
    drafts = [DSparkDraftModel.from_pretrained(tmp_path, experts=e, dtype=dtype) for e in ("packed", "dequantized")]
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    for packed, dequantised in zip(*(draft.layers for draft in drafts), strict=True):
        _, weights, indices = dequantised.mlp.gate(rows)
        expected = dequantised.mlp.experts(rows, indices, weights)
        assert torch.equal(packed.mlp.experts(rows, indices, weights), expected)
        assert expected.abs().max() > 0
    codes = drafts[0].layers[0].mlp.experts.gate_up_codes
    assert codes.dtype == torch.uint8
    assert codes.numel() * 4 == drafts[1].layers[0].mlp.experts.gate_up_proj.numel() * 2


def test_loaded_tensors_are_the_stored_ones_bit_for_bit(tmp_path):
    config = native_config()
    tensors = draft_tensors(config)
    write_repository(tmp_path, config, tensors)
    draft = DSparkDraftModel.from_pretrained(tmp_path, experts="dequantized")
    assert draft.dtype == torch.bfloat16
    assert not hasattr(draft.config, "quantization_config")  # no quantiser of the target's sees it
    state = draft.state_dict()
    for stage in range(NUM_STAGES):
        for linear, ours in (("wq_b", "q_b_proj"), ("wo_a", "o_a_proj")):
            name = f"mtp.{stage}.attn.{linear}"
            weight = tensors[f"{name}.weight"].float()
            scale = tensors[f"{name}.scale"].float().repeat_interleave(128, 0)[: len(weight)]
            assert scale.shape[1] == 1  # one block wide
            assert torch.equal(state[f"layers.{stage}.self_attn.{ours}.weight"], (weight * scale).bfloat16())
        for expert in range(4):
            parts = []
            for linear in ("w1", "w3", "w2"):
                name = f"mtp.{stage}.ffn.experts.{expert}.{linear}"
                parts.append(dequantize_fp4(tensors[f"{name}.weight"], tensors[f"{name}.scale"], torch.bfloat16))
            place = f"layers.{stage}.mlp.experts"
            assert torch.equal(state[f"{place}.gate_up_proj"][expert], torch.cat(parts[:2]))
            assert torch.equal(state[f"{place}.down_proj"][expert], parts[2])
        assert torch.equal(state[f"layers.{stage}.self_attn.sinks"], tensors[f"mtp.{stage}.attn.attn_sink"])
        assert torch.equal(state[f"layers.{stage}.ffn_hc.fn"], tensors[f"mtp.{stage}.hc_ffn_fn"])
        gate = tensors[f"mtp.{stage}.ffn.gate.bias"]
        assert torch.equal(state[f"layers.{stage}.mlp.gate.e_score_correction_bias"], gate)
    assert torch.equal(state["markov_head.markov_w2.weight"], tensors["mtp.2.markov_head.markov_w2.weight"])
    assert torch.equal(state["hc_head.hc_fn"], tensors["mtp.2.hc_head_fn"])


def released_config(name):
    """The fields of the released config.json files that the draft's tensors depend on."""
    sizes = {
        "Flash": (4096, 43, 64, 1024, 8, 2048, 256, 1.5, 256, [40, 41, 42]),
        "Pro": (7168, 61, 128, 1536, 16, 3072, 384, 2.5, 512, [58, 59, 60]),
    }
    fields = "hidden_size num_hidden_layers num_attention_heads q_lora_rank o_groups moe_intermediate_size "
    fields += "n_routed_experts routed_scaling_factor dspark_markov_rank dspark_target_layer_ids"
    fixed = {"head_dim": 512, "qk_rope_head_dim": 64, "o_lora_rank": 1024, "vocab_size": 129280}
    return native_config(**dict(zip(fields.split(), sizes[name], strict=True)), **fixed)


@pytest.mark.parametrize("name", DRAFT_TENSORS)
def test_inventory_has_the_published_number_of_tensors_and_bytes(name):
    width = {"bf16": 2, "f32": 4, "fp8": 1, "fp4": 1, "e8m0": 1}
    tensors = stored_tensors(released_config(name), NUM_STAGES)
    size = sum(width[kind] * math.prod(shape) for kind, shape in tensors.values()) / 2**30
    assert (len(tensors), round(size, 2)) == DRAFT_TENSORS[name]
