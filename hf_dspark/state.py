"""The records that pass between the steps of a round, and the one mutable state of a call.

Tensors keep the batch axis (B); g is the number of drafted tokens, L the number of verified ones, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Distribution:
    """Probabilities of the next token at L positions, over the whole vocabulary or over a listed support.

    `probs` is [B, L, K]. Column j stands for token `support_ids[..., j]`, or for token j where `support_ids` is None.
    """

    probs: torch.Tensor
    support_ids: torch.Tensor | None = None  # [B, L, K]

    def narrow(self, length: int) -> Distribution:
        """The first `length` positions."""
        ids = None if self.support_ids is None else self.support_ids[:, :length]
        return Distribution(self.probs[:, :length], ids)


@dataclass(frozen=True, slots=True)
class DraftBlock:
    """What the draft proposes in one round (paper section 2): the block, and how it came about."""

    token_ids: torch.Tensor  # [B, g]
    base_logits: torch.Tensor  # [B, g, V]  U_k, the parallel stage alone
    draft_logits: torch.Tensor  # [B, g, V]  U_k + B_k, before any logits processor
    confidence_logits: torch.Tensor | None  # [B, g]  before the sigmoid; None without a confidence head
    hidden_states: torch.Tensor  # [B, g, H]  the backbone after its final norm
    # The law each token was drawn from; None: softmax(draft_logits) at the call's temperature, or greedy.
    distribution: Distribution | None = None
    confidence_temperatures: Sequence[float] | None = None  # [g] or longer; None: not calibrated

    @property
    def confidence(self) -> torch.Tensor | None:
        """c_k [B, g], calibrated: probability that token k is accepted given that all before it were."""
        return calibrated_confidence(self.confidence_logits, self.confidence_temperatures)


@dataclass(frozen=True, slots=True)
class Verification:
    """The target's forward over [anchor, L drafted tokens]."""

    logits: torch.Tensor  # [B, L+1, V]  fp32, raw
    outputs: Any  # the model output: features, and what the user asked for, are read from it


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Outcome of the acceptance rule (paper section 2.1)."""

    num_accepted: torch.Tensor  # [B]  drafted tokens kept, without the bonus token
    next_probs: torch.Tensor  # [B, K]  law of the token after them; one-hot or residual, always normalised


@dataclass(frozen=True, slots=True)
class Choice:
    """The target's tokens of one round; columns behind the first `num_accepted` + 1 mean nothing."""

    token_ids: torch.Tensor  # [B, L+1]  accepted drafted tokens, then the target's own
    num_accepted: torch.Tensor  # [B]
    scores: torch.Tensor | None  # [B, L+1, V]  processed; None where nothing needs them all


