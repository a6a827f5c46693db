"""What is refused by name, before anything is decoded."""

import torch
from transformers import Cache, PreTrainedModel

_BATCH_ATTENTIONS = ("eager", "sdpa", "dspark")


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
    """Raise ValueError where this target and draft decode only one sequence at a time."""
    implementation = target.get_decoder().config._attn_implementation
    layer_types = set(getattr(target.config.get_text_config(decoder=True), "layer_types", None) or ())
    backbone = draft.config.backbone_type
    limits = {
        f"{type(target).__name__}, which keeps a state": getattr(target, "_is_stateful", False),
        f'the draft\'s backbone "{backbone}"': backbone == "deepseek_v4",
        f"layers of the type {layer_types}": not layer_types <= {"full_attention", "sliding_attention"},
        f'`attn_implementation="{implementation}"` (load the target with "sdpa")': implementation
        not in _BATCH_ATTENTIONS,
    }
    for limit, is_met in limits.items():
        if is_met:
            refuse_batch(limit)


def refuse_batch(what: str) -> None:
    raise ValueError(
        f"Several sequences at once are not supported with {what}. Call generate() for each prompt, or leave out "
        "`assistant_model`."
    )
