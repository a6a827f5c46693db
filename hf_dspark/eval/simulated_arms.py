"""The ways to decode that a simulation compares; one more is one more entry of `ARMS`."""

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, CompileConfig, DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache

from ..modeling_dspark import DSparkDraftModel

PLAIN, PLAIN_COMPILED = "plain", "plain_compiled"


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to decode.

    `cache` makes an empty cache for so many positions, None: the arm makes its own and reads the whole prompt;
    `arguments` are those of generate() besides; `scope` (of target, draft) is open during a call; what is not `on_cpu`
    runs there only if it is named.
    """

    name: str
    arguments: Callable[[DSparkDraftModel], Mapping[str, Any]]
    cache: Callable[[PreTrainedConfig, int], Cache] | None = lambda config, length: DynamicCache(config=config)
    scope: Callable[[PreTrainedModel, DSparkDraftModel], Any] = lambda target, draft: nullcontext()
    is_drafting: bool = True
    is_ours: bool = True
    is_compiled: bool = False
    on_cpu: bool = True


@contextmanager
def _environment(name: str, value: str):
    """The environment variable `name` set, as it was before afterwards."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


_compiled_rounds: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # of targets, between the calls of their arm


@contextmanager
def _compiled_round(target: PreTrainedModel, draft: DSparkDraftModel):
    """The draft's rounds compiled, for this call alone."""
    if target in _compiled_rounds:
        draft.compiled_rounds[target] = _compiled_rounds.pop(target)
    else:
        draft.compile_round(target)
    try:
        yield
    finally:
        _compiled_rounds[target] = draft.compiled_rounds.pop(target)


def forget_compiled(target: PreTrainedModel) -> None:
    """Free what was compiled for `target`, and the caches of its rounds."""
    _compiled_rounds.pop(target, None)
    torch.compiler.reset()


def _compiled_anywhere() -> CompileConfig:
    config = CompileConfig()
    config._compile_all_devices = True  # generate() compiles on accelerators only
    return config


ARMS = (
    Arm(PLAIN, lambda draft: {}, is_drafting=False, is_ours=False),
    Arm(
        PLAIN_COMPILED,
        lambda draft: {"compile_config": _compiled_anywhere()},
        cache=lambda config, length: StaticCache(config=config, max_cache_len=length),
        is_drafting=False, is_ours=False, is_compiled=True, on_cpu=False,
    ),
    Arm(
        "transformers_loop",
        lambda draft: {"custom_generate": draft.as_custom_generate(loop="transformers")},
        cache=None, is_ours=False,
    ),
    Arm(
        "dspark_plain_functions",
        lambda draft: {"assistant_model": draft},
        scope=lambda target, draft: _environment("HF_DSPARK_KERNELS", "0"), on_cpu=False,
    ),
    Arm("dspark", lambda draft: {"assistant_model": draft}),
    Arm(
        "dspark_compiled",
        lambda draft: {"assistant_model": draft},
        scope=lambda target, draft: _compiled_round(target, draft),
        is_compiled=True, on_cpu=False,
    ),
)  # fmt: skip


def arms_for(device: torch.device, names: Sequence[str] | None = None) -> list[Arm]:
    """The arms called `names`; default is all, on a CPU without those that make little sense there."""
    if names is None:
        return [arm for arm in ARMS if arm.on_cpu or device.type != "cpu"]
    return [arm for arm in ARMS if arm.name in names]
