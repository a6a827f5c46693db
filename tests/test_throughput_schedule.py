"""Algorithm 1 and its asynchronous variant: they find the best length where they must, and they never look ahead."""

import itertools
import random

import pytest
import torch
from tiny import QUALITIES, make_draft_of_quality, make_tiny_draft, make_tiny_target, plain, random_prompt, speculate

from hf_dspark import ConfidenceThreshold, FixedLength
from hf_dspark.generate import Stopwatch
from hf_dspark.schedule import MODES, CostTable, DraftGate, ThroughputSchedule

LENGTH = 5  # of a block in the simulations


def _table(seconds, *, num_tokens=64, draft_seconds=None):
    """A table with a sample at each number of tokens."""
    tokens = list(range(1, num_tokens + 1))
    draft = {} if draft_seconds is None else {"sample_draft_requests": [1], "sample_draft_seconds": [draft_seconds]}
    return CostTable(tokens, [1 / seconds(count) for count in tokens], num_tokens, **draft)


def _smooth(tokens):
    """A dense target: free while the weights' traffic hides it, then linear."""
    return (1 + (tokens / 6) ** 4) ** 0.25


def _linear(tokens):
    return 1 + 0.15 * tokens


def _jagged(tokens):
    """Tiles of 4 rows: a step, then nothing until the next one."""
    return 1 + 0.25 * ((tokens + 3) // 4)


def _mixture_of_experts(tokens):
    """Weights of the distinct experts among 256 that tokens with 6 experts each read."""
    return 0.3 + 256 * (1 - (1 - 6 / 256) ** tokens) / 20 + 0.01 * tokens


CURVES = {"smooth": _smooth, "linear": _linear, "jagged": _jagged, "moe": _mixture_of_experts}


def _confidence(rows, length=LENGTH, seed=0):
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) ** 0.5


def _throughput(table, confidence, lengths, *, packed=True):
    """Expected tokens a second of verifying `lengths`, as the paper defines it."""
    rows = len(lengths)
    survival = confidence.double().cumprod(-1)
    expected = rows + sum(survival[r, :length].sum().item() for r, length in enumerate(lengths))
    tokens = rows + (sum(lengths) if packed else rows * max(lengths))
    return expected / (table.seconds(tokens) + table.draft_seconds(rows))


def _best(table, confidence, *, packed=True):
    """The highest throughput of all ways to give each row a verify length."""
    rows, length = confidence.shape
    ways = itertools.product(range(length + 1), repeat=rows)
    return max(_throughput(table, confidence, lengths, packed=packed) for lengths in ways)


def _after_two_calls(schedule, confidence):
    """What the asynchronous variant does once two calls with the same confidences lie behind it."""
    return [schedule(confidence) for _ in range(3)][-1].tolist()


@pytest.mark.core
@pytest.mark.parametrize("second_confidence", [0.9, 0.0])
def test_appendix_a_both_cases_verify_nothing(second_confidence):
    table = CostTable([1, 2, 3], [1.0, 0.5, 0.45], 3)
    confidence = torch.tensor([[0.8, second_confidence]])
    assert ThroughputSchedule(table)(confidence).tolist() == [0]
    # The search over all lengths that the appendix warns of tells the two cases apart.
    best = max(range(3), key=lambda length: _throughput(table, confidence, [length]))
    assert best == (2 if second_confidence else 0)


def test_token_that_only_keeps_the_throughput_is_not_admitted():
    table = CostTable([1, 2, 3], [1.0, 0.5, 1.0], 3)
    assert ThroughputSchedule(table)(torch.ones(1, 2)).tolist() == [0]  # 1 * 1.0, 2 * 0.5, 3 * 1.0


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("draft_seconds", [None, 0.4])
@pytest.mark.parametrize("curve", ["smooth", "linear"])
def test_early_stop_is_the_best_of_all_allocations_on_convex_curves(curve, draft_seconds, rows):
    table = _table(CURVES[curve], draft_seconds=draft_seconds)
    lengths = set()
    for seed in range(20):
        confidence = _confidence(rows, seed=seed)
        chosen = ThroughputSchedule(table)(confidence).tolist()
        lengths.update(chosen)
        assert _throughput(table, confidence, chosen) == pytest.approx(_best(table, confidence), rel=1e-6)
    assert len(lengths) > 1


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("curve", CURVES)
def test_asynchronous_is_the_best_of_all_allocations_on_any_curve(curve, rows, packed):
    table = _table(CURVES[curve])
    for seed in range(20):
        confidence = _confidence(rows, seed=seed)
        schedule = ThroughputSchedule(table, mode="asynchronous", packed=packed)
        chosen = _after_two_calls(schedule, confidence)
        throughput = _throughput(table, confidence, chosen, packed=packed)
        assert throughput == pytest.approx(_best(table, confidence, packed=packed), rel=1e-6)


