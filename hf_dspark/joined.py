"""Linear layers in compiled rounds: those that read the same input are one matrix product, and few rows a kernel's.

Query, key and value, gate and up: their weights are laid side by side in memory. Nothing is held twice, and each
module keeps its own. While `joined` is open the first of them computes all, and each returns its part.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.utils import logging

from .few_rows import few_rows_linear

logger = logging.get_logger(__name__)

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def lay_side_by_side(*roots: nn.Module) -> None:
    """Move the weights that can be joined next to each other; their values and parameters stay the same.

    Where the memory is too short for a copy of a group, it and those behind it stay where they are.
    """
    try:
        for group in (group for root in roots for group in _groups(root)):
            for tensors in _parameters_of(group):
                _move_together(tensors)
    except torch.OutOfMemoryError:
        logger.warning_once("There is too little memory to lay all weights that are read together side by side.")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # where they were there are gaps as large as one


@torch.no_grad()
def _move_together(tensors: list[torch.Tensor]) -> None:
    if _are_side_by_side(tensors):
        return
    parts = torch.cat([tensor.data for tensor in tensors]).split([len(tensor) for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.data = part


@contextmanager
def joined(root: nn.Module) -> Iterator[None]:
    """What was laid side by side is computed together while this is open; plain linear layers by `few_rows_linear`."""
    alone = [module for module in root.modules() if type(module) is nn.Linear]
    groups = [group for group in _groups(root) if all(map(_are_side_by_side, _parameters_of(group)))]
    for module in alone:
        module.__class__ = _Linear
    for group in groups:
        product, first = _Product(*map(_as_one, _parameters_of(group))), 0
        for module in group:
            module.__class__, module.product, module.is_last = _Part, product, module is group[-1]
            module.first, first = first, first + module.out_features
    try:
        yield
    finally:
        for module in alone:
            module.__class__ = nn.Linear
            for name in ("product", "is_last", "first"):
                vars(module).pop(name, None)


class _Product:
    """What the modules of a group share."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        self.weight, self.bias = weight, bias
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None  # input and outputs; one value, for other threads


class _Linear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return few_rows_linear(input, self.weight, self.bias)


class _Part(nn.Linear):
    """A linear layer that computes those beside it, too, where none of them has."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        product, last = self.product, self.product.last
        if last is None or last[0] is not input:
            last = (input, few_rows_linear(input, product.weight, product.bias))
        product.last = None if self.is_last else last
        return last[1][..., self.first : self.first + self.out_features]


def _groups(root: nn.Module) -> Iterator[list[nn.Linear]]:
    for parent in root.modules():
        for names in getattr(parent, "projections_of_one_input", GROUPS):
            group = [getattr(parent, name, None) for name in names]
            if all(type(module) is nn.Linear for module in group) and _fit_together(group):
                yield group


def _fit_together(group: list[nn.Linear]) -> bool:
    kinds = {(type(m.weight), m.weight.dtype, m.weight.device, m.in_features, m.bias is None) for m in group}
    weights = [module.weight for module in group]
    is_plain = type(weights[0]) is nn.Parameter and weights[0].is_floating_point()
    return len(kinds) == 1 and is_plain and all(weight.is_contiguous() for weight in weights)


def _parameters_of(group: list[nn.Linear]) -> list[list[torch.Tensor]]:
    """The weights of a group, and the biases where it has some."""
    names = ("weight",) if group[0].bias is None else ("weight", "bias")
    return [[getattr(module, name) for module in group] for name in names]


def _are_side_by_side(tensors: list[torch.Tensor]) -> bool:
    ends = [tensor.data_ptr() + tensor.numel() * tensor.element_size() for tensor in tensors]
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    return len(storages) == 1 and all(end == t.data_ptr() for end, t in zip(ends, tensors[1:], strict=False))


def _as_one(tensors: list[torch.Tensor]) -> torch.Tensor:
    first = tensors[0].data
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())
