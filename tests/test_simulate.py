"""hf-dspark bench --simulate: the pair's text and tau, the limit, what is counted and timed, and the command."""

import json
import os
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO

import pytest
import torch

from hf_dspark.cli import main
from hf_dspark.eval import simulate
from hf_dspark.eval.counts import counted_rounds
from hf_dspark.eval.roofline import DeviceRates, Work, draft_work, target_work
from hf_dspark.eval.simulate import run_simulation
from hf_dspark.eval.simulated_arms import ARMS, Arm
from hf_dspark.eval.simulated_pair import SHAPES, SimulatedPair, acceptance_of, make_pair

TAU = 4.4
RATES = DeviceRates(copy_bandwidth=1e9, matrix_rate=1e9)
BY_NAME = {arm.name: arm for arm in ARMS}
PLAIN, TRANSFORMERS, DSPARK = (BY_NAME[name] for name in ("plain", "transformers_loop", "dspark"))


@pytest.fixture(scope="module")
def pair():
    return make_pair("tiny", TAU)


def _text(pair: SimulatedPair, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A prompt [1, 20], the text after it, and the rounds it takes."""
    first_ids, num_rounds, num_tokens = pair.passages(1, num_tokens)
    text = (first_ids + torch.arange(-1, num_tokens)).unsqueeze(0) % 8192
    prompt = torch.randint(8192, (1, 19), generator=torch.Generator().manual_seed(0))
    return torch.cat([prompt, text[:, :1]], dim=1), text[:, 1:], num_rounds


def test_layers_of_a_wide_and_deep_target_do_not_drown_the_token_it_reads(monkeypatch):
    sizes = {"hidden_size": 1024, "num_layers": 16, "vocab_size": 2048, "mask_token_id": 0}
    monkeypatch.setitem(SHAPES, "wide", replace(SHAPES["tiny"], **sizes))
    target = make_pair("wide", TAU).target
    with torch.no_grad():
        logits = target(torch.randint(2048, (1, 64))).logits[0]
    # Rows of the embedding have length 32, so 1024 is the best that a token alone can reach.
    assert logits.amax(-1).min() > 0.95 * 1024


@pytest.mark.parametrize("tau", [1.0, 3.3, 6.17, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_target_goes_on_as_written_and_every_loop_accepts_as_asked(tau, dtype):
    pair = make_pair("tiny", tau, dtype=dtype)
    prompt, text, num_rounds = _text(pair, 100)
    asked = {"max_new_tokens": text.shape[1], "do_sample": False}
    transformers_loop = {"custom_generate": pair.draft.as_custom_generate(loop="transformers")}
    assert torch.equal(pair.target.generate(prompt, **asked)[:, 20:], text)
    for arguments in ({"assistant_model": pair.draft}, transformers_loop):
        assert torch.equal(pair.target.generate(prompt, **asked, **arguments)[:, 20:], text)
        assert pair.draft.last_stats.rounds == num_rounds
        assert pair.draft.last_stats.tau == pytest.approx(tau, rel=0.03)


def test_acceptance_is_the_same_at_every_position_of_the_block(pair):
    prompt, text, _ = _text(pair, 1200)
    pair.target.generate(prompt, max_new_tokens=text.shape[1], do_sample=False, assistant_model=pair.draft)
    rate = acceptance_of(TAU, 7)
    reached = pair.draft.last_stats.rounds
    for acceptance in pair.draft.last_stats.acceptance_at:
        # The seed is fixed; another one would leave 4 standard deviations 7 times in 16,000.
        assert acceptance == pytest.approx(rate, abs=4 * (rate * (1 - rate) / reached) ** 0.5)
        reached *= rate


def test_acceptance_of_a_tau_gives_this_tau_in_the_mean():
    for tau in (1, 2.5, 6.17, 8):
        rate = acceptance_of(tau, 7)
        assert sum(rate**k for k in range(8)) == pytest.approx(tau)
    for tau in (0.9, 8.1):
        with pytest.raises(ValueError, match="from 1 to the block's 7 and one more"):
            acceptance_of(tau, 7)


def test_passages_of_all_rows_end_together_where_a_round_does(pair):
    first_ids, num_rounds, num_tokens = pair.passages(16, 100)
    starts = pair.round_starts.tolist()
    assert len(set(first_ids.tolist())) == 16
    assert {starts[starts.index(first) + num_rounds] - first for first in first_ids.tolist()} == {num_tokens - 1}
    assert num_tokens - 1 == pytest.approx(num_rounds * TAU, abs=0.5)
    with pytest.raises(ValueError, match="Ask for fewer tokens"):
        pair.passages(1, 9000)


@pytest.mark.parametrize(
    ("name", "plain", "draft", "batch_32"),
    [("qwen3-4b", 1.94, 0.57, None), ("qwen3-8b", 3.59, 0.91, 7.0), ("qwen3-14b", 6.58, 1.33, None)],
)
def test_limit_is_that_of_the_design_at_the_same_rates(name, plain, draft, batch_32):
    """Milliseconds that were worked out by hand for 4.3 TB/s, 780 TFLOP/s and a context of 2048."""
    rates = DeviceRates(copy_bandwidth=4.3e12, matrix_rate=780e12)
    pair = make_pair(name, 5.28, dtype=torch.bfloat16, device="meta")

    def milliseconds(num_rows: int) -> tuple[float, float, float]:
        of_target = [target_work(pair.target, num_rows, 2048, width).seconds(rates) for width in (1, 8)]
        of_draft = draft_work(pair.draft, pair.target, num_rows, 2048, 5.28).seconds(rates)
        return tuple(1000 * seconds for seconds in (*of_target, of_draft))

    assert milliseconds(1) == pytest.approx((plain, plain, draft), rel=0.01)
    if batch_32 is not None:
        assert sum(milliseconds(32)[1:]) == pytest.approx(batch_32, rel=0.01)


def test_forward_takes_the_longer_of_reading_and_multiplying():
    rates = DeviceRates(copy_bandwidth=10.0, matrix_rate=100.0)
    assert Work(num_bytes=20.0, num_operations=100.0).seconds(rates) == 2
    assert Work(num_bytes=20.0, num_operations=500.0).seconds(rates) == 5


def test_wide_batches_are_limited_by_the_matrix_rate(pair):
    slow, fast = DeviceRates(1e12, 1e9), DeviceRates(1e12, 2e9)
    work = target_work(pair.target, 64, 100, 8)
    assert work.seconds(slow) == 2 * work.seconds(fast)
    # Twice as many rows multiply twice as much and read the weights once.
    twice = target_work(pair.target, 128, 100, 8)
    assert twice.num_operations == 2 * work.num_operations
    num_weights = pair.target.num_parameters() - pair.target.model.embed_tokens.weight.numel()
    assert 2 * work.num_bytes - twice.num_bytes == 4 * num_weights


def test_launches_and_reads_of_one_round_are_counted():
    class Target(torch.nn.Linear):
        device = torch.device("cpu")

    target = Target(2, 2)
    states = torch.ones(2, 2)
    with torch.no_grad(), counted_rounds(target.device) as counts:
        handle = target.register_forward_pre_hook(counts.mark)
        target(states)
        states = (states + 0) * 1  # after the prefill: not counted
        for _ in range(2):
            target(states)  # 1: the bias is added in the same operation
            added = states + 1  # 2
            torch.empty(3)
            if (added.t()[0] > 5).any():  # 3, 4: compared and reduced; 1 read
                raise AssertionError
            added.tolist()  # 2 reads
            states[: added.sum().long()]  # 5, 6: summed and converted; 3 reads
        assert counts.per_round == (6, 3)
        handle.remove()


@pytest.mark.parametrize("rows", [1, 3])
def test_draft_goes_on_from_its_own_context(pair, monkeypatch, rows):
    from hf_dspark.batch_draft import BatchDraft

    known, take_over = [], BatchDraft.take_over

    def watched(self, context, slots, *, is_unpadded):
        take_over(self, context, slots, is_unpadded=is_unpadded)
        known.append((slots.shape, self.is_whole, is_unpadded))

    monkeypatch.setattr(BatchDraft, "take_over", watched)
    run_simulation(pair, RATES, batch_size=rows, context=30, max_new_tokens=12, repeats=1, arms=[BY_NAME["dspark"]])
    assert known
    assert set(known) == {((rows, 29), True, True)}


def test_fewer_than_two_verifications_give_no_counts(pair):
    with counted_rounds(pair.target) as counts:
        pair.target.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2, do_sample=False)
    assert counts.per_round is None


@pytest.fixture
def forwards_as_clock(pair, monkeypatch):
    """Time is the number of forwards of the target."""
    forwards = []
    handle = pair.target.register_forward_pre_hook(lambda *_: forwards.append(None))
    monkeypatch.setattr(simulate, "now", lambda device: float(len(forwards)))
    yield
    handle.remove()


@pytest.mark.usefixtures("forwards_as_clock")
def test_figures_are_of_decoding_without_the_prefill(pair):
    result = run_simulation(pair, RATES, context=30, max_new_tokens=45, arms=[PLAIN, TRANSFORMERS, DSPARK])
    assert (result["batch_size"], result["context"], result["new_tokens"]) == (1, 30, 45)
    plain, transformers, ours = result["arms"].values()
    assert plain["tokens_per_second"] == 1  # a token a forward, and the first one does not count
    assert transformers["tokens_per_second"] == ours["tokens_per_second"] == TAU == result["tau"]
    assert ours["ratio_to_plain"] == {"median": TAU, "p25": TAU, "p75": TAU}
    assert ours["ratio_to_plain_compiled"] is None
    assert (plain["round_ms"], ours["round_ms"]) == (1000, 1000)
    limits = result["limit_tokens_per_second"]
    assert plain["roofline_percent"] == pytest.approx(100 / limits["plain"])
    assert result["roofline_percent"] == ours["roofline_percent"] == pytest.approx(100 * TAU / limits["drafting"])
    assert all(arm["is_right"] for arm in result["arms"].values())


@pytest.mark.usefixtures("forwards_as_clock")
def test_arms_run_in_turn_in_a_rotated_order_after_a_call_that_is_not_timed(pair):
    calls = []

    def arm(name: str) -> Arm:
        return replace(PLAIN, name=name, arguments=lambda draft: calls.append(name) or {})

    run_simulation(pair, RATES, context=4, max_new_tokens=6, repeats=3, arms=[arm("a"), arm("b")])
    assert "".join(calls) == "aabb" + "ba" + "ab" + "ba"  # the first calls are repeated to be counted


def test_ours_is_called_first_before_others_are_compiled_and_may_be_refused_in_its_scope(pair):
    calls = []

    def called(arm: Arm, name: str) -> Arm:
        return replace(arm, name=name, arguments=lambda draft: calls.append(name) or arm.arguments(draft))

    def refuse(target, draft):
        raise ValueError("cannot be compiled")

    arms = [called(PLAIN, "a"), called(DSPARK, "b"), replace(DSPARK, name="c", scope=refuse)]
    result = run_simulation(pair, RATES, context=4, max_new_tokens=6, repeats=1, arms=arms)
    assert "".join(calls) == "bbaa" + "ba"
    assert result["arms"]["c"]["reason"] == "ValueError: cannot be compiled"
    assert result["arms"]["a"]["tokens_per_second"] > 0


def test_context_is_in_both_caches_before_the_first_forward(pair, monkeypatch):
    seen = []
    forward = pair.draft.forward

    def spy(features, block_ids, position_ids, cache, *masks):
        seen.append((cache.get_seq_length(), features.shape[1], position_ids[0, 0].item()))
        return forward(features, block_ids, position_ids, cache, *masks)

    monkeypatch.setattr(pair.draft, "forward", spy)
    lengths = []
    handle = pair.target.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    result = run_simulation(pair, RATES, context=50, max_new_tokens=12, repeats=1, arms=[DSPARK])
    handle.remove()
    assert result["arms"]["dspark"]["is_right"]
    assert lengths[:2] == [1, 8]
    assert seen[0] == (49, 1, 49)


def test_counts_are_those_of_a_round_of_each_loop(pair):
    result = run_simulation(pair, RATES, context=8, max_new_tokens=40, repeats=1, arms=[PLAIN, TRANSFORMERS, DSPARK])
    plain, transformers, ours = result["arms"].values()
    assert [arm["host_reads_per_round"] for arm in (plain, transformers, ours)] == [1, 2, 1]
    assert plain["launches_per_round"] < ours["launches_per_round"] == result["launches_per_round"]
    assert result["host_reads_per_round"] == 1


def test_arm_that_fails_does_not_stop_the_others(pair):
    def fail(draft):
        raise RuntimeError("no memory\nat all")

    broken = replace(PLAIN, name="broken", arguments=fail)
    result = run_simulation(pair, RATES, context=4, max_new_tokens=6, repeats=1, arms=[broken, PLAIN])
    assert result["arms"]["broken"] == {"tokens_per_second": None, "reason": "RuntimeError: no memory"}
    assert result["arms"]["plain"]["is_right"]
    assert result["tau"] is result["roofline_percent"] is None  # none of ours ran


def test_wrong_text_is_told(pair):
    wrong = replace(PLAIN, arguments=lambda draft: {"suppress_tokens": list(range(8192))[::2]})
    result = run_simulation(pair, RATES, context=4, max_new_tokens=6, repeats=1, arms=[wrong])
    assert not result["arms"]["plain"]["is_right"]


def test_compiled_arm_keeps_its_static_cache_from_call_to_call(pair):
    caches = []

    def keep(config, length):
        caches.append(BY_NAME["plain_compiled"].cache(config, length))
        return caches[-1]

    uncompiled = replace(
        BY_NAME["plain_compiled"], cache=keep, arguments=lambda draft: {"disable_compile": True}, is_drafting=False
    )
    result = run_simulation(pair, RATES, batch_size=2, context=40, max_new_tokens=12, repeats=2, arms=[uncompiled])
    arm = result["arms"]["plain_compiled"]
    assert arm["is_right"]
    assert arm["launches_per_round"] is None
    assert arm["ratio_to_plain_compiled"]["median"] == 1
    assert len(caches) == 1
    assert caches[0].get_max_length() == 40 + result["new_tokens"]


@pytest.mark.parametrize("before", [None, "1"])
def test_plain_functions_are_forced_for_the_length_of_a_call(monkeypatch, before):
    monkeypatch.delenv("HF_DSPARK_KERNELS", raising=False)
    if before is not None:
        monkeypatch.setenv("HF_DSPARK_KERNELS", before)
    with BY_NAME["dspark_plain_functions"].scope(None, None):
        assert os.environ["HF_DSPARK_KERNELS"] == "0"
    assert os.environ.get("HF_DSPARK_KERNELS") == before


def _bench(*arguments: str) -> list[str]:
    printed = StringIO()
    with redirect_stdout(printed):
        assert main(["bench", "--simulate", "tiny", *arguments]) == 0
    return printed.getvalue().splitlines()


def test_command_prints_a_table_and_a_line_of_json_for_each_setting(tmp_path):
    file = tmp_path / "bench.jsonl"
    short = ("--tau", "3", "--max-new-tokens", "20", "--repeats", "1", "--context", "16")
    lines = _bench(*short, "--batch-size", "1", "2", "--threads", "1", "--json", str(file))
    results = [json.loads(line) for line in lines if line.startswith("{")]
    assert json.loads(lines[-1]) == results[1]
    assert [json.loads(line) for line in file.read_text().splitlines()] == results
    alone, two = results
    assert (alone["shape"], alone["dtype"], alone["tau_asked"]) == ("tiny", "float32", 3)
    assert alone["device"].startswith("cpu (")
    assert alone["tau"] == pytest.approx(3, rel=0.03)
    assert list(alone["arms"]) == ["plain", "transformers_loop", "dspark"]
    for key in ("host_reads_per_round", "launches_per_round", "roofline_percent", "copy_bandwidth", "matrix_rate"):
        assert alone[key] > 0
    for arm in alone["arms"].values():
        assert arm["tokens_per_second"] > 0
        assert arm["is_right"]
    assert set(alone["arms"]["dspark"]["part_ms"]) == {"draft", "verify", "rest"}
    assert alone["command"] == two["command"] == (
        "hf-dspark bench --max-new-tokens 20 --simulate tiny --tau 3.0 --batch-size 1 --batch-size 2 --context 16 "
        f"--repeats 1 --json {file} --threads 1"
    )  # fmt: skip
    # transformers' loop takes one sequence: no figures, and why.
    row = next(line for line in lines[6:] if line.startswith("transformers_loop"))
    assert row.split() == ["transformers_loop", *["-"] * 10]
    assert any(line.startswith("transformers_loop: ValueError: ") for line in lines)
    assert two["arms"]["plain"]["is_right"]


def test_options_of_models_arms_and_block_reach_the_simulation():
    *table, line = _bench(
        "--tau", "2", "--block-size", "3", "--max-new-tokens", "20", "--repeats", "1", "--context", "16",
        "--arms", "dspark", "plain", "--dtype", "bfloat16", "--seed", "5",
    )  # fmt: skip
    result = json.loads(line)
    assert (result["dtype"], list(result["arms"])) == ("bfloat16", ["plain", "dspark"])
    assert "at most" in table[0]
    assert [row.split()[0] for row in table[1:]] == ["arm", "plain", "dspark"]
    with pytest.raises(SystemExit):
        _bench("--arms", "none")
    assert main(["bench", "--simulate", "tiny", "--block-size", "3", "--tau", "4.5"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--simulate", "tiny", "--prompts", "x"], "--prompts cannot be used with --simulate"),
        (["--simulate", "tiny", "--no-chat-template"], "--no-chat-template cannot be used with --simulate"),
        (["--target", "t", "--tau", "3", "--arms", "plain"], "--tau, --arms cannot be used without --simulate"),
        (["--target", "t"], "required without --simulate: --draft, --prompts"),
    ],
)
def test_options_of_the_two_benchmarks_do_not_mix(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(["bench", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_seed_draws_another_text(pair):
    other = make_pair("tiny", TAU, seed=1)
    assert not torch.equal(other.round_starts, pair.round_starts)
    assert not torch.equal(other.target.lm_head.weight, pair.target.lm_head.weight)
    assert torch.equal(make_pair("tiny", TAU).target.lm_head.weight, pair.target.lm_head.weight)


def test_making_a_pair_leaves_the_random_state_alone():
    state = torch.random.get_rng_state()
    make_pair("tiny", TAU)
    assert torch.equal(torch.random.get_rng_state(), state)
