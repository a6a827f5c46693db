"""DraftGate: whether a round drafts at all, learned from what rounds cost and bring."""

from collections import deque
from collections.abc import Sequence
from statistics import median

from .cost_table import CostTable


class DraftGate:
    """Decides before each round whether drafting pays, from what rounds cost and emitted: off, and back on.

    The unit is the time p of a plain round, one without drafting, and c is the time of a drafting one over p. Drafting
    goes on until it has lost more than `patience` against plain decoding of the same tokens; gains count against
    losses, the last `savings` of them. Then follow `first_interval` plain rounds and another try, and after each try
    that fails twice as many, up to `max_interval`; one that gains `patience` brings the first interval back.

    Never slower than plain by more than the tries cost: each loses at most patience + c - 1, for a round emits a token
    a request in any case. On N tokens a request of a text on which drafting always loses there are at most
    1 + log2(max_interval / first_interval) + N / max_interval tries, on any text 1 + N / first_interval. Where
    drafting pays again, it is tried within `max_interval` rounds.

    Requests that wait for each other (`rooms`) gain only what the last of them to end gains. As the luck of a single
    one decides then, patience is twice as long.

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
        self._has_failed, self._failed_texts = False, 0  # in this text; in texts since it last gained
        # Measured times over the table's (load, context, what a round costs besides) of the last rounds of each kind:
        # their median, so that one that was disturbed does not count.
        self._draft_factors: deque[float] = deque(maxlen=5)
        self._plain_factors: deque[float] = deque(maxlen=5)
        self._rounds_to_measure, self._measuring_gap = 4, 4  # drafting rounds before a plain one is measured

    def should_draft(self) -> bool:
        """Whether the next round drafts; asking changes nothing."""
        return self._to_wait == 0 and self._rounds_to_measure > 0

    def observe(
        self,
        num_emitted: int,
        num_verified: int | None,
        *,
        num_requests: int = 1,
        seconds: float | None = None,
        rooms: tuple[Sequence[int], Sequence[int]] | None = None,
    ) -> None:
        """Learn from a round.

        Args:
            num_emitted: tokens the round added, over all requests.
            num_verified: tokens in the target's forward besides one a request; None where nothing was drafted.
            num_requests: requests in the round.
            seconds: of the whole round, measured; None: the table's times.
            rooms: tokens that each request may still emit, before and after the round, where no other takes the place
                of one that ends; None: one does.
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
        if rooms is None:
            saved_seconds = plain_seconds * num_emitted / num_requests
        else:
            saved_seconds = self._plain_seconds(rooms[0]) - self._plain_seconds(rooms[1])
        # Before both kinds were measured, the table is trusted about their ratio.
        if self._draft_factors and self._plain_factors:
            draft_seconds *= median(self._draft_factors)
            plain_seconds *= median(self._plain_factors)
            saved_seconds *= median(self._plain_factors)
        patience = self.patience * (1 if rooms is None or num_requests == 1 else 2)
        self._after_drafting_round((draft_seconds - saved_seconds) / plain_seconds, patience)

    def _plain_seconds(self, rooms: Sequence[int]) -> float:
        """Of plain rounds that fill `rooms`; a request that is full takes no more time."""
        seconds, filled = 0.0, 0
        for num_full, room in enumerate(sorted(rooms)):
            if room > filled:
                seconds += (room - filled) * self.cost_table.seconds(len(rooms) - num_full)
                filled = room
        return seconds

    def reset(self) -> None:
        """Another text comes: a try is due, unless it failed in the last `first_interval` rounds or two texts."""
        self._failed_texts += self._has_failed
        self._has_failed = False
        if self._failed_texts < 2:
            self._to_wait = min(self._to_wait, max(0, self.first_interval - self._waited))

    def _after_plain_round(self) -> None:
        if self._rounds_to_measure <= 0:
            self._measuring_gap = min(2 * self._measuring_gap, 64)
        self._rounds_to_measure = self._measuring_gap
        if self._to_wait > 0:
            self._waited += 1
            self._to_wait -= 1

    def _after_drafting_round(self, loss: float, patience: float) -> None:
        self._lost = max(self._lost + loss, -self.savings)
        if self._lost <= -patience:
            self._interval, self._failed_texts, self._has_failed = self.first_interval, 0, False
        if self._lost > patience:
            self._has_failed = True
            self._lost, self._waited, self._to_wait = 0.0, 0, self._interval
            self._interval = min(2 * self._interval, self.max_interval)
