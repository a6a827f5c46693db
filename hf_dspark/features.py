"""Step 1, capture: which hidden states of the target the draft reads, and how they are had.

The list form of `output_hidden_states` is the default; hooks serve where it cannot: a chunked prefill returns only
its last chunk's states, a user's own `output_hidden_states` occupies the argument, and transformers' entry of the
last layer is taken after the final norm. A target with several residual streams (DeepSeek-V4) is read as their mean.
"""

import threading
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .compat import HIDDEN_STATES_OFFSET


def num_target_layers(target: PreTrainedModel) -> int:
    """Number of decoder layers of the target."""
    return target.config.get_text_config(decoder=True).num_hidden_layers


class FeatureTap:
    """Captures the outputs of `target_layer_ids` (0-based, -1 = embedding) in the target's forwards while open."""

    def __init__(self, target: PreTrainedModel, target_layer_ids: list[int], *, by_hooks: bool = False):
        self.target_layer_ids = target_layer_ids
        lowest = min(target_layer_ids) + 1 - HIDDEN_STATES_OFFSET
        self.by_hooks = by_hooks or lowest < 0 or max(target_layer_ids) == num_target_layers(target) - 1
        self._num_layers = num_target_layers(target)
        self._target = target
        self._captured: dict[int, list[torch.Tensor]] = {}
        self._open_hooks = ExitStack()

    @property
    def forward_kwargs(self) -> dict[str, Any]:
        """Arguments a forward of the target needs for the capture."""
        if self.by_hooks:
            return {}
        return {"output_hidden_states": [i + 1 - HIDDEN_STATES_OFFSET for i in self.target_layer_ids]}

    def __enter__(self) -> "FeatureTap":
        if self.by_hooks:
            layers = _hookable_layers(self._target)
            thread = threading.get_ident()
            for layer_id in self.target_layer_ids:
                self._captured[layer_id] = []
                self._open_hooks.callback(self._register(layers, layer_id, thread).remove)
        return self

    def __exit__(self, *exception) -> None:
        self._open_hooks.close()

    def take(self, outputs: Any) -> torch.Tensor:
        """Features [B, S, m*H] of all positions the target read since the last call."""
        if self.by_hooks:
            parts = [torch.cat(self._captured[i], dim=1) for i in self.target_layer_ids]
            self.discard()
        else:
            states = outputs.hidden_states
            # A tuple of L entries has no embedding in front (transformers before 5.23), one of L+1 has.
            offset = self._num_layers + 1 - len(states)
            parts = [_one_stream(states[i + 1 - offset]) for i in self.target_layer_ids]
        device = parts[-1].device
        return torch.cat([part.to(device) for part in parts], dim=-1)

    def discard(self) -> None:
        """Forget what was captured since the last `take`."""
        for captured in self._captured.values():
            captured.clear()

    def _register(self, layers, layer_id: int, thread: int):
        captured = self._captured[layer_id]

        def keep(states: torch.Tensor) -> None:
            if threading.get_ident() == thread:  # another thread may generate with the same target
                captured.append(_one_stream(states))

        if layer_id == -1:
            return layers[0].register_forward_pre_hook(
                lambda module, args, kwargs: keep(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
        return layers[layer_id].register_forward_hook(
            lambda module, args, output: keep(output[0] if isinstance(output, tuple) else output)
        )


def _one_stream(states: torch.Tensor) -> torch.Tensor:
    """States [B, S, H] of a layer's output [B, S, H] or of its residual streams [B, S, streams, H]."""
    return states.mean(2) if states.ndim == 4 else states


def decoder_layers(model: PreTrainedModel) -> Iterable[nn.Module]:
    """The decoder layers of a target or draft, in order; none where the decoder keeps them elsewhere."""
    decoder = model.get_decoder()
    return getattr(decoder, "layers", None) or getattr(decoder, "h", ())


def _hookable_layers(target: PreTrainedModel) -> list[nn.Module]:
    layers = list(decoder_layers(target))
    if not layers:
        raise ValueError(
            f"Hooks on the decoder layers of {type(target).__name__} were needed (chunked prefill, your own "
            "`output_hidden_states`, or a draft that reads the last layer), but its decoder has neither `layers` nor "
            "`h`. Leave out `prefill_chunk_size` and `output_hidden_states`."
        )
    return layers
