"""Sequential temperature scaling of the confidence head (paper, STS): record rounds, fit, measure, write.

The temperatures make the product of confidences, the survival, a probability; the order of confidences at a position
stays as it is. A temperature cannot move a confidence across one half: where the head is too sure (or not sure enough)
of everything, as on text of another sampling temperature than it was trained on, one shift of all logits goes first.
Whole blocks are recorded, so that no schedule decides which outcomes are seen.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .schedule import FixedLength
from .state import calibrated_confidence

NUM_BINS = 15
# 0.34 to 2.97, two percent apart. No further, for the ECE has a second minimum that is of no use: a very high
# temperature moves all confidences of a position into the one bin around 0.5, without error if half are accepted.
GRID = tuple(round(1.02**step, 4) for step in range(-55, 56))

# What makes up a draft besides its config.json; a training run's folder holds much more.
_FILES = ("*.safetensors", "*.safetensors.index.json", "generation_config.json", "*.py", "README.md", "LICENSE*")


@dataclass(frozen=True, slots=True)
class Calibration:
    """Temperatures of a draft, and what they do to rounds of prompts that they were not fitted on.

    ECE and reliability are of the survival, pooled over block positions.
    """

    temperatures: list[float]  # T_1 ... T_g
    dataset: str
    num_samples: int  # rounds the temperatures were fitted on
    ece_before: float  # with all temperatures 1
    ece_after: float
    # bins: the edges; before and after: share accepted in each bin, None where it is empty; ece_before and ece_after
    reliability: dict[str, Any]
    shift: float = 0.0  # added to all logits before they are divided by temperatures

    def to_json(self) -> str:
        """The fields under their own names."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)


def calibrate(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    prompts: Sequence[torch.Tensor],  # token ids, each [1, n]
    *,
    dataset: str = "",
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    with_shift: bool = False,
    generator: torch.Generator | None = None,
) -> Calibration:
    """Fit the draft's `confidence_temperatures` (and `confidence_shift`) on every second prompt, and measure them.

    Args:
        prompts: held out from the draft's training; the 1st, 3rd, 5th ... are fitted on, the 2nd, 4th, 6th ... are
            measured on, so that a file ordered by topic has each topic on both sides.
        dataset: what the prompts are called in the result.
        temperature: of the sampling; 0 is greedy. Confidences calibrated for one are not for the other.
        with_shift: fit one shift of all logits before the temperatures; without it the shift is 0, as in the paper.

    Raises ValueError for fewer than two prompts, and as `record_confidences` does.
    """
    if len(prompts) < 2:
        raise ValueError(
            f"Calibration fits on one half of the prompts and measures on the other, got {len(prompts)}. Give at "
            "least 2; some hundred rounds on each side, such as 50 prompts, are a fair estimate."
        )
    draft.config.confidence_shift = 0.0  # an earlier calibration's must not be in what is recorded
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "generator": generator}
    logits, accepted = record_confidences(target, draft, prompts[0::2], **settings)
    shift = fit_shift(logits, accepted) if with_shift else 0.0
    temperatures = fit_temperatures(logits + shift, accepted)
    other_logits, outcomes = record_confidences(target, draft, prompts[1::2], **settings)
    before, after = survival_probs(other_logits), survival_probs(other_logits + shift, temperatures)
    eces = {
        "ece_before": expected_calibration_error(before, outcomes),
        "ece_after": expected_calibration_error(after, outcomes),
    }
    draft.config.confidence_temperatures, draft.config.confidence_shift = temperatures, shift
    return Calibration(
        temperatures=list(temperatures),
        dataset=dataset,
        num_samples=logits.shape[0],
        **eces,
        reliability={
            "bins": [edge / NUM_BINS for edge in range(NUM_BINS + 1)],
            "before": _acceptance_by_bin(before, outcomes),
            "after": _acceptance_by_bin(after, outcomes),
            **eces,
        },
        shift=shift,
    )


