"""What looks at the rows of a call side by side sees them as in plain generate(): in step, each prefix once."""

import pytest
import torch
from tiny import ScriptedRows
from tiny_batch import LENGTHS, MANY, NEW_TOKENS, make_rows
from tiny_files import byte_tokenizer
from transformers import LogitsProcessor, StoppingCriteria, TextStreamer, WatermarkingConfig

from hf_dspark import ConfidenceThreshold, CostTable, FixedLength, ThroughputSchedule


class _ByRow(ConfidenceThreshold):
    """Verifies one token of the first row, two of the second, and so on."""

    def __call__(self, confidence):
        num_rows, num_drafted = confidence.shape
        return 1 + torch.arange(num_rows) % num_drafted


SCHEDULES = {
    "whole blocks": FixedLength(),
    "ragged": _ByRow(0.5),
    "throughput": ThroughputSchedule(CostTable([1, 64], [10.0, 9.0], 64)),
}
EACH_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


class _OnTokens(StoppingCriteria):
    """Ends a row at any of some tokens; remembers what it was asked."""

    def __init__(self, tokens):
        self.tokens, self.seen = torch.tensor(tokens), []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append((input_ids.tolist(), None if scores is None else len(scores)))
        return torch.isin(input_ids[:, -1], self.tokens)


class _OnCall(StoppingCriteria):
    """Ends all rows in its `count`-th call."""

    def __init__(self, count):
        self.left = count

    def __call__(self, input_ids, scores, **kwargs):
        self.left -= 1
        return torch.full((len(input_ids),), self.left <= 0)


class _Always(StoppingCriteria):
    """Ends the first row at once, and says so ever after."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.arange(len(input_ids)) == 0


class _Moody(LogitsProcessor):
    """Its mood changes with every call; remembers what it was given."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.tolist())
        mood = torch.Generator().manual_seed(len(self.seen))
        return scores + 2 * torch.randn(scores.shape[-1], generator=mood)


def _some_eos(rows) -> list[int]:
    return [rows.new_token(0, 0), rows.new_token(1, 5), rows.new_token(2, 17)]


# Under these, rows go on for long.
LONG = ("guidance", "processor with a state", "processor of each row", "watermark", "time")
# Arguments of generate() for a batch, made anew for each call: some of them remember it.
REQUESTS = {
    "criterion": lambda rows: {"stopping_criteria": [_OnTokens(list(range(1, 60, 5)))]},
    "criterion of all rows": lambda rows: {"stopping_criteria": [_OnCall(14)]},
    "criterion and stop tokens": lambda rows: {
        "stopping_criteria": [_OnTokens([rows.new_token(3, 8), rows.new_token(1, 3)])],
        "eos_token_id": _some_eos(rows),
        "pad_token_id": 5,
    },
    "guidance": lambda rows: {"guidance_scale": 1.6},
    "guidance and stop tokens": lambda rows: {"guidance_scale": 1.6, "eos_token_id": [1, 20, 30, 40, 45, 50]},
    "processor with a state": lambda rows: {"logits_processor": [_Moody()]},
    "processor with a state, stop tokens and penalty": lambda rows: {
        "logits_processor": [_Moody()],
        "eos_token_id": list(range(1, 60, 4)),
        "repetition_penalty": 1.3,
    },
    "processor with a state and criterion": lambda rows: {
        "logits_processor": [_Moody()],
        "stopping_criteria": [_OnTokens(list(range(1, 60, 5)))],
    },
    "processor of each row": lambda rows: {
        "prefix_allowed_tokens_fn": lambda row, ids: list(range((int(ids[-1]) + row) % 7, 60))
    },
    "watermark": lambda rows: {"watermarking_config": WatermarkingConfig(greenlist_ratio=0.3, bias=2.0)},
    "no time": lambda rows: {"max_time": 1e-9},
    "time": lambda rows: {"max_time": 1e9},
}


def _knowing(rows, expected, rate=0.3) -> ScriptedRows:
    return rows.draft("noisy").follow_rows(rows.unpadded(expected), rate)


