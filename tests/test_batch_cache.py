"""What a call over several rows leaves behind: the cache plain generate() leaves, a context, an untouched target."""

import pytest
import torch
from interrupts import Interrupt, RaisingCriterion, RaisingStreamer
from tiny import NextToken, ScriptedRows, make_tiny_draft, random_prompt
from tiny_batch import AHEAD, LENGTHS, MANY, NEW_TOKENS, make_rows, new_tokens_of
from transformers import DynamicCache

from hf_dspark import ConfidenceThreshold, FixedLength
from hf_dspark.compat import CACHE
from hf_dspark.slots import SlotCache


def _stop_tokens(rows) -> dict[str, list[int]]:
    return {"eos_token_id": [rows.new_token(0, 0), rows.new_token(1, 5), rows.new_token(2, 17)]}


def _mask_of(rows, sequences, eos) -> torch.Tensor:
    """Which columns hold tokens of a row: neither padding in front nor any behind its end."""
    start = max(rows.lengths)
    mask = torch.zeros_like(sequences)
    mask[:, :start] = rows.prompts["attention_mask"]
    for row, new in enumerate(new_tokens_of(sequences, eos, start)):
        mask[row, start : start + len(new)] = 1
    return mask


def _assert_same(got, wanted, mask):
    """Both caches hold the same where `mask` [B, C] has a token."""
    for ours, theirs in zip(got.layers, wanted.layers, strict=True):
        assert ours.get_seq_length() == theirs.get_seq_length()
        for name in ("keys", "values"):
            one, other = getattr(ours, name), getattr(theirs, name)
            assert one.shape == other.shape
            is_token = mask[:, None, -one.shape[2] :, None].bool()
            torch.testing.assert_close(one, other * is_token, atol=2e-5, rtol=2e-5)  # ours holds zeros elsewhere


@pytest.mark.core
@pytest.mark.parametrize("eos", [False, True], ids=["to the limit", "stop tokens"])
@pytest.mark.parametrize("quality", ["noisy", "perfect"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "mistral", "gpt_oss", "deepseek_v3", "gemma4_text"])
def test_returned_cache_holds_what_plain_generates_holds(kind, quality, eos):
    rows = make_rows(kind, MANY[:7])
    kwargs = _stop_tokens(rows) if eos else {}
    expected = rows.plain(return_dict_in_generate=True, **kwargs)
    output = rows.speculate(rows.draft(quality), **kwargs)
    mask = _mask_of(rows, expected.sequences, kwargs.get("eos_token_id", []))[:, :-1]
    _assert_same(getattr(output, CACHE), getattr(expected, CACHE), mask)


@pytest.mark.core
@pytest.mark.parametrize("count", [1, 2, 5])
def test_cache_is_right_wherever_the_call_ends(count):
    rows = make_rows("gemma3_text")
    for kwargs in ({"max_new_tokens": count}, {"eos_token_id": [rows.new_token(row, count - 1) for row in range(3)]}):
        expected = rows.plain(return_dict_in_generate=True, **kwargs)
        output = rows.speculate(rows.draft("perfect"), **kwargs)
        assert output.sequences.tolist() == expected.sequences.tolist()
        mask = _mask_of(rows, expected.sequences, kwargs.get("eos_token_id", []))[:, :-1]
        _assert_same(getattr(output, CACHE), getattr(expected, CACHE), mask)


@pytest.mark.core
@pytest.mark.parametrize(("kind", "eos"), [("qwen3", False), ("qwen3", True), ("gemma3_text", False)])
def test_cache_passed_in_is_filled_also_where_only_tokens_are_returned(kind, eos):
    rows = make_rows(kind, MANY[:5])
    kwargs = _stop_tokens(rows) if eos else {}
    ours, theirs = (DynamicCache(config=rows.target.config) for _ in range(2))
    draft = rows.draft("noisy")
    sequences = rows.plain(assistant_model=draft, **kwargs, **{CACHE: ours})
    assert sequences.tolist() == rows.plain(**kwargs, **{CACHE: theirs}).tolist()
    _assert_same(ours, theirs, _mask_of(rows, sequences, kwargs.get("eos_token_id", []))[:, :-1])
    longer = _second_turn(rows, sequences, kwargs.get("eos_token_id", []))
    expected = rows.plain(**longer)
    assert rows.plain(assistant_model=draft, **longer, **{CACHE: ours}).tolist() == expected.tolist()