def record_confidences(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    prompts: Sequence[torch.Tensor],  # token ids, each [1, n]
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw confidence logits [N, g] of N whole verified blocks, and whether tokens 1 to k were all accepted [N, g].

    Sampled at `temperature` (0: greedy) and else as the target's generation config says. Rounds too near to the end
    for a whole block are left out. Raises ValueError for a draft without a confidence head, and where none is left.
    """
    if draft.confidence_head is None:
        raise ValueError("This draft has no confidence head, so there is nothing to calibrate. Train it with one.")
    block_size = draft.config.block_size
    law = {"do_sample": True, "temperature": temperature} if temperature != 0 else {"do_sample": False}
    logits, num_accepted = [], []
    for prompt in logging.tqdm(prompts, desc="recording rounds"):
        input_ids = prompt.to(target.device)
        output = target.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            assistant_model=draft,
            schedule=FixedLength(),
            generator=generator,
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            **law,
        )
        whole = [r for r in output.rounds if r.verify_length == block_size]
        logits += [r.confidence_logits.cpu() for r in whole]
        num_accepted += [r.num_accepted for r in whole]
    if not logits:
        raise ValueError(
            f"No round of {len(prompts)} prompts with `max_new_tokens` {max_new_tokens} verified a whole block of "
            f"{block_size} tokens. Give more prompts, or a `max_new_tokens` well above {block_size + 2}."
        )
    positions = torch.arange(1, block_size + 1)
    return torch.cat(logits), torch.tensor(num_accepted).unsqueeze(-1) >= positions


def fit_shift(
    confidence_logits: torch.Tensor,  # [N, g]  raw
    accepted: torch.Tensor,  # [N, g]  whether tokens 1 to k were all accepted
) -> float:
    """The one shift of all logits with which as many tokens are expected as were accepted, of those that were reached.

    It has the highest likelihood of all shifts; between -8 and 8.
    """
    reached = torch.cat([torch.ones_like(accepted[:, :1]), accepted[:, :-1]], dim=1)
    logits, outcomes = confidence_logits[reached].double(), accepted[reached].double()
    low, high = -8.0, 8.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if (logits + middle).sigmoid().mean() < outcomes.mean() else (low, middle)
    return round((low + high) / 2, 4)


def fit_temperatures(
    confidence_logits: torch.Tensor,  # [N, g]  raw
    accepted: torch.Tensor,  # [N, g]  whether tokens 1 to k were all accepted
    *,
    grid: Sequence[float] = GRID,
) -> list[float]:
    """T_1 ... T_g, left to right: each minimises the ECE of the product of confidences so far, earlier ones fixed.

    Of equally good values of `grid` the one nearest to 1 (in ratio) is taken, so a position without evidence is left
    as it is. The ECE has 15 bins of equal width.
    """
    if confidence_logits.shape != accepted.shape or confidence_logits.ndim != 2 or not len(confidence_logits):
        raise ValueError(
            "Temperatures are fitted on logits and outcomes of the same rounds, both [N, g] with N at least 1, got "
            f"{list(confidence_logits.shape)} and {list(accepted.shape)}. Take both from `record_confidences`."
        )
    if not grid or min(grid) <= 0:
        raise ValueError(f"`grid` must hold temperatures above 0, got {list(grid)}.")
    survival = torch.ones(len(confidence_logits), dtype=torch.double, device=confidence_logits.device)
    temperatures = []
    for logits, outcomes in zip(confidence_logits.double().unbind(-1), accepted.unbind(-1), strict=True):
        temperatures.append(_best_temperature(logits, survival, outcomes, grid))
        survival = survival * (logits / temperatures[-1]).sigmoid()
    return temperatures


def survival_probs(
    confidence_logits: torch.Tensor,  # [N, g]  raw
    temperatures: Sequence[float] | None = None,  # [g]
) -> torch.Tensor:
    """a_k [N, g]: probability that tokens 1 to k are all accepted, by confidences calibrated with `temperatures`."""
    return calibrated_confidence(confidence_logits.double(), temperatures).cumprod(-1)


def expected_calibration_error(probs: torch.Tensor, outcomes: torch.Tensor, num_bins: int = NUM_BINS) -> float:
    """Mean distance of predicted probability and share of true outcomes, over bins of equal width weighted by count.

    `probs` and `outcomes` have one shape, whatever it is; bin b holds b/num_bins <= p < (b+1)/num_bins, the last one
    also p = 1.
    """
    probs, outcomes = probs.double().flatten(), outcomes.double().flatten()
    index = _bin_index(probs, num_bins)
    # |sum of p - sum of outcomes| of a bin is its count times the distance of the two means.
    gaps = torch.bincount(index, weights=probs - outcomes, minlength=num_bins)
    return gaps.abs().sum().item() / probs.numel()


def write_temperatures(
    temperatures: Sequence[float],
    draft: str | os.PathLike,
    output: str | os.PathLike | None = None,
    *,
    shift: float = 0.0,
) -> Path:
    """Write `confidence_temperatures` and `confidence_shift` into a draft's config.json; returns its folder.

    Whatever layout the config has, its other keys stay as they are. With `output`, the draft (a folder or a Hub name)
    is left alone: its files are copied there, its config last. Raises ValueError as `output_folder` does.
    """
    folder = output_folder(draft, output)
    source = Path(cached_file(draft, "config.json"))
    if not folder.exists() or not folder.samefile(source.parent):
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted({file for pattern in _FILES for file in source.parent.glob(pattern)}):
            shutil.copyfile(file, folder / file.name)
    text = source.read_text(encoding="utf-8")
    fields = json.loads(text) | {"confidence_temperatures": list(temperatures)}
    if shift or "confidence_shift" in fields:
        fields["confidence_shift"] = shift
    indent = re.search(r"^[ \t]+", text, re.MULTILINE)  # as in the file, so that a diff shows the one key
    written = json.dumps(fields, indent=indent and indent[0], ensure_ascii=False)
    _replace_file(folder / "config.json", written + "\n" * text.endswith("\n"))
    return folder


def output_folder(draft: str | os.PathLike, output: str | os.PathLike | None) -> Path:
    """The folder `write_temperatures` writes to.

    Raises ValueError where that would be a Hub's, and OSError where it is read-only: a call knows before it works.
    """
    if output is None and not Path(draft).is_dir():
        raise ValueError(
            f"{os.fspath(draft)!r} is no local folder, so the temperatures cannot be written into its config.json. "
            "Say with --output (`output`) which folder the calibrated draft goes to."
        )
    folder = Path(draft if output is None else output)
    if folder.exists() and not os.access(folder, os.W_OK):
        raise OSError(f"{folder} cannot be written to. Give another folder with --output (`output`).")
    return folder


def _best_temperature(
    logits: torch.Tensor,  # [N]  of one position
    survival: torch.Tensor,  # [N]  of the positions before it, calibrated
    outcomes: torch.Tensor,  # [N]
    grid: Sequence[float],
) -> float:
    def key(temperature: float) -> tuple[float, float]:
        probs = survival * (logits / temperature).sigmoid()
        return expected_calibration_error(probs, outcomes), abs(math.log(temperature))

    return min(grid, key=key)


def _acceptance_by_bin(probs: torch.Tensor, outcomes: torch.Tensor) -> list[float | None]:
    index = _bin_index(probs.flatten(), NUM_BINS)
    counts = torch.bincount(index, minlength=NUM_BINS).tolist()
    accepted = torch.bincount(index, weights=outcomes.double().flatten(), minlength=NUM_BINS).tolist()
    return [share / count if count else None for share, count in zip(accepted, counts, strict=True)]


def _bin_index(probs: torch.Tensor, num_bins: int) -> torch.Tensor:
    return (probs * num_bins).long().clamp(0, num_bins - 1)


def _replace_file(path: Path, text: str) -> None:
    """Write `text` beside `path` and rename it: no process ever reads half of it."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        if path.exists():
            shutil.copymode(path, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
