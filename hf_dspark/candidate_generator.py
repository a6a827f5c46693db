"""The draft's side of one generate() call: its cache, features it has not read yet, schedule and randomness.

Our loop steps it through `observe` and `propose`; transformers' own assisted loop through `get_candidates`.
"""

from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.utils import logging

from .draft import draft_block
from .features import FeatureTap
from .rollback import drop_last
from .sampling import SamplingRule
from .schedule import ConfidenceThreshold, FixedLength, checked_lengths
from .state import Distribution, DraftBlock, DraftContext, RoundRecord

logger = logging.get_logger(__name__)


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
        self._scores: list[torch.Tensor] = []  # processed draft scores of the last block, one [B, V] a position
        self._last: tuple[DraftBlock | None, int] = (None, 0)  # what transformers' loop verifies now

    @property
    def model_kwargs_overrides(self) -> dict[str, Any]:
        """What the target's forwards need for the capture of features."""
        return self.tap.forward_kwargs

    def observe_prompt(self, features: torch.Tensor, model_kwargs: dict[str, Any], *, num_ahead: int = 0) -> None:
        """Hand over the prefill's features [1, S, m*H]; padding among them is left out.

        `num_ahead`: tokens behind the prefill that `model_kwargs` already cover.
        """
        num_new = features.shape[1]
        window = slice(-num_new - num_ahead, -num_ahead or None)
        mask = model_kwargs.get("attention_mask")
        position_ids = _position_ids(model_kwargs)
        if position_ids is None:
            start = self.context.target_length
            position_ids = torch.arange(start, start + num_new + num_ahead).unsqueeze(0)
        position_ids = position_ids[:, window].to(features.device)
        if mask is not None:
            kept = mask[0, window].bool().to(features.device)
            features, position_ids = features[:, kept], position_ids[:, kept]
        self.context.target_length += num_new
        if self.draft.context_window is not None:  # the rest of a long prompt would be projected for nothing
            features, position_ids = (part[:, -self.draft.context_window :] for part in (features, position_ids))
        self.context.add(features, position_ids)

    def observe(self, features: torch.Tensor) -> None:
        """Hand over features [1, new, m*H] of the positions the last round committed."""
        self.context.target_length += features.shape[1]
        self.context.add(features, self.context.next_positions(features.shape[1]))

    def propose(self, input_ids: torch.Tensor) -> DraftBlock | None:
        """Draft a block after `input_ids` [1, n]; None where there is nothing to draft."""
        block_size = self.draft.config.block_size
        limit = block_size if self.schedule.num_tokens is None else self.schedule.num_tokens
        num_tokens = min(block_size, limit, self.max_length - input_ids.shape[1] - 1)  # room for the bonus token
        if num_tokens < 1 or not self.schedule.should_draft():
            return None
        block_positions = self.context.next_positions(self.draft.config.num_block_inputs)
        features, positions = self.context.take()
        device = self.draft.device
        return draft_block(
            self.draft,
            features.to(device),
            input_ids[:, -1].to(device),
            self.context.cache,
            position_ids=torch.cat([positions, block_positions], dim=1).to(device),
            num_tokens=num_tokens,
            sampler=self._sampler(input_ids, num_tokens),
        )

    def verify_length(self, block: DraftBlock) -> int:
        """How many tokens of the block the target should read."""
        if not self.schedule.needs_confidence:
            return block.token_ids.shape[1]
        # The width of the verification is a shape, which the host must know: one synchronisation a round.
        return checked_lengths(self.schedule(block.confidence).tolist(), block.token_ids.shape, self.schedule)[0]

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
        self._last = (None, 0)
        if is_first_iteration:
            return input_ids, None
        features = self.tap.take(model_outputs)
        if self.context.target_length == 0:
            self.observe_prompt(features, model_kwargs, num_ahead=1)
        else:
            self.observe(features[:, : int(n_last_matches) + 1])
        block = self.propose(input_ids)
        if block is None:
            return input_ids, None
        length = self.verify_length(block)
        self._last = (block, length)
        if length == 0:
            return input_ids, None
        candidate_ids = torch.cat([input_ids, block.token_ids[:, :length].to(input_ids.device)], dim=1)
        return candidate_ids, self._candidate_logits(block)[:, :length]

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """Record the round; transformers' loop calls this after each verification, the prompt's included."""
        if self.context.target_length > 0:
            block, length = self._last
            self.rounds.append(RoundRecord.of(block, length, int(num_matches), input_ids[:, -int(num_matches) - 1 :]))
            self.schedule.observe(int(num_matches) + 1, None if block is None else length)

    def _sampler(self, input_ids: torch.Tensor, num_tokens: int):
        """The rule on one position's draft logits, with the prefix that ends in the tokens drafted before it."""
        rule, processors = self.rule, self.rule.draft_processors()
        self._scores = []
        if rule.temperature is not None:
            return rule.temperature_sampler(input_ids, num_tokens)

        def sample(logits: torch.Tensor, drafted_ids: torch.Tensor) -> tuple[torch.Tensor, Distribution | None]:
            logits = logits.to(input_ids.device)
            law = rule.sparse_distribution(logits.unsqueeze(1), exact=False)
            if law is not None:
                column = rule.draw_drafted(law.probs[:, 0])
                return law.support_ids[:, 0].gather(-1, column.unsqueeze(-1)).squeeze(-1), law
            if len(processors):
                prefix = torch.cat([input_ids, drafted_ids.to(input_ids.device)], dim=1)
                logits = processors(prefix, logits.clone())
            self._scores.append(logits)
            if not rule.do_sample:
                return logits.argmax(-1), None
            probs = logits.softmax(-1)
            return rule.draw_drafted(probs), Distribution(probs.unsqueeze(1))

        return sample

    def _candidate_logits(self, block: DraftBlock) -> torch.Tensor:
        if self._scores:
            return torch.stack(self._scores, dim=1)
        law = block.distribution
        if law is None:
            return block.draft_logits / self.rule.temperature
        outside = torch.full_like(block.draft_logits, -torch.inf)
        return outside.scatter(-1, law.support_ids, law.probs.log())


