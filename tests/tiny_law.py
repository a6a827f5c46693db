"""The law of a target's continuations, enumerated, and how well draws agree with it."""

import pytest
import torch
from scipy.stats import chisquare
from transformers import DynamicCache, LogitsProcessor

from hf_dspark import DSparkDraftModel
from hf_dspark.compat import CACHE

FALSE_ALARM, FOUND = 1e-4, 1e-6  # p-values


@torch.no_grad()
def enumerate_law(target, prompt, processors, new_tokens, eos=None) -> dict[tuple[int, ...], float]:
    """Probability of every continuation the target can produce, by transformers' own processors."""
    open_sequences, probs, law = prompt, torch.ones(1, dtype=torch.float64), {}
    for _ in range(new_tokens):
        logits = target(open_sequences, **{CACHE: DynamicCache(config=target.config)}).logits
        scores = processors(open_sequences, logits[:, -1].float())
        joint = probs.unsqueeze(-1) * scores.double().softmax(-1)
        rows, tokens = (joint > 0).nonzero(as_tuple=True)
        open_sequences, probs = torch.cat([open_sequences[rows], tokens.unsqueeze(-1)], dim=-1), joint[rows, tokens]
        if eos is not None:
            ended = tokens == eos
            law |= _as_law(open_sequences[ended], probs[ended], prompt)
            open_sequences, probs = open_sequences[~ended], probs[~ended]
    return law | _as_law(open_sequences, probs, prompt)


def _as_law(sequences, probs, prompt):
    continuations = sequences[:, prompt.shape[1] :].tolist()
    return {tuple(tokens): p for tokens, p in zip(continuations, probs.tolist(), strict=True)}


def p_value(law: dict[tuple[int, ...], float], drawn: list[tuple[int, ...]], min_pools: int = 10) -> float:
    """Of a chi-square test; unlikely continuations are pooled until 5 of a pool are expected."""
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-6)
    impossible = set(drawn) - law.keys()
    assert not impossible, f"the target cannot produce {sorted(impossible)[:3]}"
    counts = dict.fromkeys(law, 0)
    for tokens in drawn:
        counts[tokens] += 1
    observed, expected = [0.0], [0.0]
    for tokens, probability in sorted(law.items(), key=lambda item: item[1]):
        if expected[-1] >= 5:
            observed.append(0.0)
            expected.append(0.0)
        observed[-1] += counts[tokens]
        expected[-1] += probability * len(drawn)
    assert len(expected) > min_pools
    total = sum(expected)
    return chisquare(observed, [e * len(drawn) / total for e in expected]).pvalue


def marginals_of(law, prompt, vocab_size) -> torch.Tensor:
    """The law of the token at each position [positions, V]; 0 in the prompt."""
    longest = max(map(len, law))
    table = torch.zeros(prompt.shape[1] + longest, vocab_size)
    for tokens, probability in law.items():
        for i, token in enumerate(tokens):
            table[prompt.shape[1] + i, token] += probability
    return table


class PositionalDraft(DSparkDraftModel):
    """Heads of a draft on a backbone that sees only positions, which costs nothing.

    With `marginals` it knows the target's law at each position, though not the tokens before it.
    """

    marginals: torch.Tensor | None = None  # [positions, V]

    def forward(self, features, block_ids, position_ids, *args, **kwargs):
        self._block_positions = position_ids[:, -block_ids.shape[1] :]
        states = torch.randn(64, self.config.hidden_size, generator=torch.Generator().manual_seed(5))
        return states[self._block_positions]

    def compute_logits(self, hidden_states):
        if self.marginals is None:
            return super().compute_logits(hidden_states)
        positions = self._block_positions[:, : hidden_states.shape[1]] + 1  # a position predicts the token after it
        logits = (self.marginals[positions.clamp_max(len(self.marginals) - 1)] + 1e-3).log()
        return logits if self.draft_token_ids is None else logits[..., self.draft_token_ids]


class AgainstRepeats(LogitsProcessor):
    """Of a type nobody knows: it might keep a state, so it is called once for each emitted token."""

    def __call__(self, input_ids, scores):
        return scores.scatter_add(-1, input_ids[:, -2:], torch.full_like(scores[:, :2], -1.0))
