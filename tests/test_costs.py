"""Cost tables: times between samples, JSON that other engines read, and what is timed. No test reads a real clock."""

import json
import os

import pytest
import torch
from tiny import make_tiny_draft, make_tiny_target, plain, random_prompt, speculate
from tiny_files import save_random_pair

from hf_dspark import costs
from hf_dspark.cli import main
from hf_dspark.costs import describe_setup, load_or_profile, profile_costs
from hf_dspark.schedule import CostTable, ThroughputSchedule

SAMPLES = {"sample_batch_tokens": [2, 4, 8], "sample_steps_per_sec": [10.0, 5.0, 4.0], "max_batch_tokens": 16}
DRAFT = {"sample_draft_requests": [1, 4], "sample_draft_seconds": [0.01, 0.04]}


@pytest.mark.parametrize(
    ("tokens", "seconds"),
    [(1, 0.1), (2, 0.1), (3, 0.15), (4, 0.2), (5, 0.2125), (8, 0.25), (9, 0.2625), (16, 0.35), (100, 1.4)],
)
def test_time_is_linear_between_samples_flat_below_and_goes_on_above(tokens, seconds):
    table = CostTable(**SAMPLES)
    assert table.seconds(tokens) == pytest.approx(seconds)
    assert table.steps_per_second(tokens) == pytest.approx(1 / seconds)


def test_time_above_the_last_sample_never_falls():
    table = CostTable([1, 2, 4], [1.0, 2.0, 4.0], 8)
    assert table.seconds(3) == pytest.approx(0.375)  # between samples it does, where it was measured so
    assert table.seconds(8) == table.seconds(4) == 0.25
    assert CostTable([4], [2.0], 64).seconds(64) == 0.5


@pytest.mark.parametrize(("requests", "seconds"), [(1, 0.01), (2, 0.02), (4, 0.04), (8, 0.08)])
def test_time_of_the_draft_is_interpolated_over_requests(requests, seconds):
    assert CostTable(**SAMPLES, **DRAFT).draft_seconds(requests) == pytest.approx(seconds)


def test_draft_that_was_not_measured_takes_no_time():
    assert CostTable(**SAMPLES).draft_seconds(3) == 0.0


@pytest.mark.parametrize("extra", [{}, DRAFT])
def test_json_has_the_keys_to_the_letter_and_comes_back(extra):
    table = CostTable(**SAMPLES, **extra)
    assert json.loads(table.to_json()) == {**SAMPLES, **extra}
    assert CostTable.from_json(table.to_json()) == table


def test_keys_of_another_engine_are_passed_over():
    assert CostTable.from_json(json.dumps({**SAMPLES, "gpu": "some"})) == CostTable(**SAMPLES)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sample_batch_tokens": [4, 2, 8]}, "each larger than the one before"),
        ({"sample_batch_tokens": [2, 2, 8]}, "each larger than the one before"),
        ({"sample_batch_tokens": [0, 4, 8]}, "at least 1"),
        ({"sample_batch_tokens": [2, 4.5, 8]}, "whole numbers"),
        ({"sample_batch_tokens": [2, 4]}, "one to one, got 2 and 3"),
        ({"sample_batch_tokens": [], "sample_steps_per_sec": []}, "one sample at least"),
        ({"sample_steps_per_sec": [10.0, 0.0, 4.0]}, "above 0"),
        ({"sample_steps_per_sec": [10.0, -1.0, 4.0]}, "above 0"),
        ({"sample_steps_per_sec": [10.0, float("nan"), 4.0]}, "finite"),
        ({"sample_steps_per_sec": [10.0, "5", 4.0]}, "finite numbers"),
        ({"sample_steps_per_sec": 10.0}, "`sample_steps_per_sec` of a cost table is a list"),
        ({"max_batch_tokens": 7}, "not below the last"),
        ({"max_batch_tokens": "16"}, "whole number"),
        ({"sample_draft_requests": [1]}, "one to one, got 1 and 0"),
        ({"sample_draft_requests": [1], "sample_draft_seconds": [0.0]}, "`sample_draft_seconds`.*above 0"),
    ],
)
def test_table_that_cannot_be_is_refused_by_name(changed, message):
    with pytest.raises(ValueError, match=message):
        CostTable.from_json(json.dumps({**SAMPLES, **changed}))