def test_call_that_neither_passes_nor_returns_a_cache_reads_no_token_for_one():
    rows, forwards = make_rows(), []
    draft = rows.draft("noisy")
    handle = rows.target.get_decoder().register_forward_pre_hook(lambda *args: forwards.append(1))
    counts = []
    for asked in ("nothing", CACHE, "return_dict_in_generate"):
        for eos in (None, rows.new_token(1, 5)):
            forwards.clear()
            kwargs = {"nothing": {}, CACHE: {CACHE: DynamicCache()}}.get(asked, {asked: True})
            rows.plain(assistant_model=draft, eos_token_id=eos, **kwargs)
            counts.append(len(forwards))
    handle.remove()
    # The last token of a row that ended sooner is among the columns; where all ended together, it is in none.
    assert counts[2:] == [counts[0], counts[1] + 1] * 2


def test_no_cache_is_returned_where_none_was_wanted():
    rows = make_rows()
    assert getattr(rows.speculate(rows.draft(), use_cache=False), CACHE) is None


def _second_turn(rows, sequences, eos, **kwargs):
    """Arguments that append a question to each row."""
    question = torch.cat([random_prompt(64, 4, seed=60 + row) for row in range(len(rows.lengths))])
    mask = _mask_of(rows, sequences, eos)
    ids = torch.cat([sequences, question], dim=1)
    return {"input_ids": ids, "attention_mask": torch.cat([mask, torch.ones_like(question)], dim=1), **kwargs}


@pytest.mark.core
@pytest.mark.parametrize("turns", ["speculative speculative", "speculative plain", "plain speculative"])
@pytest.mark.parametrize(
    ("kind", "eos"),
    [("qwen3", False), ("qwen3", True), ("deepseek_v3", True), ("gemma3_text", False), ("mistral", False)],
)
def test_second_turn_on_the_cache_equals_plain_generation_of_both(kind, eos, turns):
    """Also of rows that ended early, whose padding lies between the turns."""
    rows = make_rows(kind, MANY[:5])
    kwargs = {"return_dict_in_generate": True} | (_stop_tokens(rows) if eos else {})
    draft = rows.draft("noisy")
    assistants = [{"assistant_model": draft} if turn == "speculative" else {} for turn in turns.split()]
    first = rows.plain(**kwargs, **assistants[0])
    longer = _second_turn(rows, first.sequences, kwargs.get("eos_token_id", []), max_new_tokens=NEW_TOKENS)
    expected = rows.plain(**longer)
    draft.follow_rows([row[row.index(next(filter(None, row))) :] for row in expected.tolist()], 0.2)
    again = rows.plain(**longer, return_dict_in_generate=True, **{CACHE: getattr(first, CACHE)}, **assistants[1])
    assert again.sequences.tolist() == expected.tolist()
    assert getattr(again, CACHE).get_seq_length() == expected.shape[1] - 1


@pytest.mark.core
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_draft_goes_on_with_what_it_read_in_the_first_turn(kind):
    """It drafts what it would after reading everything at once, where rows stayed together."""
    rows = make_rows(kind, (5, 9, 7))
    draft = make_tiny_draft(rows.target, seed=2, num_hidden_layers=2)
    first = rows.speculate(draft, output_logits=True)
    longer = _second_turn(rows, first.sequences, [])
    continued = rows.speculate(draft, **longer, **{CACHE: getattr(first, CACHE)})
    at_once = rows.speculate(draft, **longer)
    assert continued.sequences.tolist() == at_once.sequences.tolist()
    _assert_same_blocks(continued.rounds, at_once.rounds)


@pytest.mark.core
@pytest.mark.parametrize(("kind", "eos"), [("qwen3", False), ("qwen3", True), ("gemma3_text", False)])
@pytest.mark.parametrize("quality", [[0.0, 0.5, 1.0, 0.5], None], ids=["own pace", "garbage"])
def test_draft_goes_on_with_what_it_read_of_rows_that_ended_at_different_rounds(kind, eos, quality):
    """Whatever was pending of a row when it went out, the token that ended it, and rows that changed places."""
    rows = make_rows(kind, (5, 9, 7, 3))
    draft = rows.draft("garbage" if quality is None else quality, num_hidden_layers=2)
    stops = [rows.new_token(0, 9), rows.new_token(2, 0), rows.new_token(3, 4)] if eos else []
    first = rows.speculate(draft, eos_token_id=stops or None)
    num_rounds = {sum(r.row == row for r in first.rounds) for row in range(4)}
    assert len(num_rounds) > (2 if eos or quality else 0)
    longer = _second_turn(rows, first.sequences, stops)
    draft.scripts = ()
    continued = rows.speculate(draft, **longer, **{CACHE: getattr(first, CACHE)})
    at_once = rows.speculate(draft, **longer)
    assert continued.sequences.tolist() == at_once.sequences.tolist()
    _assert_same_blocks(continued.rounds, at_once.rounds)
    third = _second_turn(rows, continued.sequences, [])
    third["attention_mask"][:, : longer["attention_mask"].shape[1]] = longer["attention_mask"]
    again = rows.speculate(draft, **third, **{CACHE: getattr(continued, CACHE)})
    _assert_same_blocks(again.rounds, rows.speculate(draft, **third).rounds)


