"""Where training gets the target's states from: computed in the step, or read from a cache on disk."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers.utils import logging

from .answers import Sample
from .target import FrozenTarget, TargetStates

logger = logging.get_logger(__name__)


class StateSource:
    """States of samples; with a `folder`, each is computed once and kept there.

    Size on disk in bytes: tokens of all samples * ((taps + 1) * hidden size * bytes of the target's dtype + 12).
    """

    def __init__(self, target: FrozenTarget, folder: Path | None, samples: Sequence[Sample]):
        self._target = target
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            config = target.model.config.get_text_config(decoder=True)
            tokens = sum(len(sample.input_ids) for sample in samples)
            width = (len(target.target_layer_ids) + 1) * config.hidden_size
            size = tokens * (width * target.model.dtype.itemsize + 12)  # 12: log_normalisers and best_ids
            logger.warning(f"The cache of the target's states in {folder} will take {size / 1e9:.2f} GB.")

    def read_all(self, samples: Sequence[Sample]) -> list[TargetStates]:
        """The target's states of each of `samples`, on the target's device."""
        if self._folder is None:
            return self._target.read_all([sample.input_ids for sample in samples])
        return [self.read(sample) for sample in samples]

    def read(self, sample: Sample) -> TargetStates:
        """The target's states of `sample`."""
        if self._folder is None:
            return self._target.read(sample.input_ids)
        file = self._folder / f"{sample.index}.safetensors"
        if file.exists():
            states = TargetStates(**load_file(file, device=str(self._target.model.device)))
            if states.final.shape[0] == len(sample.input_ids):  # else another run left it
                return states
        states = self._target.read(sample.input_ids)
        unfinished = file.with_suffix(".unfinished")
        save_file({f.name: getattr(states, f.name).contiguous() for f in fields(states)}, unfinished)
        unfinished.replace(file)
        return states
