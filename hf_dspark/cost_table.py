"""CostTable: what forwards take by the number of their tokens, in the JSON that other engines read."""

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite


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
