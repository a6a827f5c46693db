"""Slot caches hold each row as a list would; masks show what they say; rows come in while others go on."""

import copy
import itertools
import random

import pytest
import torch
from tiny import WINDOW, NextToken, make_tiny_draft, make_tiny_target, plain, random_prompt, speculate
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from hf_dspark import ConfidenceThreshold, FixedLength
from hf_dspark.attention import draft_masks
from hf_dspark.batch import RowBatch
from hf_dspark.compat import CACHE
from hf_dspark.features import FeatureTap
from hf_dspark.generate import Stopwatch
from hf_dspark.rows import Row
from hf_dspark.slots import (
    PADDING,
    SlotCache,
    _as_wide_numbers,
    draft_slot_masks,
    move_into_slots,
    move_out_of_slots,
    slot_masks,
    why_not_in_slots,
    windows_of,
)
from hf_dspark.terms import Terms

NUM_ROWS, HEADS, SIZE = 4, 2, 3


def _states(num_rows, num_tokens):
    return torch.randn(num_rows, HEADS, num_tokens, SIZE)


def test_rows_hold_what_was_written_last_through_swaps_and_growth():
    """Against a table of what each slot holds; writes lie anywhere below `stop`, and some nowhere."""
    rng = random.Random(1)
    torch.manual_seed(1)
    cache, held = SlotCache([None, None], NUM_ROWS, 5), [{} for _ in range(NUM_ROWS)]
    stop = 0
    for step in range(80):
        if step % 7 == 3:
            row, other = rng.randrange(NUM_ROWS), rng.randrange(NUM_ROWS)
            cache.swap_rows(row, other)
            held[row], held[other] = held[other], held[row]
        first = rng.randrange(NUM_ROWS)
        num_rows, num_tokens = rng.randrange(1, NUM_ROWS - first + 1), rng.randrange(1, 4)
        stop = max(stop, num_tokens) + rng.choice([0, 0, 1, 7, 60])
        slots = torch.stack([torch.tensor(rng.sample(range(stop), num_tokens)) for _ in range(num_rows)])
        slots[torch.rand(slots.shape) < 0.2] = PADDING
        keys, values = _states(num_rows, num_tokens), _states(num_rows, num_tokens)
        cache.place(slots, stop, first_row=first)
        seen = [cache.update(keys * (layer + 1), values, layer) for layer in range(2)]
        for i, t in ((i, t) for i in range(num_rows) for t in range(num_tokens) if slots[i, t] < stop):
            held[first + i][int(slots[i, t])] = keys[i, :, t], values[i, :, t]
        for layer, (got_keys, got_values) in enumerate(seen):
            assert got_keys.shape == got_values.shape == (num_rows, HEADS, cache.stop, SIZE)
            for i in range(num_rows):
                for slot, (key, value) in held[first + i].items():
                    assert torch.equal(got_keys[i, :, slot], key * (layer + 1))
                    assert torch.equal(got_values[i, :, slot], value)
    assert stop > 256  # it grew more than once
    assert all(len(row) > 5 for row in held)


def test_tokens_without_a_slot_are_written_to_the_last_one_which_growth_leaves_behind():
    cache = SlotCache([None], 2, 4)
    cache.place(torch.tensor([[0, PADDING], [5, 1]]), 3)
    keys, _ = cache.update(torch.ones(2, 1, 2, 1), torch.ones(2, 1, 2, 1), 0)
    assert keys[..., 0].squeeze(1).tolist() == [[1, 0, 0, 1], [0, 1, 0, 1]]
    cache.place(torch.tensor([[1], [2]]), 300)
    keys, _ = cache.update(torch.full((2, 1, 1, 1), 2.0), torch.ones(2, 1, 1, 1), 0)
    assert keys[..., 0].squeeze(1)[:, :3].tolist() == [[1, 2, 0], [0, 1, 2]]
    assert not keys[:, :, 3:].any()


