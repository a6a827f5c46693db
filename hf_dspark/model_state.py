"""What a graph cannot see change: where weights lie, which modules there are and what they are set to, and hooks."""

from collections.abc import Iterator
from typing import Any

from torch import nn

_SIMPLE = (bool, int, float, str, type(None))
_OWN_SETTINGS = set(vars(nn.Module()))
# Their modules are set to nothing else once they are made, and their hooks record, or move tensors of their own.
_KNOWN = ("torch.", "transformers.", f"{__package__}.")


def state_of(*models: nn.Module) -> list:
    """Equal as long as graphs of the models' forwards hold. A millisecond for a model of 36 layers."""
    state: list = []
    for module in (module for model in models for module in model.modules()):
        state.append(id(module))
        tensors = (*module._parameters.values(), *module._buffers.values())
        state += [tensor.data_ptr() for tensor in tensors if tensor is not None]
        if not type(module).__module__.startswith(_KNOWN):  # of adapters: whether they are on, and which
            state += [(name, repr(value)) for name, value in _settings(module)]
    return state


def has_hooks(*models: nn.Module) -> bool:
    """Whether someone's hooks are called in the models' forwards."""
    for module in (module for model in models for module in model.modules()):
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not (getattr(hook, "__module__", None) or "").startswith(_KNOWN):
                return True
    return False


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if name not in _OWN_SETTINGS and _is_simple(value):
            yield name, value


def _is_simple(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return all(isinstance(entry, _SIMPLE) for entry in value)
    return isinstance(value, _SIMPLE)
