"""Logits to probabilities to tokens: one rule for draft and target alike.

Which processors may be called freely, on whole blocks or on copies, is decided here; the round only asks.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as lp

from .state import Distribution
from .warpers import Warpers

# They read only the scores, never the prefix: one call may serve all positions of a block.
_PREFIX_FREE = (
    lp.TemperatureLogitsWarper,
    lp.TopKLogitsWarper,
    lp.TopPLogitsWarper,
    lp.MinPLogitsWarper,
    lp.TypicalLogitsWarper,
    lp.EpsilonLogitsWarper,
    lp.EtaLogitsWarper,
)
# Their scores are a function of the prefix they are given, so a call for a rejected token leaves no trace.
_STATELESS = (
    *_PREFIX_FREE,
    lp.RepetitionPenaltyLogitsProcessor,
    lp.NoRepeatNGramLogitsProcessor,
    lp.EncoderNoRepeatNGramLogitsProcessor,
    lp.EncoderRepetitionPenaltyLogitsProcessor,
    lp.MinLengthLogitsProcessor,
    lp.MinNewTokensLengthLogitsProcessor,
    lp.SequenceBiasLogitsProcessor,
    lp.NoBadWordsLogitsProcessor,
    lp.ForcedBOSTokenLogitsProcessor,
    lp.ForcedEOSTokenLogitsProcessor,
    lp.InfNanRemoveLogitsProcessor,
    lp.ExponentialDecayLengthPenalty,
    lp.SuppressTokensLogitsProcessor,
    lp.SuppressTokensAtBeginLogitsProcessor,
    lp.LogitNormalization,
)
# Columns kept beyond top_k: all tokens that tie with the k-th survive transformers' filter.
_TIE_SLACK = 16


@dataclass(frozen=True, slots=True)
class TopKWarper:
    """Temperature, top-k and top-p on the k best tokens instead of on sorted copies of the vocabulary."""

    temperature: float
    top_k: int
    top_p: float

    def __call__(self, logits: torch.Tensor, *, exact: bool) -> Distribution | None:
        """The law [B, L, K] the three processors give for `logits` [B, L, V].

        With `exact`, None where more tokens tie with the k-th than the support holds; without, they are left out.
        """
        vocab_size = logits.shape[-1]
        width = min(self.top_k + _TIE_SLACK, vocab_size)
        values, ids = torch.topk(logits, width)
        kth = values[..., min(self.top_k, vocab_size) - 1, None]
        if exact and width < vocab_size and (values[..., -1:] == kth).any().tolist():
            return None
        scores = (values / self.temperature).masked_fill(values < kth, -torch.inf)
        if self.top_p < 1.0:
            mass_from_the_tail = scores.softmax(-1).flip(-1).cumsum(-1).flip(-1)
            removed = mass_from_the_tail <= 1.0 - self.top_p
            removed[..., 0] = False
            scores = scores.masked_fill(removed, -torch.inf)
        return Distribution(scores.softmax(-1), ids)


@dataclass(frozen=True, slots=True)
class WarpedSampler:
    """Chooses a drafted token by `warpers`, and gives their law."""

    warpers: Warpers
    uniforms: torch.Tensor  # [B, g]  fp64, in [0, 1)

    def __call__(self, logits: torch.Tensor, drafted_ids: torch.Tensor) -> tuple[torch.Tensor, Distribution]:
        """Token ids [B] from `logits` [B, V]; `drafted_ids` [B, k] are the block's tokens before them."""
        probs = self.warpers(logits)
        return search(probs, self.uniforms[:, drafted_ids.shape[1]]), Distribution(probs.unsqueeze(1))


torch.export.register_dataclass(WarpedSampler)  # graphs find the tensors in it


