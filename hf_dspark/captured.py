"""The rounds of one call as two graphs each: the draft's side up to its tokens, and from there to what is emitted.

Random numbers are drawn outside of them, so that a seed gives the tokens it gives eagerly. The host reads one small
tensor a round. On CUDA the next block is drafted before it does: the device works on while the host reads and records.
"""

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from .agreement import Agreement
from .compiled import CompiledRound, on_one_device
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
    reasons = {
        "processors other than temperature, top-k and top-p": not terms.rule.is_traceable(target.device),
        "stopping criteria, or scores and states are collected": terms.has_other_criteria or bool(terms.extras),
        "features are captured by hooks": tap.by_hooks,
        "processes agree on each round": agreement.is_needed,
        "the models lie on several devices": not on_one_device(target, draft),
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
        self._drafted: tuple[SlotCache, torch.Tensor, int] | None = None  # what the last block was drafted from
        self._ahead: DraftBlock | None = None
        self._tokens: torch.Tensor | None = None  # of the round under way
        self._figures = _ToHost(columns.ids.device)
        draft.refresh_head()

    def propose(
        self, cache: SlotCache, starts: torch.Tensor, features: torch.Tensor, slots: torch.Tensor, num_tokens: int
    ) -> DraftBlock:
        """A block for each row; arguments as in `traced.draft_rows`, of `num_tokens` + 1 features."""
        if self._frame is None:
            self._frame = self.compiled.frame(self.columns, self.tap, features)
        frame, ended = self._frame, [row.ended for row in self.rows]
        ahead, self._ahead = self._ahead, None
        is_next = features is frame.features and ended == self._ended
        if ahead is not None and is_next and ahead.token_ids.shape[1] == num_tokens:
            return ahead
        if features is not frame.features:
            frame.features.copy_(features)
            frame.slots.copy_(slots)
        if ended != self._ended:  # at the first token, or in rounds that did not draft
            frame.ended.copy_(torch.tensor(ended))
        self._drafted = (cache, starts, num_tokens)
        return self._block(*self._drafted)

    def verify(self, cache: SlotCache, block: DraftBlock, limits: torch.Tensor | None) -> None:
        """Begin a round that verifies `block`; what it emits, `read` says."""
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
        self._tokens = tokens.clone()
        self._figures.send(figures)

    def draft_ahead(self) -> None:
        """Draft the next block; nothing of it counts where no round follows."""
        if self.compiled.is_graphed:
            self._ahead = self._block(*self._drafted)

    def read(self) -> Emission:
        """What the round emits; it is committed, but for what rows count on the host."""
        # The one synchronisation of every round: which rows go on, and where they stand.
        counts, num_accepted, finished = self._figures.receive().tolist()
        self._ended = [bool(ends) for ends in finished]
        return Emission(self._tokens, counts, num_accepted, self._ended, None)

    def _block(self, cache: SlotCache, starts: torch.Tensor, num_tokens: int) -> DraftBlock:
        sampler = TemperatureSampler()
        if self.warpers is not None:
            sampler = WarpedSampler(self.warpers, self.terms.rule.draft_uniforms(starts, num_tokens))
        torch.compiler.cudagraph_mark_step_begin()
        settings = {"num_tokens": num_tokens, "sampler": sampler, "is_whole": self.is_whole}
        block = self.compiled.draft_rows(self.draft, cache, self._frame, starts, **settings)
        # Copies, for what records keep is not to be overwritten by the next replay.
        confidence = None if block.confidence_logits is None else block.confidence_logits.clone()
        return replace(block, token_ids=block.token_ids.clone(), confidence_logits=confidence)

    @property
    def pending(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Features that the draft has not read, and their slots."""
        return self._frame.features, self._frame.slots


class _ToHost:
    """A small tensor's way to the host, beside what the device is given to do after it was sent."""

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._on_host: torch.Tensor | None = None
        self._sent = None

    def send(self, tensor: torch.Tensor) -> None:
        if not self._is_cuda:
            self._on_host = tensor
            return
        if self._on_host is None:
            self._on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._on_host.copy_(tensor, non_blocking=True)
        self._sent = torch.cuda.current_stream(tensor.device).record_event()

    def receive(self) -> torch.Tensor:
        if self._is_cuda:
            self._sent.synchronize()
        return self._on_host
