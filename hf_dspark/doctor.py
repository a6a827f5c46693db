"""The checks of `hf-dspark check`: what a draft was found to be, what it is worth, and why it may be worth so little.

A lossless loop hides a draft that is fed wrongly: the text stays right and nothing is accepted. So the draft is also
measured with each usual fault undone, on the same text; a variant that is clearly better names the fault.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .comparison import Comparison, compare
from .features import num_target_layers
from .modeling_dspark import BACKBONES, DSparkDraftModel
from .train.anchors import blocks_of_draft, sample_anchors
from .train.answers import Sample
from .train.step import TrainingStep
from .train.target import FrozenTarget

PROMPTS = (
    "Tom has 4 boxes with 6 pencils each and gives away 9 pencils. How many pencils does he have left?",
    "Explain in three sentences how a bicycle stays upright.",
    "Write a Python function that counts the vowels in a string.",
    "Give me a short recipe for pancakes.",
    "A train travels 180 km in 3 hours. What is its average speed, and how far does it go in 5 hours?",
    "Write a short story about a fox who finds a lamp.",
    "A shop sells 3 apples for 2 dollars. How much do 12 apples cost?",
    "Sara reads 15 pages a day. How many days does she need for 240 pages?",
    "What is the difference between a frog and a toad?",
    "Name three uses of a paper clip.",
)
# Accepted lengths below it are hardly worth a draft (a plain decoding step is 1).
POOR_TAU = 1.8
# A variant names a fault where it adds so much to the accepted drafted tokens, and is better on so many of the texts.
_CLEARLY_BETTER, _MOST, _HARDLY = 1.03, 0.6, 0.5
_NUM_ANCHORS = 64


@dataclass(frozen=True, slots=True)
class Variant:
    """The draft with one thing changed: its expected accepted length, and how to keep the change."""

    name: str
    remedy: str
    tau: float
    tau_as_is: float  # of the draft as it is, on the same text
    num_better: int  # texts on which the change is for the better
    num_texts: int

    @property
    def is_clearly_better(self) -> bool:
        """Whether the change adds more than chance would, and on most texts."""
        adds = self.tau - 1 > _CLEARLY_BETTER * (self.tau_as_is - 1)
        return adds and self.num_better >= _MOST * self.num_texts


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What `examine` found."""

    facts: dict[str, str]
    comparisons: tuple[Comparison, ...]  # plain against speculative generation, a prompt each
    expected_tau: float  # teacher-forced at temperature 1, the draft as it is
    variants: tuple[Variant, ...]  # those that add most first

    @property
    def tau(self) -> float:
        """Accepted length of the greedy self-test, pooled over prompts."""
        rounds = sum(c.stats.rounds for c in self.comparisons)
        return sum(c.stats.tokens - 1 for c in self.comparisons) / rounds if rounds else 1.0

    @property
    def fault(self) -> Variant | None:
        """The variant that is clearly better than the draft as it is; None where there is none."""
        return next((variant for variant in self.variants if variant.is_clearly_better), None)

    @property
    def is_healthy(self) -> bool:
        """Whether the draft is worth using as it is loaded."""
        return self.fault is None and self.tau >= POOR_TAU