@dataclass(frozen=True, slots=True)
class TemperatureSampler:
    """Chooses a drafted token from its logits alone: the likeliest, or one drawn from their softmax."""

    temperature: float = 1.0
    uniforms: torch.Tensor | None = None  # [B, g]  fp64, in [0, 1); None: the likeliest

    def __call__(self, logits: torch.Tensor, drafted_ids: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Token ids [B] from `logits` [B, V]; `drafted_ids` [B, k] are the block's tokens before them."""
        if self.uniforms is None:
            return logits.argmax(-1), None
        uniforms = self.uniforms[:, drafted_ids.shape[1]].to(logits.device)
        return search(softmax_at(self.temperature, logits), uniforms), None


class SamplingRule:
    """The logits processors of one call and the way a token is chosen, for the target and for the draft.

    Args:
        processors: as generate() prepared them.
        do_sample: draw from the processed law; otherwise take its argmax.
        generator: source of randomness; None is torch's default generator of the device, as in plain generate.
        keep_scores: the caller wants processed scores of the whole vocabulary, so nothing may be skipped.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        *,
        do_sample: bool,
        generator: torch.Generator | None = None,
        keep_scores: bool = False,
    ):
        self.processors = processors
        self.do_sample = do_sample
        self.generator = generator
        self.is_stateful = any(type(p) not in _STATELESS for p in processors)
        self.is_prefix_free = all(type(p) in _PREFIX_FREE for p in processors)
        # Of the softmax that is the law of a token; None: other processors have a say, or scores are wanted.
        self.temperature = None if keep_scores else _temperature(processors)
        self._settings = None if keep_scores else _warper_settings(processors)
        self.top_k_warper = _top_k_warper(self._settings) if do_sample else None

    def draft_processors(self) -> LogitsProcessorList:
        """Processors for one block of the draft: stateful ones as copies, so that the target's see only its own calls.

        A copy that holds a model (classifier-free guidance) would run the target for every drafted token, and one
        that cannot be copied would be disturbed: both are left out. The draft's law may be any; the output's is not.
        """
        if not self.is_stateful:
            return self.processors
        kept = (p if type(p) in _STATELESS else _copy_processor(p) for p in self.processors)
        return LogitsProcessorList([p for p in kept if p is not None])

    def sparse_distribution(self, logits: torch.Tensor, *, exact: bool) -> Distribution | None:
        """The law over a short support, where processors and device allow it; None: process the whole vocabulary.

        Only on a CPU: there full sorts cost most, and looking for ties costs no device synchronisation.
        """
        if self.top_k_warper is None or logits.device.type != "cpu":
            return None
        return self.top_k_warper(logits, exact=exact)

    def draft_token(
        self, logits: torch.Tensor, prefix: torch.Tensor | None
    ) -> tuple[torch.Tensor, Distribution | None]:
        """Drafted tokens [B] and their law [B, 1, K] (None: greedy, or a softmax) from draft logits [B, V].

        Where there is no one `prefix` [B, n], processors that read it are left out: the draft's law may be any.
        """
        if self.temperature is not None:
            return self.temperature_sampler(logits, 1)(logits, logits[:, :0])
        law = self.sparse_distribution(logits.unsqueeze(1), exact=False)
        if law is not None:
            column = self.draw_drafted(law.probs[:, 0])
            return law.support_ids[:, 0].gather(-1, column.unsqueeze(-1)).squeeze(-1), law
        processors = self.draft_processors() if prefix is not None else self.processors
        for processor in processors:
            if prefix is not None or type(processor) in _PREFIX_FREE:
                logits = processor(prefix, logits.clone())
        if not self.do_sample:
            return logits.argmax(-1), None
        probs = logits.softmax(-1)
        return self.draw_drafted(probs), Distribution(probs.unsqueeze(1))

    def is_traceable(self, device: torch.device) -> bool:
        """Whether tensors of fixed shapes say all of the rule: it is greedy, or temperature, top-k and top-p.

        Not where `sparse_distribution` serves: whether it does, the host decides by ties.
        """
        if not self.do_sample:
            return self.temperature is not None
        return self._settings is not None and (self.top_k_warper is None or device.type != "cpu")

    def warpers(self, device: torch.device) -> Warpers | None:
        """The numbers of a traceable rule; None: greedy."""
        if not self.do_sample:
            return None
        temperature, top_k, top_p = self._settings
        return Warpers(
            torch.tensor(temperature, device=device),
            top_k,
            None if top_p is None else torch.tensor(1.0 - top_p, device=device),
        )

    def draft_uniforms(self, like: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Numbers [B, g] for a `WarpedSampler`: those that drafted tokens would take one after the other."""
        if self.temperature is not None:
            return self._doubles(like, num_tokens)
        return torch.cat([self._doubles(like, 1) for _ in range(num_tokens)], dim=1)

    def exponentials(self, like: torch.Tensor) -> torch.Tensor:
        """What `draw` divides probabilities by, in the shape of `like`."""
        return torch.empty_like(like).exponential_(generator=self.generator)

    def draw(self, probs: torch.Tensor) -> torch.Tensor:
        """Column [B] drawn from `probs` [B, K] for a token that is emitted: torch.multinomial's random stream."""
        return draw(probs, self.generator)

    def draw_drafted(self, probs: torch.Tensor) -> torch.Tensor:
        """Column [B] drawn from `probs` [B, K] for a drafted token: one uniform number instead of K exponentials."""
        return search(probs, self._doubles(probs, 1).squeeze(-1))

    def temperature_sampler(self, like: torch.Tensor, num_tokens: int) -> TemperatureSampler:
        """For `num_tokens` drafted tokens of each row of `like` [B, ...], where `temperature` is all there is."""
        return TemperatureSampler(self.temperature, self._doubles(like, num_tokens) if self.do_sample else None)

    def uniforms(self, like: torch.Tensor) -> torch.Tensor:
        """One uniform number in [0, 1) for each drafted token; `like` is [B, L]."""
        return torch.rand(like.shape, device=like.device, generator=self.generator)

    def _doubles(self, like: torch.Tensor, count: int) -> torch.Tensor:
        return torch.rand(len(like), count, dtype=torch.double, device=like.device, generator=self.generator)


def softmax_at(temperature: float, logits: torch.Tensor) -> torch.Tensor:
    """softmax(logits / temperature) over the last axis."""
    return (logits if temperature == 1.0 else logits / temperature).softmax(-1)


def draw(probs: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """The index [...] drawn from `probs` [..., K].

    torch.multinomial's algorithm and random stream, without its host synchronisations.
    """
    return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1)


def search(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The column [B] of `probs` [B, K] in which `uniforms` [B] falls, a share of the mass.

    In fp64, so that the law is `probs` to 1e-16 also for the rarest token of a large vocabulary.
    """
    cumulative = probs.double().cumsum(-1)
    column = torch.searchsorted(cumulative, uniforms.unsqueeze(-1) * cumulative[:, -1:], right=True)
    return column.squeeze(-1).clamp_max(probs.shape[-1] - 1)


def process_scores(
    rule: SamplingRule,
    candidate_ids: torch.Tensor,  # [B, n+L]  committed tokens, then the drafted ones
    logits: torch.Tensor,  # [B, L+1, V]
    goes_on: Callable[[int, torch.Tensor], bool] | None = None,
) -> torch.Tensor:
    """Processed scores [B, L+1, V]; position i is processed with the prefix that ends in drafted token i.

    Where `goes_on(i, scores so far)` returns False, positions behind i are not processed: their rows stay raw and must
    not be read. Stateful processors need it, since they may only be called for tokens that are emitted, in order.
    """
    if len(rule.processors) == 0:
        return logits
    if rule.is_prefix_free:
        return rule.processors(candidate_ids, logits.flatten(0, 1).clone()).view_as(logits)
    scores = logits.clone()
    num_drafted = logits.shape[1] - 1
    for i in range(num_drafted + 1):
        prefix = candidate_ids[:, : candidate_ids.shape[1] - num_drafted + i]
        scores[:, i] = rule.processors(prefix, logits[:, i].clone())
        if goes_on is not None and i < num_drafted and not goes_on(i, scores):
            break
    return scores


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Committed tokens of a call's rows, which are of different lengths, and which of them are still going on."""

    ids: torch.Tensor  # [B, C]  all rows, also those that ended; what stands behind a row's length means nothing
    rows: list[int]  # [R]  those that go on
    lengths: list[int]  # [R]


def process_ragged(
    rule: SamplingRule,
    prefixes: Prefixes,
    draft_ids: torch.Tensor,  # [R, L]
    logits: torch.Tensor,  # [R, L+1, V]
) -> torch.Tensor:
    """`process_scores` for rows of different lengths: processors see all rows of the call, once a length.

    They may hold a number for every row of the call, and count the tokens in front of them. For stateless ones only.
    """
    scores, num_drafted = logits.clone(), draft_ids.shape[1]
    for length in sorted({n + i for n in prefixes.lengths for i in range(num_drafted + 1)}):
        ids = prefixes.ids[:, :length].clone()
        batch = logits.new_zeros(len(ids), logits.shape[-1])
        here = []
        for index, (row, start) in enumerate(zip(prefixes.rows, prefixes.lengths, strict=True)):
            if start <= length <= start + num_drafted:
                ids[row, start:] = draft_ids[index, : length - start]
                batch[row] = logits[index, length - start]
                here.append((index, length - start, row))
        processed = rule.processors(ids, batch)
        for index, position, row in here:
            scores[index, position] = processed[row]
    return scores


def _temperature(processors: LogitsProcessorList) -> float | None:
    """The temperature where `processors` hold nothing else; 1 where there are none."""
    if any(type(p) is not lp.TemperatureLogitsWarper for p in processors):
        return None
    return math.prod(float(p.temperature) for p in processors)


def _warper_settings(processors: LogitsProcessorList) -> tuple[float, int | None, float | None] | None:
    """Temperature, top-k and top-p where `processors` are nothing else, in transformers' order; otherwise None."""
    order = [lp.TemperatureLogitsWarper, lp.TopKLogitsWarper, lp.TopPLogitsWarper]
    types = [type(p) for p in processors]
    if types != [t for t in order if t in types]:
        return None
    if any(getattr(p, "filter_value", -torch.inf) != -torch.inf for p in processors):
        return None
    if any(getattr(p, "min_tokens_to_keep", 1) != 1 for p in processors):
        return None
    by_type = dict(zip(types, processors, strict=True))
    temperature, top_k, top_p = (by_type.get(t) for t in order)
    return (
        1.0 if temperature is None else float(temperature.temperature),
        None if top_k is None else top_k.top_k,
        None if top_p is None else float(top_p.top_p),
    )


def _top_k_warper(settings: tuple[float, int | None, float | None] | None) -> TopKWarper | None:
    """The short form of processors with a top-k."""
    if settings is None or settings[1] is None:
        return None
    temperature, top_k, top_p = settings
    return TopKWarper(temperature, top_k, 1.0 if top_p is None else top_p)


def _copy_processor(processor: LogitsProcessor) -> LogitsProcessor | None:
    if any(isinstance(value, nn.Module) for value in vars(processor).values()):
        return None
    try:
        return copy.deepcopy(processor)
    except Exception:  # whatever a user's class raises: it cannot be copied, and that is all we need to know
        return None
