"""The sequential stage and the confidence head of a draft (paper section 2); parameter names are the checkpoints'.

A Markov-type head turns the previous token (and the position's hidden state) into a transition bias B_k on the base
logits U_k. Heads carry an explicit state from position to position; only the recurrent one uses it. Where the draft
has a vocabulary of its own, previous tokens are the target's ids and logits are over the draft's tokens.
"""

import torch
from torch import nn

from .configuration_dspark import DSparkConfig


def is_readable(weight: torch.Tensor) -> bool:
    """Whether rows of a target's weight can be read from it: not quantised, offloaded or sharded over processes."""
    is_sharded = hasattr(weight, "to_local")  # a DTensor, of tensor parallelism
    return weight.is_floating_point() and weight.device.type != "meta" and not is_sharded


class SelectedRows(nn.Module):
    """A target's lm_head for some of its tokens: their rows, copied at the first use and when they change."""

    def __init__(self, head: nn.Module, token_ids: torch.Tensor):
        super().__init__()
        self._head, self._token_ids = (head,), token_ids  # a tuple: the target's module is no part of this one
        self._copied_from: tuple | None = None

    @property
    def source(self) -> nn.Module:
        """The lm_head whose rows these are."""
        return self._head[0]

    def select(self, token_ids: torch.Tensor) -> None:
        """Take the rows of other tokens, of as many."""
        self._token_ids = token_ids
        if self._copied_from is not None:
            self._copied_from = (None, *self._copied_from[1:])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [..., tokens]."""
        head, ids = self.source, self._token_ids
        weight = head.weight
        if not is_readable(weight):
            logits = head(hidden_states)
            return logits[..., ids.to(logits.device)]
        if not torch.compiler.is_compiling():  # what compiles it calls `refresh` before
            self._copy_rows()
        return nn.functional.linear(hidden_states.to(weight.device, weight.dtype), self._weight, self._bias)

    def refresh(self) -> None:
        """Copy the rows now, where they can be: what is captured in a graph does not."""
        if is_readable(self.source.weight):
            self._copy_rows()

    def _copy_rows(self) -> None:
        head, weight = self.source, self.source.weight
        version = (weight.data_ptr(), weight._version, weight.device, weight.dtype)
        if version != self._copied_from:
            ids = self._token_ids.to(weight.device)
            bias = getattr(head, "bias", None)
            rows = (weight.detach()[ids], None if bias is None else bias.detach()[ids])
            if self._copied_from is not None and self._copied_from[2:] == version[2:]:
                for own, new in zip((self._weight, self._bias), rows, strict=True):
                    if own is not None:
                        own.copy_(new)  # graphs read it where it is
            else:
                self._weight, self._bias = rows
                torch._dynamo.mark_static_address(self._weight)  # or CUDA graphs would copy it every round
            self._copied_from = version


class MarkovHead(nn.Module):
    """`vanilla`: B_k = W2 · W1[x_{k-1}], a low-rank table of token transitions."""

    reads_hidden_states = False

    def __init__(self, config: DSparkConfig):
        super().__init__()
        self.markov_w1 = nn.Embedding(config.vocab_size, config.markov_rank)
        self.markov_w2 = nn.Linear(config.markov_rank, config.draft_vocab_size or config.vocab_size, bias=False)

    def previous_embedding(self, previous_ids: torch.Tensor) -> torch.Tensor:
        """W1[x] [..., r] for token ids [...]."""
        return self.markov_w1(previous_ids)

    def forward(
        self,
        previous_ids: torch.Tensor,  # [B]
        hidden_states: torch.Tensor,  # [B, H]  of the position that is sampled
        state: torch.Tensor | None,  # [B, r] or None at the first position
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Transition bias B_k [B, V] (of the draft's tokens) and the state for the next position."""
        latent, state = self.latent(previous_ids, hidden_states, state)
        return self.markov_w2(latent), state

    def latent(self, previous_ids, hidden_states, state):
        """What W2 projects to the bias [B, r], and the state for the next position; arguments as in `forward`."""
        return self.markov_w1(previous_ids), state


class GatedMarkovHead(MarkovHead):
    """`gated`: B_k = W2 · (sigmoid(W_g [h_k ; W1[x_{k-1}]]) * W1[x_{k-1}])."""

    reads_hidden_states = True

    def __init__(self, config: DSparkConfig):
        super().__init__(config)
        self.gate_proj = nn.Linear(config.hidden_size + config.markov_rank, config.markov_rank)

    def latent(self, previous_ids, hidden_states, state):
        previous = self.markov_w1(previous_ids)
        gate = self.gate_proj(torch.cat([hidden_states, previous], dim=-1)).sigmoid()
        return gate * previous, state


class RNNHead(MarkovHead):
    """`rnn`: one joint linear of [s_{k-1} ; W1[x_{k-1}] ; h_k] gives gate, candidate and output.

    s_k = sig(gate) · s_{k-1} + (1 - sig(gate)) · tanh(candidate), B_k = W2 · tanh(output), s_0 = 0.
    """

    reads_hidden_states = True

    def __init__(self, config: DSparkConfig):
        super().__init__(config)
        rank = config.markov_rank
        self.joint_proj = nn.Linear(2 * rank + config.hidden_size, 3 * rank)

    def latent(self, previous_ids, hidden_states, state):
        previous = self.markov_w1(previous_ids)
        state = torch.zeros_like(previous) if state is None else state
        joint = self.joint_proj(torch.cat([state, previous, hidden_states], dim=-1))
        gate, candidate, output = joint.chunk(3, dim=-1)
        gate = gate.sigmoid()
        state = gate * state + (1 - gate) * candidate.tanh()
        return output.tanh(), state


class ConfidenceHead(nn.Module):
    """w · [h_k ; W1[x_{k-1}]], or of h_k alone, in fp32: the logit of P(token k accepted | all before it were)."""

    def __init__(self, config: DSparkConfig):
        super().__init__()
        self.config = config
        extra = config.markov_rank if config.confidence_head_with_markov else 0
        self.proj = nn.Linear(config.hidden_size + extra, 1, bias=config.confidence_head_bias)

    def forward(self, hidden_states: torch.Tensor, previous: torch.Tensor | None) -> torch.Tensor:
        """Logits [B, g] from hidden states [B, g, H] and W1 of the previous tokens [B, g, r] (None: not used)."""
        inputs = hidden_states if previous is None else torch.cat([hidden_states, previous], dim=-1)
        bias = None if self.proj.bias is None else self.proj.bias.float()
        logits = nn.functional.linear(inputs.float(), self.proj.weight.float(), bias).squeeze(-1)
        return logits + self.config.confidence_shift


MARKOV_HEADS = {"vanilla": MarkovHead, "gated": GatedMarkovHead, "rnn": RNNHead}


def build_heads(config: DSparkConfig) -> tuple[MarkovHead | None, ConfidenceHead | None]:
    """The sequential head (None for rank 0) and the confidence head (None where the config has none)."""
    markov_head = MARKOV_HEADS[config.markov_head_type](config) if config.markov_rank > 0 else None
    confidence_head = ConfidenceHead(config) if config.enable_confidence_head else None
    return markov_head, confidence_head
