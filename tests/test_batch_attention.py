"""Batches under attention that reads no masks of slots: transformers' flash and flex paths, and users' own."""

import pytest
import torch
from flash_stand_in import FlashAttention
from tiny import QUALITIES, make_tiny_draft, make_tiny_target
from tiny_batch import (
    AHEAD,
    LENGTHS,
    MANY,
    Rows,
    assert_as_scripted,
    assert_equal_to_plain,
    make_rows,
    new_tokens_of,
    rows_of_target,
)
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_dspark import GenerationRequest, generate_many
from hf_dspark.compat import CACHE

FLASH, FLEX = "flash_attention_2", "flex_attention"
# Of those that run on a CPU: flex attention has no sinks there, and not all models let it have a soft-cap.
KINDS = ["qwen3", "mistral", "gemma3_text"]
FLASH_KINDS = [*KINDS, "gemma2", "deepseek_v3"]


@pytest.fixture(autouse=True)
def flash(monkeypatch):
    """Flash attention's stand-in; flex attention by its definition, for its CPU kernels do not compile everywhere."""
    stand_in = FlashAttention()
    stand_in.install(monkeypatch)
    with torch.compiler.set_stance("force_eager"):
        yield stand_in


def _rows(attention: str, kind: str = "qwen3", lengths: tuple[int, ...] = LENGTHS) -> Rows:
    if attention != FLASH:
        return make_rows(kind, lengths, attention=attention)
    target = make_tiny_target(kind, seed=1)
    target.config._attn_implementation = FLASH  # from_pretrained() asks for a GPU
    return rows_of_target(target, lengths)


BLOCK = 4
CASES = [(FLEX, kind) for kind in KINDS] + [(FLASH, kind) for kind in FLASH_KINDS]


@pytest.mark.core
@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize(("attention", "kind"), CASES)
def test_rows_equal_plain_and_rounds_are_as_good_as_the_draft(attention, kind, quality):
    rows = _rows(attention, kind, {"garbage": (1, 14), "noisy": MANY}.get(quality, LENGTHS))
    assert_equal_to_plain(rows, quality)


@pytest.mark.core
@pytest.mark.parametrize(("attention", "kind"), CASES)
def test_rows_end_at_stop_tokens_of_their_own(attention, kind):
    rows = _rows(attention, kind, MANY[:7])
    eos = [rows.new_token(0, 0), rows.new_token(1, 5), rows.new_token(2, 17)]
    expected = rows.plain(eos_token_id=eos, pad_token_id=7)
    for quality in ("noisy", "perfect"):
        draft = rows.draft(quality)
        output = rows.speculate(draft, eos_token_id=eos, pad_token_id=7)
        assert output.sequences.tolist() == expected.tolist()
        assert_as_scripted(rows, draft, output, eos)
    assert len({len(new) for new in new_tokens_of(expected, eos, max(rows.lengths))}) >= 3


@pytest.mark.core
@pytest.mark.parametrize(("attention", "kind"), [(FLEX, "gemma3_text"), (FLASH, "gemma3_text"), (FLASH, "qwen3")])
def test_rows_in_step_equal_plain(attention, kind):
    rows = _rows(attention, kind)
    kwargs = {"eos_token_id": rows.new_token(1, 7), "output_logits": True}
    expected = rows.plain(return_dict_in_generate=True, **kwargs)
    output = rows.speculate(rows.draft("noisy"), **kwargs)
    assert output.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_each_row_is_a_sequence_of_its_own_to_flash_attention(flash):
    """No row's queries see padding, nor keys behind them."""
    rows = _rows(FLASH)
    flash.calls.clear()
    draft = rows.draft([0.0, 0.5, 1.0])
    rows.speculate(draft, eos_token_id=rows.new_token(0, 9))
    block = draft.config.block_size
    rounds = flash.calls[:: rows.target.config.num_hidden_layers]  # the first read the prompts
    assert rounds[1] == [(block + 1, n + block + 1) for n in LENGTHS]
    assert {len(sequences) for sequences in rounds} == {1, 2, 3}


@pytest.mark.core
@pytest.mark.parametrize("attention", [FLEX, FLASH])
def test_queue_of_requests_equals_plain_down_to_the_last_row(attention):
    """Whole blocks are drafted there: the last row's positions repeat at its end, as those of packed sequences do."""
    rows = _rows(attention)
    prompts, counts = rows.unpadded(rows.prompts["input_ids"]), [7, 30, 5]
    requests = [GenerationRequest(*request) for request in zip(prompts, counts, strict=True)]
    results = generate_many(rows.target, rows.draft("near-perfect"), requests, max_rows=2)
    said = [tuple(row[max(LENGTHS) :][:count]) for row, count in zip(rows.said.tolist(), counts, strict=True)]
    assert [result.token_ids for result in results] == said


@pytest.mark.core
@pytest.mark.parametrize("attention", [FLEX, FLASH])
def test_second_turn_on_the_cache_equals_plain(attention):
    rows = _rows(attention)
    draft = rows.draft("noisy")
    first = rows.speculate(draft)
    question = torch.tensor([[5, 6], [7, 8], [9, 10]])
    ids = torch.cat([first.sequences, question], dim=1)
    mask = torch.nn.functional.pad(rows.prompts["attention_mask"], (0, ids.shape[1] - max(LENGTHS)), value=1)
    longer = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 20}
    expected = rows.plain(**longer)
    again = rows.speculate(draft, **longer, **{CACHE: getattr(first, CACHE)})
    assert again.sequences.tolist() == expected.tolist()


# The draft's own attention


@pytest.mark.core
@pytest.mark.parametrize("lengths", [LENGTHS, (9,)], ids=["rows", "one row"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backbone", ["qwen3", "gemma4"])
@pytest.mark.parametrize("attention", ["eager", FLASH])
def test_draft_of_any_attention_drafts_the_same_blocks(attention, backbone, causal, lengths):
    rows, outputs = make_rows(lengths=lengths), []
    for implementation in ("sdpa", attention):
        draft = make_tiny_draft(rows.target, seed=2, backbone_type=backbone, causal=causal)
        draft.config._attn_implementation = implementation
        outputs.append(rows.speculate(draft))
    for ours, theirs in zip(outputs[1].rounds, outputs[0].rounds, strict=True):
        assert ours.drafted == theirs.drafted
        torch.testing.assert_close(ours.confidence_logits, theirs.confidence_logits, atol=1e-4, rtol=1e-4)
    assert outputs[1].sequences.tolist() == rows.said[:, :-AHEAD].tolist()


# Attention of the user's own


def _own_attention(*args, **kwargs):
    return sdpa_attention_forward(*args, **kwargs)


@pytest.mark.core
def test_attention_of_the_users_own_takes_batches_with_its_mask_function_and_is_refused_without():
    AttentionInterface.register("own", _own_attention)
    rows = _rows("own")
    draft = rows.draft("noisy")
    with pytest.raises(ValueError, match='attn_implementation="own"`, for which no mask function is registered'):
        rows.speculate(draft)
    AttentionMaskInterface.register("own", sdpa_mask)
    rows = rows_of_target(rows.target)
    assert rows.speculate(draft).sequences.tolist() == rows.said[:, :-AHEAD].tolist()


@pytest.mark.parametrize("attention", [FLEX, FLASH])
def test_compiled_rounds_are_refused_by_name(attention):
    rows = _rows(attention)
    with pytest.raises(ValueError, match=f'Compiled rounds are not supported with `attn_implementation="{attention}"'):
        make_tiny_draft(rows.target).compile_round(rows.target)