def context_of(draft: PreTrainedModel, cache: Cache, past_length: int) -> DraftContext:
    """The draft's context for a target cache that holds `past_length` positions: the last turn's, or a new one."""
    context = draft.contexts.get(cache)
    if context is not None and _rewind(context, past_length):
        return context
    if past_length > 0:
        logger.warning_once(
            "This cache was filled without this draft, so the draft knows nothing of what it holds and reads the "
            "sequence from its first new token on. The output is the same; fewer tokens are accepted at first."
        )
    draft.contexts[cache] = DraftContext(draft.new_cache(), target_length=past_length)
    return draft.contexts[cache]


@contextmanager
def in_transformers_loop(target: PreTrainedModel, generator: DSparkCandidateGenerator):
    """Make `target._assisted_decoding` use `generator`, on this instance and while this is open."""
    target._get_candidate_generator = lambda **kwargs: generator
    try:
        yield
    finally:
        del target._get_candidate_generator


def _position_ids(model_kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Positions [1, n] of the whole sequence so far; None where generate() did not need to prepare any."""
    position_ids = model_kwargs.get("position_ids")
    if position_ids is not None:
        return position_ids if position_ids.ndim == 2 else position_ids[0]
    mask = model_kwargs.get("attention_mask")
    return None if mask is None else (mask.long().cumsum(-1) - 1).clamp_min(0)


def _rewind(context: DraftContext, past_length: int) -> bool:
    """Bring a kept context back to `past_length` target positions; False where it does not reach or cannot go back."""
    surplus = context.target_length - past_length
    if surplus == 0:
        return True
    pending = sum(part.shape[1] for part in context.features)
    # A cache that keeps a window has forgotten what would come back into it.
    in_cache = 0 if any(context.cache.is_sliding) else context.cache.get_seq_length()
    if surplus < 0 or surplus > pending + in_cache:
        return False
    if pending:
        features, positions = context.take()
        if pending > surplus:
            context.add(features[:, :-surplus], positions[:, :-surplus])
    if surplus > pending:
        drop_last(context.cache, surplus - pending)
    context.target_length = past_length
    return True
