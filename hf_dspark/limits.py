"""What is refused by name, before anything is decoded."""

import inspect

import torch
from transformers import Cache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .slots import READ_SLOT_MASKS, has_windows

_BATCH_LAYER_TYPES = {"full_attention", "sliding_attention", "global"}


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
        # It sees no padding either, with or without a draft.
        f'`attn_implementation="{implementation}"`, for which no mask function is registered (load the target with '
        '"sdpa", or register one with AttentionMaskInterface)': implementation not in ALL_MASK_ATTENTION_FUNCTIONS,
    }
    for limit, is_met in limits.items():
        if is_met:
            refuse_batch(limit)


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


def refuse_batch(what: str) -> None:
    raise ValueError(
        f"Several sequences at once are not supported with {what}. Call generate() for each prompt, or leave out "
        "`assistant_model`."
    )