def test_padded_rows_end_in_the_last_column_for_one_forward():
    cache, written = SlotCache([None], 3, 4), torch.arange(1.0, 5).expand(3, 1, 4).unsqueeze(-1)
    cache.place(torch.arange(4).expand(3, 4), 4, first_row=0)
    cache.update(written, -written, 0)
    new = torch.full((2, 1, 2, 1), 9.0)
    cache.place(torch.tensor([[3, 4], [1, 2]]), 5, first_row=1)
    mask = cache.pad_rows(torch.tensor([5, 3]))
    assert (cache.get_seq_length(), cache.get_mask_sizes(2, 0)) == (4, (6, 0))
    keys, values = (states[..., 0].squeeze(1) for states in cache.update(new, -new, 0))
    assert mask.tolist() == [[0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert (keys * mask).tolist() == [[0, 1, 2, 3, 9, 9], [0, 0, 0, 1, 9, 9]]
    assert torch.equal(values, -keys)
    cache.place(torch.tensor([[4]]), 5)
    assert (cache.get_seq_length(), cache.get_mask_sizes(1, 0)) == (4, (5, 0))
    assert cache.update(new[:1, :, :1], new[:1, :, :1], 0)[0].flatten().tolist() == [1, 2, 3, 4, 9]


@pytest.mark.parametrize("windows", [[None] * 2, [3, 3], [3, None, 3]], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_masks_show_each_token_itself_and_its_window(windows, dtype):
    slots, stop = torch.tensor([[0, 1, 2], [4, 5, 6], [2, 3, 4]]), 8
    masks = slot_masks(slots, stop, windows, dtype=dtype)
    assert isinstance(masks, dict) == (len(set(windows)) > 1)
    for window in set(windows):
        name = "full_attention" if window is None else "sliding_attention"
        mask = masks[name] if isinstance(masks, dict) else masks
        assert mask.shape == (3, 1, 3, stop)
        if dtype is not None:
            assert mask.dtype == dtype
            assert set(mask.unique().tolist()) == {0.0, torch.finfo(dtype).min}
            mask = mask == 0
        for row, query in itertools.product(range(3), range(3)):
            slot = int(slots[row, query])
            expected = [key <= slot and (window is None or slot - key < window) for key in range(stop)]
            assert mask[row, 0, query].tolist() == expected


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "layer_types", [["full_attention"], ["sliding_attention"], ["sliding_attention", "full_attention"]]
)
def test_draft_masks_show_what_they_show_a_row_by_itself(causal, layer_types):
    """`attention.draft_masks` from the slot on where a row's context begins."""
    num_inputs, stop, window = 4, 19, 3
    anchors, firsts = [2, 7, 15, 0], [0, 0, 5, 0]
    settings = {"causal": causal, "window": window}
    masks = draft_slot_masks(torch.tensor(anchors), torch.tensor(firsts), num_inputs, stop, layer_types, **settings)
    assert set(masks) == set(layer_types)
    for row, (anchor, first) in enumerate(zip(anchors, firsts, strict=True)):
        num_keys = anchor - first + num_inputs
        alone = draft_masks(layer_types, num_inputs, num_keys, device=torch.device("cpu"), **settings)
        for layer_type, mask in masks.items():
            assert mask.shape == (4, 1, num_inputs, stop)
            expected = torch.zeros(num_inputs, stop, dtype=torch.bool)
            own = alone[layer_type]
            expected[:, first : first + num_keys] = True if own is None else own[0, 0]
            assert mask[row, 0].tolist() == expected.tolist()


def _filled(config, num_rows, num_tokens, layers=3):
    cache = DynamicCache(config=config) if config is not None else DynamicCache()
    for layer in range(layers if config is None else config.num_hidden_layers):
        cache.update(_states(num_rows, num_tokens), _states(num_rows, num_tokens), layer)
    return cache


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "mistral"])
@pytest.mark.parametrize("num_tokens", [5, WINDOW - 1, WINDOW, 3 * WINDOW])
def test_columns_moved_into_slots_and_out_again_are_the_same(kind, num_tokens):
    """With padding in front and a gap; into rows behind others, and from rows in another order."""
    torch.manual_seed(2)
    config = make_tiny_target(kind).config
    cache = _filled(config, 2, num_tokens)
    expected = copy.deepcopy(cache)
    is_token = torch.ones(2, num_tokens, dtype=torch.bool)
    is_token[0, :2], is_token[1, 1] = False, False
    slots = torch.where(is_token, is_token.long().cumsum(-1) - 1, PADDING)
    windows = windows_of(cache, config)
    into = SlotCache(windows, 4, 2)
    move_into_slots(_filled(config, 2, 4), torch.arange(4).expand(2, 4), into, 4)
    move_into_slots(cache, slots, into, num_tokens, first_row=2)
    assert cache.get_seq_length() == 0  # no token is held twice
    into.swap_rows(0, 3)
    back = DynamicCache(config=config)
    move_out_of_slots(into, slots, back, torch.tensor([2, 0]))
    assert back.get_seq_length() == num_tokens
    assert not any(layer.is_initialized for layer in into.layers)
    for ours, theirs in zip(back.layers, expected.layers, strict=True):
        for name in ("keys", "values"):
            wanted = getattr(theirs, name) * is_token[:, None, -getattr(theirs, name).shape[2] :, None]
            assert torch.equal(getattr(ours, name), wanted)
    # What is moved out is a cache like any other.
    for column in back.update(_states(2, 1), _states(2, 1), 0), expected.update(_states(2, 1), _states(2, 1), 0):
        assert column[0].shape[2] == min(num_tokens + 1, windows[0] or num_tokens + 1)


