"""Step 4, verify: one forward of the target over [anchor, drafted tokens]."""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .features import FeatureTap
from .state import DecodeState, Verification


def verify_block(
    target: PreTrainedModel, state: DecodeState, draft_ids: torch.Tensor, tap: FeatureTap
) -> Verification:
    """Next-token logits of the target after the anchor and after each of `draft_ids` [B, L]; L may be 0."""
    length = draft_ids.shape[1]
    model_kwargs = _extend_model_kwargs(target, state.model_kwargs, length)
    inputs = target.prepare_inputs_for_generation(
        torch.cat([state.input_ids, draft_ids], dim=1), next_sequence_length=length + 1, **model_kwargs
    )
    if "logits_to_keep" in inputs:
        inputs["logits_to_keep"] = length + 1
    # transformers' own decoding loops run mixture-of-experts layers in this context, so plain generate() does, too.
    with target._optimize_model_for_decode():
        outputs = target(**inputs, **tap.forward_kwargs, return_dict=True)
    return read_verification(outputs, length, state.input_ids.device)


def read_verification(outputs: Any, length: int, device: torch.device) -> Verification:
    """The last `length` + 1 rows of logits, in fp32 as plain generate() takes them."""
    # A copy after the prefill, or the view would keep the whole prompt's logits alive.
    logits = outputs.logits[:, -length - 1 :].to(copy=length == 0, dtype=torch.float32, device=device)
    return Verification(logits=logits, outputs=outputs)


def _extend_model_kwargs(target: PreTrainedModel, model_kwargs: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """A copy of `model_kwargs` whose masks, positions and token types (text) reach `num_tokens` further."""
    if num_tokens == 0:
        return dict(model_kwargs)
    return target._update_model_kwargs_for_generation(ModelOutput(), dict(model_kwargs), num_new_tokens=num_tokens)


def extras_of_tokens(
    wanted: Iterable[str],
    target: PreTrainedModel,
    verification: Verification,
    scores: torch.Tensor | None,  # [B, L+1, V]
    count: int,
    *,
    is_prefill: bool,
) -> dict[str, list]:
    """What plain generate() would have collected for the first `count` tokens of a verification, one entry a token."""
    outputs, extras = verification.outputs, {}
    rows = verification.logits.shape[1]
    for name in wanted:
        if name == "scores":
            extras[name] = list(scores[:, :count].unbind(1))
        elif name == "logits":
            extras[name] = list(verification.logits[:, :count].unbind(1))
        elif is_prefill:
            extras[name] = [getattr(outputs, name)]
        elif name == "hidden_states":
            extras[name] = [tuple(s[:, i : i + 1] for s in outputs.hidden_states) for i in range(count)]
        elif name == "attentions":
            extras[name] = [_attentions_of_row(target, outputs.attentions, i, rows) for i in range(count)]
    return extras


def _attentions_of_row(target: PreTrainedModel, attentions, row: int, num_rows: int) -> tuple[torch.Tensor, ...]:
    """Attention weights [B, heads, 1, keys] of one verified position, layer by layer.

    Cut to the keys a single-token forward would have had: all up to its own, or the last of them in a sliding window.
    """
    config = target.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    # Convolutions and the like return no weights; a config without layer types slides in every layer or in none.
    layer_types = [name for name in getattr(config, "layer_types", None) or () if name.endswith("attention")]
    cut = []
    for layer, weights in enumerate(attentions):
        if weights is None:  # an attention function that computes none
            cut.append(None)
            continue
        stop = weights.shape[-1] - num_rows + row + 1
        is_sliding = window is not None and (not layer_types or layer_types[layer] == "sliding_attention")
        cut.append(weights[:, :, row : row + 1, max(0, stop - window) if is_sliding else 0 : stop])
    return tuple(cut)
