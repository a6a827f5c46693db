"""Step 4, verify: one forward of the target over [anchor, drafted tokens]."""

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
    model_kwargs = extend_model_kwargs(target, state.model_kwargs, length)
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


def extend_model_kwargs(target: PreTrainedModel, model_kwargs: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """A copy of `model_kwargs` whose masks, positions and token types (text) reach `num_tokens` further."""
    if num_tokens == 0:
        return dict(model_kwargs)
    return target._update_model_kwargs_for_generation(ModelOutput(), dict(model_kwargs), num_new_tokens=num_tokens)


def states_of_token(outputs: Any, row: int, num_rows: int) -> tuple[torch.Tensor, ...]:
    """Hidden states of one verified position, a tuple over layers [B, 1, H], as a single-token forward returns them."""
    first = row - num_rows
    return tuple(state[:, first : first + 1 or None] for state in outputs.hidden_states)


def attentions_of_token(outputs: Any, row: int, num_rows: int, windows: list[int | None]) -> tuple[torch.Tensor, ...]:
    """Attention weights of one verified position, a tuple over layers [B, heads, 1, keys].

    Cut to the keys a single-token forward would have had: all up to its own, or the last `window` of them.
    """
    cut = []
    for layer, weights in enumerate(outputs.attentions):
        stop = weights.shape[-1] - num_rows + row + 1
        window = windows[layer] if layer < len(windows) else None
        start = 0 if window is None else max(0, stop - window)
        cut.append(weights[:, :, row : row + 1, start:stop])
    return tuple(cut)
