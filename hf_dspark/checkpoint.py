"""A draft's tensors under our names, read from its files one at a time. `hub.py` finds the files."""

import threading
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import logging

from .dequantize import dequantize_fp4, dequantize_fp8
from .dialects import UNUSED, Decision, read_dialect
from .dialects_deepseek_v4 import Part, block_size, our_tensors, read_deepseek_v4

# transformers reads with several threads; one tensor in flight keeps the peak at the draft's size and one tensor.
_one_at_a_time = threading.Lock()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A draft's config and the header of every tensor: our name -> (file, stored name, shape)."""

    config: dict[str, Any]
    entries: dict[str, tuple[str, str, tuple[int, ...]]]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, _, shape) in self.entries.items()}

    @property
    def is_renamed(self) -> bool:
        """Whether transformers' loading would look for other names than the files have."""
        return any(stored.removeprefix("model.") != name for name, (_, stored, _) in self.entries.items())

    def decide(self) -> Decision:
        """What this checkpoint is. Raises ValueError where config and tensors do not tell."""
        return read_dialect(self.config, self.shapes)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, in the dtype it was stored in."""
        file, stored_name, _ = self.entries[name]
        return _read(file, stored_name)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All tensors the draft loads."""
        return {name: self.tensor(name) for name in self.entries if name not in UNUSED}


@dataclass(frozen=True)
class DeepseekV4Checkpoint:
    """The draft inside a DeepSeek-V4 target: `mtp.*` tensors, dequantised as they are read.

    With `is_packed` the routed experts stay fp4 codes and scales, a quarter of their size in bfloat16.
    """

    config: dict[str, Any]
    files: dict[str, str]  # native name -> file
    num_stages: int
    is_packed: bool = False

    is_renamed = True

    @cached_property
    def entries(self) -> dict[str, Part]:
        """What each tensor of the draft is made of, under our names."""
        return our_tensors(self.config, self.num_stages, is_packed=self.is_packed)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: part.shape for name, part in self.entries.items()}

    @property
    def num_bytes(self) -> int:
        """Size of the loaded draft in bfloat16, packed experts as they are."""
        width = {"codes": 1, "scales": 1}
        return sum(torch.Size(part.shape).numel() * width.get(part.kind, 2) for part in self.entries.values())

    def with_experts(self, *, is_packed: bool) -> "DeepseekV4Checkpoint":
        """The same files, with the routed experts kept as they are stored or dequantised."""
        return replace(self, is_packed=is_packed)

    def decide(self) -> Decision:
        fields = read_deepseek_v4(self.config, self.num_stages, is_packed=self.is_packed)
        experts = fields["backbone_config"]
        reason = (
            f"a DeepSeek-V4 target's files (`mtp.*`): {self.num_stages} stages with {experts['n_routed_experts']} "
            f"{experts['experts']} experts each, vanilla Markov head of rank {fields['markov_rank']}, block size "
            f"{fields['block_size']}, the anchor predicts, window {fields['sliding_window']}, sinks, "
            f"{self.num_bytes / 2**30:.2f} GiB"
        )
        return Decision(fields, reason, is_foreign=True)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor and what belongs to it; quantised ones come back in bfloat16."""
        part = self.entries[name]
        if part.kind == "plain":
            return self._read(part.stored[0]).clone()  # not a view of the file, which would stay open
        if part.kind == "fp8":
            weight, scale = (self._read(stored) for stored in part.stored)
            return dequantize_fp8(weight, scale, block_size(self.config), torch.bfloat16)
        return self._experts(name, part)

    def state_dict(self) -> dict[str, "LazyTensor"]:
        """All tensors the draft loads; transformers reads each when its turn comes."""
        return {name: LazyTensor(self, name) for name in self.entries}

    def _experts(self, name: str, part: Part) -> torch.Tensor:
        """All experts of a stage in one tensor, filled one stored tensor after the other."""
        is_fp4 = part.kind == "fp4"
        experts = torch.empty(part.shape, dtype=torch.bfloat16 if is_fp4 else torch.uint8)
        count = len(part.stored) // 2 if is_fp4 else len(part.stored)
        rows = experts.view(count, -1, part.shape[-1])
        for i, stored in enumerate(logging.tqdm(part.stored[:count], desc=name, leave=False, delay=2)):
            if is_fp4:
                rows[i] = dequantize_fp4(self._read(stored), self._scale(part.stored[count + i]), torch.bfloat16)
            else:
                rows[i] = self._scale(stored) if part.kind == "scales" else self._read(stored).view(torch.uint8)
        return experts

    def _scale(self, stored: str) -> torch.Tensor:
        scale = self._read(stored).view(torch.uint8)
        if (scale == 255).any():
            raise ValueError(f"`{stored}` holds scales that are no numbers (NaN): the file is damaged. Get it again.")
        return scale

    def _read(self, stored: str) -> torch.Tensor:
        return _read(self.files[stored], stored)


class LazyTensor:
    """A tensor that is read when it is indexed, as the slices of safetensors are."""

    def __init__(self, checkpoint: DeepseekV4Checkpoint, name: str):
        self._checkpoint, self._name = checkpoint, name

    def __getitem__(self, index: Any) -> torch.Tensor:
        with _one_at_a_time:
            return self._checkpoint.tensor(self._name)[index]


def _read(file: str, stored_name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as handle:  # one at a time: an open file keeps all pages it touched in memory
        return handle.get_tensor(stored_name)
