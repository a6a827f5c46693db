"""Step 3, schedule: how many drafted tokens the target reads. A schedule never looks at the tokens themselves.

Whether token k is verified may depend on confidences up to c_k only, which read tokens before k: otherwise the
output's law changes (paper, Appendix A).
"""

from collections import deque
from dataclasses import dataclass, field

import torch

from .cost_table import CostTable
from .draft_gate import DraftGate

MODES = ("early-stop", "asynchronous")


class Schedule:
    """What the loop asks of a schedule besides calling it. Without a gate it drafts in every round."""

    __slots__ = ()
    gate: DraftGate | None = None

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


def checked_lengths(lengths: list[int], block_shape: tuple[int, int], schedule: Schedule) -> list[int]:
    """What a schedule said of a block [B, g], which the end of a call may cut short: more than there are is all.

    Raises ValueError for what is no length of each row.
    """
    num_rows, num_drafted = block_shape
    if len(lengths) != num_rows or not all(isinstance(length, int) and length >= 0 for length in lengths):
        raise ValueError(
            f"{schedule} gave verify lengths {lengths} for confidences of {num_rows} rows of {num_drafted} drafted "
            f"tokens. It must return an integer tensor [{num_rows}] of values from 0 to {num_drafted}."
        )
    return [min(length, num_drafted) for length in lengths]


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
            so all requests verify the same number; so generate() asks (`padded`) where it cannot pack.
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


def _check_num_tokens(num_tokens: int | None) -> None:
    if num_tokens is not None and num_tokens < 0:
        raise ValueError(f"`num_tokens` is a number of drafted tokens and must be at least 0, got {num_tokens}.")
