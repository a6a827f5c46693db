"""run_simulation(): plain decoding, transformers' own assisted loop and ours on a simulated pair, against the limit.

Timed is decoding: caches are filled with random keys and values before a call, and its clock starts behind the first
forward, which reads the prompt's last token. Ours stops behind the last round, for a call by itself does not give a
cache back. transformers' loop takes no filled cache: its first forward reads the whole prompt, and what its first
draft reads of it is on the clock.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from transformers import Cache, PreTrainedModel, StaticCache
from transformers.utils import logging

from ..compat import CACHE
from ..schedule import Schedule
from ..state import DraftContext, GenerationStats
from .clock import now
from .counts import counted_rounds
from .environment import describe_environment
from .metrics import quartiles
from .roofline import DeviceRates, draft_work, target_work
from .simulated_arms import PLAIN, PLAIN_COMPILED, Arm, arms_for, forget_compiled
from .simulated_pair import SimulatedPair

logger = logging.get_logger(__name__)

_COUNTED_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class _Run:
    seconds: float  # behind the prefill
    is_right: bool  # whether the pair's text came out
    stats: GenerationStats | None  # None: nothing was drafted


class _Watched(Schedule):
    """Whole blocks, and the time at which the last of them was over."""

    num_tokens, needs_confidence = None, False

    def __init__(self, mark: Callable[..., None] | None):
        self._mark, self.last_round = mark, None

    def observe(self, *args, **kwargs) -> None:
        self.last_round = now(torch.device("cpu"))  # without a wait: the round has read from the device
        if self._mark is not None:
            self._mark()


@dataclass(slots=True)
class _Outcome:
    """What came of an arm."""

    runs: list[_Run] = field(default_factory=list)
    counts: tuple[int, int] | None = None  # launches and host reads of a round
    reason: str | None = None  # why it cannot run


def run_simulation(
    pair: SimulatedPair,
    rates: DeviceRates,
    *,
    batch_size: int = 1,
    context: int = 2048,
    max_new_tokens: int = 128,
    repeats: int = 3,
    arms: Sequence[Arm] | None = None,
) -> dict[str, Any]:
    """Decode about `max_new_tokens` (whole rounds) after `context` tokens of each of `batch_size` sequences, greedily.

    All arms run in turn, in an order that is rotated, `repeats` times after a first call that is not timed; one after
    the other where their caches do not fit into the device's memory together. An arm that raises has its `reason` in
    the result and does not stop the others.
    """
    bench = _Bench(pair, batch_size, context, max_new_tokens)
    arms = arms_for(pair.target.device) if arms is None else arms
    outcomes = {arm.name: _Outcome() for arm in arms}
    for group in [list(arms)] if bench.all_fit() else [[arm] for arm in arms]:
        # Ours may move weights, which others' graphs are not to see: it does so before they are captured.
        for arm in sorted(group, key=lambda arm: not arm.is_ours):
            _attempt(bench, arm, outcomes[arm.name], is_timed=False)
        for turn in range(1, repeats + 1):
            shift = turn % len(group)
            for arm in group[shift:] + group[:shift]:
                _attempt(bench, arm, outcomes[arm.name], is_timed=True)
        for arm in group:
            bench.forget(arm)
    return _summarise(bench, rates, {arm: outcomes[arm.name] for arm in arms})


class _Bench:
    """One setting: prompts, what must come out, and caches filled with the prompts' contexts."""

    def __init__(self, pair: SimulatedPair, num_rows: int, context: int, max_new_tokens: int):
        if context < 2:
            raise ValueError(f"`context` is a prompt of at least 2 tokens, got {context}.")
        self.pair, self.num_rows, self.context = pair, num_rows, context
        self.device = pair.target.device
        vocab_size = pair.target.config.vocab_size
        first_ids, self.num_rounds, self.num_tokens = pair.passages(num_rows, max_new_tokens)
        text = (first_ids.unsqueeze(1) + torch.arange(-1, self.num_tokens)) % vocab_size
        generator = torch.Generator().manual_seed(0)
        before = torch.randint(vocab_size, (num_rows, context - 1), generator=generator)
        self.prompts = torch.cat([before, text[:, :1]], dim=1).to(self.device)
        self._expected = text[:, 1:].to(self.device)
        self._static: dict[str, Cache] = {}

    @property
    def tau(self) -> float:
        """Tokens a round emits in these passages."""
        return (self.num_tokens - 1) / self.num_rounds

    def run(self, arm: Arm, num_tokens: int | None = None, mark: Callable[..., None] | None = None) -> _Run:
        """One call of generate() for `num_tokens` (default: the whole passage), timed behind its first forward.

        `mark` is called once a round.
        """
        target, draft = self.pair.target, self.pair.draft
        num_tokens = self.num_tokens if num_tokens is None else num_tokens
        arguments = {"max_new_tokens": num_tokens, "do_sample": False, **arm.arguments(draft)}
        arguments |= {"attention_mask": torch.ones_like(self.prompts), **self._cache_argument(arm)}
        watched = _Watched(mark)
        with ExitStack() as stack:
            if arm.is_ours:
                arguments["schedule"] = watched
            elif mark is not None:
                stack.callback(target.register_forward_pre_hook(mark).remove)
            stack.enter_context(arm.scope(target, draft))
            starts = stack.enter_context(_time_after_first_forward(target))
            output = target.generate(self.prompts, **arguments)
            seconds = (watched.last_round or now(self.device)) - starts[0]
        is_right = torch.equal(output[:, self.context :], self._expected[:, :num_tokens])
        return _Run(seconds, is_right, draft.last_stats if arm.is_drafting else None)

    def count(self, arm: Arm) -> tuple[int, int] | None:
        """Launches and host reads of one of the arm's rounds; None where they are hidden in compiled code."""
        num_tokens = 1 + _COUNTED_ROUNDS * (self.pair.draft.config.block_size + 1)
        if arm.is_compiled:
            if not arm.is_ours or self.device.type != "cuda":
                return None
            num_tokens = self.num_tokens  # of another number of slots, graphs would be captured anew
        with counted_rounds(self.device) as counts:
            self.run(arm, min(num_tokens, self.num_tokens), counts.mark)
        return counts.per_round

    def all_fit(self) -> bool:
        """Whether the caches that compiled arms keep, and one being filled, fit into what is left of the memory."""
        if self.device.type != "cuda":
            return True
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        lengths = self.num_rows * (self.context + self.num_tokens)
        models = (self.pair.target, self.pair.draft)
        return 3.5 * lengths * sum(_position_bytes(model) for model in models) < free

    def forget(self, arm: Arm) -> None:
        """Free the memory that `arm` kept: its cache, and code that was compiled for it."""
        self._static.pop(arm.name, None)
        if arm.is_compiled:
            forget_compiled(self.pair.target)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _cache_argument(self, arm: Arm) -> dict[str, Cache]:
        if arm.cache is None:
            return {}
        target, draft, num_read = self.pair.target, self.pair.draft, self.context - 1
        cache = self._static.get(arm.name)
        if cache is None:
            cache = arm.cache(target.config, self.context + self.num_tokens)
        if isinstance(cache, StaticCache):
            self._static[arm.name] = cache  # compiled code belongs to one cache
            cache.reset()
        _fill(cache, target, self.num_rows, num_read)
        if arm.is_drafting:
            last = torch.full((self.num_rows, 1), num_read - 1, device=self.device)
            draft.contexts[cache] = DraftContext(draft.new_cache(), target_length=num_read, last_position=last)
            _fill(draft.contexts[cache].cache, draft, self.num_rows, num_read)
        return {CACHE: cache}


