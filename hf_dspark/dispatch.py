"""Which implementation of a function runs: its Triton twin where one is installed and fits, else the plain function.

The plain function is the specification. A twin lies in `kernels/`, has the function's name and arguments, and may have
a `why_not_NAME` beside it, with the same arguments, that gives the reason why the plain function must serve instead.
"""

import functools
import importlib
import os
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

SWITCH = "HF_DSPARK_KERNELS"  # "0" forces the plain functions

_names: list[str] = []  # of the functions that may have a twin
_twins: dict[str, tuple[Callable, Callable]] = {}  # name -> the twin and its `why_not`
_devices: frozenset[torch.device] = frozenset()  # that twins run on
_missing: str | None = None  # why there are no twins; None: not looked yet
_notes: dict[str, dict[str, None]] = {}  # what was said of a function since `load_kernels`, in order


def with_kernel(
    function: Callable, *, unless: Callable[..., str | None] | None = None, is_slower: bool = True
) -> Callable:
    """`function`, whose first argument is a tensor, or its twin where that fits; the caller cannot tell.

    Args:
        unless: with the same arguments, gives a reason why the plain function is better than a twin that fits.
        is_slower: on CUDA the plain function costs so much that its use is said in the log.
    """
    name = function.__name__
    _names.append(name)

    @functools.wraps(function)
    def choose(tensor: torch.Tensor, *args, **kwargs):
        is_traced = torch.compiler.is_compiling()
        if _missing is None and not is_traced:
            load_kernels()
        reason = _missing
        better = unless(tensor, *args, **kwargs) if unless is not None and name in _twins else None
        if better is not None:
            note(name, f"not Triton: {better}")
            return function(tensor, *args, **kwargs)
        if name in _twins:
            twin, why_not = _twins[name]
            reason = why_not(tensor, *args, **kwargs) if tensor.device in _devices else f"it is on {tensor.device}"
            if reason is None:
                note(name, "Triton")
                # Triton launches on the current device; in a trace the compiler sees to that.
                with nullcontext() if is_traced else torch.cuda.device_of(tensor):
                    return twin(tensor, *args, **kwargs)
        note(name, f"not Triton: {reason}", is_loss=is_slower and tensor.is_cuda)
        return function(tensor, *args, **kwargs)

    return choose


def load_kernels() -> None:
    """Find the twins, as the switch says now, and forget all notes. The loop calls it before each call.

    Else the first function that may have a twin does it, outside any trace.
    """
    global _twins, _devices, _missing
    _notes.clear()
    found = _find()
    if found != (_twins, _devices, _missing):  # else compiled graphs keep their guards
        _twins, _devices, _missing = found


def note(name: str, text: str, *, is_loss: bool = False) -> None:
    """Keep `text` for `report`, as a trace is made, too; what `is_loss` (of speed) is also said once in the log."""
    keep = _note_of_trace if torch.compiler.is_compiling() else _note
    keep(name, text, is_loss)


def _note(name: str, text: str, is_loss: bool) -> bool:
    notes = _notes.setdefault(name, {})
    if text not in notes:
        notes[text] = None
        if is_loss:
            logger.warning_once(f"{name}: {text}.")
    return True


@torch.compiler.assume_constant_result
def _note_of_trace(name: str, text: str, is_loss: bool) -> bool:
    return _note(name, text, is_loss)


def remember(kept: dict[str, dict[str, None]]) -> None:
    """Note again what `kept` holds of functions with twins, and keep what was noted: a replayed graph says nothing."""
    for name in _names:
        notes = kept.get(name, {}) | _notes.get(name, {})
        if notes:
            kept[name], _notes[name] = notes, dict(notes)


def twins() -> tuple[str, ...]:
    """The functions whose twins may run, as `load_kernels` found them."""
    return tuple(_twins)


def report() -> dict[str, str]:
    """What ran for each function since `load_kernels`, and why nothing better did."""
    return {name: "; ".join(notes) for name, notes in _notes.items()}


def _find() -> tuple[dict, frozenset, str]:
    if os.environ.get(SWITCH) == "0":
        return {}, frozenset(), f"{SWITCH} is 0"
    devices = _kernel_devices()
    if not devices:
        return {}, devices, "there is no NVIDIA GPU of compute capability 8.0 or later"
    module, reason = _import_kernels()
    if module is None:
        return {}, devices, reason
    names = [name for name in _names if hasattr(module, name)]
    twins = {name: (getattr(module, name), getattr(module, f"why_not_{name}", _always)) for name in names}
    return twins, devices, "it has no kernel"


def _always(*args, **kwargs) -> None:
    return None


def _kernel_devices() -> frozenset[torch.device]:
    if torch.version.hip is not None or not torch.cuda.is_available():
        return frozenset()
    devices = (torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    return frozenset(device for device in devices if torch.cuda.get_device_capability(device) >= (8, 0))


@functools.cache
def _import_kernels() -> tuple[ModuleType | None, str]:
    """By name: remote code has no kernels beside it, and Triton is an extra."""
    try:
        return importlib.import_module("hf_dspark.kernels"), ""
    except ImportError as error:
        return None, f"{error.name or error} is not installed (pip install hf-dspark[kernels])"
