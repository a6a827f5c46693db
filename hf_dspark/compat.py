"""What differs between the supported versions of transformers (5.18 to 5.24); no other file knows them.

5.24 renamed `past_key_values` to `cache`; 5.23 changed what the list form of `output_hidden_states` counts.
"""

import inspect
from typing import Any

import transformers
from transformers import GenerationMixin, PreTrainedModel

# The name of the cache in forwards, in their outputs and in generate(): "cache" since 5.24.
CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
_OTHER_CACHE_NAME = "past_key_values" if CACHE == "cache" else "cache"

# Before 5.23 entry i of `output_hidden_states=[i]` is the output of layer i, from 5.23 it is hidden state i.
HIDDEN_STATES_OFFSET = int(not hasattr(transformers.utils.output_capturing, "resolve_hidden_states_indices"))


def get_cache(outputs: Any) -> Any:
    """The cache a forward returned (None if it returned none)."""
    return getattr(outputs, CACHE, None)


def is_users_cache(cache: Any) -> bool:
    """Whether the cache of a generate() call was passed to it, so that the user reads it afterwards."""
    return getattr(cache, "_is_user_defined", False)  # generate() marks it


def rename_cache_argument(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` of generate() with the cache under this version's name; users may pass either."""
    if kwargs.get(_OTHER_CACHE_NAME) is None:
        return {name: value for name, value in kwargs.items() if name != _OTHER_CACHE_NAME}
    if kwargs.get(CACHE) is not None:
        raise ValueError("`cache` and `past_key_values` are two names of one argument: pass only one of them.")
    renamed = dict(kwargs)
    renamed[CACHE] = renamed.pop(_OTHER_CACHE_NAME)
    return renamed


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Recompute the layers' activations in the backward pass (5.24 has another name for it)."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def tensor_parallel_group(model: PreTrainedModel) -> Any:
    """The processes that hold parts of `model`'s weights and read the same tokens; None where one holds all."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None:
        return None
    if "tp" in (mesh.mesh_dim_names or ()):
        mesh = mesh["tp"]
    return mesh.get_group() if mesh.size() > 1 else None