@pytest.mark.parametrize("key", SAMPLES)
def test_missing_key_is_named(key):
    fields = {name: value for name, value in SAMPLES.items() if name != key}
    with pytest.raises(ValueError, match=f"here {key} is missing"):
        CostTable.from_json(json.dumps(fields))


@pytest.mark.parametrize("text", ["", "no json", "[1, 2]", "3"])
def test_text_that_is_no_table_is_refused(text):
    with pytest.raises(ValueError, match="A cost table is a JSON object"):
        CostTable.from_json(text)


class _Clock:
    """A clock that only the timed forwards move: by `of_target(rows, width)` and `of_draft(rows)`, and by a load."""

    def __init__(self, monkeypatch, load=lambda: 0.0):
        self.now, self.load, self.shapes = 0.0, load, []
        verify_block, draft_block = costs.verify_block, costs.draft_block

        def timed_verify(target, state, draft_ids, tap):
            rows, width = draft_ids.shape[0], draft_ids.shape[1] + 1
            self.shapes.append((rows, width))
            self.now += self.of_target(rows, width) + self.load()
            return verify_block(target, state, draft_ids, tap)

        def timed_draft(draft, features, anchor_ids, cache):
            self.now += self.of_draft(len(anchor_ids)) + self.load()
            return draft_block(draft, features, anchor_ids, cache)

        monkeypatch.setattr(costs, "verify_block", timed_verify)
        monkeypatch.setattr(costs, "draft_block", timed_draft)
        monkeypatch.setattr(costs, "_now", lambda device: self.now)

    @staticmethod
    def of_target(rows, width):
        return 1 + 0.1 * rows + 0.05 * rows * width

    @staticmethod
    def of_draft(rows):
        return 0.2 + 0.01 * rows


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hf_dspark" / "costs"


@pytest.mark.parametrize(
    ("settings", "shapes"),
    [
        ({}, [(1, 1), (1, 2), (1, 3), (1, 4), (1, 5)]),  # the block has 4 tokens
        ({"max_tokens": 2}, [(1, 1), (1, 2)]),
        ({"max_tokens": 14}, [*((1, width) for width in range(1, 9)), (1, 10), (1, 12), (1, 14)]),
        ({"batch_size": 3}, [(1, 1), (2, 1), (3, 1), (3, 2), (3, 3), (3, 4), (3, 5)]),
        ({"batch_size": 2, "max_tokens": 7}, [(1, 1), (2, 1), (2, 2), (2, 3)]),
    ],
)
def test_table_holds_what_each_shape_took(target, draft, monkeypatch, settings, shapes):
    clock = _Clock(monkeypatch)
    table = profile_costs(target, draft, prompt_length=10, repeats=2, **settings)
    assert clock.shapes == 3 * shapes  # once for lazy set-up
    assert table.sample_batch_tokens == tuple(rows * width for rows, width in shapes)
    assert [1 / rate for rate in table.sample_steps_per_sec] == pytest.approx([clock.of_target(*s) for s in shapes])
    rows = sorted({rows for rows, _ in shapes})
    assert table.sample_draft_requests == tuple(rows)
    assert table.sample_draft_seconds == pytest.approx([clock.of_draft(row) for row in rows])
    assert table.max_batch_tokens == settings.get("max_tokens", settings.get("batch_size", 1) * 5)