@dataclass(frozen=True, slots=True)
class Decision:
    """What a round adds to the sequence; the counts are on the host."""

    emitted_ids: torch.Tensor  # [1, m]  accepted tokens and the target's own, up to a stop
    num_accepted: int
    finished: bool
    scores: torch.Tensor | None  # [1, L+1, V]  processed; None where nothing needs them all


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One round of one sequence as it happened. Tensors stay on their device until a property reads them."""

    draft_ids: torch.Tensor | None  # [1, g]; None: nothing was drafted
    emitted_ids: torch.Tensor  # [1, m]  tokens this round added to the sequence
    verify_length: int
    num_accepted: int
    confidence_logits: torch.Tensor | None  # [1, g]  raw; None without a confidence head
    confidence_temperatures: Sequence[float] | None = None  # as in the block
    row: int = 0  # of the batch: every row has a record of each of its rounds

    @classmethod
    def of(
        cls,
        block: DraftBlock | None,
        verify_length: int,
        num_accepted: int,
        emitted_ids: torch.Tensor,
        *,
        row: int = 0,
        row_of_block: int = 0,
    ) -> RoundRecord:
        """The record of a round that drafted `block` (None: nothing), or of one row of it."""
        of_row = slice(row_of_block, row_of_block + 1)
        confidence = None if block is None else block.confidence_logits
        return cls(
            draft_ids=None if block is None else block.token_ids[of_row],
            emitted_ids=emitted_ids,
            verify_length=verify_length,
            num_accepted=num_accepted,
            confidence_logits=None if confidence is None else confidence[of_row],
            confidence_temperatures=None if block is None else block.confidence_temperatures,
            row=row,
        )

    @property
    def drafted(self) -> list[int]:
        """Token ids the draft proposed, in order."""
        return [] if self.draft_ids is None else self.draft_ids[0].tolist()

    @property
    def verified(self) -> int:
        """How many of them the target read."""
        return self.verify_length

    @property
    def accepted(self) -> int:
        """How many of them the target accepted, without the bonus token."""
        return self.num_accepted

    @property
    def emitted(self) -> list[int]:
        """Token ids this round emitted: accepted ones and the bonus token, less what a stop cut off."""
        return self.emitted_ids[0].tolist()

    @property
    def accepted_length(self) -> int:
        """Tokens emitted by this round, the bonus token included."""
        return self.emitted_ids.shape[1]

    @property
    def bonus(self) -> int | None:
        """The token the target added after the accepted ones; None where a stop token came before it."""
        return self.emitted[-1] if self.accepted_length > self.num_accepted else None

    @property
    def confidence(self) -> list[float] | None:
        """Conditional confidence of each drafted token, calibrated; None without a confidence head."""
        probs = calibrated_confidence(self.confidence_logits, self.confidence_temperatures)
        return None if probs is None else probs[0].tolist()


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """A call in figures. `tau` counts emitted tokens, the bonus token included (glossary in the README)."""

    tau: float  # tokens emitted after the prefill's one / rounds; 0 without a round
    acceptance_at: tuple[float, ...]  # [k] conditional: over rounds that verified k with all before it accepted
    survival_at: tuple[float, ...]  # [k] over rounds that verified k
    tokens: int  # all new tokens, the prefill's one included
    rounds: int
    verify_rate: float  # tokens emitted / (drafted tokens verified + rounds)
    prefill_seconds: float | None  # None: not measured (transformers' own loop)
    draft_seconds: float | None
    verify_seconds: float | None
    rest_seconds: float | None
    tokens_per_second: float  # over the whole call, prefill included
    kernels: dict[str, str] = field(default_factory=dict)  # function -> what ran for it, and why nothing better did

    @classmethod
    def from_rounds(
        cls,
        rounds: Sequence[RoundRecord],
        tokens: int,
        seconds: dict[str, float],
        kernels: dict[str, str] | None = None,
    ) -> GenerationStats:
        emitted = sum(r.accepted_length for r in rounds)
        verified = sum(r.verify_length for r in rounds)
        conditional, survival = [], []
        for k in range(1, max((r.verify_length for r in rounds), default=0) + 1):
            reached = [r for r in rounds if r.verify_length >= k]
            given = [r for r in reached if r.num_accepted >= k - 1]
            kept = sum(r.num_accepted >= k for r in reached)
            survival.append(kept / len(reached))
            conditional.append(kept / len(given) if given else float("nan"))
        total = seconds["total"]
        parts = [seconds.get(part) for part in ("prefill", "draft", "verify")]
        return cls(
            tau=emitted / len(rounds) if rounds else 0.0,
            acceptance_at=tuple(conditional),
            survival_at=tuple(survival),
            tokens=tokens,
            rounds=len(rounds),
            verify_rate=emitted / (verified + len(rounds)) if rounds else 0.0,
            prefill_seconds=parts[0],
            draft_seconds=parts[1],
            verify_seconds=parts[2],
            rest_seconds=total - sum(parts) if None not in parts else None,
            tokens_per_second=tokens / total if total > 0 else float("nan"),
            kernels=kernels or {},
        )


@dataclass(slots=True)
class DraftContext:
    """The draft's side of one sequence: its cache, and features the target computed but the draft has not read yet."""

    cache: Any
    target_length: int = 0  # positions of the target's cache up to which features were taken
    features: list[torch.Tensor] = field(default_factory=list)  # pending, each [B, new, m*H]
    position_ids: list[torch.Tensor] = field(default_factory=list)  # of the pending features, each [B, new]
    last_position: torch.Tensor | None = None  # [B, 1]

    def add(self, features: torch.Tensor, position_ids: torch.Tensor) -> None:
        """Append the features of newly committed positions."""
        self.features.append(features)
        self.position_ids.append(position_ids)
        self.last_position = position_ids[:, -1:]

    def next_positions(self, count: int) -> torch.Tensor:
        """Positions [B, count] behind the last one added, the anchor's first."""
        return self.last_position + torch.arange(1, count + 1, device=self.last_position.device)

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All pending features [B, new, m*H] and their positions [B, new]; afterwards none are pending."""
        taken = torch.cat(self.features, 1), torch.cat(self.position_ids, 1)
        self.features, self.position_ids = [], []
        return taken


@dataclass(slots=True)
class DecodeState:
    """All that changes during one call of the loop."""

    input_ids: torch.Tensor  # [B, n]  committed tokens; the last is the anchor, which the target has not read
    model_kwargs: dict[str, Any]
    cache_length: int  # positions the target has read: all committed tokens but the anchor
    num_pending: int = 0  # the last of them that a rollback took out of its cache: it has to read them again
    finished: bool = False
    rounds: list[RoundRecord] = field(default_factory=list)
    # What the user asked for besides tokens, one entry a token: scores, logits, hidden_states, attentions.
    extras: dict[str, list] = field(default_factory=dict)


def calibrated_confidence(
    logits: torch.Tensor | None,  # [B, g]
    temperatures: Sequence[float] | None,  # [g] or longer
) -> torch.Tensor | None:
    """sigmoid(logit_k / T_k) [B, g]; sigmoid(logit_k) without temperatures, None without logits."""
    if logits is None or temperatures is None:
        return None if logits is None else logits.sigmoid()
    # Numbers, not a tensor of them: copying one to the device in every round would be a synchronisation.
    pairs = zip(logits.unbind(-1), temperatures[: logits.shape[-1]], strict=True)  # the block may be cut short
    return torch.stack([logit / temperature for logit, temperature in pairs], dim=-1).sigmoid()
