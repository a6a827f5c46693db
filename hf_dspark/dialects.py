"""Foreign config and tensor names -> ours, pure dict to dict: the only file that knows how other tools write a draft.

Tensor names decide first, the config second, labels last. A field that is part of the training and that neither tells
is an error, never a guess.
"""

import re
from dataclasses import dataclass
from typing import Any

SHAPE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "attention_bias",
    "attention_dropout",
    "max_position_embeddings",
    "initializer_range",
)
CALIBRATION = ("confidence_temperatures", "confidence_shift")
# What ModelOpt, NVIDIA and some trainers call the tensors of heads and sinks; whole names, behind no prefix.
_RENAMED = {
    r"^(?:model\.|logit_head\.)": "",
    r"^(markov_w[12]|gate_proj|joint_proj)\.": r"markov_head.\1.",
    r"^confidence_proj\.": "confidence_head.proj.",
    r"^markov_head\.(embed|head)\.": lambda m: f"markov_head.markov_w{1 + (m[1] == 'head')}.",
    r"\.self_attn\.attention_sink_bias$": ".self_attn.sinks",
}
# Tensors of the target's or of the training that no draft needs.
UNUSED = ("t2d", "verifier_lm_head.weight", "verifier_norm.weight", "embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, slots=True)
class Decision:
    """What a checkpoint was found to be: fields for DSparkConfig, and one line that says how that was decided."""

    fields: dict[str, Any]
    reason: str
    is_foreign: bool


def rename_tensor(name: str) -> str:
    """Our name of a checkpoint's tensor."""
    for pattern, replacement in _RENAMED.items():
        name = re.sub(pattern, replacement, name)
    return name


def read_dialect(config: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> Decision:
    """Decide what draft `config` and `tensors` (our name -> shape) describe.

    Raises ValueError where the tensors are no DSpark or DFlash draft's, or where taps, mask token, block size or rope
    theta are missing or contradict each other.
    """
    _check_tensors(config, tensors)
    if config.get("model_type") == "dspark" and "backbone_type" in config:
        return Decision(dict(config), "our own layout (model_type dspark)", is_foreign=False)
    found = _Config(config)
    layers = found.layers
    fields = {name: layers[name] for name in SHAPE_FIELDS if layers.get(name) is not None}
    fields["hidden_act"] = layers.get("hidden_act") or layers.get("hidden_activation") or "silu"
    for name in ("num_target_layers", *CALIBRATION, "architectures", "dtype", "torch_dtype"):
        if found.get(name) is not None:
            fields[name] = found.get(name)
    fields["target_layer_ids"] = _taps(found)
    fields["mask_token_id"] = found.require("mask_token_id", "pard_token", "dspark_noise_token_id")
    fields |= _heads(found, tensors, fields["hidden_size"])
    packaging = _packaging(found, fields)
    fields |= _slots(found, packaging)
    fields |= _attention(found, tensors, packaging)
    fields |= _gemma4(layers, fields) if _is_gemma4(tensors) else {"rope_parameters": _rope(layers)}
    if "d2t" in tensors:
        fields["draft_vocab_size"] = tensors["d2t"][0]
    if found.get("rope_is_neox_style") is False:
        fields["rope_interleaved"] = True
    return Decision(fields, _reason(found, packaging, fields), is_foreign=True)


class _Config:
    """A foreign config whose fields lie at the top, in `dflash_config`, or in a layer config of speculators."""

    def __init__(self, config: dict[str, Any]):
        self.top = config
        self.nested = config.get("dflash_config") or {}
        self.layers = config.get("transformer_layer_config") or config
        self.label = f"architectures {config.get('architectures')}, model_type {config.get('model_type')!r}"

    def get(self, *names: str) -> Any:
        """The first of `names` that is set, in `dflash_config` or at the top."""
        for name in names:
            for place in (self.nested, self.top):
                if place.get(name) is not None:
                    return place[name]
        return None

    def require(self, *names: str) -> Any:
        """As `get`, and ValueError where none is set."""
        value = self.get(*names)
        if value is None:
            raise ValueError(
                f"The draft's config.json ({self.label}) has no `{names[0]}`. It is part of the training and cannot "
                "be guessed: add it to config.json from the draft's model card."
            )
        return value


def _check_tensors(config: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> None:
    label = _Config(config).label
    if any(name.startswith("mtp.") for name in tensors) and "fc.weight" not in tensors:
        raise ValueError(
            f"This is a DeepSeek-V4 checkpoint ({label}), whose draft lies inside the target in `mtp.*` tensors. "
            "Drafts of that architecture are not supported yet."
        )
    if "fc.weight" not in tensors or "hidden_norm.weight" not in tensors:
        raise ValueError(
            "This checkpoint has no `fc.weight` and `hidden_norm.weight`, the projection of the target's hidden "
            f"states, so it is no DSpark draft's ({label}). Load it with the class it was saved from, or give the "
            "repository of the draft."
        )
    if config.get("quantization_config") or any(name.endswith(("weight_scale", "weight_packed")) for name in tensors):
        method = (config.get("quantization_config") or {}).get("quant_algo") or "packed weights"
        raise ValueError(
            f"This draft is quantised ({method}, {label}), and such drafts are not read here. Take the unquantised "
            "twin of the repository (its name often ends in BF16)."
        )
    theirs = _Config(config).layers
    rows, head_dim = tensors.get("layers.0.self_attn.q_proj.weight", (0,))[0], theirs.get("head_dim")
    if head_dim and not _is_gemma4(tensors) and rows == 2 * theirs.get("num_attention_heads", 0) * head_dim:
        raise ValueError(
            f"The draft's query projection is twice as wide as its heads ({label}): gated attention as in Qwen3.5, "
            "which is not supported. Take a draft with Qwen3 or Gemma4 layers."
        )


def _taps(found: _Config) -> list[int]:
    """Zero-based layers whose outputs are read. The other keys count the embedding as 0, so a layer is one more."""
    ids = found.get("target_layer_ids")
    shifted = found.get("aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids")
    if ids is None and shifted is None:
        found.require("target_layer_ids")
    if ids is not None and shifted is not None and list(ids) != [i - 1 for i in shifted]:
        raise ValueError(
            f"The draft's config.json ({found.label}) names layers {ids} as `target_layer_ids` and {shifted} as "
            "hidden states, which should be one more each. Correct the one that is wrong, from its model card."
        )
    return list(ids) if ids is not None else [i - 1 for i in shifted]


def _heads(found: _Config, tensors: dict[str, tuple[int, ...]], hidden_size: int) -> dict[str, Any]:
    rank = tensors["markov_head.markov_w1.weight"][1] if "markov_head.markov_w1.weight" in tensors else 0
    claimed = found.get("markov_rank", "dspark_markov_rank")
    if claimed is not None and claimed != rank:
        raise ValueError(
            f"The draft's config.json says `markov_rank` {claimed}, but its tensors have rank {rank} "
            "(`markov_head.markov_w1.weight`). The file or the config belongs to another draft."
        )
    head_type = "vanilla"
    for name, tensor in (("gated", "gate_proj"), ("rnn", "joint_proj")):
        if f"markov_head.{tensor}.weight" in tensors:
            head_type = name
    if rank and found.get("markov_head_type") not in (None, head_type):
        raise ValueError(
            f"The draft's config.json says `markov_head_type` {found.get('markov_head_type')!r}, but its tensors are "
            f"those of a {head_type!r} head. The file or the config belongs to another draft."
        )
    confidence = tensors.get("confidence_head.proj.weight")
    if found.get("enable_confidence_head", "use_confidence_head") and confidence is None:
        raise ValueError(
            "The draft's config.json says `enable_confidence_head`, but the checkpoint has no "
            "`confidence_head.proj.weight`. Set `enable_confidence_head` to false, or get the complete checkpoint."
        )
    return {
        "markov_rank": rank,
        "markov_head_type": head_type,
        "enable_confidence_head": confidence is not None,
        "confidence_head_with_markov": confidence is not None and confidence[1] > hidden_size,
    }


def _packaging(found: _Config, fields: dict[str, Any]) -> str:
    architectures = found.top.get("architectures") or []
    if found.top.get("speculators_model_type"):
        return "speculators"
    if found.get("dspark_bonus_anchor") is not None or found.get("sample_from_anchor") is not None:
        return "NVIDIA's"
    if fields["markov_rank"] == 0 and architectures == ["DFlashDraftModel"]:
        return "z-lab's DFlash"
    if found.nested:
        return "SpecForge's nested" if architectures != ["DFlashDraftModel"] else "a hybrid (labelled DFlash)"
    return "the authors' flat"


def _slots(found: _Config, packaging: str) -> dict[str, int]:
    """`first_slot`, and `block_size` as the number of drafted tokens."""
    theirs, first_slot = found.require("block_size"), 0
    from_anchor = found.get("sample_from_anchor")
    methods = (found.top.get("speculators_config") or {}).get("proposal_methods") or [{}]
    drafted = methods[0].get("speculative_tokens")
    if packaging == "speculators" and drafted is not None:
        first_slot = theirs - drafted
    elif from_anchor is not None:
        first_slot = 0 if from_anchor else 1
    elif packaging in ("speculators", "z-lab's DFlash") or found.get("dspark_bonus_anchor"):
        first_slot = 1
    if first_slot not in (0, 1):
        raise ValueError(
            f"The draft's config.json ({found.label}) has `block_size` {theirs} and {drafted} `speculative_tokens`: a "
            "block drafts as many tokens as it has positions, or one less. Correct the one that is wrong."
        )
    return {"first_slot": first_slot, "block_size": theirs - first_slot}


def _attention(found: _Config, tensors: dict[str, tuple[int, ...]], packaging: str) -> dict[str, Any]:
    """Causal blocks, windows and sinks. A flat config is the target's with fields added: its window is noise."""
    fields: dict[str, Any] = {}
    if packaging == "speculators":
        types = found.layers.get("layer_types")
        if types and "sliding_attention" in types:
            fields["layer_types"] = list(types)
            fields["sliding_window"] = found.layers.get("sliding_window")
            fields["causal"] = not found.get("sliding_window_non_causal")
    else:
        fields["causal"] = bool(found.get("causal", "is_causal", "dflash_query_causal"))
        if found.get("use_swa"):
            fields["sliding_window"] = found.require("swa_window_size")
    has_sinks = "layers.0.self_attn.sinks" in tensors
    if found.get("attention_sink_bias") and not has_sinks:
        raise ValueError(
            "The draft's config.json says `attention_sink_bias`, but its layers have no sinks "
            "(`layers.0.self_attn.sinks` or `.attention_sink_bias`). Get the complete checkpoint."
        )
    return fields | {"attention_sinks": has_sinks}


def _is_gemma4(tensors: dict[str, tuple[int, ...]]) -> bool:
    return "layers.0.pre_feedforward_layernorm.weight" in tensors


def _gemma4(layers: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Layers of Gemma4: full attention only, with its own head size and, where keys are the values, key heads."""
    shares = bool(layers.get("attention_k_eq_v"))
    rope = layers.get("rope_parameters") or {}
    return {
        "backbone_type": "gemma4",
        "backbone_config": {"attention_k_eq_v": shares},
        "head_dim": layers.get("global_head_dim") or layers.get("head_dim"),
        "num_key_value_heads": (layers.get("num_global_key_value_heads") if shares else None)
        or layers["num_key_value_heads"],
        "rope_parameters": dict(rope.get("full_attention") or rope),
        "embed_scale": fields["hidden_size"] ** 0.5,
        "final_logit_softcapping": layers.get("final_logit_softcapping"),
    }


def _rope(layers: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` with its theta, which stands inside it or flat beside it.

    Frequencies are the draft's own: partial and multimodal rotation are the target's and not its draft's.
    """
    rope = dict(layers.get("rope_parameters") or layers.get("rope_scaling") or {})
    if "sliding_attention" in rope or "full_attention" in rope:
        rope = dict(rope.get("sliding_attention") or rope["full_attention"])
    if "type" in rope:  # as older configs call it
        rope.setdefault("rope_type", rope.pop("type"))
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = layers.get("rope_theta")
    noise = {"partial_rotary_factor", "mrope_section", "mrope_interleaved"}
    rope = {"rope_type": "default"} | {name: value for name, value in rope.items() if name not in noise}
    if rope["rope_type"] in ("mrope", "proportional"):
        rope["rope_type"] = "default"
    return rope


def _reason(found: _Config, packaging: str, fields: dict[str, Any]) -> str:
    rank, backbone = fields["markov_rank"], fields.get("backbone_type", "qwen3")
    head = f"{fields['markov_head_type']} Markov head of rank {rank}" if rank else "no sequential head"
    slot = "the anchor predicts" if fields["first_slot"] == 0 else "the first mask predicts"
    flags = [
        "causal" if fields.get("causal") else "",
        f"window {fields['sliding_window']}" if fields.get("sliding_window") else "",
        "sinks" if fields.get("attention_sinks") else "",
        f"{fields['draft_vocab_size']} tokens" if fields.get("draft_vocab_size") else "",
    ]
    return (
        f"{packaging} layout ({found.label}): {backbone} backbone, {head}, block size {fields['block_size']}, {slot}"
        + "".join(f", {flag}" for flag in flags if flag)
    )
