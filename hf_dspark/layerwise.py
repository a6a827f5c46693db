"""Rounds compiled in parts: layers that are alike share what one of them was compiled to.

A whole model of 36 layers takes the compiler a minute for each number of rows and slots, one layer a few seconds.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from .features import decoder_layers
from .joined import joined, lay_side_by_side
from .slots import SlotCache

MAX_GRAPHS = 256  # of one function: numbers of rows and of slots, pairs of models, kinds of rules


class LayerCompiler:
    """What is compiled of some models' rounds; `options` are torch.compile's.

    These are decoder layers, norms and rotary embeddings, and the functions marked as a `part`. Weights of projections
    that read the same input are moved next to each other.
    """

    def __init__(self, *models: PreTrainedModel, **options: Any):
        layers = [layer for model in models for layer in decoder_layers(model)]
        lay_side_by_side(*layers)
        self._options = {"dynamic": False, **options}
        modules = [("layer", layer) for layer in layers]
        modules += [named for model in models for named in _small_modules(model)]
        self._modules = [(module, _forward_of(type(module), name)) for name, module in modules]
        self._compiled: dict[Callable, Callable] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The models' modules run compiled while this is open, in any thread; parts do in this one."""
        with ExitStack() as stack:
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS))
            for module, function in self._modules:
                if "forward" not in vars(module):  # else something else has taken it over
                    module.forward = _called_alone(self.compiled(function), module)
                    stack.callback(vars(module).pop, "forward")
                    stack.enter_context(joined(module))
                for inner in module.modules():
                    if inner is not module:
                        stack.enter_context(_without_recorders(inner))
            stack.callback(_open.reset, _open.set(self))
            yield

    def compiled(self, function: Callable) -> Callable:
        """`function`, compiled once."""
        if function not in self._compiled:
            self._compiled[function] = torch.compile(function, **self._options)
        return self._compiled[function]


_open: ContextVar[LayerCompiler | None] = ContextVar("open", default=None)


def part(function: Callable) -> Callable:
    """`function`, compiled by itself while a LayerCompiler is open: many small operations become a few."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        compiler = None if torch.compiler.is_compiling() else _open.get()
        return (function if compiler is None else compiler.compiled(function))(*args, **kwargs)

    return run


class OneLayer:
    """A cache as one layer sees it: no number tells it from the others, or each would be compiled by itself."""

    def __init__(self, cache: Cache, index: int):
        self._cache, self._layer = cache, cache.layers[index]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """The layer's keys and values with the new ones, as `Cache.update`."""
        return self._layer.update(key_states, value_states, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


@functools.cache
def _forward_of(cls: type[nn.Module], name: str) -> Callable:
    """The forward of modules of a class that are called `name`, one for the process."""

    def forward(module: nn.Module, *args, **kwargs):
        return cls.forward(module, *args, **kwargs)

    # A code object of its own, by which the compiler keeps, and counts, what it has made.
    forward.__code__ = forward.__code__.replace(co_name=f"{cls.__name__}.{name}")
    return forward


def _called_alone(function: Callable, module: nn.Module) -> Callable:
    """`function` of a module, which sees no more of a cache than its own layer."""
    index = _cache_layer_of(module)

    def alone(value: Any) -> Any:
        return OneLayer(value, index) if isinstance(value, SlotCache) and index is not None else value

    def forward(*args, **kwargs):
        return function(module, *map(alone, args), **{name: alone(value) for name, value in kwargs.items()})

    return forward


def _cache_layer_of(layer: nn.Module) -> int | None:
    """The cache's layer that a decoder layer writes; None where its modules do not say."""
    indices = {module.layer_idx for module in layer.modules() if isinstance(getattr(module, "layer_idx", None), int)}
    return indices.pop() if len(indices) == 1 else None


def _small_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """What stands beside the decoder layers and has no matrix; torch's own modules are a kernel each already."""
    for name, module in model.get_decoder().named_children():
        is_own = type(module).__module__.startswith("torch.")
        if not is_own and all(parameter.ndim < 2 for parameter in module.parameters()):
            yield name, module


@contextmanager
def _without_recorders(module: nn.Module) -> Iterator[None]:
    """A module in a layer without transformers' hooks that record attention weights: no trace gets past them."""
    hooks = module._forward_hooks
    recorders = [
        key
        for key, hook in hooks.items()
        if getattr(hook, "__module__", None) == "transformers.utils.output_capturing"
    ]
    taken = {key: hooks.pop(key) for key in recorders}
    try:
        yield
    finally:
        hooks.update(taken)
