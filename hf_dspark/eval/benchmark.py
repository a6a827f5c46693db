"""run_benchmark(): plain generation, transformers' own speculative methods and drafts, on the same prompts.

Each prompt runs through every arm before the next one does, in an order that is rotated from prompt to prompt, so that
a busy machine slows all arms alike. It prints nothing.
"""

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from ..schedule import ConfidenceThreshold
from ..state import RoundRecord
from .clock import now
from .environment import describe_environment
from .metrics import NO_ROUNDS, count_outcomes, pool_forwards, pool_rounds, quartiles
from .prompts import PromptSet, encode_prompt

PLAIN, PROMPT_LOOKUP, STOCK_LOOP = "plain", "prompt_lookup", "@transformers"
THRESHOLDS = tuple(step / 10 for step in range(9))

_PROMPT_LOOKUP_TOKENS = 10  # what transformers' own PromptLookupCandidateGenerator drafts unless told otherwise
_WARM_UP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to generate: its name, and what it adds to the arguments of generate()."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """What is kept of one generate() call; its cache is not, or it would lie beside the next run's."""

    ids: list[int]  # new tokens only
    seconds: float
    num_forwards: int  # of the target, the prefill included
    rounds: tuple[RoundRecord, ...] | None  # None: the arm's drafting is not ours

    @property
    def tokens_per_second(self) -> float:
        return len(self.ids) / self.seconds


def make_arms(drafts: Mapping[str, PreTrainedModel]) -> list[Arm]:
    """Plain generation, prompt lookup, transformers' loop with the first draft, and every draft in ours."""
    for name in drafts:
        if name in (PLAIN, PROMPT_LOOKUP) or name.endswith(STOCK_LOOP):
            raise ValueError(f"A draft cannot be called {name!r}: another arm has that name. Rename its folder.")
    first, draft = next(iter(drafts.items()))
    return [
        Arm(PLAIN, {}),
        Arm(PROMPT_LOOKUP, {"prompt_lookup_num_tokens": _PROMPT_LOOKUP_TOKENS}),
        Arm(first + STOCK_LOOP, {"custom_generate": draft.as_custom_generate(loop="transformers")}),
        *(Arm(name, {"assistant_model": draft}) for name, draft in drafts.items()),
    ]


def run_benchmark(
    target: PreTrainedModel,
    drafts: Mapping[str, PreTrainedModel],
    tokenizer,
    prompts: PromptSet,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    as_chat: bool = True,
    seed: int = 0,
    threshold_sweep: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Measure `drafts` (by name) against plain generation; returns the content of the benchmark's JSON.

    Args:
        temperature: 0 is greedy; else every arm starts prompt i with seed `seed` + i.
        as_chat: frame prompts by the tokenizer's chat template, where it has one.
        threshold_sweep: also count accepted and rejected tokens of the first draft by confidence threshold.
        command: recorded as it is.
    """
    name, draft = next(iter(drafts.items()))
    if threshold_sweep and draft.confidence_head is None:
        raise ValueError(f"A threshold sweep needs a confidence head, and {name!r} has none. Leave the sweep out.")
    arguments = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0, "return_dict_in_generate": True}
    if temperature > 0:
        arguments["temperature"] = temperature
    inputs = [encode_prompt(tokenizer, text, as_chat=as_chat).to(target.device) for text in prompts.texts]
    runs = _run_arms(target, make_arms(drafts), inputs, arguments, seed)
    environment = describe_environment(target)
    result = {
        **environment,
        "command": command,
        "prompts": {"file": prompts.file, "number": len(prompts.texts)},
        "arms": {arm: _summarise(of_arm, runs[PLAIN], is_greedy=temperature == 0) for arm, of_arm in runs.items()},
    }
    if threshold_sweep:
        result["threshold_sweep"] = _sweep_thresholds(target, draft, inputs, arguments, seed)
    return result


def _run_arms(
    target: PreTrainedModel, arms: list[Arm], inputs: list[Mapping[str, Any]], arguments: dict[str, Any], seed: int
) -> dict[str, list[Run]]:
    """Every arm's runs, one a prompt, in the order of the prompts."""
    # The first call of an arm pays for lazy set-up, which does not depend on how much it generates.
    short = {**arguments, "max_new_tokens": min(_WARM_UP_TOKENS, arguments["max_new_tokens"])}
    for arm in arms:
        _run(target, arm, inputs[0], short, seed)
    runs: dict[str, list[Run]] = {arm.name: [] for arm in arms}
    for index, prompt in enumerate(logging.tqdm(inputs, desc="prompts")):
        start = index % len(arms)
        for arm in arms[start:] + arms[:start]:
            runs[arm.name].append(_run(target, arm, prompt, arguments, seed + index))
    return runs


def _run(target: PreTrainedModel, arm: Arm, inputs: Mapping[str, Any], arguments: Mapping[str, Any], seed: int) -> Run:
    if arguments["do_sample"]:
        set_seed(seed)
    with _counted_forwards(target) as forwards:
        start = now(target.device)
        output = target.generate(**inputs, **arguments, **arm.arguments)
        seconds = now(target.device) - start
    ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return Run(ids, seconds, len(forwards), getattr(output, "rounds", None))


@contextmanager
def _counted_forwards(target: PreTrainedModel):
    """A list that grows by one with every forward of the target; in all arms, so that all bear its cost."""
    forwards: list[None] = []
    handle = target.register_forward_hook(lambda *_: forwards.append(None))
    try:
        yield forwards
    finally:
        handle.remove()


def _summarise(runs: list[Run], plain_runs: list[Run], *, is_greedy: bool) -> dict[str, Any]:
    """An arm's entry in the JSON."""
    num_tokens = [len(run.ids) for run in runs]
    if runs[0].rounds is None:
        drafting = {"tau": pool_forwards(num_tokens, [run.num_forwards for run in runs]), **NO_ROUNDS}
    else:
        drafting = pool_rounds(chain.from_iterable(run.rounds for run in runs))
    pairs = list(zip(runs, plain_runs, strict=True))
    return {
        **drafting,
        "tokens_per_second": sum(num_tokens) / sum(run.seconds for run in runs),
        "ratio_to_plain": quartiles([run.tokens_per_second / plain.tokens_per_second for run, plain in pairs]),
        "identical": [sum(run.ids == plain.ids for run, plain in pairs), len(pairs)] if is_greedy else None,
    }


def _sweep_thresholds(
    target: PreTrainedModel, draft: PreTrainedModel, inputs: list[Any], arguments: dict[str, Any], seed: int
) -> list[dict[str, float]]:
    """What becomes of the verified tokens when a block is verified only up to the first lower confidence."""
    sweep = []
    for threshold in logging.tqdm(THRESHOLDS, desc="thresholds"):
        schedule = ConfidenceThreshold(threshold, draft.generation_config.num_assistant_tokens)
        arm = Arm("sweep", {"assistant_model": draft, "schedule": schedule})
        runs = [_run(target, arm, prompt, arguments, seed + index) for index, prompt in enumerate(inputs)]
        sweep.append({"threshold": threshold, **count_outcomes(chain.from_iterable(run.rounds for run in runs))})
    return sweep
