"""What training reads of the frozen target: features of the tapped layers, and its law at chosen positions."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..features import FeatureTap
from ..heads import SelectedRows

# Positions whose full-vocabulary logits exist at once while a sequence is read.
_READ_ROWS = 64


@dataclass(frozen=True, slots=True)
class TargetStates:
    """One sequence of S tokens as the target sees it."""

    features: torch.Tensor  # [1, S, m*H]
    final: torch.Tensor  # [S, H]  what the lm_head reads
    log_normalisers: torch.Tensor  # [S]  logsumexp of the target's logits, fp32
    best_ids: torch.Tensor  # [S]  their argmax


class FrozenTarget:
    """The target in evaluation mode without gradients, as a source of `TargetStates` and probabilities.

    With `token_ids` [V] probabilities are those of these tokens only.
    """

    def __init__(self, target: PreTrainedModel, target_layer_ids: list[int], token_ids: torch.Tensor | None = None):
        self.model = target.eval().requires_grad_(False)
        self.target_layer_ids = target_layer_ids
        head = target.get_output_embeddings()
        self._head = head if token_ids is None else SelectedRows(head, token_ids)
        config = target.config.get_text_config(decoder=True)
        # What transformers' models do behind the lm_head: Gemma caps, Cohere multiplies, Granite divides.
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1)
        self._is_checked = False

    @torch.no_grad()
    def read(self, input_ids: list[int]) -> TargetStates:
        """Features and final states of `input_ids`, and of each position's law what a part of it does not tell.

        Raises ValueError where the target's logits are not made from its final states in a way known here.
        """
        ids = torch.tensor([input_ids], device=self.model.device)
        decoder = self.model.get_decoder()
        with FeatureTap(self.model, self.target_layer_ids) as tap:
            outputs = decoder(ids, **tap.forward_kwargs, use_cache=False, return_dict=True)
            features, final = tap.take(outputs), outputs.last_hidden_state[0]
        if not self._is_checked:
            self._check(ids, final)
        head = self.model.get_output_embeddings()
        normalisers, best = [], []
        for rows in final.split(_READ_ROWS):
            logits = self._logits(head, rows)
            normalisers.append(logits.logsumexp(-1))
            best.append(logits.argmax(-1))
        return TargetStates(features, final, torch.cat(normalisers), torch.cat(best))

    @torch.no_grad()
    def probs(self, states: TargetStates, rows: torch.Tensor) -> torch.Tensor:
        """Probabilities [R, V] in fp32 at positions `rows` [R]; each distinct position goes through the head once."""
        distinct, place = rows.unique(return_inverse=True)
        logits = self._logits(self._head, states.final[distinct])
        probs = logits.sub_(states.log_normalisers[distinct].unsqueeze(-1)).exp_()
        return probs[place]

    def _logits(self, head, final: torch.Tensor) -> torch.Tensor:
        logits = head(final).float() * self._scale
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)

    def _check(self, ids: torch.Tensor, final: torch.Tensor) -> None:
        expected = self.model(ids, use_cache=False).logits[0, -1].float()
        got = self._logits(self.model.get_output_embeddings(), final[-1:])[0]
        if (expected - got).abs().max() > 1e-2 * expected.abs().max():
            raise ValueError(
                f"The logits of {type(self.model).__name__} are not its lm_head on the decoder's last hidden state, "
                "scaled or capped in a way known here: training would learn another law. Please report this model."
            )
        self._is_checked = True