def examine(
    draft: DSparkDraftModel,
    target: PreTrainedModel,
    tokenizer,
    prompts: Sequence[str] = PROMPTS,
    *,
    max_new_tokens: int = 64,
    as_chat: bool = True,
) -> Diagnosis:
    """Measure `draft` on `prompts`, as it is and with the usual faults undone. Both models are left as they were.

    Raises ValueError where no prompt has an answer that is long enough to measure on.
    """
    encodings = _encodings(tokenizer, as_chat)
    (_, encode), *others = encodings.items()
    comparisons = [
        compare(target, draft, encode(prompt).to(target.device), max_new_tokens=max_new_tokens, do_sample=False)
        for prompt in prompts
    ]
    samples = _samples(target, encode, prompts, max_new_tokens)
    base = _taus(draft, target, samples)
    variants = []
    for name, remedy, change in _changes(draft, target):
        with change():
            variants.append(_variant(name, remedy, _taus(draft, target, samples), base))
    for name, other in others:
        # Other encodings have other answers. The draft knows the one that it was trained with: on the answers written
        # after it, it is worth more with that encoding before them than with another.
        theirs = _samples(target, other, prompts, max_new_tokens)
        ours = [_behind(encode(prompts[sample.index]), sample) for sample in theirs]
        taus = [_taus(draft, target, samples) for samples in (theirs, ours)]
        # Where the draft is hardly worth anything after that encoding, it is not the one it was trained with.
        if _mean(taus[0]) - 1 > _HARDLY * (_mean(base) - 1):
            variants.append(_variant(name, f"encode prompts {name}", *taus))
    variants.sort(key=lambda variant: variant.tau_as_is - variant.tau)
    facts = _facts(draft, target) | comparisons[0].stats.kernels
    return Diagnosis(facts, tuple(comparisons), _mean(base), tuple(variants))


def _facts(draft: DSparkDraftModel, target: PreTrainedModel) -> dict[str, str]:
    config = draft.config
    rank = config.markov_rank
    confidence = "none"
    if config.enable_confidence_head:
        confidence = "calibrated" if config.confidence_temperatures else "not calibrated"
    shared = [name for name in ("embed_tokens", "lm_head") if getattr(draft, name) is None]
    return {
        "backbone": f"{config.backbone_type}, {config.num_hidden_layers} layers",
        "reads": f"layers {config.target_layer_ids} of {num_target_layers(target)}, mask token {config.mask_token_id}",
        "block": f"{config.block_size} tokens, {'the first mask' if config.first_slot else 'the anchor'} predicts"
        + (", causal" if config.causal else ""),
        "rope": f"{config.rope_parameters}" + (", interleaved" if config.rope_interleaved else ""),
        "window": "none" if config.sliding_window is None else f"{config.sliding_window} ({config.layer_types})",
        "sinks": "yes" if config.attention_sinks else "no",
        "sequential head": f"{config.markov_head_type}, rank {rank}" if rank else "none",
        "confidence head": confidence,
        "vocabulary": f"{config.draft_vocab_size or config.vocab_size} of {config.vocab_size} tokens",
        "of the target's": " and ".join(shared) or "nothing: it has its own embedding and lm_head",
    }


def _encodings(tokenizer, as_chat: bool) -> dict[str, Callable[[str], dict]]:
    """Ways to encode a prompt by name, the one that was asked for first."""

    def plainly(prompt: str):
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)

    def by_template(**more):
        def encode(prompt: str):
            turn = [{"role": "user", "content": prompt}]
            settings = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
            return tokenizer.apply_chat_template(turn, **settings, **more)

        return encode

    template = tokenizer.chat_template
    if template is None:
        return {"as they are": plainly}
    ways = {"with the chat template": by_template(), "without a chat template": plainly}
    if not as_chat:
        ways = dict(reversed(ways.items()))
    if "enable_thinking" in template:
        ways["with thinking off (enable_thinking=False)"] = by_template(enable_thinking=False)
        ways["with thinking on (enable_thinking=True)"] = by_template(enable_thinking=True)
    return ways


@torch.no_grad()
def _samples(target, encode, prompts: Sequence[str], max_new_tokens: int) -> list[Sample]:
    """Greedy answers of the target that hold at least one whole step."""
    samples = []
    for index, prompt in enumerate(prompts):
        inputs = encode(prompt).to(target.device)
        start = inputs["input_ids"].shape[1]
        output = target.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0].tolist()
        if len(output) - start > 2:
            samples.append(Sample(index, output, [(start, len(output))]))
    if not samples:
        raise ValueError("The target answered none of the prompts with more than two tokens. Give other prompts.")
    return samples


def _behind(inputs, sample: Sample) -> Sample:
    """The answer of `sample` behind another prompt."""
    (start, stop), prompt = sample.answer_spans[0], inputs["input_ids"][0].tolist()
    answer = sample.input_ids[start:stop]
    return Sample(sample.index, prompt + answer, [(len(prompt), len(prompt) + len(answer))])


