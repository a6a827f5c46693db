"""The draft's side of one generate() call: its cache, features it has not read yet, schedule and randomness.

Our loop steps it through `observe` and `propose`; transformers' own assisted loop through `get_candidates`.
"""

from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator

from .draft import draft_block
from .features import FeatureTap
from .sampling import SamplingRule
from .schedule import ConfidenceThreshold, FixedLength
from .state import Distribution, DraftBlock, DraftContext, RoundRecord


class DSparkCandidateGenerator(CandidateGenerator):
    """Proposes blocks of a DSpark draft as a transformers `CandidateGenerator` (batch 1).

    Args:
        draft: a DSparkDraftModel that is bound to the target.
        rule: the call's processors and randomness, shared with the target's side.
        schedule: how many drafted tokens are offered for verification.
        max_length: total tokens the call may reach; no draft goes past it.
        tap: captures the target's features; open while the target runs.
        context: the draft's cache and pending features, possibly continued from an earlier call.
    """

    requires_model_outputs = True

    def __init__(
        self,
        draft: PreTrainedModel,
        rule: SamplingRule,
        *,
        schedule: FixedLength | ConfidenceThreshold,
        max_length: int,
        tap: FeatureTap,
        context: DraftContext,
    ):
        self.draft = draft
        self.rule = rule
        self.schedule = schedule
        self.max_length = max_length
        self.tap = tap
        self.context = context
        self.rounds: list[RoundRecord] = []  # of transformers' loop; ours keeps its own
        self._scores: list[torch.Tensor] = []
        self._last: tuple[DraftBlock, int] | None = None

    @property
    def model_kwargs_overrides(self) -> dict[str, Any]:
        """What the target's forwards need for the capture of features."""
        return self.tap.forward_kwargs

    def observe(self, features: torch.Tensor, position_ids: torch.Tensor, keep: torch.Tensor | None = None) -> None:
        """Hand over features [1, new, m*H] of newly committed positions; `keep` [1, new] leaves padding out."""
        self.context.target_length += features.shape[1]
        position_ids = position_ids.to(features.device)
        if keep is not None:
            keep = keep[0].bool().to(features.device)
            features, position_ids = features[:, keep], position_ids[:, keep]
        self.context.add(features, position_ids)

    def num_tokens(self, length: int) -> int:
        """Tokens to draft after `length` committed ones: the bonus token always has room, too."""
        limit = self.draft.config.block_size if self.schedule.num_tokens is None else self.schedule.num_tokens
        return max(0, min(self.draft.config.block_size, limit, self.max_length - length - 1))

    def propose(self, input_ids: torch.Tensor) -> DraftBlock | None:
        """Draft a block after `input_ids` [1, n]; None where there is nothing to draft."""
        num_tokens = self.num_tokens(input_ids.shape[1])
        if num_tokens == 0:
            return None
        device = self.draft.device
        features, positions = self.context.take()
        ahead = torch.arange(1, self.draft.config.block_size + 1, device=positions.device)
        positions = torch.cat([positions, positions[:, -1:] + ahead], dim=1)
        return draft_block(
            self.draft,
            features.to(device),
            input_ids[:, -1].to(device),
            self.context.cache,
            position_ids=positions.to(device),
            num_tokens=num_tokens,
            sampler=self._sampler(input_ids),
        )

    def verify_length(self, block: DraftBlock) -> int:
        """How many tokens of the block the target should read."""
        if not self.schedule.needs_confidence:
            return block.token_ids.shape[1]
        # The width of the verification is a shape: the host must know it. One synchronisation a round.
        return self.schedule(block.confidence).tolist()[0]

    def get_candidates(
        self,
        input_ids: torch.LongTensor,
        model_kwargs: dict[str, Any] | None = None,
        model_outputs: Any = None,
        is_first_iteration: bool = False,
        n_last_matches: int = 0,
        **kwargs: Any,
    ) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """Candidate ids [1, n+L] and the logits [1, L, V] they were sampled from, for transformers' assisted loop.

        The first iteration drafts nothing: there the loop runs the target on the prompt, whose features come next.
        """
        self._last = None
        if is_first_iteration:
            return input_ids, None
        features = self.tap.take(model_outputs)
        is_prompt = self.context.target_length == 0
        num_new = input_ids.shape[1] - 1 if is_prompt else int(n_last_matches) + 1
        mask = model_kwargs.get("attention_mask")
        positions = committed_positions(model_kwargs, input_ids.shape[1])[:, -num_new - 1 : -1]
        self.observe(features[:, :num_new], positions, mask[:, -num_new - 1 : -1] if mask is not None else None)
        block = self.propose(input_ids)
        if block is None:
            return input_ids, None
        length = self.verify_length(block)
        self._last = block, length
        if length == 0:
            return input_ids, None
        candidate_ids = torch.cat([input_ids, block.token_ids[:, :length].to(input_ids.device)], dim=1)
        return candidate_ids, self._candidate_logits(block)[:, :length]

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """Record the round; transformers' loop calls this after each verification, the prompt's included."""
        if self.context.target_length == 0:
            return
        block, length = self._last or (None, 0)
        self.rounds.append(
            RoundRecord(
                draft_ids=None if block is None else block.token_ids,
                emitted_ids=input_ids[:, -int(num_matches) - 1 :],
                verify_length=length,
                num_accepted=int(num_matches),
                confidence_probs=None if block is None else block.confidence,
            )
        )

    def _sampler(self, input_ids: torch.Tensor):
        """The rule on one position's draft logits, with the prefix that ends in the tokens drafted before it."""
        rule, processors = self.rule, self.rule.draft_processors()
        self._scores = []

        def sample(logits: torch.Tensor, drafted_ids: torch.Tensor) -> tuple[torch.Tensor, Distribution | None]:
            logits = logits.to(input_ids.device)
            law = rule.sparse_distribution(logits.unsqueeze(1), exact=False)
            if law is not None:
                column = rule.draw(law.probs[:, 0])
                return law.support_ids[:, 0].gather(-1, column.unsqueeze(-1)).squeeze(-1), law
            if len(processors):
                prefix = torch.cat([input_ids, drafted_ids.to(input_ids.device)], dim=1)
                logits = processors(prefix, logits.clone())
            self._scores.append(logits)
            if not rule.do_sample:
                return logits.argmax(-1), None
            probs = logits.softmax(-1)
            return rule.draw(probs), Distribution(probs.unsqueeze(1))

        return sample

    def _candidate_logits(self, block: DraftBlock) -> torch.Tensor:
        if self._scores:
            return torch.stack(self._scores, dim=1)
        law = block.distribution
        outside = torch.full_like(block.draft_logits, -torch.inf)
        return outside.scatter(-1, law.support_ids, law.probs.log())


def committed_positions(model_kwargs: dict[str, Any], length: int) -> torch.Tensor:
    """True positions [1, length] of the sequence so far, its anchor included."""
    position_ids = model_kwargs.get("position_ids")
    if position_ids is not None:
        return position_ids if position_ids.ndim == 2 else position_ids[0]
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        return (mask.long().cumsum(-1) - 1).clamp_min(0)
    return torch.arange(length).unsqueeze(0)


@contextmanager
def in_transformers_loop(target: PreTrainedModel, generator: DSparkCandidateGenerator):
    """Make `target._assisted_decoding` use `generator`, on this instance and while this is open."""
    target._get_candidate_generator = lambda **kwargs: generator
    try:
        yield
    finally:
        del target._get_candidate_generator
