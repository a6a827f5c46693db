"""What is refused by name, before anything is decoded."""

import inspect
from typing import Any

import torch
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .compat import CACHE
from .slots import READ_SLOT_MASKS, has_windows, why_not_in_slots
from .verify import TOKEN_TYPES

_BATCH_LAYER_TYPES = {"full_attention", "sliding_attention", "global"}
# What generate() hands to a target's forwards that rounds of rows make anew, or that only a prefill reads.
_ARGUMENTS = {"attention_mask", "position_ids", "inputs_embeds", "logits_to_keep", "use_cache", CACHE, *TOKEN_TYPES}
_ARGUMENTS |= {"output_attentions", "output_hidden_states"}


def check_request(target: PreTrainedModel, input_ids: torch.Tensor, synced_gpus: bool) -> None:
    if target.config.is_encoder_decoder:
        raise ValueError(
            f"A DSpark draft reads the hidden states of a decoder-only target, and {type(target).__name__} is an "
            "encoder-decoder. Call generate() without `assistant_model`."
        )
    if getattr(target.config, "is_decoder", True) is False:  # only architectures that are both have this field
        raise ValueError(
            f"{type(target).__name__} attends in both directions (`config.is_decoder` is False): drafted tokens "
            "would change what it says before them. Load it with `is_decoder=True`, or leave out `assistant_model`."
        )
    if synced_gpus:
        raise ValueError(
            "`synced_gpus=True` (FSDP or ZeRO-3 over several processes) is not supported with a DSpark draft: "
            "processes would run different numbers of forwards. Call generate() without `assistant_model`."
        )


def check_prompt_length(target: PreTrainedModel, cache: Cache, num_read: int) -> None:
    """Refuse a target whose cache holds more positions than it read tokens (a prompt of its own in front of them)."""
    if cache.get_seq_length() != num_read:
        raise ValueError(
            f"{type(target).__name__} has {cache.get_seq_length()} positions in its cache for {num_read} tokens: it "
            "adds positions of its own, so blocks cannot be verified. Call generate() without `assistant_model`."
        )


def check_batch(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """Refuse a target or draft that decodes only one sequence at a time."""
    limit = _why_not_batch(target, draft)
    if limit is not None:
        refuse_batch(limit)


def _why_not_batch(target: PreTrainedModel, draft: PreTrainedModel) -> str | None:
    config = target.config.get_text_config(decoder=True)
    implementation, backbone = _attention_of(target), draft.config.backbone_type
    # GPT-Neo has its own name for them; its local layers count columns, wherever a row's tokens lie.
    layer_types = set(getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or ())
    takes_positions = "position_ids" in inspect.signature(target.forward).parameters
    limits = {
        f"{type(target).__name__}, which keeps a state": getattr(target, "_is_stateful", False),
        "a target without positions (ALiBi)": not takes_positions or getattr(config, "alibi", False),
        f'the draft\'s backbone "{backbone}"': backbone == "deepseek_v4",
        f"layers of the types {sorted(layer_types)}": not layer_types <= _BATCH_LAYER_TYPES,
        f"{type(target).__name__}, whose attention is code of its own": not _is_known(target),
        # It sees no padding either, with or without a draft.
        f'`attn_implementation="{implementation}"`, for which no mask function is registered (load the target with '
        '"sdpa", or register one with AttentionMaskInterface)': implementation not in ALL_MASK_ATTENTION_FUNCTIONS,
    }
    return next((limit for limit, is_met in limits.items() if is_met), None)


def why_not_in_a_row(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    model_kwargs: dict[str, Any],
    cache: Cache,
    *,
    output_attentions: bool,
) -> str | None:
    """Why a single sequence keeps the cache that transformers made for it; None where it can be a batch's only row.

    A row's forwards are given tokens, positions and masks alone, and its slots hold every token.
    """
    limit = _why_not_batch(target, draft)
    if limit is not None:
        return limit
    prepares = type(target).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    others = {name for name, value in model_kwargs.items() if value is not None} - _ARGUMENTS
    position_ids, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    limits = {
        "`output_attentions`": output_attentions,
        "the target prepares its inputs in a way of its own": prepares,
        f"the target is given {sorted(others)}": bool(others),
        "positions of several axes": position_ids is not None and position_ids.ndim > 2,
        "its attention is code of its own": not target.get_decoder()._supports_attention_backend,
        f'`attn_implementation="{_attention_of(target)}"`': _attention_of(target) not in READ_SLOT_MASKS,
        "windows forget what slots would hold": draft.context_window is not None
        or has_windows(target.config.get_text_config(decoder=True))
        or any(getattr(layer, "is_sliding", False) for layer in cache.layers),
        "padding behind the prompt": mask is not None and not bool(mask[:, -1].all()),
    }
    return next((limit for limit, is_met in limits.items() if is_met), why_not_in_slots(cache))


def check_compiled(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """Refuse a target or draft whose rounds have no fixed shapes."""
    check_batch(target, draft)
    implementation = _attention_of(target)
    if implementation not in READ_SLOT_MASKS:
        raise ValueError(
            f'Compiled rounds are not supported with `attn_implementation="{implementation}"`, whose shapes follow '
            'the lengths of rows. Load the target with "sdpa", or generate without `compile_round`.'
        )


def check_padding(mask: torch.Tensor, config) -> None:
    """Refuse padding behind the prompt, and before sliding windows padding between tokens; `mask` is [B, n]."""
    is_in_front = bool((mask[:, 1:] >= mask[:, :-1]).all())
    if bool(mask[:, -1].all()) and (is_in_front or not has_windows(config)):
        return
    between = ", and none between tokens where the target has sliding windows" if has_windows(config) else ""
    raise ValueError(
        f"Several sequences at once need their padding in front{between}: `attention_mask` has a 0 behind a 1. "
        'Set `padding_side="left"` in the tokenizer.'
    )


def _attention_of(target: PreTrainedModel) -> str:
    return target.get_decoder().config._attn_implementation


def _is_known(target: PreTrainedModel) -> bool:
    """Whether its attention is sure to read masks as they are given; remote code may make its own."""
    decoder = target.get_decoder()
    return decoder._supports_attention_backend or type(decoder).__module__.startswith("transformers.")


def refuse_batch(what: str) -> None:
    raise ValueError(
        f"Several sequences at once are not supported with {what}. Call generate() for each prompt, or leave out "
        "`assistant_model`."
    )
