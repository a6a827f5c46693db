"""What one generate() call asks of a decoding method, read once: its sampling rule, its limits, what it collects."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import stopping_criteria as sc

from .sampling import SamplingRule
from .state import DecodeState

# Criteria whose verdict is a function of the prefix and the clock.
_STATELESS = (sc.MaxLengthCriteria, sc.EosTokenCriteria, sc.MaxTimeCriteria, sc.StopStringCriteria)
_EXTRAS = ("scores", "logits", "hidden_states", "attentions")


@dataclass(frozen=True, slots=True)
class Terms:
    """Read from what generate() prepared."""

    rule: SamplingRule
    criteria: sc.StoppingCriteriaList
    max_length: int  # columns of the output, padding in front of the prompt included
    eos_ids: torch.Tensor | None
    has_other_criteria: bool  # than length and EOS, which are decided on the device; they are asked for every prefix
    extras: tuple[str, ...]  # what to collect besides tokens
    pad_token_id: int  # behind rows that ended; 0 where the call names none

    @classmethod
    def of(
        cls,
        processors: LogitsProcessorList,
        criteria: sc.StoppingCriteriaList,
        config: GenerationConfig,
        device: torch.device,
        generator: torch.Generator | None,
    ) -> "Terms":
        asked = tuple(name for name in _EXTRAS if getattr(config, f"output_{name}"))
        extras = asked if config.return_dict_in_generate else ()
        lengths = [c.max_length for c in criteria if type(c) is sc.MaxLengthCriteria]
        eos = [c.eos_token_id for c in criteria if type(c) is sc.EosTokenCriteria]
        pad = config.pad_token_id
        return cls(
            rule=SamplingRule(
                processors, do_sample=config.do_sample, generator=generator, keep_scores="scores" in extras
            ),
            criteria=criteria,
            max_length=min(lengths, default=config.max_length),
            eos_ids=torch.cat(eos).to(device) if eos else None,
            has_other_criteria=len(lengths) + len(eos) < len(criteria),
            extras=extras,
            pad_token_id=0 if pad is None else int(pad),
        )


class Verdicts:
    """What the user's stopping criteria say of one round's prefixes; each prefix is asked for once, in order."""

    def __init__(self, terms: Terms, state: DecodeState):
        self._criteria, self._state, self._with_scores = terms.criteria, state, "scores" in terms.extras
        self._verdicts: list[torch.Tensor] = []

    def on_last(self, tokens: torch.Tensor, scores: torch.Tensor | None) -> torch.Tensor:
        """Whether plain generate() would stop behind `tokens` [B, m], m at least 1; [B]."""
        for count in range(len(self._verdicts) + 1, tokens.shape[1] + 1):
            prefix = torch.cat([self._state.input_ids, tokens[:, :count]], dim=1)
            seen = (*self._state.extras["scores"], *scores[:, :count].unbind(1)) if self._with_scores else None
            self._verdicts.append(self._criteria(prefix, seen))
        return self._verdicts[tokens.shape[1] - 1]

    def first_stop(
        self, tokens: torch.Tensor, scores: torch.Tensor | None, ended: Sequence[bool] = (False,)
    ) -> tuple[int, list[bool]]:
        """How many of `tokens` [B, m] come before a row stops that has not `ended`, and which rows stop there."""
        num_tokens = tokens.shape[1]
        # One more synchronisation a round, only where the user gave criteria: they decide how much is emitted. One a
        # token where they may keep a state: they must not be asked of a prefix behind a stop, which is not emitted.
        step = num_tokens if all(type(c) in _STATELESS for c in self._criteria) else 1
        for start in range(0, num_tokens, step):
            self.on_last(tokens[:, : start + step], scores)
            for count, stops in enumerate(torch.stack(self._verdicts[start : start + step]).tolist(), start + 1):
                if any(stop and not before for stop, before in zip(stops, ended, strict=True)):
                    return count, stops
        return num_tokens, [False] * len(ended)