def test_early_stop_does_not_look_past_a_step_and_the_asynchronous_variant_does():
    confidence = torch.full((1, LENGTH), 0.99)
    table = CostTable([1, 2, 3, 4, 5, 6], [1.0, 0.5, 0.5, 0.5, 0.5, 0.5], 6)
    assert ThroughputSchedule(table)(confidence).tolist() == [0]
    schedule = ThroughputSchedule(table, mode="asynchronous")
    assert [schedule(confidence).tolist() for _ in range(4)] == [[0], [0], [5], [5]]


@pytest.mark.core
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("curve", CURVES)
def test_confidence_of_a_token_or_of_later_ones_never_decides_about_tokens_before_it(curve, rows, mode, packed):
    """In its own row: c_k and later ones are permuted or replaced, and no token j < k changes its fate."""
    table = _table(CURVES[curve])
    for seed in range(20):
        history = [_confidence(rows, seed=100 + seed), _confidence(rows, seed=200 + seed)]
        confidence = _confidence(rows, seed=seed)

        def verified(present, history=history):
            schedule = ThroughputSchedule(table, mode=mode, packed=packed)
            for past in history:
                schedule(past)
            return schedule(present)

        lengths = verified(confidence)
        for row, k in itertools.product(range(rows), range(LENGTH)):
            replaced, permuted = confidence.clone(), confidence.clone()
            replaced[row, k:] = _confidence(1, LENGTH - k, seed=300 + seed)
            permuted[row, k:] = confidence[row, k:].flip(0)
            for changed in (replaced, permuted):
                assert verified(changed)[row].clamp_max(k) == lengths[row].clamp_max(k)


@pytest.mark.core
def test_tokens_admitted_before_decide_which_is_next_and_whether_it_is():
    """Over all rows, one token after another: a confidence is revealed only once the token before is admitted."""
    for seed, curve in itertools.product(range(30), CURVES):
        table, confidence = _table(CURVES[curve]), _confidence(4, seed=seed)
        survival = confidence.cumprod(-1)
        lengths, expected, throughput = [0] * 4, 4.0, 4.0 / table.seconds(4)
        while open_rows := [row for row in range(4) if lengths[row] < LENGTH]:
            row = max(open_rows, key=lambda row: (survival[row, lengths[row]].item(), -lengths[row], -row))
            candidate = expected + survival[row, lengths[row]].item()
            rate = candidate / table.seconds(4 + sum(lengths) + 1)
            if rate <= throughput:
                break
            lengths[row], expected, throughput = lengths[row] + 1, candidate, rate
        assert ThroughputSchedule(table)(confidence).tolist() == lengths


@pytest.mark.core
def test_present_confidences_never_change_the_asynchronous_capacity():
    table = _table(_jagged)
    for seed in range(20):
        totals = set()
        for present in range(10):
            schedule = ThroughputSchedule(table, mode="asynchronous")
            schedule(_confidence(4, seed=seed))
            schedule(_confidence(4, seed=1000 + present))  # neither does the call before
            totals.add(schedule(_confidence(4, seed=2000 + present)).sum().item())
        assert len(totals) == 1


def test_asynchronous_capacity_is_that_of_two_calls_earlier():
    table = _table(_smooth)
    high, low = torch.full((2, LENGTH), 0.95), torch.full((2, LENGTH), 0.05)
    schedule = ThroughputSchedule(table, mode="asynchronous")
    totals = [schedule(confidence).sum().item() for confidence in (high, low, low, high, high, high)]
    early = [ThroughputSchedule(table)(confidence).sum().item() for confidence in (high, low)]
    assert early[0] > early[1]
    assert totals == [early[0], early[1], early[0], early[1], early[1], early[0]]