def _attempt(bench: _Bench, arm: Arm, outcome: _Outcome, *, is_timed: bool) -> None:
    """Run `arm`; the first time also count what a round launches and reads."""
    if outcome.reason is not None:
        return
    try:
        run = bench.run(arm)
        if is_timed:
            outcome.runs.append(run)
        else:
            outcome.counts = bench.count(arm)
    except Exception as error:  # whatever it is, the other arms go on
        outcome.reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        if not isinstance(error, ValueError):  # a refusal
            logger.warning(f"{arm.name} failed.", exc_info=True)
    if outcome.reason is not None:  # and the error has let go of the tensors it held
        bench.forget(arm)


@contextmanager
def _time_after_first_forward(target: PreTrainedModel):
    """A list that gets the time at which the target's next forward is done."""
    times: list[float] = []

    def stop(*_) -> None:
        handle.remove()  # compiled forwards would trace it
        times.append(now(target.device))

    handle = target.register_forward_hook(stop)
    try:
        yield times
    finally:
        handle.remove()


def _fill(cache: Cache, model: PreTrainedModel, num_rows: int, num_positions: int) -> None:
    config = model.config
    shape = (2, 1, config.num_key_value_heads, num_positions, config.head_dim)
    keys, values = torch.randn(shape, device=model.device, dtype=model.dtype).expand(-1, num_rows, -1, -1, -1)
    for layer in range(config.num_hidden_layers):
        cache.update(keys, values, layer)