def test_windows_are_the_layers_or_the_models_where_a_bare_cache_knows_none():
    config = make_tiny_target("gemma3_text").config
    expected = [WINDOW, None, WINDOW, None]
    assert windows_of(_filled(config, 1, 2), config) == expected
    assert windows_of(_filled(None, 1, 2, layers=4), config) == expected
    assert windows_of(_filled(None, 1, 2, layers=2), make_tiny_target().config) == [None, None]


def test_layers_that_keep_more_than_keys_and_values_are_named():
    cache = DynamicCache(config=make_tiny_target("lfm2").config)
    assert "Linear" in why_not_in_slots(cache)
    assert why_not_in_slots(_filled(None, 1, 2)) is None


# Rows that come in while others go on


class _Refill:
    """Prompts that go through a RowBatch of few places, one after another, each as soon as one is free."""

    def __init__(self, target, draft, schedule=None, *, num_rows=2):
        draft.bind_target(target)
        self.target, self.tap = target, FeatureTap(target, draft.config.target_layer_ids)
        self.num_rows, self.watch = num_rows, Stopwatch(target.device)
        schedule = schedule or FixedLength()
        self.batch = RowBatch(draft, target, self.tap, schedule, num_rows=num_rows, num_slots=4)
        self.rows: list[Row] = []
        self.said: dict[int, list[int]] = {}
        self.num_live: list[int] = []  # of each round

    @torch.no_grad()
    def run(self, prompts, counts, eos):
        """Leaves in `said` each prompt [1, n] with up to so many new tokens."""
        waiting = list(zip(prompts, counts, strict=True))
        with self.tap:
            while waiting or self.batch.rows:
                while waiting and len(self.batch.rows) < self.num_rows:
                    self._admit(*waiting.pop(0), eos)
                rows = list(self.batch.rows)
                if rows:
                    self.num_live.append(len(rows))
                    self._drop(rows, self.batch.round(self.watch)[0])

    def _admit(self, prompt, count, eos):
        length = prompt.shape[1]
        criteria = StoppingCriteriaList([MaxLengthCriteria(length + count), EosTokenCriteria(eos)])
        config = GenerationConfig(do_sample=False, max_length=length + count)
        terms = Terms.of(LogitsProcessorList(), criteria, config, prompt.device, None)
        cache = DynamicCache(config=self.target.config)
        outputs = self.target(prompt, use_cache=True, **{CACHE: cache}, **self.tap.forward_kwargs)
        row, slots = Row(len(self.rows), terms, length + count, length, length), torch.arange(length).unsqueeze(0)
        self.rows.append(row)
        self.batch.admit([row], prompt, cache, slots, slots[:, -1], self.tap.take(outputs))
        emission = self.batch.emit([row], outputs.logits[:, -1:], prompt[:, :0], None, None)
        self.batch.columns.append([row], emission)
        self._drop([row], emission)

    def _drop(self, rows, emission):
        ended = [row for row, ends in zip(rows, emission.finished, strict=True) if ends]
        for row in ended:
            self.said[row.index] = self.batch.columns.ids[row.place, : row.length].tolist()
        self.batch.drop(ended)


