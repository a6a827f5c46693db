"""Step 3, schedule: how many drafted tokens the target reads. A schedule never looks at the tokens themselves.

Whether token k is verified may depend on confidences up to c_k only, which read tokens before k: otherwise the
output's law changes (paper, Appendix A).
"""

import json
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite, sqrt
from statistics import median

import torch

MODES = ("early-stop", "asynchronous")


class Schedule:
    """What the loop asks of a schedule besides calling it. Without a gate it drafts in every round."""

    __slots__ = ()
    gate: "DraftGate | None" = None

    def padded(self, confidence: torch.Tensor) -> torch.Tensor:
        """As a call, where shorter rows are padded to the longest."""
        return self(confidence)

    def should_draft(self) -> bool:
        """Whether the next round drafts at all; asked before anything is drafted."""
        return self.gate is None or self.gate.should_draft()

    def observe(self, num_emitted: int, num_verified: int | None, **measured) -> None:
        """What a round brought, with the arguments of `DraftGate.observe`."""
        if self.gate is not None:
            self.gate.observe(num_emitted, num_verified, **measured)

    def reset(self) -> None:
        """Another call begins."""
        if self.gate is not None:
            self.gate.reset()


@dataclass(frozen=True, slots=True)
class FixedLength(Schedule):
    """Verify `num_tokens` drafted tokens each round; None is the whole block, 0 never drafts."""

    num_tokens: int | None = None
    needs_confidence = False

    def __post_init__(self):
        _check_num_tokens(self.num_tokens)

    def __call__(self, confidence: torch.Tensor) -> torch.Tensor:
        """Verify lengths [B] for confidences [B, g]."""
        length = confidence.shape[1] if self.num_tokens is None else min(self.num_tokens, confidence.shape[1])
        return torch.full((confidence.shape[0],), length, device=confidence.device)


@dataclass(frozen=True, slots=True)
class ConfidenceThreshold(Schedule):
    """Stop before the first position whose conditional confidence c_k is below `threshold` (paper section 4).

    A threshold of 0 verifies all that `num_tokens` allows (None: the whole block).
    """

    threshold: float
    num_tokens: int | None = None
    needs_confidence = True

    def __post_init__(self):
        _check_num_tokens(self.num_tokens)
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"`threshold` is a probability and must lie between 0 and 1, got {self.threshold}.")

    def __call__(self, confidence: torch.Tensor) -> torch.Tensor:
        """Verify lengths [B] for confidences [B, g]."""
        reached = (confidence >= self.threshold).long().cumprod(-1).sum(-1)
        return reached if self.num_tokens is None else reached.clamp_max(self.num_tokens)


@dataclass(frozen=True, slots=True)
class CostTable:
    """What a forward of the target costs by the number of its tokens, and a block of the draft by that of requests.

    Between samples the time of a step is interpolated, not its inverse; below the first sample it is the first one's,
    above the last it goes on with the last slope, or stays where that falls. `costs.profile_costs` measures a table.
    """

    sample_batch_tokens: Sequence[int]
    sample_steps_per_sec: Sequence[float]
    max_batch_tokens: int  # no forward is filled with drafted tokens beyond it
    sample_draft_requests: Sequence[int] = ()  # empty: drafting takes no time
    sample_draft_seconds: Sequence[float] = ()

    def __post_init__(self):
        for count, value in (
            ("sample_batch_tokens", "sample_steps_per_sec"),
            ("sample_draft_requests", "sample_draft_seconds"),
        ):
            counts, values = tuple(getattr(self, count)), tuple(getattr(self, value))
            _check_samples(count, counts, value, values)
            object.__setattr__(self, count, counts)
            object.__setattr__(self, value, values)
        if not self.sample_batch_tokens:
            raise ValueError("`sample_batch_tokens` is empty: a cost table needs one sample at least.")
        if not _is_count(self.max_batch_tokens) or self.max_batch_tokens < self.sample_batch_tokens[-1]:
            raise ValueError(
                f"`max_batch_tokens` is the most tokens of a forward and must be a whole number not below the last of "
                f"`sample_batch_tokens` ({self.sample_batch_tokens[-1]}), got {self.max_batch_tokens!r}."
            )

    def steps_per_second(self, batch_tokens: int) -> float:
        """SPS(B): forwards of the target a second with `batch_tokens` tokens in each."""
        return 1 / self.seconds(batch_tokens)

    def seconds(self, batch_tokens: int) -> float:
        """Time of a forward of the target over `batch_tokens` tokens."""
        return _interpolate(self.sample_batch_tokens, [1 / s for s in self.sample_steps_per_sec], batch_tokens)

    def draft_seconds(self, num_requests: int) -> float:
        """Time of drafting a block for each of `num_requests` requests."""
        if not self.sample_draft_requests:
            return 0.0
        return _interpolate(self.sample_draft_requests, self.sample_draft_seconds, num_requests)

    def to_json(self) -> str:
        """The fields under their own names; those of the draft only where it was measured."""
        return json.dumps({name: value for name, value in asdict(self).items() if value != ()}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "CostTable":
        """A table from `to_json` or from another engine; other keys are passed over. Raises ValueError."""
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"A cost table is a JSON object, and this is no JSON: {error}.") from None
        required = ("sample_batch_tokens", "sample_steps_per_sec", "max_batch_tokens")
        missing = [name for name in required if not isinstance(fields, dict) or name not in fields]
        if missing:
            raise ValueError(
                f"A cost table is a JSON object with the keys {', '.join(required)}; here {', '.join(missing)} is "
                "missing. `hf-dspark calibrate --cost --json FILE` writes one."
            )
        names = [name for name in cls.__dataclass_fields__ if name in fields]
        for name in names:
            if name != "max_batch_tokens" and not isinstance(fields[name], list):
                raise ValueError(f"`{name}` of a cost table is a list of numbers, got {fields[name]!r}.")
        return cls(**{name: fields[name] for name in names})