def _position_bytes(model: PreTrainedModel) -> int:
    """Bytes of a position's keys and values."""
    config = model.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize


def _summarise(bench: _Bench, rates: DeviceRates, outcomes: Mapping[Arm, _Outcome]) -> dict[str, Any]:
    pair = bench.pair
    limits = _limits(bench, rates)
    runs = {arm.name: outcome.runs for arm, outcome in outcomes.items() if outcome.reason is None}
    arms = {arm.name: _summarise_arm(bench, arm, outcome, limits, runs) for arm, outcome in outcomes.items()}
    ours = [arms[arm.name] for arm in outcomes if arm.is_ours and arm.name in runs]
    best = max(ours, key=lambda arm: arm["tokens_per_second"], default={})
    return {
        **describe_environment(pair.target),
        "batch_size": bench.num_rows,
        "context": bench.context,
        "new_tokens": bench.num_tokens,
        "tau_asked": pair.tau,
        "copy_bandwidth": rates.copy_bandwidth,
        "matrix_rate": rates.matrix_rate,
        "limit_tokens_per_second": {"plain": limits[False], "drafting": limits[True]},
        **{key: best.get(key) for key in ("tau", "host_reads_per_round", "launches_per_round", "roofline_percent")},
        "arms": arms,
    }


def _limits(bench: _Bench, rates: DeviceRates) -> dict[bool, float]:
    """Tokens a second at the roofline, over all rows: with drafting, and without."""
    target, draft, tau = bench.pair.target, bench.pair.draft, bench.tau
    num_rows, context = bench.num_rows, bench.context + bench.num_tokens // 2
    plain = target_work(target, num_rows, context, 1).seconds(rates)
    verify = target_work(target, num_rows, context, draft.config.block_size + 1).seconds(rates)
    drafting = draft_work(draft, target, num_rows, context, tau).seconds(rates)
    return {False: num_rows / plain, True: num_rows * tau / (drafting + verify)}


def _summarise_arm(
    bench: _Bench, arm: Arm, outcome: _Outcome, limits: dict[bool, float], runs: Mapping[str, list[_Run]]
) -> dict[str, Any]:
    """An arm's entry in the JSON; all figures are of decoding, seconds are medians."""
    if outcome.reason is not None:
        return {"tokens_per_second": None, "reason": outcome.reason}
    seconds = median(run.seconds for run in outcome.runs)
    num_rounds = bench.num_rounds if arm.is_drafting else bench.num_tokens - 1
    round_ms = 1000 * seconds / num_rounds
    tokens_per_second = bench.num_rows * (bench.num_tokens - 1) / seconds
    launches, host_reads = outcome.counts or (None, None)
    stats = [run.stats for run in outcome.runs]
    return {
        "tokens_per_second": tokens_per_second,
        "ratio_to_plain": _ratio(runs.get(PLAIN), outcome.runs),
        "ratio_to_plain_compiled": _ratio(runs.get(PLAIN_COMPILED), outcome.runs),
        "tau": stats[0].tau if arm.is_drafting else 1.0,
        "round_ms": round_ms,
        "part_ms": _part_ms(stats, num_rounds, round_ms) if arm.is_drafting else None,
        "launches_per_round": launches,
        "host_reads_per_round": host_reads,
        "roofline_percent": 100 * tokens_per_second / limits[arm.is_drafting],
        "is_right": all(run.is_right for run in outcome.runs),
    }


def _part_ms(stats: Sequence[GenerationStats], num_rounds: int, round_ms: float) -> dict[str, float] | None:
    """Milliseconds of a round's parts; None where the loop does not tell.

    The rest is what of a round's time the device does neither; parts are measured on the device, and a block that is
    drafted ahead of the last read counts, too.
    """
    if stats[0].draft_seconds is None:
        return None
    parts = {part: median(getattr(s, f"{part}_seconds") for s in stats) for part in ("draft", "verify")}
    parts = {part: 1000 * seconds / num_rounds for part, seconds in parts.items()}
    return parts | {"rest": max(0.0, round_ms - sum(parts.values()))}


def _ratio(slower: Sequence[_Run] | None, runs: Sequence[_Run]) -> dict[str, float] | None:
    """Quartiles of the ratios of speeds, paired by turn."""
    if slower is None:
        return None
    return quartiles([other.seconds / run.seconds for other, run in zip(slower, runs, strict=True)])