def test_load_that_comes_and_goes_does_not_bend_the_table(target, draft, monkeypatch):
    clock = _Clock(monkeypatch)
    quiet = profile_costs(target, draft, prompt_length=10, repeats=6)
    calls = iter(range(1000))
    clock.load = lambda: 5.0 if next(calls) % 5 else 0.0  # 6 runs a turn: each is undisturbed in one turn of 5
    loaded = profile_costs(target, draft, prompt_length=10, repeats=6)
    assert loaded.sample_steps_per_sec == pytest.approx(quiet.sample_steps_per_sec)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "lfm2", "deepseek_v3"])
def test_each_forward_is_timed_on_the_same_context(kind, monkeypatch):
    """The target's cache is brought back: all forwards start at its length, and see the same tokens before them."""
    target = make_tiny_target(kind)
    lengths, logits = [], {}
    verify_block = costs.verify_block

    def watched(target, state, draft_ids, tap):
        lengths.append(state.model_kwargs[costs.CACHE].get_seq_length())
        verification = verify_block(target, state, draft_ids, tap)
        logits.setdefault(draft_ids.shape[1], []).append(verification.logits)
        return verification

    monkeypatch.setattr(costs, "verify_block", watched)
    profile_costs(target, make_tiny_draft(target), prompt_length=30, repeats=2)
    assert lengths == [30] * 15
    for of_width in logits.values():
        for other in of_width[1:]:
            torch.testing.assert_close(other, of_width[0])


def test_profiling_leaves_nothing_behind_on_the_models(target, draft):
    prompt = random_prompt(64, 6)
    before = plain(target, prompt, max_new_tokens=20).tolist()
    profile_costs(target, draft, prompt_length=10, repeats=1)
    assert plain(target, prompt, max_new_tokens=20).tolist() == before
    by_hooks = make_tiny_draft(target, taps=(0, 3))  # what the last layer puts out is had by a hook
    hooks = sum(len(module._forward_hooks) for module in target.modules())
    table = profile_costs(target, by_hooks, prompt_length=10, repeats=1)
    assert sum(len(module._forward_hooks) for module in target.modules()) == hooks
    assert all(rate > 0 for rate in table.sample_steps_per_sec)
    schedule = ThroughputSchedule(table)
    assert speculate(target, draft, prompt, max_new_tokens=20, schedule=schedule).tolist() == before


def test_draft_with_a_window_and_a_tap_on_the_last_layer_are_timed(target):
    window = {"layer_types": ["sliding_attention"], "sliding_window": 8, "use_sliding_window": True}
    draft = make_tiny_draft(target, taps=(-1, 3), **window)
    assert draft.context_window == 8
    assert profile_costs(target, draft, prompt_length=20, repeats=1).sample_draft_seconds[0] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 3, "batch_size": 4}, "`max_tokens` must be at least `batch_size`.*got 3 and 4"),
        ({"batch_size": 0}, "that at least 1"),
        ({"prompt_length": 0}, "`prompt_length` and `repeats` must be at least 1"),
        ({"repeats": 0}, "`prompt_length` and `repeats` must be at least 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(target, draft, settings, message):
    with pytest.raises(ValueError, match=message):
        profile_costs(target, draft, **settings)


def test_table_is_measured_once_and_kept(target, draft, cache, monkeypatch):
    table = load_or_profile(target, draft, prompt_length=10, repeats=1)
    (file,) = cache.iterdir()
    fields = json.loads(file.read_text())
    assert CostTable.from_json(file.read_text()) == table
    assert fields["measured_on"].items() >= describe_setup(target, draft).items()
    monkeypatch.setattr(costs, "profile_costs", lambda *args, **kwargs: pytest.fail("measured again"))
    assert load_or_profile(target, draft, prompt_length=10, repeats=1) == table


@pytest.mark.parametrize("changed", ["dtype", "attention", "threads", "max_tokens", "batch_size", "prompt_length"])
def test_other_setting_has_a_table_of_its_own(target, draft, cache, monkeypatch, changed):
    fixed = {"prompt_length": 10, "repeats": 1}
    load_or_profile(target, draft, **fixed)
    if changed == "dtype":
        target = make_tiny_target().bfloat16()
    elif changed == "attention":
        target = make_tiny_target(attention="eager")
    elif changed == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    else:
        fixed |= {changed: 3}
    load_or_profile(target, make_tiny_draft(target, seed=0).to(target.dtype), **fixed)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ["", "{}", "no json", '{"measured_on": {}}'])