@torch.no_grad()
def _taus(draft: DSparkDraftModel, target: PreTrainedModel, samples: Sequence[Sample]) -> list[float]:
    """Expected accepted length at temperature 1 on each text, every position of it the anchor of a block."""
    frozen = FrozenTarget(target, draft.config.target_layer_ids, draft.draft_token_ids)
    step, taus = TrainingStep(draft, frozen), []
    for sample in samples:
        anchors = sample_anchors(sample, _NUM_ANCHORS, torch.Generator().manual_seed(0)).to(target.device)
        blocks = blocks_of_draft(draft.config, sample, anchors, position_decay=4.0)
        _, outcomes = step(frozen.read(sample.input_ids), blocks)
        supervised = blocks.weights > 0
        overlap = torch.zeros(supervised.shape, device=supervised.device)
        overlap[supervised] = outcomes.overlap
        taus.append(1 + overlap.cumprod(-1).sum(-1).mean().item())
    return taus


def _variant(name: str, remedy: str, taus: list[float], base: list[float]) -> Variant:
    better = sum(ours > as_is for ours, as_is in zip(taus, base, strict=True))
    return Variant(name, remedy, _mean(taus), _mean(base), better, len(base))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _changes(draft: DSparkDraftModel, target: PreTrainedModel) -> Iterator[tuple[str, str, Callable]]:
    """Name, remedy and context manager of each usual fault undone."""
    config = draft.config
    for shift in (-1, 1):
        taps = [i + shift for i in config.target_layer_ids]
        if min(taps) >= -1 and max(taps) < num_target_layers(target):
            yield f"taps {taps}", f"set `target_layer_ids` to {taps}", _config_change(draft, target_layer_ids=taps)
    if config.backbone_type != "deepseek_v4":  # whose blocks have one form only
        other, causal = 1 - config.first_slot, not config.causal
        yield f"first slot {other}", f"set `first_slot` to {other}", _config_change(draft, first_slot=other)
        yield f"causal {causal}", f"set `causal` to {causal}", _config_change(draft, causal=causal)
    theirs = _target_rope(target)
    if theirs != {name: config.rope_parameters.get(name) for name in theirs}:
        rope = config.rope_parameters | theirs
        yield "the target's rope", f"set `rope_parameters` to {rope}", _config_change(draft, rope_parameters=rope)
    for name, module in (("embed_tokens", draft.embed_tokens), ("lm_head", draft.lm_head)):
        if module is not None and (name == "embed_tokens" or config.draft_vocab_size is None):
            remedy = f"remove `{name}.weight` from the draft's file, so that the target's is used"
            yield f"the target's {name}", remedy, _without(draft, target, name)


def _target_rope(target: PreTrainedModel) -> dict:
    rope = target.config.get_text_config(decoder=True).rope_parameters or {}
    rope = rope.get("full_attention") or rope
    return {name: rope[name] for name in ("rope_type", "rope_theta", "factor") if rope.get(name) is not None}


def _config_change(draft: DSparkDraftModel, **fields) -> Callable:
    @contextmanager
    def changed():
        config, rotary = draft.config, draft.rotary_emb
        before = {name: getattr(config, name) for name in fields}
        try:
            for name, value in fields.items():
                setattr(config, name, value)
            if "rope_parameters" in fields:
                draft.rotary_emb = BACKBONES[config.backbone_type].RotaryEmbedding(config).to(draft.device)
            yield
        finally:
            for name, value in before.items():
                setattr(config, name, value)
            draft.rotary_emb = rotary

    return changed


def _without(draft: DSparkDraftModel, target: PreTrainedModel, name: str) -> Callable:
    @contextmanager
    def changed():
        own = getattr(draft, name)
        try:
            setattr(draft, name, None)
            draft.bind_target(target)
            yield
        finally:
            setattr(draft, name, own)

    return changed