def test_asynchronous_ranks_by_survival_then_position_then_request():
    table = CostTable([1, 4, 7, 8], [1.0, 1.0, 1.0, 0.01], 8)
    schedule = ThroughputSchedule(table, mode="asynchronous")
    flat = torch.full((3, 3), 0.5)
    assert _after_two_calls(schedule, flat) == [2, 1, 1]  # four tokens: those first in position, then the first row's
    assert schedule(torch.tensor([[0.5, 0.9, 0.9], [0.1, 1.0, 1.0], [0.6, 0.9, 0.1]])).tolist() == [2, 0, 2]


def test_capacity_shrinks_with_the_rows_that_have_finished():
    table = CostTable([1, 8, 9], [1.0, 1.0, 0.01], 9)
    schedule = ThroughputSchedule(table, mode="asynchronous")
    for _ in range(2):
        assert schedule(torch.full((4, LENGTH), 0.9)).tolist() == [1, 1, 1, 1]
    assert schedule(torch.full((2, LENGTH), 0.9)).tolist() == [1, 1]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_rows_with_shorter_blocks_verify_no_more_than_they_have(mode, packed):
    table = CostTable([1], [1.0], 100)  # all tokens are free
    schedule = ThroughputSchedule(table, mode=mode, packed=packed)
    confidence, num_drafted = torch.full((4, LENGTH), 0.9), torch.tensor([0, 2, 5, 3])
    for _ in range(3):
        assert schedule(confidence, num_drafted).tolist() == [0, 2, 5, 3]
    assert schedule(confidence, torch.zeros(4, dtype=torch.long)).tolist() == [0] * 4


def test_confidences_of_tokens_that_are_not_there_play_no_part():
    table, num_drafted = _table(_smooth), torch.tensor([1, 3, 0])
    for seed in range(20):
        confidence = _confidence(3, seed=seed)
        other = torch.where(
            torch.arange(LENGTH) < num_drafted.unsqueeze(-1), confidence, _confidence(3, seed=seed + 99)
        )
        lengths = [ThroughputSchedule(table)(c, num_drafted).tolist() for c in (confidence, other)]
        assert lengths[0] == lengths[1]


@pytest.mark.parametrize("packed", [True, False])
def test_capacity_counts_only_tokens_that_were_there(packed):
    table = CostTable([1, 6], [1.0, 100.0], 6)  # a larger forward is the faster one
    schedule = ThroughputSchedule(table, mode="asynchronous", packed=packed)
    for _ in range(2):
        assert schedule(torch.full((1, LENGTH), 0.9), torch.tensor([2])).tolist() == [2]
    assert schedule(torch.full((1, LENGTH), 0.9)).tolist() == [2]


def test_one_schedule_serves_batches_of_different_shapes():
    table = _table(_jagged, draft_seconds=0.1)
    schedule = ThroughputSchedule(table)
    for rows, length in ((2, 3), (3, 2), (6, 1), (1, 6), (2, 3)):
        confidence = _confidence(rows, length, seed=rows)
        assert schedule(confidence).tolist() == ThroughputSchedule(table)(confidence).tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("num_tokens", "length"), [(None, 5), (0, 0), (2, 2), (9, 5)])
def test_num_tokens_is_the_most_that_is_verified(mode, num_tokens, length):
    schedule = ThroughputSchedule(CostTable([1], [1.0], 100), num_tokens, mode)
    for _ in range(3):
        assert schedule(torch.full((2, LENGTH), 0.9)).tolist() == [length] * 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("packed", "lengths"), [(True, [2, 1, 1]), (False, [1, 1, 1])])
def test_no_forward_is_filled_beyond_the_table_s_maximum(mode, packed, lengths):
    table = CostTable([1], [1.0], 7)
    schedule = ThroughputSchedule(table, mode=mode, packed=packed)
    for _ in range(3):
        assert schedule(torch.full((3, LENGTH), 0.9)).tolist() == lengths
    assert schedule(torch.full((9, LENGTH), 0.9)).tolist() == [0] * 9