@pytest.mark.core
@EACH_SCHEDULE
@pytest.mark.parametrize("name", REQUESTS)
def test_output_equals_plain(name, schedule):
    rows = make_rows("gemma3_text", MANY[:7])
    request = REQUESTS[name]
    expected = rows.plain(**request(rows))
    draft = _knowing(rows, expected, 0.1)
    output = rows.speculate(draft, schedule=schedule, **request(rows))
    assert output.sequences.tolist() == expected.tolist()
    assert all(r.accepted <= r.verified for r in output.rounds)
    assert draft.last_stats.tau > 1.2 or name not in LONG or schedule.needs_confidence
    assert (expected.tolist() != rows.plain().tolist()) == (name != "time")


@pytest.mark.core
@EACH_SCHEDULE
@pytest.mark.parametrize("eos", [False, True], ids=["no stop token", "stop tokens"])
@pytest.mark.parametrize("scores", [False, True], ids=["ids", "scores"])
@pytest.mark.parametrize("moody", [False, True], ids=["criterion", "criterion and processor"])
def test_criteria_and_processors_see_each_prefix_once_in_order(moody, scores, eos, schedule):
    """Also those of rows that end while others go on; and no prefix that is not in the output."""
    rows = make_rows("qwen3", MANY[:5])
    seen, draft = [], None
    for speculates in (False, True):
        criterion, processor = _OnTokens([9, 18, 23, 63] if moody else [9, 16, 18, 23, 39, 63]), _Moody()
        kwargs = {"stopping_criteria": [criterion]}
        if moody:  # the first row ends at once, and is often wrong from then on
            kwargs = {"stopping_criteria": [criterion, _Always()], "logits_processor": [processor]}
        kwargs |= {"eos_token_id": _some_eos(rows)} if eos else {}
        kwargs |= {"output_scores": True, "return_dict_in_generate": True} if scores else {}
        expected = rows.plain(**kwargs, **({"assistant_model": draft, "schedule": schedule} if speculates else {}))
        draft = _knowing(rows, expected.sequences if scores else expected, [0.5 * moody, 0.05, 0.05, 0.3, 0.05])
        seen.append((criterion.seen, processor.seen))
    assert seen[0] == seen[1]
    assert len(seen[0][0]) >= 5


@pytest.mark.parametrize("eos", [{}, {"eos_token_id": 64}], ids=["no stop token", "stop token"])
@pytest.mark.parametrize("moody", [False, True], ids=["criterion", "criterion and processor"])
def test_a_row_that_has_ended_does_not_hold_the_others_up(moody, eos):
    rows = make_rows("qwen3", (4, 7, 5))

    def request():
        return eos | {"stopping_criteria": [_Always()]} | ({"logits_processor": [_Moody()]} if moody else {})

    expected = rows.plain(**request())
    draft = _knowing(rows, expected, 0.0)
    assert rows.speculate(draft, **request()).sequences.tolist() == expected.tolist()
    assert draft.last_stats.tau > 3


@pytest.mark.core
def test_stop_strings_end_each_row_where_it_says_them():
    tokenizer = byte_tokenizer()
    rows = make_rows("qwen3", LENGTHS, vocab_size=len(tokenizer) + 1)
    new = rows.said[:, max(LENGTHS) : -10].tolist()
    spoken = [[tokenizer.decode([token]) for token in row] for row in new]
    text = [next(t for t in row[2:] if t.isascii() and t.isprintable() and t.strip()) for row in spoken]
    kwargs = {"stop_strings": text, "tokenizer": tokenizer}
    for more in ({}, {"eos_token_id": rows.new_token(2, 4)}):
        expected = rows.plain(**kwargs, **more)
        assert expected.tolist() != rows.plain(**more).tolist()
        draft = _knowing(rows, rows.said)
        assert rows.speculate(draft, **kwargs, **more).sequences.tolist() == expected.tolist()
        assert draft.last_stats.tau > 1.3


