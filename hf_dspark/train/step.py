"""The loss of sequences: the draft on packed blocks, teacher-forced heads, and the comparison with the target."""

import torch
from torch import nn

from ..modeling_dspark import DSparkDraftModel
from .anchors import Blocks
from .loss import RowOutcomes, block_loss
from .target import FrozenTarget, TargetStates


class TrainingStep(nn.Module):
    """The draft with its loss as one module, so that DDP and FSDP see a forward and a backward of it."""

    def __init__(self, draft: DSparkDraftModel, target: FrozenTarget, *, chunk_rows: int = 64):
        super().__init__()
        self.draft = draft
        self.chunk_rows = chunk_rows
        self._target = (target,)  # a tuple: the target is no part of this module
        ids = draft.draft_token_ids
        draft_ids = torch.full((draft.config.vocab_size,), -1, device=draft.device)
        if ids is None:
            draft_ids = torch.arange(draft.config.vocab_size, device=draft.device)
        else:
            draft_ids[ids] = torch.arange(len(ids), device=draft.device)
        self.register_buffer("_draft_ids", draft_ids, persistent=False)  # target id -> draft id, or -1

    def forward(self, states: TargetStates, blocks: Blocks) -> tuple[torch.Tensor, RowOutcomes]:
        """Weighted sum of the losses of supervised rows, and their outcomes, in the order of `blocks.weights`."""
        hidden_states, latents, confidence = self.block_outputs(states, blocks)
        supervised = blocks.weights > 0
        target, head = self._target[0], self.draft.markov_head
        target_rows = blocks.target_rows[supervised]
        return block_loss(
            self._draft_logits,
            lambda rows: target.probs(states, rows),
            hidden_states[supervised],
            latents[supervised],
            None if head is None else head.markov_w2.weight,
            target_rows,
            self._draft_ids[blocks.labels[supervised]],
            self._draft_ids[states.best_ids[target_rows]],
            None if confidence is None else confidence[supervised],
            blocks.weights[supervised],
            chunk_rows=self.chunk_rows,
        )

    def block_outputs(
        self, states: TargetStates, blocks: Blocks
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Hidden states [A, g, H], latents [A, g, r] and confidence logits [A, g] under teacher forcing."""
        draft, block_size = self.draft, blocks.labels.shape[1]
        hidden_states = draft(
            states.features,
            blocks.block_ids.view(len(blocks.position_ids), -1),
            blocks.position_ids,
            attention_mask=blocks.attention_mask,
        ).view(*blocks.block_ids.shape, -1)[:, draft.config.first_slot :]
        head, latents, state = draft.markov_head, [], None
        for k in range(block_size):
            if head is None:
                latents.append(hidden_states[:, k, :0])
            else:
                latent, state = head.latent(blocks.previous_ids[:, k], hidden_states[:, k], state)
                latents.append(latent)
        confidence = None
        if draft.confidence_head is not None:
            with_markov = draft.config.confidence_head_with_markov
            previous = head.previous_embedding(blocks.previous_ids) if with_markov else None
            confidence = draft.confidence_head(hidden_states, previous)
        return hidden_states, torch.stack(latents, dim=1), confidence

    def _draft_logits(self, hidden_states: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        logits = self.draft.compute_logits(hidden_states)
        head = self.draft.markov_head
        return logits if head is None else logits.add_(head.markov_w2(latents))