def test_padded_rows_cost_what_the_table_says():
    """A forward is as wide as its longest row: one sure row among doubtful ones pays packed, and not padded."""
    table = _table(_linear)
    confidence = torch.tensor([[1.0] * LENGTH] + [[0.01] * LENGTH] * 3)
    assert ThroughputSchedule(table)(confidence).tolist() == [LENGTH, 0, 0, 0]
    assert ThroughputSchedule(table, packed=False)(confidence).tolist() == [0, 0, 0, 0]
    sure = torch.ones(4, LENGTH)
    assert ThroughputSchedule(table, packed=False)(sure).tolist() == [LENGTH] * 4


def test_time_of_the_draft_makes_longer_blocks_worth_while():
    confidence = torch.full((1, LENGTH), 0.5)
    without, with_it = (ThroughputSchedule(_table(_linear, draft_seconds=d))(confidence).item() for d in (None, 5.0))
    assert without < with_it


def test_reset_forgets_the_last_call_s_confidences():
    table = CostTable([1, 2, 3, 4, 5, 6], [1.0, 0.5, 0.5, 0.5, 0.5, 0.5], 6)
    schedule, confidence = ThroughputSchedule(table, mode="asynchronous"), torch.full((1, LENGTH), 0.99)
    assert _after_two_calls(schedule, confidence) == [5]
    schedule.reset()
    assert schedule(confidence).tolist() == [0]


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="early-stop, asynchronous, got 'lookahead'"):
        ThroughputSchedule(_table(_smooth), mode="lookahead")


def test_negative_number_of_tokens_is_refused():
    with pytest.raises(ValueError, match="num_tokens"):
        ThroughputSchedule(_table(_smooth), -1)


def test_draft_without_a_confidence_head_is_refused_by_name(target):
    draft = make_tiny_draft(target, confidence=False)
    with pytest.raises(ValueError, match=r"ThroughputSchedule\(num_tokens=None, mode='early-stop'.*confidence head"):
        speculate(target, draft, random_prompt(64, 6), max_new_tokens=4, schedule=ThroughputSchedule(_table(_smooth)))


@pytest.mark.core
@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_greedy_text_is_plain_generate_s(kind, mode, quality):
    target, prompt = make_tiny_target(kind), random_prompt(64, 6)
    expected = plain(target, prompt, max_new_tokens=40)
    draft = make_draft_of_quality(target, expected[0].tolist(), quality)
    table = _table(_linear)
    schedule = ThroughputSchedule(table, mode=mode)
    output = speculate(target, draft, prompt, max_new_tokens=40, schedule=schedule, return_dict_in_generate=True)
    assert output.sequences.tolist() == expected.tolist()
    by_hand = ThroughputSchedule(table, mode=mode)
    drafting = [r for r in output.rounds if r.drafted]
    assert [r.verified for r in drafting] == [by_hand(torch.tensor([r.confidence])).item() for r in drafting]


# The gate. Times are in plain rounds: a table of one token a second, and a draft with a forward of `cost` together.


def _gate_table(cost):
    return CostTable([1, 8], [1.0, 1 / (cost - 0.2)], 8, [1], [0.2])


def _run(gate, emitted, num_tokens, *, cost, plain_cost=1.0, measured=False, disturb=lambda seconds: seconds):
    """Seconds and drafting rounds until `num_tokens` are out; `emitted(n)` is what a drafting round adds after n."""
    seconds = tokens = 0
    drafting = []
    while tokens < num_tokens:
        is_drafting = gate.should_draft()
        count = emitted(tokens) if is_drafting else 1
        spent = cost if is_drafting else plain_cost
        gate.observe(count, 7 if is_drafting else None, seconds=disturb(spent) if measured else None)
        if is_drafting:
            drafting.append(tokens)
        seconds, tokens = seconds + spent, tokens + count
    return seconds, tokens, drafting


