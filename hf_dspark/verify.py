"""Step 4, verify: one forward of the target over [anchor, drafted tokens]."""

from collections.abc import Iterable
from math import inf
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .features import FeatureTap
from .state import DecodeState, Verification

# Arguments of a forward that name a type for every token.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


def verify_block(
    target: PreTrainedModel, state: DecodeState, draft_ids: torch.Tensor, tap: FeatureTap
) -> Verification:
    """Next-token logits of the target after the anchor and after each of `draft_ids` [B, L]; L may be 0.

    Tokens that a rollback left pending are read again in front of the anchor; their rows come first in the outputs.
    """
    length = draft_ids.shape[1]
    model_kwargs = _extend_model_kwargs(target, state.model_kwargs, length)
    token_ids = torch.cat([state.input_ids, draft_ids], dim=1)
    outputs = _forward(target, token_ids, model_kwargs, tap, state.num_pending + length + 1, num_logits=length + 1)
    return read_verification(outputs, length, state.input_ids.device)


def read_pending(target: PreTrainedModel, state: DecodeState, tap: FeatureTap) -> Any:
    """Outputs of the target on the pending tokens alone, which it read before."""
    aligned = ("attention_mask", "position_ids", *TOKEN_TYPES)
    model_kwargs = {
        name: value[..., :-1] if name in aligned and value is not None else value
        for name, value in state.model_kwargs.items()
    }
    return _forward(target, state.input_ids[:, :-1], model_kwargs, tap, state.num_pending, num_logits=1)


def _forward(target, token_ids, model_kwargs, tap, num_tokens: int, *, num_logits: int) -> Any:
    """A forward over the last `num_tokens` of `token_ids`."""
    inputs = target.prepare_inputs_for_generation(token_ids, next_sequence_length=num_tokens, **model_kwargs)
    if "logits_to_keep" in inputs:
        inputs["logits_to_keep"] = num_logits
    # transformers' own decoding loops run mixture-of-experts layers in this context, so plain generate() does, too.
    with target._optimize_model_for_decode():
        return target(**inputs, **tap.forward_kwargs, return_dict=True)


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
    first_position: int,
    is_prefill: bool,
) -> dict[str, list]:
    """What plain generate() would have collected for the first `count` tokens of a verification, one entry a token.

    `first_position`: of the anchor in the target's cache.
    """
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
            states = [s[:, -rows:] for s in outputs.hidden_states]  # tokens that were pending come before them
            extras[name] = [tuple(s[:, i : i + 1] for s in states) for i in range(count)]
        elif name == "attentions":
            extras[name] = [
                _attentions_of_row(target, outputs.attentions, i, rows, first_position) for i in range(count)
            ]
    return extras


def _attentions_of_row(
    target: PreTrainedModel, attentions, row: int, num_rows: int, first_position: int
) -> tuple[torch.Tensor, ...]:
    """Attention weights [B, heads, 1, keys] of one verified position, layer by layer.

    Cut to the keys a single-token forward would have had: all up to its own, or the last of them in a sliding window;
    and the entries of DeepSeek-V4's compressed windows that were closed by then, which come behind the keys.
    """
    config = target.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    rates = getattr(config, "compress_rates", {})
    # Convolutions and recurrences return no weights; a config without layer types slides in every layer or in none.
    layer_types = [name for name in getattr(config, "layer_types", None) or () if name.endswith("attention")]
    layer_types = [name for name in layer_types if name != "linear_attention"]
    cut = []
    for layer, weights in enumerate(attentions):
        if weights is None:  # an attention function that computes none
            cut.append(None)
            continue
        layer_type = layer_types[layer] if layer_types else "sliding_attention"
        weights = weights[:, :, row - num_rows, None]
        rate = rates.get(layer_type, inf)
        num_keys = weights.shape[-1] - int((first_position + num_rows) // rate)
        entries = weights[..., num_keys:][..., : int((first_position + row + 1) // rate)]
        stop = num_keys - num_rows + row + 1
        is_sliding = window is not None and (layer_type == "sliding_attention" or rate < inf)
        keys = weights[..., max(0, stop - window) if is_sliding else 0 : stop]
        cut.append(torch.cat([keys, entries], dim=-1))
    return tuple(cut)