class DraftGate:
    """Decides before each round whether drafting pays, from what rounds cost and emitted: off, and back on.

    The unit is the time p of a plain round, one without drafting, and c is the time of a drafting one over p. Drafting
    goes on until it has lost more than `patience` against plain decoding of the same tokens; gains count against
    losses, the last `savings` of them; both over the root of the number of requests. Then follow `first_interval`
    plain rounds and another try, and after each try that fails twice as many, up to `max_interval`; one that gains
    `patience` brings the first interval back.

    Never slower than plain by more than the tries cost: each loses at most patience + c - 1, for a round emits a token
    a request in any case. On N tokens a request of a text on which drafting always loses there are at most
    1 + log2(max_interval / first_interval) + N / max_interval tries, on any text 1 + N / first_interval. Where
    drafting pays again, it is tried within `max_interval` rounds.

    Times are the table's unless `observe` is given measured ones. Then a plain round is put in now and then, at
    most every 64th, to know what plain decoding takes now.
    """

    def __init__(
        self,
        cost_table: CostTable,
        *,
        patience: float = 1.0,
        savings: float = 8.0,
        first_interval: int = 32,
        max_interval: int = 256,
    ):
        if not (patience > 0 and savings >= 0 and 1 <= first_interval <= max_interval):
            raise ValueError(
                "A gate needs `patience` above 0, `savings` of at least 0 and 1 <= `first_interval` <= "
                f"`max_interval`, got {patience}, {savings}, {first_interval} and {max_interval}."
            )
        self.cost_table = cost_table
        self.patience, self.savings = patience, savings
        self.first_interval, self.max_interval = first_interval, max_interval
        self._lost = 0.0  # plain rounds' time lost since drafting began; below 0: gained
        self._interval = first_interval  # plain rounds after the next try that fails
        self._waited, self._to_wait = 0, 0  # plain rounds since the last try failed; until the next try
        # Measured times over the table's (load, context, what a round costs besides) of the last rounds of each kind:
        # their median, so that one that was disturbed does not count.
        self._draft_factors: deque[float] = deque(maxlen=5)
        self._plain_factors: deque[float] = deque(maxlen=5)
        self._rounds_to_measure, self._measuring_gap = 4, 4  # drafting rounds before a plain one is measured

    def should_draft(self) -> bool:
        """Whether the next round drafts; asking changes nothing."""
        return self._to_wait == 0 and self._rounds_to_measure > 0

    def observe(
        self, num_emitted: int, num_verified: int | None, *, num_requests: int = 1, seconds: float | None = None
    ) -> None:
        """Learn from a round.

        Args:
            num_emitted: tokens the round added, over all requests.
            num_verified: tokens in the target's forward besides one a request; None where nothing was drafted.
            num_requests: requests in the round.
            seconds: of the whole round, measured; None: the table's times.
        """
        plain_seconds = self.cost_table.seconds(num_requests)
        if num_verified is None:
            if seconds is not None:
                self._plain_factors.append(seconds / plain_seconds)
            self._after_plain_round()
            return
        draft_seconds = self.cost_table.draft_seconds(num_requests)
        draft_seconds += self.cost_table.seconds(num_requests + num_verified)
        if seconds is not None:
            self._draft_factors.append(seconds / draft_seconds)
            self._rounds_to_measure -= 1
        # Before both kinds were measured, the table is trusted about their ratio.
        if self._draft_factors and self._plain_factors:
            draft_seconds *= median(self._draft_factors)
            plain_seconds *= median(self._plain_factors)
        self._after_drafting_round(draft_seconds / plain_seconds - num_emitted / num_requests, num_requests)

    def reset(self) -> None:
        """Another text comes: a try is due, unless the last one failed less than `first_interval` rounds ago."""
        self._to_wait = min(self._to_wait, max(0, self.first_interval - self._waited))

    def _after_plain_round(self) -> None:
        if self._rounds_to_measure <= 0:
            self._measuring_gap = min(2 * self._measuring_gap, 64)
        self._rounds_to_measure = self._measuring_gap
        if self._to_wait > 0:
            self._waited += 1
            self._to_wait -= 1

    def _after_drafting_round(self, loss: float, num_requests: int) -> None:
        # The mean over R requests varies less from round to round, as one over the root of R.
        patience, savings = (limit / sqrt(num_requests) for limit in (self.patience, self.savings))
        self._lost = max(self._lost + loss, -savings)
        if self._lost <= -patience:
            self._interval = self.first_interval
        if self._lost > patience:
            self._lost, self._waited, self._to_wait = 0.0, 0, self._interval
            self._interval = min(2 * self._interval, self.max_interval)