@pytest.mark.parametrize("cost", [1.05, 1.3, 1.6, 2.5, 4.0])
@pytest.mark.parametrize("num_tokens", [16, 64, 128, 1000, 20_000])
def test_hostile_text_costs_no_more_than_the_tries(num_tokens, cost):
    gate = DraftGate(_gate_table(cost))
    seconds, tokens, drafting = _run(gate, lambda _: 1, num_tokens, cost=cost)
    tries = 1 + 3 + num_tokens / 256  # 3: the interval doubles from 32 to 256
    assert drafting
    assert seconds - tokens <= tries * (1 + cost - 1) + 1e-6
    if num_tokens >= 1000:
        assert seconds <= 1.025 * tokens


@pytest.mark.parametrize("seed", range(20))
def test_no_text_costs_more_than_a_try_in_each_first_interval(seed):
    """Drawn so that texts change their nature again and again, at the worst moments, too."""
    rng, cost = random.Random(seed), 1.0 + 1.5 * random.Random(seed).random()
    gate = DraftGate(_gate_table(cost))
    lengths = [rng.randrange(1, 80) for _ in range(400)]
    kinds = [rng.choice(("hostile", "friendly", "mixed")) for _ in lengths]
    nature = [kind for kind, length in zip(kinds, lengths, strict=True) for _ in range(length)]

    def emitted(position):
        kind = nature[position]
        return 1 if kind == "hostile" else 8 if kind == "friendly" else rng.choice((1, 1, 1, 2, 3))

    seen = [-99]

    def spiteful(position):  # each try begins well enough to have the first interval again, and then fails
        is_first, seen[0] = position - seen[0] > 16, position
        return int(cost + gate.patience) + 1 if is_first else 1

    for law in (emitted, spiteful):
        seconds, tokens, _ = _run(gate, law, 5000, cost=cost)
        assert seconds - tokens <= (1 + 5000 / 32) * cost + 1e-6


def test_gate_stays_open_where_drafting_pays():
    rng = random.Random(0)
    gate = DraftGate(_gate_table(1.4))
    seconds, tokens, drafting = _run(gate, lambda _: rng.choice((1, 2, 3, 4)), 2000, cost=1.4)
    assert tokens / seconds > 0.98 * 2.5 / 1.4
    assert len(drafting) > 0.98 * 2000 / 2.5


@pytest.mark.parametrize("turn", [50, 100, 500, 3000])
def test_gate_finds_its_way_back_within_the_longest_interval(turn):
    gate = DraftGate(_gate_table(1.5))
    _, _, drafting = _run(gate, lambda position: 1 if position < turn else 4, turn + 2000, cost=1.5)
    back = min(position for position in drafting if position >= turn)
    assert back - turn <= 256
    assert {b - a for a, b in itertools.pairwise(drafting) if a >= turn} == {4}  # and stays


def test_interval_doubles_with_each_try_that_fails_and_starts_again_after_one_that_pays():
    def gaps(emitted, num_tokens):
        drafting = _run(gate, emitted, num_tokens, cost=2.5)[2]
        return [b - a - 1 for a, b in itertools.pairwise(drafting) if b - a > 8]

    gate = DraftGate(_gate_table(2.5), first_interval=4 * 8, max_interval=128)
    assert gaps(lambda _: 1, 600) == [32, 64, 128, 128, 128]
    assert gaps(lambda position: 8 if position < 300 else 1, 500)[:2] == [32, 64]


def test_savings_bound_what_is_lost_after_friendly_text():
    """A long friendly text does not buy a long hostile one: the gate shuts after savings and patience are gone."""
    gate = DraftGate(_gate_table(1.5), savings=4.0)
    _run(gate, lambda _: 8, 4000, cost=1.5)
    _, _, drafting = _run(gate, lambda _: 1, 40, cost=1.5)
    assert 0.5 * len(drafting) <= 4 + 1 + 0.5


@pytest.mark.parametrize(("believed", "true", "is_open"), [(1.2, 3.0, False), (3.0, 1.2, True)])
def test_measured_times_overrule_a_wrong_table(believed, true, is_open):
    gate = DraftGate(_gate_table(believed))
    _, _, drafting = _run(gate, lambda _: 2, 1500, cost=true, measured=True)
    late = [position for position in drafting if position > 500]
    assert (len(late) > 400) == is_open
    if not is_open:
        assert len(late) < 25


