"""Figures of several calls together: rounds pooled over prompts (glossary in the README), quartiles of ratios."""

import math
from collections.abc import Iterable, Sequence

import torch

from ..state import GenerationStats, RoundRecord

# Of an arm whose drafting is not ours: transformers tells of no rounds.
NO_ROUNDS = {"acceptance_at": None, "survival_at": None, "verify_rate": None}


def pool_rounds(rounds: Iterable[RoundRecord]) -> dict[str, float | list[float | None]]:
    """tau, acceptance and survival by position and verify rate over the rounds of all prompts, each counting once.

    A position that no round reached has no acceptance: None.
    """
    stats = GenerationStats.from_rounds(list(rounds), tokens=0, seconds={"total": 0.0})
    return {
        "tau": stats.tau,
        "acceptance_at": [None if math.isnan(rate) else rate for rate in stats.acceptance_at],
        "survival_at": list(stats.survival_at),
        "verify_rate": stats.verify_rate,
    }


def pool_forwards(num_tokens: Sequence[int], num_forwards: Sequence[int]) -> float:
    """tau of calls that tell no rounds: new tokens after each call's first, by target forwards after its prefill.

    Plain generation has 1. Prompt lookup verifies its first candidates within the prefill; the tokens it gains there
    count, that forward does not.
    """
    forwards = sum(num_forwards) - len(num_forwards)
    return (sum(num_tokens) - len(num_tokens)) / forwards if forwards else 1.0


def count_outcomes(rounds: Iterable[RoundRecord]) -> dict[str, int]:
    """Verified drafted tokens that were accepted, and that were not."""
    rounds = list(rounds)
    accepted = sum(r.num_accepted for r in rounds)
    return {"accepted": accepted, "rejected": sum(r.verify_length for r in rounds) - accepted}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median, p25 and p75, interpolated linearly."""
    shares = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    return dict(
        zip(
            ("median", "p25", "p75"),
            torch.tensor(values, dtype=torch.float64).quantile(shares).tolist(),
            strict=True,
        )
    )
