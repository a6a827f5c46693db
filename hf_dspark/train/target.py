"""What training reads of the frozen target: features of the tapped layers, and its law at chosen positions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..features import FeatureTap
from ..heads import SelectedRows

# Positions whose full-vocabulary logits exist at once while sequences are read.
_READ_ROWS = 64


@dataclass(frozen=True, slots=True)
class TargetStates:
    """B sequences of S tokens as the target sees them; B is 1 but for `stack_states`."""

    features: torch.Tensor  # [B, S, m*H]
    final: torch.Tensor  # [B*S, H]  what the lm_head reads
    log_normalisers: torch.Tensor  # [B*S]  logsumexp of the target's logits, fp32
    best_ids: torch.Tensor  # [B*S]  their argmax


def stack_states(parts: Sequence[TargetStates]) -> TargetStates:
    """Single sequences as one batch, padded with zeros behind the shorter ones."""
    if len(parts) == 1:
        return parts[0]
    length = max(part.final.shape[0] for part in parts)

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])])

    features = torch.stack([padded(part.features[0]) for part in parts])
    names = ("final", "log_normalisers", "best_ids")
    return TargetStates(features, *(torch.cat([padded(getattr(part, name)) for part in parts]) for name in names))


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

    def read(self, input_ids: list[int]) -> TargetStates:
        """The states of one sequence, as `read_all` gives them."""
        return self.read_all([input_ids])[0]

    @torch.no_grad()
    def read_all(self, sequences: list[list[int]]) -> list[TargetStates]:
        """Features and final states of token ids, and of each position's law what a part of it does not tell.

        One forward; padding stands behind a sequence, where no position of it sees it. Raises ValueError where the
        target's logits are not made from its final states in a way known here.
        """
        if not self._is_checked:
            self._check(sequences[0])
        lengths = list(map(len, sequences))
        padded = [ids + [ids[-1]] * (max(lengths) - len(ids)) for ids in sequences]
        with FeatureTap(self.model, self.target_layer_ids) as tap:
            ids = torch.tensor(padded, device=self.model.device)
            outputs = self.model.get_decoder()(ids, **tap.forward_kwargs, use_cache=False, return_dict=True)
            features, final = tap.take(outputs), outputs.last_hidden_state
        normalisers, best = [], []
        own_rows = torch.cat([states[:length] for states, length in zip(final, lengths, strict=True)])
        for rows in own_rows.split(_READ_ROWS):
            logits = self._logits(self.model.get_output_embeddings(), rows)
            normalisers.append(logits.logsumexp(-1))
            best.append(logits.argmax(-1))
        laws = zip(torch.cat(normalisers).split(lengths), torch.cat(best).split(lengths), strict=True)
        parts = zip(features.split(1), final, lengths, laws, strict=True)
        return [TargetStates(feature[:, :n], states[:n], *law) for feature, states, n, law in parts]

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

    @torch.no_grad()
    def _check(self, sequence: list[int]) -> None:
        ids = torch.tensor([sequence], device=self.model.device)
        final = self.model.get_decoder()(ids, use_cache=False, return_dict=True).last_hidden_state[0, -1:]
        expected = self.model(ids, use_cache=False).logits[0, -1].float()
        got = self._logits(self.model.get_output_embeddings(), final)[0]
        if (expected - got).abs().max() > 1e-2 * expected.abs().max():
            raise ValueError(
                f"The logits of {type(self.model).__name__} are not its lm_head on the decoder's last hidden state, "
                "scaled or capped in a way known here: training would learn another law. Please report this model."
            )
        self._is_checked = True
