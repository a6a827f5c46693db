"""One sequence as the only row of slots: which calls go that way, and how rows are read on CUDA, here on a CPU."""

import pytest
import torch
from tiny import (
    KINDS,
    QUALITIES,
    make_draft_of_quality,
    make_tiny_draft,
    make_tiny_target,
    plain,
    random_prompt,
    scripted_rounds,
    speculate,
)
from tiny_batch import MANY, make_rows
from transformers import DynamicCache, GenerationMixin

from hf_dspark import ConfidenceThreshold, FixedLength
from hf_dspark.compat import CACHE
from hf_dspark.limits import why_not_in_a_row
from hf_dspark.slots import SlotCache

IN_SLOTS = ("llama", "qwen3", "qwen3_moe", "mixtral", "deepseek_v3", "smollm3", "glm4_moe")
NEW_TOKENS = 40


def _where(draft) -> str:
    return draft.last_stats.kernels["cache"]


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_call_says_where_its_tokens_were_kept(kind):
    target, prompt = make_tiny_target(kind, seed=1), random_prompt(64, 7)
    draft = make_tiny_draft(target)
    speculate(target, draft, prompt, max_new_tokens=6)
    assert (_where(draft) == "slots") == (kind in IN_SLOTS), _where(draft)


def _attentions(target, monkeypatch):
    target.set_attn_implementation("eager")
    return {"output_attentions": True, "return_dict_in_generate": True}


def _sliding_cache(target, monkeypatch):
    return {CACHE: DynamicCache(config=make_tiny_target("mistral", sliding_window=100).config)}


def _inputs(target, monkeypatch):
    def prepare(self, *args, **kwargs):
        return GenerationMixin.prepare_inputs_for_generation(self, *args, **kwargs)

    monkeypatch.setattr(type(target), "prepare_inputs_for_generation", prepare)
    return {}


def _attention(target, monkeypatch):
    monkeypatch.setattr(type(target.model), "_supports_attention_backend", False)
    return {}


def _padding(target, monkeypatch):
    return {"attention_mask": torch.tensor([[1] * 6 + [0]]), "pad_token_id": 0}


@pytest.mark.core
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_attentions, "`output_attentions`"),
        (_sliding_cache, "windows"),
        (_inputs, "prepares its inputs"),
        (_attention, "code of its own"),
        (_padding, "padding behind"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_slots_cannot_hold_stays_in_the_targets_own_cache_and_is_lossless(change, reason, monkeypatch):
    target, prompt = make_tiny_target("qwen3", seed=1), random_prompt(64, 7, seed=1)
    kwargs = change(target, monkeypatch)
    shared = {name: kwargs[name] for name in ("attention_mask", "pad_token_id") if name in kwargs}
    expected = plain(target, prompt, max_new_tokens=NEW_TOKENS, **shared).tolist()
    draft = make_draft_of_quality(target, expected[0], "noisy")
    output = speculate(target, draft, prompt, max_new_tokens=NEW_TOKENS, **kwargs)
    assert getattr(output, "sequences", output).tolist() == expected
    assert reason in _where(draft)


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ({}, None),
        ({"attention_mask": torch.tensor([[0, 0, 1]]), "use_cache": True, "logits_to_keep": 1}, None),
        ({"token_type_ids": torch.zeros(1, 3)}, None),
        ({"pixel_values": None}, None),
        ({"pixel_values": torch.zeros(1, 3)}, "['pixel_values']"),
        ({"position_ids": torch.zeros(3, 1, 3)}, "several axes"),
    ],
    ids=str,
)
def test_arguments_that_rounds_of_rows_do_not_make_keep_a_sequence_out_of_slots(target, draft, argument, reason):
    found = why_not_in_a_row(target, draft, argument, DynamicCache(), output_attentions=False)
    assert (found is None) if reason is None else (reason in found)


def test_cache_that_is_offloaded_stays_where_it_is(target, draft):
    cache = DynamicCache()
    cache.offloading = True  # such a cache cannot be made without a GPU
    assert "offloaded" in why_not_in_a_row(target, draft, {}, cache, output_attentions=False)


def test_draft_whose_windows_forget_keeps_its_own_cache():
    target, prompt = make_tiny_target("qwen3", seed=1), random_prompt(64, 7, seed=1)
    expected = plain(target, prompt, max_new_tokens=NEW_TOKENS).tolist()
    windows = {"layer_types": ["sliding_attention"], "sliding_window": 8}
    draft = make_draft_of_quality(target, expected[0], "noisy", **windows)
    assert speculate(target, draft, prompt, max_new_tokens=NEW_TOKENS).tolist() == expected
    assert "windows" in _where(draft)


@pytest.mark.core
@pytest.mark.parametrize("kind", IN_SLOTS)
@pytest.mark.parametrize("quality", QUALITIES)
def test_row_read_as_on_cuda_equals_plain_and_rounds_are_as_good_as_the_draft(kind, quality, read_as_on_cuda):
    """Without masks, up to where the row ends; past what the cache has to begin with."""
    target, prompt = make_tiny_target(kind, seed=1), random_prompt(64, 7, seed=1)
    expected = plain(target, prompt, max_new_tokens=NEW_TOKENS)
    draft = make_draft_of_quality(target, expected[0].tolist(), quality)
    output = speculate(target, draft, prompt, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True)
    assert output.sequences.tolist() == expected.tolist()
    assert _where(draft) == "slots"
    if QUALITIES[quality] is not None:
        wanted = scripted_rounds(draft, prompt.shape[1], expected.shape[1])
        assert [r.accepted_length for r in output.rounds] == wanted