def test_load_that_slows_all_rounds_alike_changes_nothing():
    fast, slow = (
        _run(DraftGate(_gate_table(1.4)), lambda _: 2, 600, cost=1.4, measured=True, disturb=lambda s, f=f: s * f)[2]
        for f in (1.0, 7.0)
    )
    assert fast == slow


@pytest.mark.parametrize("is_refilled", [True, False])
def test_requests_that_wait_for_each_other_gain_what_the_last_of_them_gains(is_refilled):
    """Two requests, of which one gets three tokens a round and the other one: two on the mean, at 1.5 rounds' cost."""
    gate, rooms, drafting = DraftGate(CostTable([2, 16], [1.0, 1 / 1.3], 16, [2], [0.2])), [100, 100], 0
    while min(rooms):
        is_drafting = gate.should_draft()
        counts = [min(n, room) for n, room in zip((3, 1) if is_drafting else (1, 1), rooms, strict=True)]
        left = [room - n for room, n in zip(rooms, counts, strict=True)]
        measured = {"num_requests": 2, "rooms": None if is_refilled else (rooms, left)}
        gate.observe(sum(counts), 14 if is_drafting else None, **measured)
        drafting, rooms = drafting + is_drafting, left
    assert drafting == 34 if is_refilled else 2 <= drafting < 12


def test_plain_time_is_that_of_rounds_whose_requests_leave_when_they_are_full():
    gate = DraftGate(CostTable([1, 2, 3], [1.0, 0.5, 0.25], 3))
    assert gate._plain_seconds([2, 7, 0, 3]) == pytest.approx(2 * 4.0 + 1 * 2.0 + 4 * 1.0)
    assert gate._plain_seconds([0, 0]) == 0


def test_after_two_failed_texts_the_next_ones_wait_until_a_try_gains():
    gate = DraftGate(_gate_table(1.5))
    tries = []
    for text in range(40):
        gate.reset()
        emitted = 1 if text < 20 else 4
        tries.append(bool(_run(gate, lambda _, emitted=emitted: emitted, 64, cost=1.5)[2]))
    assert tries[:2] == [True, True]
    assert 2 <= sum(tries[2:20]) <= 18 * 64 // 256 + 2
    first = tries.index(True, 20)
    assert first <= 24
    assert all(tries[first:])


def test_a_disturbed_round_does_not_shut_the_gate():
    rng = random.Random(1)
    gate = DraftGate(_gate_table(1.4))
    _run(gate, lambda _: 3, 200, cost=1.4, measured=True)
    _, _, drafting = _run(
        gate, lambda _: 3, 3000, cost=1.4, measured=True, disturb=lambda s: s * (50 if rng.random() < 0.05 else 1)
    )
    assert len(drafting) > 0.95 * 1000


def test_disturbed_plain_rounds_do_not_open_the_gate():
    rng = random.Random(2)
    gate = DraftGate(_gate_table(1.6))

    def disturb(seconds):
        return 50 * seconds if seconds == 1.0 and rng.random() < 0.1 else seconds

    _, _, drafting = _run(gate, lambda _: 1, 5000, cost=1.6, measured=True, disturb=disturb)
    assert len(drafting) < 3 * (4 + 5000 / 256)


def test_plain_rounds_are_measured_now_and_then_only_where_times_are_given():
    def plain_rounds(measured):
        gate = DraftGate(_gate_table(1.4))
        _, tokens, drafting = _run(gate, lambda _: 4, 4000, cost=1.4, measured=measured)
        return tokens - 4 * len(drafting)

    assert plain_rounds(measured=False) == 0
    assert 1000 / 64 <= plain_rounds(measured=True) <= 1000 / 64 + 6


def test_asking_the_gate_changes_nothing():
    gate = DraftGate(_gate_table(1.4))
    assert all(gate.should_draft() for _ in range(100))
    gate.observe(1, 7, seconds=None)
    for _ in range(40):
        gate.observe(1, 7, seconds=None)
    assert not any(gate.should_draft() for _ in range(100))