@dataclass(slots=True, eq=False)
class ThroughputSchedule(Schedule):
    """Verify as many tokens as make expected tokens a second highest, over all requests (paper, Algorithm 1).

    Tokens are admitted in the order of their survival. With B tokens in the forward the expected throughput is
    (R + sum of admitted survivals) / (time of the forward + time of the draft); Algorithm 1 as printed where the
    table has no times of the draft.

    - "early-stop": admission stops before the first token that does not raise it. A step in the table hides what
      comes after it.
    - "asynchronous": the number of tokens is where it was highest of all, by the confidences of two calls earlier; the
      present ones only rank. It looks past steps of the table. The first two calls stop early.

    Both are non-anticipating: which token comes next is known from tokens admitted before, and the number of them from
    these or from rounds that are over. One object serves one generate() call at a time.

    Args:
        num_tokens: at most so many drafted tokens a request; None is the whole block.
        packed: whether the forward holds just the admitted tokens. Otherwise shorter rows are padded to the longest,
            so all requests verify the same number; so generate() asks, which pads (`padded`).
        gate: decides whether a round drafts at all; default is one with the same table.
    """

    cost_table: CostTable = field(repr=False)
    num_tokens: int | None = None
    mode: str = "early-stop"
    packed: bool = True
    gate: DraftGate | None = field(default=None, repr=False)
    _capacities: deque = field(default_factory=lambda: deque(maxlen=2), init=False, repr=False)
    _rates: dict = field(default_factory=dict, init=False, repr=False)
    needs_confidence = True

    def __post_init__(self):
        _check_num_tokens(self.num_tokens)
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {', '.join(MODES)}, got {self.mode!r}.")
        if self.gate is None:
            self.gate = DraftGate(self.cost_table)

    def __call__(self, confidence: torch.Tensor, num_drafted: torch.Tensor | None = None) -> torch.Tensor:
        """Verify lengths [R] for confidences [R, g]; of row r only the first `num_drafted[r]` are there (None: all).

        Nothing is read back from the device.
        """
        return self._lengths(confidence, num_drafted, self.packed)

    def padded(self, confidence: torch.Tensor) -> torch.Tensor:
        return self._lengths(confidence, None, False)

    def _lengths(self, confidence: torch.Tensor, num_drafted: torch.Tensor | None, packed: bool) -> torch.Tensor:
        num_requests, length = confidence.shape
        length = length if self.num_tokens is None else min(self.num_tokens, length)
        # Products that a parallel scan takes in another order may rise by a rounding; a prefix must not.
        survival = confidence[:, :length].float().cumprod(-1).cummin(-1).values
        if num_drafted is None:
            num_drafted = torch.full((num_requests,), length, device=survival.device)
        is_there = torch.arange(length, device=survival.device) < num_drafted.unsqueeze(-1)
        rank, gains = _admission_order(survival.masked_fill(~is_there, -1.0), packed=packed)
        width = 1 if packed else num_requests
        gains = gains[: max(0, self.cost_table.max_batch_tokens - num_requests) // width]
        throughput = self._throughput(gains, num_requests, width)
        count = (throughput[1:] > throughput[:-1]).long().cumprod(0).sum()
        if self.mode == "asynchronous":
            if len(self._capacities) == 2:
                capacity, before = self._capacities[0]
                # Rows may have finished since; a column of padded rows is one step, whatever its height.
                count = capacity * num_requests // before if packed else capacity
                count = count.clamp_max(len(gains))
            self._capacities.append((throughput.argmax(), num_requests))
        return ((rank < count) & is_there).sum(-1)

    def _throughput(self, gains: torch.Tensor, num_requests: int, width: int) -> torch.Tensor:
        """Expected tokens a second [N+1] after each number of steps; 0 where a step has no token left to admit."""
        key = (num_requests, len(gains), gains.device)
        if key not in self._rates:  # numbers go to the device once, not in every round
            draft_seconds = self.cost_table.draft_seconds(num_requests)
            counts = range(num_requests, num_requests + width * len(gains) + 1, width)
            rates = [1 / (self.cost_table.seconds(count) + draft_seconds) for count in counts]
            self._rates[key] = torch.tensor(rates, device=gains.device)
        expected = num_requests + torch.cat([gains.new_zeros(1), gains.clamp_min(0).cumsum(0)])
        is_step = torch.cat([gains.new_ones(1), gains]) >= 0
        return expected * self._rates[key] * is_step

    def reset(self) -> None:
        """Another call begins: confidences of the last one are forgotten, what rounds cost is not."""
        self._capacities.clear()
        Schedule.reset(self)  # no super() without arguments: the dataclass with slots is another class than this


def schedule_from(num_tokens: int | None, threshold: float | None) -> FixedLength | ConfidenceThreshold:
    """The schedule that `num_assistant_tokens` and `assistant_confidence_threshold` of a generation config ask for."""
    if threshold is None:
        return FixedLength(num_tokens)
    return ConfidenceThreshold(threshold, num_tokens)


def _admission_order(
    survival: torch.Tensor,  # [R, g]  non-increasing in a row; -1: no token
    *,
    packed: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In which step each token is admitted [R, g], and what each step adds to the expected tokens [N].

    A step is a token; without packing a position of all requests. Of equal survivals the earlier position comes first,
    then the earlier request: a token never comes before one that it follows, and only tokens before it decide when.
    """
    num_requests, length = survival.shape
    if not packed:
        column = torch.arange(length, device=survival.device).expand(num_requests, length)
        gains = survival.clamp_min(0).sum(0)
        return column, torch.where((survival >= 0).any(0), gains, -1.0)
    gains, order = survival.t().reshape(-1).sort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return rank.view(length, num_requests).t(), gains


def _interpolate(points: Sequence[int], values: Sequence[float], at: int) -> float:
    """Linear between points, the first value below them, the last slope above them unless it falls."""
    if at <= points[0] or len(points) == 1:
        return values[0]
    right = min(bisect_left(points, at), len(points) - 1)
    slope = (values[right] - values[right - 1]) / (points[right] - points[right - 1])
    if at > points[-1]:
        return values[-1] + max(slope, 0.0) * (at - points[-1])
    return values[right] - slope * (points[right] - at)


def _check_samples(count_name: str, counts: Sequence[int], value_name: str, values: Sequence[float]) -> None:
    if len(counts) != len(values):
        raise ValueError(
            f"`{count_name}` and `{value_name}` of a cost table belong together, one to one, got {len(counts)} and "
            f"{len(values)} of them."
        )
    if not all(map(_is_count, counts)) or any(a >= b for a, b in zip(counts, counts[1:], strict=False)):
        raise ValueError(
            f"`{count_name}` of a cost table must be whole numbers of at least 1, each larger than the one before it, "
            f"got {list(counts)}."
        )
    if not all(isinstance(value, (int, float)) and isfinite(value) and value > 0 for value in values):
        raise ValueError(f"`{value_name}` of a cost table must be finite numbers above 0, got {list(values)}.")


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_num_tokens(num_tokens: int | None) -> None:
    if num_tokens is not None and num_tokens < 0:
        raise ValueError(f"`num_tokens` is a number of drafted tokens and must be at least 0, got {num_tokens}.")