@pytest.mark.core
def test_context_that_began_behind_the_cache_is_handed_back_as_it_is():
    """A later turn drafts as if it had gone on without a break, and sees nothing of what was never read."""
    rows = make_rows("qwen3", (9, 5, 7))
    draft = rows.draft("noisy", num_hidden_layers=2)
    start, mask = 6, rows.prompts["attention_mask"]

    def cache_behind():
        cache, ids = DynamicCache(), rows.prompts["input_ids"][:, :start]
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, :start]
        with torch.no_grad():
            rows.target(ids, attention_mask=mask[:, :start], position_ids=positions, use_cache=True, **{CACHE: cache})
        return cache

    first = rows.speculate(draft, **{CACHE: cache_behind()})
    longer = _second_turn(rows, first.sequences, [])
    draft.scripts = ()
    continued = rows.speculate(draft, **longer, **{CACHE: getattr(first, CACHE)})
    at_once = rows.speculate(draft, **longer, **{CACHE: cache_behind()})
    assert continued.sequences.tolist() == at_once.sequences.tolist()
    _assert_same_blocks(continued.rounds, at_once.rounds)


def _assert_same_blocks(got, wanted):
    """The same tokens, for the same reasons."""
    assert [r.drafted for r in got] == [r.drafted for r in wanted]
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.confidence_logits, other.confidence_logits, atol=1e-4, rtol=1e-4)


def test_compiled_rounds_go_on_with_what_the_draft_read_and_had_yet_to_read_before():
    rows = make_rows("qwen3", (7,))
    draft = make_tiny_draft(rows.target, seed=2, num_hidden_layers=2)
    first = rows.speculate(draft)
    longer = _second_turn(rows, first.sequences, [])
    draft.compile_round(rows.target, backend="eager")
    continued = rows.speculate(draft, **longer, **{CACHE: getattr(first, CACHE)})
    at_once = rows.speculate(draft, **longer)
    assert continued.sequences.tolist() == at_once.sequences.tolist()
    _assert_same_blocks(continued.rounds, at_once.rounds)