def test_damaged_table_is_measured_again(target, draft, cache, damage):
    load_or_profile(target, draft, prompt_length=10, repeats=1)
    (file,) = cache.iterdir()
    whole = json.loads(file.read_text())
    file.write_text(damage or json.dumps(whole | {"measured_on": {"target": "another"}}))
    load_or_profile(target, draft, prompt_length=10, repeats=1)
    assert [path.name for path in cache.iterdir()] == [file.name]
    assert json.loads(file.read_text())["measured_on"] == whole["measured_on"]


def test_refresh_measures_again(target, draft, cache, monkeypatch):
    load_or_profile(target, draft, prompt_length=10, repeats=1)
    other = CostTable([1], [7.0], 9)
    monkeypatch.setattr(costs, "profile_costs", lambda *args, **kwargs: other)
    assert load_or_profile(target, draft, prompt_length=10, repeats=1) != other
    assert load_or_profile(target, draft, prompt_length=10, repeats=1, refresh=True) == other
    assert load_or_profile(target, draft, prompt_length=10, repeats=1) == other


def test_cache_that_cannot_be_written_costs_only_the_next_measurement(target, draft, cache, monkeypatch, caplog):
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("read-only file system")))
    table = load_or_profile(target, draft, prompt_length=10, repeats=1)
    assert table.max_batch_tokens == 5
    assert list(cache.iterdir()) == []


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_random_pair(tmp_path_factory.mktemp("pair"))


def _calibrate(pair, *arguments):
    words = ["calibrate", "--target", pair.target, "--draft", pair.draft, *arguments]
    return main([str(word) for word in words])


def test_command_prints_the_table_and_writes_it(pair, cache, tmp_path, monkeypatch, capsys):
    clock = _Clock(monkeypatch)
    asked = ("--batch-size", 2, "--max-tokens", 8, "--prompt-length", 12, "--repeats", 3)
    assert _calibrate(pair, "--cost", "--json", tmp_path / "cost.json", *asked) == 0, capsys.readouterr().err
    table = CostTable.from_json((tmp_path / "cost.json").read_text())
    assert table.sample_batch_tokens == (1, 2, 4, 6, 8)
    assert len(clock.shapes) == 4 * 5
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["tokens", "ms", "steps/s", "of", "the", "first"]
    assert lines[1].split() == ["1", "1150.0", "0.9", "1.00"]
    assert lines[5].split() == ["8", "1600.0", "0.6", "1.39"]
    assert lines[6:] == ["drafting for 1: 210.0 ms, 0.18 of the first", "drafting for 2: 220.0 ms, 0.19 of the first"]
    (kept,) = cache.iterdir()
    assert json.loads(kept.read_text())["measured_on"]["prompt_length"] == 12


def test_command_measures_even_where_a_table_is_kept(pair, cache, monkeypatch):
    clock = _Clock(monkeypatch)
    for _ in range(2):
        assert _calibrate(pair, "--cost", "--prompt-length", 12, "--repeats", 1) == 0
    assert len(clock.shapes) == 2 * 2 * 5


def test_options_of_the_command_set_threads_and_dtype(pair, cache, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    options = ("--cost", "--threads", 3, "--dtype", "bfloat16", "--prompt-length", 12, "--repeats", 1)
    assert _calibrate(pair, *options) == 0
    assert asked == [3]
    (kept,) = cache.iterdir()
    assert json.loads(kept.read_text())["measured_on"]["dtype"] == "bfloat16"


def test_without_cost_prompts_are_required(pair, capsys):
    with pytest.raises(SystemExit) as stop:
        _calibrate(pair)
    assert stop.value.code == 2
    assert "the following arguments are required: --prompts" in capsys.readouterr().err
