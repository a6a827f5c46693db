"""Our config -> the configs other engines read, pure dict to dict; tensor names are the same in all of them.

What a layout cannot say is an error: a draft that another engine would run otherwise is not written.
"""

from dataclasses import dataclass
from typing import Any

from .dialects import CALIBRATION, SHAPE_FIELDS

LAYOUTS = ("dspark", "deepspec", "speculators", "specforge")
_HEADS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")


@dataclass(frozen=True, slots=True)
class Export:
    """A foreign config, and what of the target's the layout keeps in the file."""

    config: dict[str, Any]
    keeps_embed_tokens: bool
    keeps_lm_head: bool
    keeps_t2d: bool = False


def export_config(config: Any, layout: str, *, target_name: str | None, target_architectures: list[str]) -> Export:
    """The config of `layout` (one of LAYOUTS but "dspark") for a draft's DSparkConfig.

    Raises ValueError where the layout has no word for what the draft does.
    """
    _refuse(layout, {"layers of DeepSeek-V4": config.backbone_type == "deepseek_v4"})
    writer = {"deepspec": _deepspec, "speculators": _speculators, "specforge": _specforge}[layout]
    return writer(config, target_name, target_architectures)


def _refuse(layout: str, unsupported: dict[str, bool]) -> None:
    found = [name for name, is_set in unsupported.items() if is_set]
    if found:
        raise ValueError(
            f"The layout {layout!r} cannot describe this draft: it has {' and '.join(found)}. Another engine would "
            f"run it otherwise than it was trained. Write it as `dspark`, or in another of {LAYOUTS}."
        )


def _layers(config: Any) -> dict[str, Any]:
    """Shape of the decoder layers, with theta beside the rope parameters, where older readers look for it."""
    rope = dict(config.rope_parameters)
    fields = {name: getattr(config, name) for name in SHAPE_FIELDS}
    return fields | {"hidden_act": config.hidden_act, "rope_parameters": rope, "rope_theta": rope["rope_theta"]}


def _taps(config: Any) -> dict[str, Any]:
    return {"target_layer_ids": list(config.target_layer_ids), "mask_token_id": config.mask_token_id}


def _common(config: Any) -> dict[str, Any]:
    fields = {"block_size": config.block_size, "dtype": str(config.dtype or "float32").removeprefix("torch.")}
    for name in ("num_target_layers", *CALIBRATION):
        if getattr(config, name) not in (None, 0.0):
            fields[name] = getattr(config, name)
    return fields


def _deepspec(config: Any, target_name: str | None, target_architectures: list[str]) -> Export:
    """F1: everything flat, with copies of the target's embedding and lm_head."""
    _refuse(
        "deepspec",
        {
            "a vocabulary of its own": config.draft_vocab_size is not None,
            "first slot 1": config.first_slot == 1,
            "causal blocks": config.causal,
            "a sliding window": config.sliding_window is not None,
            "attention sinks": config.attention_sinks,
            "interleaved rope": config.rope_interleaved,
        },
    )
    fields = _layers(config) | _common(config) | _taps(config) | {name: getattr(config, name) for name in _HEADS}
    fields |= {"layer_types": list(config.layer_types), "tie_word_embeddings": False}
    if config.backbone_type == "gemma4":
        fields |= {
            "architectures": ["Gemma4DSparkModel"],
            "model_type": "gemma4_text",
            "hidden_activation": fields.pop("hidden_act"),
            "global_head_dim": config.head_dim,
            "num_global_key_value_heads": config.num_key_value_heads,
            "attention_k_eq_v": bool((config.backbone_config or {}).get("attention_k_eq_v")),
            "final_logit_softcapping": config.final_logit_softcapping,
            "rope_parameters": {"full_attention": fields.pop("rope_parameters")},
        }
    else:
        fields |= {"architectures": ["Qwen3DSparkModel"], "model_type": "qwen3"}
    return Export(fields, keeps_embed_tokens=True, keeps_lm_head=True)


def _specforge(config: Any, target_name: str | None, target_architectures: list[str]) -> Export:
    """F2: the draft's own fields in `dflash_config`; embedding and lm_head are the target's."""
    _refuse(
        "specforge",
        {
            "Gemma4 layers": config.backbone_type != "qwen3",
            "a vocabulary of its own": config.draft_vocab_size is not None,
            "first slot 1": config.first_slot == 1,
            "a sliding window": config.sliding_window is not None,
            "attention sinks": config.attention_sinks,
            "interleaved rope": config.rope_interleaved,
        },
    )
    grouped = config.num_key_value_heads < config.num_attention_heads
    nested = {"projector_type": "dspark", "attention_mode": "gqa" if grouped else "mha", "causal": config.causal}
    nested |= {name: getattr(config, name) for name in _HEADS} | _taps(config)
    fields = _layers(config) | _common(config)
    fields |= {"architectures": ["DSparkDraftModel"], "model_type": "qwen3", "dflash_config": nested}
    return Export(fields, keeps_embed_tokens=False, keeps_lm_head=False)


def _speculators(config: Any, target_name: str | None, target_architectures: list[str]) -> Export:
    """F3: layer ids one more, the layers in a config of their own, and the rows of a reduced vocabulary."""
    _refuse(
        "speculators",
        {
            "Gemma4 layers": config.backbone_type != "qwen3",
            "attention sinks": config.attention_sinks,
            "interleaved rope": config.rope_interleaved,
            "causal blocks in full-attention layers": config.causal and "sliding_attention" not in config.layer_types,
        },
    )
    if target_name is None:
        raise ValueError("The layout 'speculators' names its target: give `--target` (or `target=`).")
    layers = _layers(config) | {"model_type": "qwen3", "layer_types": list(config.layer_types)}
    if config.sliding_window is not None:
        layers |= {"sliding_window": config.sliding_window, "use_sliding_window": True}
    drafted, is_reduced = config.block_size, config.draft_vocab_size is not None
    method = {"proposal_type": "greedy", "speculative_tokens": drafted}
    fields = {name: getattr(config, name) for name in _HEADS} | _common(config)
    fields |= {
        "architectures": ["DSparkDraftModel"],
        "speculators_model_type": "dspark",
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": "dspark",
            "proposal_methods": [method],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": target_name, "architectures": target_architectures},
        },
        "transformer_layer_config": layers,
        "aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "block_size": drafted + config.first_slot,
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": config.first_slot == 0,
        "sliding_window_non_causal": not config.causal,
    }
    return Export(fields, keeps_embed_tokens=False, keeps_lm_head=is_reduced, keeps_t2d=is_reduced)
