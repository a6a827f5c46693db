"""Foreign config names -> ours, pure dict to dict: the only file that knows how other tools write a draft.

Tensor names decide first, the config second, labels last. Understood here: our own layout and the authors' flat one
(`Qwen3DSparkModel`), whose config is the target's with the draft's fields added, so most of its keys are noise.
"""

from dataclasses import dataclass
from typing import Any

_SHAPE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "attention_bias",
    "attention_dropout",
    "max_position_embeddings",
    "initializer_range",
)
_DRAFT_FIELDS = (
    "block_size",
    "target_layer_ids",
    "mask_token_id",
    "num_target_layers",
    "draft_vocab_size",
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
    "confidence_temperatures",
)


@dataclass(frozen=True, slots=True)
class Decision:
    """What a checkpoint was found to be: fields for DSparkConfig, and one line that says how that was decided."""

    fields: dict[str, Any]
    reason: str
    is_foreign: bool


def read_dialect(config: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> Decision:
    """Decide what draft `config` and `tensors` (name -> shape, without a `model.` prefix) describe.

    Raises ValueError where the tensors are no DSpark draft's, or where taps, mask token or rope theta are missing.
    """
    if "fc.weight" not in tensors or "hidden_norm.weight" not in tensors:
        raise ValueError(
            "This checkpoint has no `fc.weight` and `hidden_norm.weight`, the projection of the target's hidden "
            f"states, so it is no DSpark draft (its config says {_label(config)}). Load it with the class it was "
            "saved from, or give the repository of the draft."
        )
    if config.get("model_type") == "dspark" and "backbone_type" in config:
        return Decision(dict(config), "our own layout (model_type dspark)", is_foreign=False)
    return _flat(config, tensors)


def _flat(config: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> Decision:
    for name in ("target_layer_ids", "mask_token_id"):
        if config.get(name) is None:
            raise ValueError(
                f"The draft's config.json ({_label(config)}) has no `{name}`. It is part of the training and cannot "
                "be guessed: add it to config.json from the draft's model card."
            )
    fields = {name: config[name] for name in (*_SHAPE_FIELDS, *_DRAFT_FIELDS) if config.get(name) is not None}
    fields["rope_parameters"] = _rope(config)
    fields["markov_rank"] = _rank(config, tensors)
    has_confidence = "confidence_head.proj.weight" in tensors
    if config.get("enable_confidence_head") and not has_confidence:
        raise ValueError(
            "The draft's config.json says `enable_confidence_head`, but the checkpoint has no "
            "`confidence_head.proj.weight`. Set `enable_confidence_head` to false, or get the complete checkpoint."
        )
    fields["enable_confidence_head"] = has_confidence
    if has_confidence:
        extra = tensors["confidence_head.proj.weight"][1] - fields["hidden_size"]
        fields["confidence_head_with_markov"] = extra > 0
    else:
        fields["confidence_head_with_markov"] = False
    for name in ("architectures", "dtype", "torch_dtype"):
        if config.get(name) is not None:
            fields[name] = config[name]
    head = f"{fields.get('markov_head_type', 'vanilla')} Markov head of rank {fields['markov_rank']}"
    return Decision(
        fields,
        f"the authors' flat layout ({_label(config)}): qwen3 backbone, "
        f"{head if fields['markov_rank'] else 'no sequential head'}, block size {fields.get('block_size')}",
        is_foreign=True,
    )


def _rank(config: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> int:
    rank = tensors["markov_head.markov_w1.weight"][1] if "markov_head.markov_w1.weight" in tensors else 0
    if config.get("markov_rank") is not None and config["markov_rank"] != rank:
        raise ValueError(
            f"The draft's config.json says `markov_rank` {config['markov_rank']}, but its tensors have rank {rank} "
            "(`markov_head.markov_w1.weight`). The file or the config belongs to another draft."
        )
    return rank


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` with its theta, which stands inside it or flat beside it."""
    rope = dict(config.get("rope_parameters") or {})
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = config.get("rope_theta")
    return {"rope_type": "default"} | rope


def _label(config: dict[str, Any]) -> str:
    return f"architectures {config.get('architectures')}, model_type {config.get('model_type')!r}"