@pytest.mark.core
@pytest.mark.parametrize("schedule", [None, ConfidenceThreshold(0.2)], ids=["whole blocks", "ragged"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "deepseek_v3"])
def test_rows_that_come_in_behind_others_say_and_draft_what_they_would_alone(kind, schedule):
    """Nine prompts in three places; some end with their first token, one is longer than all that were there."""
    target = make_tiny_target(kind, seed=1)
    lengths, counts = (5, 9, 2, 14, 1, 30, 3, 7, 4), (12, 1, 30, 9, 22, 6, 17, 2, 11)
    prompts = [random_prompt(64, n, seed=40 + i) for i, n in enumerate(lengths)]
    eos = [int(plain(target, prompts[6], max_new_tokens=5)[0, -1])]
    draft = make_tiny_draft(target, seed=2, draft_class=NextToken, num_hidden_layers=2)
    said = [plain(target, p, max_new_tokens=45)[0].tolist() for p in prompts]
    draft.follow_rows(said, 0.0)
    refill = _Refill(target, draft, schedule, num_rows=3)
    widths = []
    hook = draft.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    refill.run(prompts, counts, eos)
    hook.remove()
    for index, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        kwargs = {"max_new_tokens": count, "eos_token_id": eos, "pad_token_id": 0}
        assert refill.said[index] == plain(target, prompt, **kwargs)[0].tolist()
        alone = speculate(
            target, draft, prompt, schedule=schedule or FixedLength(), return_dict_in_generate=True, **kwargs
        )
        assert [r.emitted for r in refill.rows[index].records] == [r.emitted for r in alone.rounds]
        for ours, theirs in zip(refill.rows[index].records, alone.rounds, strict=True):
            assert ours.drafted[: len(theirs.drafted)] == theirs.drafted
    assert {5, 14, 30} <= set(widths)
    assert 9 not in widths  # that prompt's only token was the target's: the draft need not read it
    assert max(refill.num_live) == 3
    assert sum(refill.num_live) == sum(len(row.records) for row in refill.rows)


def _bits(states: torch.Tensor) -> torch.Tensor:
    return states.contiguous().view(torch.int16)


def test_states_are_copied_bit_for_bit_as_wide_numbers():
    states = torch.randint(-(2**15), 2**15, (2, 3, 5, 24), dtype=torch.int16).view(torch.bfloat16)  # NaNs, too
    into = torch.zeros(4, 3, 9, 24, dtype=torch.bfloat16)
    wide, wide_into = _as_wide_numbers(states.transpose(0, 1).contiguous().transpose(0, 1), into[1:3, :, 2:7])
    assert (wide.dtype, wide.shape) == (torch.complex128, (2, 3, 5, 3))
    wide_into.copy_(wide)
    assert torch.equal(_bits(into[1:3, :, 2:7]), _bits(states))
    assert not _bits(into[:, :, :2]).any()
    assert not _bits(into[0]).any()


@pytest.mark.parametrize(
    "states",
    [
        torch.zeros(1, 1, 4, 12, dtype=torch.bfloat16),  # rows of 24 bytes
        torch.zeros(1, 1, 4, 17, dtype=torch.bfloat16)[..., 1:],
        torch.zeros(1, 1, 4, 32, dtype=torch.bfloat16)[..., ::2],
        torch.zeros(1, 1, 4, 16),  # of another type
    ],
)
def test_what_does_not_lie_so_is_copied_as_it_is(states):
    into = torch.zeros(states.shape, dtype=torch.bfloat16)
    assert all(x is y for x, y in zip(_as_wide_numbers(states, into), (states, into), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [8, 700])
def test_side_by_side_states_are_copied_on_cuda(num_tokens):
    cache = SlotCache([None], 3, 1024)
    keys, values = torch.randn(2, 2, 4, num_tokens, 64, device="cuda", dtype=torch.bfloat16)
    cache.place(torch.arange(num_tokens, device="cuda").expand(2, -1) + 5, num_tokens + 5, first_row=1, start=5)
    seen = cache.layers[0].update(keys, values)
    assert all(torch.equal(own[:, :, 5:], states) for own, states in zip(seen, (keys, values), strict=True))
    assert not cache.layers[0].keys[0].any()
    assert not cache.layers[0].keys[:, :, :5].any()