@pytest.mark.core
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("schedule", [FixedLength(), ConfidenceThreshold(0.2)], ids=["whole blocks", "ragged"])
def test_rows_read_as_on_cuda_equal_plain(kind, schedule, read_as_on_cuda):
    """With lengths in place of masks where no layer has a window; rows end one by one."""
    rows = make_rows(kind, MANY[:6])
    stops = {"eos_token_id": [rows.new_token(0, 3), rows.new_token(2, 15)]}
    draft = rows.draft("noisy")
    output = rows.speculate(draft, schedule=schedule, **stops)
    assert output.sequences.tolist() == rows.plain(**stops).tolist()
    assert draft.last_stats.tau > 1.25


@pytest.mark.parametrize(
    "fields", [{}, {"causal": True}, {"attention_sinks": True}, {"backbone_type": "gemma4"}], ids=str
)
@pytest.mark.parametrize("ids", ["draft", "stop tokens"])
def test_drafts_of_rows_are_the_same_by_masks_and_by_lengths(fields, ids, request, monkeypatch):
    rows = make_rows("qwen3", (5, 9, 2))
    draft = make_tiny_draft(rows.target, num_hidden_layers=2, **fields)
    settings = {"eos_token_id": [rows.new_token(0, 3)]} if ids == "stop tokens" else {}

    def blocks():
        output = rows.speculate(draft, **settings)
        return [(r.row, r.drafted, r.emitted) for r in output.rounds], output.rounds

    by_masks, rounds = blocks()
    request.getfixturevalue("read_as_on_cuda")
    monkeypatch.delattr("hf_dspark.traced.draft_slot_masks")
    by_lengths, others = blocks()
    assert by_masks == by_lengths
    for one, other in zip(rounds, others, strict=True):
        assert one.confidence == pytest.approx(other.confidence, abs=1e-4)


@pytest.mark.core
def test_draft_of_a_row_proposes_the_same_however_it_is_read(monkeypatch, request):
    """Masks, none, and a cache like the target's own hold the same for it, also behind padding."""
    target, prompt = make_tiny_target("qwen3", seed=1), random_prompt(64, 9, seed=1)
    draft = make_tiny_draft(target, num_hidden_layers=2)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
    settings = {"attention_mask": mask, "pad_token_id": 0, "max_new_tokens": 20, "return_dict_in_generate": True}

    def blocks():
        output = speculate(target, draft, prompt, **settings)
        confidences = [r.confidence_logits for r in output.rounds if r.drafted]
        return [(r.drafted, r.emitted) for r in output.rounds], torch.cat(confidences, dim=1)

    by_masks, confidences = blocks()
    request.getfixturevalue("read_as_on_cuda")
    without, others = blocks()
    monkeypatch.setattr("hf_dspark.generate.why_not_in_a_row", lambda *args, **kwargs: "a test")
    own_cache, own = blocks()
    assert by_masks == without == own_cache
    torch.testing.assert_close(confidences, others, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(confidences, own, atol=1e-4, rtol=1e-4)


def test_one_sequence_is_held_once(monkeypatch):
    """The prefill's cache is emptied layer by layer, and there is no row beside the one."""
    target, prompt = make_tiny_target("qwen3", seed=1), random_prompt(64, 30, seed=1)
    draft, seen, place = make_tiny_draft(target), [], SlotCache.place

    def watched(self, slots, stop, **kwargs):
        place(self, slots, stop, **kwargs)
        seen.append(sum(layer.is_initialized for layer in cache.layers))
        assert all(layer.keys.shape[0] == 1 for layer in self.layers if layer.is_initialized)

    monkeypatch.setattr(SlotCache, "place", watched)
    cache = DynamicCache(config=target.config)
    speculate(target, draft, prompt, max_new_tokens=12, **{CACHE: cache})
    assert (seen[0], set(seen[1:-1]), seen[-1]) == (len(cache.layers), {0}, len(cache.layers))
    assert cache.get_seq_length() == 30 + 12 - 1


@pytest.mark.core
@pytest.mark.parametrize("law", [{}, {"do_sample": True, "temperature": 0.8, "top_k": 0}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("schedule", [FixedLength(), ConfidenceThreshold(0.3)], ids=["whole blocks", "ragged"])
def test_rows_attend_by_the_kernel_that_reads_lengths_on_the_device(
    law, schedule, kernels_everywhere, read_as_on_cuda, monkeypatch
):
    """Both models, by Triton's (in its interpreter where there is no GPU) or the plain function."""
    rows = make_rows("qwen3", (5, 9, 2), head_dim=16)
    draft = rows.draft("noisy", head_dim=16)
    for switch, ran in (("1", "Triton"), ("0", "not Triton: HF_DSPARK_KERNELS is 0; packed queries")):
        monkeypatch.setenv("HF_DSPARK_KERNELS", switch)
        output = rows.speculate(draft, schedule=schedule, max_new_tokens=12, **law)
        assert draft.last_stats.kernels["block_attention"] == ran
        if not law:
            assert output.sequences.tolist() == rows.plain(max_new_tokens=12).tolist()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_compiled_rounds_that_read_lengths_on_the_device_equal_plain(rows, kind, read_as_on_cuda):
    target = make_tiny_target(kind, seed=1)
    ids = torch.cat([random_prompt(64, 9, seed=row) for row in range(rows)])
    expected = plain(target, ids, max_new_tokens=24, pad_token_id=0)
    draft = make_tiny_draft(target)
    draft.compile_round(target, backend="eager")
    output = speculate(target, draft, ids, max_new_tokens=24, pad_token_id=0, return_dict_in_generate=True)
    assert output.sequences.tolist() == expected.tolist()
    assert draft.last_stats.kernels["compiled round"] == "whole"
