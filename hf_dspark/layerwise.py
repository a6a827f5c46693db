"""Decoder layers compiled one by one: layers that are alike share what one of them was compiled to.

A whole model of 36 layers takes the compiler a minute for each number of rows and slots, one layer a few seconds.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from .features import decoder_layers
from .slots import SlotCache

MAX_GRAPHS = 256  # of one function: numbers of rows and of slots, pairs of models, kinds of rules


class LayerCompiler:
    """What is compiled of the layers of some models; `options` are torch.compile's."""

    def __init__(self, *models: PreTrainedModel, **options: Any):
        self._layers = [layer for model in models for layer in decoder_layers(model)]
        # One function for all layers of a class.
        self._compiled = {
            cls: torch.compile(_call_of(cls), dynamic=False, **options)
            for cls in {type(layer) for layer in self._layers}
        }

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The models' layers run compiled while this is open, in any thread."""
        with ExitStack() as stack:
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS))
            for layer in self._layers:
                if "forward" not in vars(layer):  # else something else has taken it over
                    layer.forward = self._forward_of(layer)
                    stack.callback(vars(layer).pop, "forward")
                for module in layer.modules():
                    if module is not layer:
                        stack.enter_context(_without_recorders(module))
            yield

    def _forward_of(self, layer: nn.Module) -> Callable:
        run, index = self._compiled[type(layer)], _cache_layer_of(layer)

        def alone(value: Any) -> Any:
            return OneLayer(value, index) if isinstance(value, SlotCache) and index is not None else value

        def forward(*args, **kwargs):
            return run(layer, *map(alone, args), **{name: alone(value) for name, value in kwargs.items()})

        return forward


class OneLayer:
    """A cache as one layer sees it: no number tells it from the others, or each would be compiled by itself."""

    def __init__(self, cache: Cache, index: int):
        self._cache, self._layer = cache, cache.layers[index]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """The layer's keys and values with the new ones, as `Cache.update`."""
        return self._layer.update(key_states, value_states, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _call_of(cls: type[nn.Module]) -> Callable:
    def call(layer: nn.Module, *args, **kwargs):
        return cls.forward(layer, *args, **kwargs)

    return call


def _cache_layer_of(layer: nn.Module) -> int | None:
    """The cache's layer that a decoder layer writes; None where its modules do not say."""
    indices = {module.layer_idx for module in layer.modules() if isinstance(getattr(module, "layer_idx", None), int)}
    return indices.pop() if len(indices) == 1 else None


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
