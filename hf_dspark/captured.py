"""The rounds of one call as two graphs each: the draft's side up to its tokens, and from there to what is emitted.

Random numbers are drawn outside of them, so that a seed gives the tokens it gives eagerly. The host reads one small
tensor a round.
"""

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from .agreement import Agreement
from .compiled import CompiledRound
from .features import FeatureTap
from .rows import Columns, Emission, Row
from .sampling import TemperatureSampler, WarpedSampler
from .slots import SlotCache
from .state import DraftBlock
from .terms import Terms


def why_not_captured(
    target: PreTrainedModel, draft: PreTrainedModel, tap: FeatureTap, terms: Terms, agreement: Agreement
) -> str | None:
    """Why only the forwards of a call's compiled rounds can be graphs; None where all of them can."""
    devices = {str(device) for device in getattr(target, "hf_device_map", {}).values()}
    reasons = {
        "processors other than temperature, top-k and top-p": not terms.rule.is_traceable(target.device),
        "stopping criteria, or scores and states are collected": terms.has_other_criteria or bool(terms.extras),
        "features are captured by hooks": tap.by_hooks,
        "processes agree on each round": agreement.is_needed,
        "the models lie on several devices": len(devices) > 1 or draft.device != target.device,
    }
    return next((reason for reason, is_met in reasons.items() if is_met), None)


class CapturedRounds:
    """The rounds of a call whose R rows all stay."""

    def __init__(
        self,
        compiled: CompiledRound,
        target: PreTrainedModel,
        draft: PreTrainedModel,
        tap: FeatureTap,
        columns: Columns,
        rows: list[Row],
        token_types: tuple[str, ...],
        *,
        is_whole: bool,
    ):
        self.compiled, self.target, self.draft, self.tap = compiled, target, draft, tap
        self.columns, self.rows, self.terms = columns, rows, rows[0].terms
        self.warpers = self.terms.rule.warpers(columns.ids.device)
        self.token_types, self.is_whole, self._frame = token_types, is_whole, None
        self._ended: list[bool] = []  # as the frame has it
        # What is taken of the target's lm_head at the first use: no graph may hold that.
        draft.compute_logits(torch.zeros(1, 1, draft.config.hidden_size, dtype=draft.dtype, device=draft.device))

    def propose(
        self, cache: SlotCache, starts: torch.Tensor, features: torch.Tensor, slots: torch.Tensor, num_tokens: int
    ) -> DraftBlock:
        """A block for each row; arguments as in `traced.draft_rows`, of `num_tokens` + 1 features."""
        if self._frame is None:
            self._frame = self.compiled.frame(self.columns, self.tap, features)
        frame, rule, sampler = self._frame, self.terms.rule, TemperatureSampler()
        if features is not frame.features:
            frame.features.copy_(features)
            frame.slots.copy_(slots)
        ended = [row.ended for row in self.rows]
        if ended != self._ended:  # at the first token, or in rounds that did not draft
            frame.ended.copy_(torch.tensor(ended))
        if self.warpers is not None:
            sampler = WarpedSampler(self.warpers, rule.draft_uniforms(starts, num_tokens))
        torch.compiler.cudagraph_mark_step_begin()
        settings = {"num_tokens": num_tokens, "sampler": sampler, "is_whole": self.is_whole}
        block = self.compiled.draft_rows(self.draft, cache, frame, starts, **settings)
        # Copies, for what records keep is not to be overwritten by the next replay.
        confidence = None if block.confidence_logits is None else block.confidence_logits.clone()
        return replace(block, token_ids=block.token_ids.clone(), confidence_logits=confidence)

    def verify(self, cache: SlotCache, block: DraftBlock, limits: torch.Tensor | None) -> Emission:
        """What a round emits; it is committed, but for what rows count on the host."""
        rule, draft_ids, chances, probs = self.terms.rule, block.token_ids, (None, None), None
        if self.warpers is not None:
            chances = (rule.uniforms(draft_ids), rule.exponentials(block.draft_logits[:, 0]))
            probs = block.distribution.probs
        arguments = self.tap.forward_kwargs
        if self.token_types:
            types = draft_ids.new_zeros(len(draft_ids), draft_ids.shape[1] + 1)
            arguments = arguments | dict.fromkeys(self.token_types, types)
        own = (cache, self._frame, draft_ids, probs, self.warpers, chances, limits, self.terms.eos_ids, arguments)
        with self.target._optimize_model_for_decode():
            tokens, figures = self.compiled.verify_rows(self.target, *own)
        # The one synchronisation of every round: which rows go on, and where they stand.
        counts, num_accepted, finished = figures.tolist()
        self._ended = [bool(ends) for ends in finished]
        return Emission(tokens.clone(), counts, num_accepted, self._ended, None)

    @property
    def pending(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Features that the draft has not read, and their slots."""
        return self._frame.features, self._frame.slots