def test_new_text_is_tried_at_once_but_never_sooner_than_the_first_interval():
    gate = DraftGate(_gate_table(2.5))
    _run(gate, lambda _: 1, 1000, cost=2.5)  # the interval is at its longest
    while not gate.should_draft():
        gate.observe(1, None)
    while gate.should_draft():
        gate.observe(1, 7)
    for _ in range(10):
        gate.observe(1, None)
    gate.reset()
    assert not gate.should_draft()
    for _ in range(22):
        assert not gate.should_draft()
        gate.observe(1, None)
    assert gate.should_draft()


def test_requests_of_a_batch_are_judged_by_their_mean():
    table = CostTable([4, 8], [1.0, 1 / 1.5], 64)
    for emitted, is_open in ((8, True), (5, False)):
        gate = DraftGate(table)
        for _ in range(20):
            gate.observe(emitted, 4, num_requests=4)
        assert gate.should_draft() == is_open


@pytest.mark.parametrize(
    "wrong", [{"patience": 0}, {"savings": -1}, {"first_interval": 0}, {"first_interval": 9, "max_interval": 8}]
)
def test_gate_that_could_not_work_is_refused(wrong):
    with pytest.raises(ValueError, match="A gate needs"):
        DraftGate(_gate_table(1.4), **wrong)


def test_schedule_hands_rounds_to_its_gate_and_others_always_draft():
    schedule = ThroughputSchedule(_gate_table(2.5))
    for other in (FixedLength(), ConfidenceThreshold(0.5)):
        for _ in range(10):
            other.observe(1, 7, seconds=9.0)
        other.reset()
        assert other.should_draft()
    assert schedule.should_draft()
    schedule.observe(1, 7)
    assert not schedule.should_draft()
    for _ in range(32):
        schedule.observe(1, None)
    assert schedule.should_draft()
    own = DraftGate(_gate_table(2.5))
    assert ThroughputSchedule(_gate_table(2.5), gate=own).gate is own


@pytest.mark.core
@pytest.mark.parametrize(("draft_seconds", "is_worth_it"), [(0.01, True), (5.0, False)])
@pytest.mark.parametrize("rows", [1, 3])
def test_loop_stops_drafting_where_it_does_not_pay_and_only_there(draft_seconds, is_worth_it, rows, monkeypatch):
    """By what rounds take on the host's clock, which here runs while a model does; the table knows nothing of it."""
    clock = [0.0]

    def takes(seconds):
        return lambda *_: clock.__setitem__(0, clock[0] + seconds)

    monkeypatch.setattr(Stopwatch, "host_seconds", staticmethod(lambda: clock[0]))
    target, prompt = make_tiny_target("qwen3", seed=2), random_prompt(64, 6, seed=4)
    expected = plain(target, prompt, max_new_tokens=40)
    draft = make_draft_of_quality(target, expected[0].tolist(), "perfect")
    target.register_forward_hook(takes(0.1))
    draft.register_forward_hook(takes(draft_seconds))
    schedule = ThroughputSchedule(_table(_smooth, draft_seconds=0.01))
    settings = {"max_new_tokens": 40, "return_dict_in_generate": True, "schedule": schedule}
    for _ in range(2):  # a gate that is shut stays so in the next call
        output = target.generate(
            prompt.expand(rows, -1), assistant_model=draft, do_sample=False, pad_token_id=0, **settings
        )
        assert output.sequences.tolist() == expected.tolist() * rows
        drafted = [r.draft_ids is not None for r in output.rounds if r.row == 0][:-1]
        if is_worth_it:
            assert drafted.count(False) <= 2  # a plain round is measured now and then
        else:
            assert drafted.count(True) < len(drafted) / 4


@pytest.mark.core
@pytest.mark.parametrize(("num_requests", "waits", "patience"), [(1, True, 2.0), (4, False, 2.0), (4, True, 4.0)])
def test_gate_is_twice_as_patient_where_the_luck_of_one_request_decides(num_requests, waits, patience):
    gate = DraftGate(CostTable([1, 8], [1.0, 1.0], 8, [1], [0.25]), patience=2.0)
    rounds = 0
    while gate.should_draft():  # a quarter of a plain round is lost in each
        rounds += 1
        rooms = ([100 - rounds] * num_requests, [99 - rounds] * num_requests) if waits else None
        gate.observe(num_requests, 0, num_requests=num_requests, rooms=rooms)
        assert rounds < 100
    assert rounds == patience / 0.25 + 1