@pytest.mark.core
@pytest.mark.parametrize("bare", [False, True], ids=["of the model", "bare"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_prompt_may_lie_in_the_cache_already(kind, bare):
    rows = make_rows(kind, (9, 7, 5))
    cache = DynamicCache() if bare else DynamicCache(config=rows.target.config)
    start, mask = 6, rows.prompts["attention_mask"]
    with torch.no_grad():
        ids, positions = rows.prompts["input_ids"][:, :start], (mask.cumsum(-1) - 1).clamp_min(0)[:, :start]
        rows.target(ids, attention_mask=mask[:, :start], position_ids=positions, use_cache=True, **{CACHE: cache})
    draft = rows.draft("near-perfect")
    output = rows.speculate(draft, **{CACHE: cache})
    assert output.sequences.tolist() == rows.said[:, :-AHEAD].tolist()
    assert draft.last_stats.tau > 2
    assert getattr(output, CACHE) is cache
    assert cache.get_seq_length() == output.sequences.shape[1] - 1


@pytest.mark.core
def test_draft_sees_nothing_of_a_prompt_that_it_has_not_read():
    """Each row's context begins where its cache ended, also after others went out; and it drafts as if alone."""
    rows = make_rows("qwen3", (9, 5, 7, 8))
    target, mask, start = rows.target, rows.prompts["attention_mask"], 6
    draft = make_tiny_draft(target, seed=2, num_hidden_layers=2, draft_class=NextToken)
    draft.follow_rows(rows.unpadded(rows.said), 0.0)

    def speculate_behind(**prompts):
        cache, first = DynamicCache(), {name: tensor[:, :start] for name, tensor in prompts.items()}
        positions = (first["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            target(**first, position_ids=positions, use_cache=True, **{CACHE: cache})
        stops = [rows.new_token(0, 6), rows.new_token(2, 14)]
        return rows.speculate(draft, **prompts, **{CACHE: cache}, eos_token_id=stops).rounds

    together = speculate_behind(**rows.prompts)
    for row in range(4):
        own = {name: tensor[row : row + 1] for name, tensor in rows.prompts.items()}
        alone = speculate_behind(**own)
        ours = [r for r in together if r.row == row]
        assert [r.emitted for r in ours] == [r.emitted for r in alone]
        assert all(one.drafted[: len(r.drafted)] == r.drafted for one, r in zip(ours, alone, strict=True))
    assert (mask[:, :start].sum(-1) > 0).all()
    assert len({sum(r.row == row for r in together) for row in range(4)}) > 1


@pytest.mark.core
def test_no_slot_is_written_twice_in_one_forward(monkeypatch):
    """Which of two would stay is left open."""
    written, place = [], SlotCache.place

    def checked(self, slots, stop, **kwargs):
        place(self, slots, stop, **kwargs)
        places = zip(self.rows.flatten().tolist(), self.slots.flatten().tolist(), strict=True)
        own = [(row, slot) for row, slot in places if slot < self.num_slots - 1]  # the last is for what nobody reads
        assert len(set(own)) == len(own)
        written.append(len(own))

    monkeypatch.setattr(SlotCache, "place", checked)
    rows = make_rows("gemma3_text", MANY[:6])
    for schedule in (FixedLength(), ConfidenceThreshold(0.2)):
        rows.speculate(rows.draft("noisy"), schedule=schedule, eos_token_id=rows.new_token(1, 4))
    assert sum(written) > 500


class _RaisingRows(ScriptedRows):
    """Raises in its third block, between its layers' cache updates and its logits."""

    calls_left = 3

    def compute_logits(self, hidden_states):
        self.calls_left -= 1
        if self.calls_left == 0:
            raise Interrupt
        return super().compute_logits(hidden_states)


def _raise_in_streamer(target):
    return {"streamer": RaisingStreamer(10)}


def _raise_in_criterion(target):
    return {"stopping_criteria": [RaisingCriterion(max(LENGTHS) + 12)]}


def _raise_in_draft(target):
    return {}


def _raise_in_target(target):
    """In the fourth forward, when half of its layers have updated their caches."""
    calls = []

    def hook(module, args):
        calls.append(1)
        if len(calls) == 4:
            handle.remove()
            raise Interrupt

    handle = target.get_decoder().layers[2].register_forward_pre_hook(hook)
    return {}


def _state_of(target):
    hooks = [module for module in target.modules() if module._forward_hooks or module._forward_pre_hooks]
    return hooks, target.config._attn_implementation, "forward" in vars(target)


@pytest.mark.core
@pytest.mark.parametrize("place", [_raise_in_streamer, _raise_in_criterion, _raise_in_draft, _raise_in_target])
@pytest.mark.parametrize("taps", [(0, 2), (0, 3)], ids=["list form", "hooks"])
def test_exception_in_the_middle_leaves_nothing_changed(place, taps):
    rows = make_rows("gemma3_text")
    target, draft = rows.target, rows.draft("noisy", taps=taps)
    expected = rows.said[:, :-AHEAD].tolist()
    target(rows.said[:, :4], output_hidden_states=True)  # transformers' own hooks, which stay
    before, cache = _state_of(target), DynamicCache(config=target.config)
    if place is _raise_in_draft:
        draft.__class__ = _RaisingRows
    with pytest.raises(Interrupt):
        rows.speculate(draft, **place(target), **{CACHE: cache})
    assert _state_of(target) == before
    # The cache holds what all rows have, as a prefill of it would, and a call may go on from there.
    num_new = cache.get_seq_length() - max(LENGTHS)
    assert 0 < num_new < NEW_TOKENS
    ids = rows.said[:, : max(LENGTHS) + num_new + 1]
    mask = torch.cat([rows.prompts["attention_mask"], torch.ones(3, num_new + 1, dtype=torch.long)], dim=1)
    prefilled, positions = DynamicCache(config=target.config), (mask.cumsum(-1) - 1).clamp_min(0)
    read = {"attention_mask": mask[:, :-1], "position_ids": positions[:, :-1], CACHE: prefilled}
    with torch.no_grad():
        target(ids[:, :-1], **read, use_cache=True)
    _assert_same(cache, prefilled, mask[:, :-1])
    taken_up = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": NEW_TOKENS - num_new - 1, CACHE: cache}
    assert rows.speculate(draft, **taken_up).sequences.tolist() == expected
    assert rows.speculate(draft).sequences.tolist() == expected
    assert rows.plain().tolist() == expected