@pytest.mark.core
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("eos", [False, True], ids=["no stop token", "stop tokens"])
def test_what_is_collected_equals_plain_in_value_and_layout(kind, eos):
    """Of rows that ended, too: plain generate() goes on to read their padding."""
    rows = make_rows(kind, MANY[:6])
    names = ("scores", "logits", "hidden_states")
    kwargs = {"return_dict_in_generate": True, "repetition_penalty": 1.2} | {f"output_{name}": True for name in names}
    kwargs |= {"eos_token_id": [*_some_eos(rows), 9, 23, 40]} if eos else {}
    expected = rows.plain(**kwargs)
    draft = _knowing(rows, expected.sequences, 0.15)
    kwargs.pop("return_dict_in_generate")
    output = rows.speculate(draft, **kwargs)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert draft.last_stats.tau > 1.1
    assert not eos or (expected.sequences[:, max(rows.lengths) :] == 0).any()
    for name in names:
        ours, theirs = getattr(output, name), getattr(expected, name)
        assert type(ours) is tuple
        assert len(ours) == len(theirs) == expected.sequences.shape[1] - max(rows.lengths)
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


class _Columns:
    """A streamer that takes batches."""

    def __init__(self):
        self.puts, self.ends = [], 0

    def put(self, value):
        assert self.ends == 0
        assert value.device.type == "cpu"
        self.puts.append(value.tolist())

    def end(self):
        self.ends += 1


@pytest.mark.core
@EACH_SCHEDULE
@pytest.mark.parametrize("eos", [False, True], ids=["no stop token", "stop tokens"])
def test_streamer_gets_the_prompts_once_then_a_token_of_every_row_at_a_time(eos, schedule):
    rows = make_rows("gemma3_text", MANY[:5])
    kwargs = {"eos_token_id": _some_eos(rows), "pad_token_id": 3} if eos else {}
    theirs, ours = _Columns(), _Columns()
    expected = rows.plain(streamer=theirs, **kwargs)
    draft = _knowing(rows, rows.said)
    output = rows.speculate(draft, streamer=ours, schedule=schedule, **kwargs)
    assert output.sequences.tolist() == expected.tolist()
    assert (
        ours.puts
        == theirs.puts
        == [rows.prompts["input_ids"].tolist(), *expected[:, max(rows.lengths) :].t().tolist()]
    )
    assert ours.ends == theirs.ends == 1


def test_text_streamer_takes_one_sequence_as_in_plain_generate():
    rows = make_rows()
    streamer = TextStreamer(byte_tokenizer())
    for kwargs in ({}, {"assistant_model": rows.draft()}):
        with pytest.raises(ValueError, match="batch size 1"):
            rows.plain(streamer=streamer, **kwargs)


@pytest.mark.core
def test_rows_in_step_emit_what_the_row_that_accepts_fewest_lets_them():
    rows = make_rows("qwen3", (4, 7, 5))
    draft = rows.draft("noisy").follow_rows(rows.unpadded(rows.said), [0.0, 0.4, 0.0])
    output = rows.speculate(draft, streamer=_Columns())
    rounds = [[r for r in output.rounds if r.row == row] for row in range(3)]
    for records in zip(*rounds, strict=True):
        emitted = {r.accepted_length for r in records}
        assert emitted == {min(r.accepted + 1 for r in records)}
        assert all(r.bonus is None or r.accepted_length == r.accepted + 1 for r in records)
    assert draft.last_stats.tokens == 3 * NEW_TOKENS
    assert sum(r.accepted_length for r in rounds[0]) == NEW_TOKENS - 1


@pytest.mark.core
def test_ended_rows_have_no_rounds_and_no_tokens_in_the_figures():
    rows = make_rows("qwen3", MANY[:4])
    eos = [rows.new_token(0, 0), rows.new_token(1, 5)]
    output = rows.speculate(rows.draft("near-perfect"), eos_token_id=eos, pad_token_id=3, streamer=_Columns())
    new = output.sequences[:, max(rows.lengths) :].tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token in eos), len(row)) for row in new]
    assert min(ends) == 1 < max(ends)
    assert output.stats.tokens == sum(ends)
    for row, end in enumerate(ends):
        emitted = [token for r in output.rounds if r.row == row for token in r.emitted]
        assert new[row][1 : max(end, len(emitted) + 1)] == emitted
        assert len(emitted) == end - 1
