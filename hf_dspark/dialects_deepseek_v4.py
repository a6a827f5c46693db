"""DeepSeek-V4's native files -> ours, pure dict to dict: the draft lies inside the target as `mtp.*` tensors.

Says which tensors there must be, in which shape and type, and what each of ours is made of (v4 names: `attn.wq_a`).
"""

import math
import re
from dataclasses import dataclass
from typing import Any

PREFIX = "mtp."
_FP4_GROUP = 32
# What one stage calls its tensors -> our name, the type it is stored in, and its shape in symbols of `_sizes`.
_STAGE = {
    "attn_norm.weight": ("input_layernorm.weight", "bf16", "D"),
    "ffn_norm.weight": ("post_attention_layernorm.weight", "bf16", "D"),
    "attn.wq_a.weight": ("self_attn.q_a_proj.weight", "fp8", "Q D"),
    "attn.q_norm.weight": ("self_attn.q_a_norm.weight", "bf16", "Q"),
    "attn.wq_b.weight": ("self_attn.q_b_proj.weight", "fp8", "H*hd Q"),
    "attn.wkv.weight": ("self_attn.kv_proj.weight", "fp8", "hd D"),
    "attn.kv_norm.weight": ("self_attn.kv_norm.weight", "bf16", "hd"),
    "attn.attn_sink": ("self_attn.sinks", "f32", "H"),
    "attn.wo_a.weight": ("self_attn.o_a_proj.weight", "fp8", "G*O H*hd/G"),
    "attn.wo_b.weight": ("self_attn.o_b_proj.weight", "fp8", "D G*O"),
    "ffn.gate.weight": ("mlp.gate.weight", "bf16", "E D"),
    "ffn.gate.bias": ("mlp.gate.e_score_correction_bias", "f32", "E"),
    "ffn.shared_experts.w1.weight": ("mlp.shared_experts.gate_proj.weight", "fp8", "M D"),
    "ffn.shared_experts.w3.weight": ("mlp.shared_experts.up_proj.weight", "fp8", "M D"),
    "ffn.shared_experts.w2.weight": ("mlp.shared_experts.down_proj.weight", "fp8", "D M"),
    "hc_attn_fn": ("attn_hc.fn", "f32", "mix c*D"),
    "hc_attn_base": ("attn_hc.base", "f32", "mix"),
    "hc_attn_scale": ("attn_hc.scale", "f32", "3"),
    "hc_ffn_fn": ("ffn_hc.fn", "f32", "mix c*D"),
    "hc_ffn_base": ("ffn_hc.base", "f32", "mix"),
    "hc_ffn_scale": ("ffn_hc.scale", "f32", "3"),
}
_FIRST_STAGE = {
    "main_proj.weight": ("fc.weight", "fp8", "D m*D"),
    "main_norm.weight": ("hidden_norm.weight", "bf16", "D"),
}
_LAST_STAGE = {
    "norm.weight": ("norm.weight", "bf16", "D"),
    "hc_head_fn": ("hc_head.hc_fn", "f32", "c c*D"),
    "hc_head_base": ("hc_head.hc_base", "f32", "c"),
    "hc_head_scale": ("hc_head.hc_scale", "f32", "1"),
    "markov_head.markov_w1.weight": ("markov_head.markov_w1.weight", "bf16", "V r"),
    "markov_head.markov_w2.weight": ("markov_head.markov_w2.weight", "bf16", "V r"),
    "confidence_head.proj.weight": ("confidence_head.proj.weight", "bf16", "1 D+r"),
}
_EXPERT = {"w1": "M D", "w3": "M D", "w2": "D M"}  # gate, up, down
_STORED = {  # the names safetensors gives its types
    "bf16": ("BF16", "F32"),
    "f32": ("F32", "BF16"),
    "fp8": ("F8_E4M3",),
    "fp4": ("I8", "U8"),
    "e8m0": ("F8_E8M0", "U8"),
}
# Copies of the target's in some re-exports, and the router's bias for pictures: nothing that drafting text needs.
_UNUSED = re.compile(r"mtp\.\d+\.(embed\.weight|head\.weight|ffn\.gate\.bias_vl)$")
_CONFIG_KEYS = {
    "D": "hidden_size",
    "H": "num_attention_heads",
    "hd": "head_dim",
    "Q": "q_lora_rank",
    "G": "o_groups",
    "O": "o_lora_rank",
    "M": "moe_intermediate_size",
    "V": "vocab_size",
    "c": "hc_mult",
    "r": "dspark_markov_rank",
}
BACKBONE_KEYS = (
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "scoring_func",
    "routed_scaling_factor",
    "swiglu_limit",
    "hc_mult",
    "hc_sinkhorn_iters",
    "hc_eps",
)


@dataclass(frozen=True, slots=True)
class Part:
    """What one of our tensors is made of: stored tensors, in order, and how they are stored."""

    kind: (
        str  # "plain", "fp8" (weight and scale), "fp4" (weights and scales of all experts) or their "codes", "scales"
    )
    stored: tuple[str, ...]
    shape: tuple[int, ...]


def holds_deepseek_v4_draft(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a DeepSeek-V4 target with a DSpark draft inside.

    Raises ValueError for V4.1, whose draft is another architecture.
    """
    text = config.get("text_config") or {}
    if any(key.startswith("dspark_") for key in text) or str(config.get("model_type")).startswith("deepseek_v41"):
        raise ValueError(
            f"This is a DeepSeek-V4.1 checkpoint (model_type {config.get('model_type')!r}). Its draft reads the "
            "streams that enter a layer and mixes them otherwise than V4's, which is not supported. Use a "
            "DeepSeek-V4-Flash-DSpark or DeepSeek-V4-Pro-DSpark repository."
        )
    return config.get("model_type") == "deepseek_v4" and any(key.startswith("dspark_") for key in config)


def check_is_draft(index: dict[str, str]) -> None:
    """Raise ValueError where an index is that of a whole target with classic multi-token prediction."""
    if any(name.startswith(PREFIX) for name in index) and not any(name.endswith("fc.weight") for name in index):
        raise ValueError(
            "This is a DeepSeek checkpoint whose config.json has no `dspark_*` fields: its `mtp.*` tensors are the "
            "classic multi-token prediction, no DSpark draft. Give the -DSpark repository of the model."
        )


def read_deepseek_v4(config: dict[str, Any], num_stages: int, *, is_packed: bool) -> dict[str, Any]:
    """Fields for DSparkConfig from the native config.json (section 3 of the V4 report names the parts)."""
    _sizes(config)
    rope_dim = config["qk_rope_head_dim"]
    return {
        "backbone_type": "deepseek_v4",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["moe_intermediate_size"],
        "num_hidden_layers": num_stages,
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": 1,
        "head_dim": config["head_dim"],
        "hidden_act": config["hidden_act"],
        "rms_norm_eps": config["rms_norm_eps"],
        "max_position_embeddings": config["max_position_embeddings"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config["rope_theta"],
            "partial_rotary_factor": rope_dim / config["head_dim"],
        },
        "rope_interleaved": True,
        "attention_sinks": True,
        "sliding_window": config["sliding_window"],
        "block_size": config["dspark_block_size"],
        "target_layer_ids": list(config["dspark_target_layer_ids"]),
        "mask_token_id": config["dspark_noise_token_id"],
        "num_target_layers": config["num_hidden_layers"],
        "markov_rank": config["dspark_markov_rank"],
        "enable_confidence_head": True,
        "confidence_head_bias": False,
        "confidence_temperatures": config.get("confidence_temperatures"),
        "confidence_shift": config.get("confidence_shift") or 0.0,
        "dtype": config.get("dtype") or config.get("torch_dtype") or "bfloat16",
        "backbone_config": {name: config[name] for name in BACKBONE_KEYS}
        | {
            "n_routed_experts": _num_experts(config),
            "num_experts_per_tok": config.get("dspark_num_experts_per_tok") or config["num_experts_per_tok"],
            "experts": "packed" if is_packed else "dequantized",
        },
    }


def count_stages(config: dict[str, Any], names: set[str]) -> int:
    """Number of draft stages, from the names of the `mtp.*` tensors: `num_nextn_predict_layers` says 1 where 3 lie.

    Raises ValueError where one is missing.
    """
    found = sorted({int(match[1]) for name in names if (match := re.match(r"mtp\.(\d+)\.", name))})
    if not found:
        raise ValueError(
            "config.json has `dspark_*` fields, but the checkpoint holds no `mtp.*` tensors, which are the draft. Get "
            "the complete repository; some conversions of DeepSeek-V4 drop them."
        )
    ratios = config.get("compress_ratios") or []
    expected = max(len(ratios) - config.get("num_hidden_layers", len(ratios)), 0) or len(found)
    if found != list(range(expected)):
        raise ValueError(
            f"The draft has stages {found} (tensors `mtp.N.*`), but {expected} from 0 on are expected (trailing "
            "`compress_ratios` of config.json). A shard is missing: get the complete repository."
        )
    return expected


def check_inventory(config: dict[str, Any], found: dict[str, tuple[str, tuple[int, ...]]], num_stages: int) -> None:
    """Raise ValueError unless `found`, native name -> (type, shape), is exactly the draft that `config` describes."""
    wanted = stored_tensors(config, num_stages)
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        classic = any(".enorm." in name or ".hnorm." in name for name in found)
        hint = " They are classic multi-token prediction, no DSpark draft." if classic else ""
        raise ValueError(
            f"The draft lacks {len(missing)} of {len(wanted)} tensors: {_some(missing)}.{hint} Get the complete "
            "-DSpark repository."
        )
    unknown = sorted(name for name in found.keys() - wanted.keys() if not _UNUSED.match(name))
    if unknown:
        raise ValueError(
            f"The draft holds {len(unknown)} tensors that config.json does not account for: {_some(unknown)}. The "
            "expert count or another field of config.json is of another checkpoint, or this is a variant that is not "
            "supported."
        )
    for name, (kind, shape) in wanted.items():
        stored, their_shape = found[name]
        if stored not in _STORED[kind]:
            raise ValueError(
                f"`{name}` is stored as {stored}, but DeepSeek-V4's format has {' or '.join(_STORED[kind])} there. "
                "Take the original repository; re-quantised ones are not read."
            )
        if their_shape != shape:
            raise ValueError(
                f"`{name}` has shape {their_shape}, but config.json asks for {shape}. The file or config.json is of "
                "another checkpoint: get both from one revision."
            )


def stored_tensors(config: dict[str, Any], num_stages: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every `mtp.*` tensor that must be there: native name -> (kind, shape)."""
    sizes, tensors = _sizes(config), {}
    for stage, suffix, _, kind, symbols in _entries(num_stages):
        shape = _shape(symbols, sizes)
        tensors[f"mtp.{stage}.{suffix}"] = (kind, shape)
        if kind == "fp8":
            blocks = zip(shape, block_size(config), strict=True)
            scale = tuple(math.ceil(size / block) for size, block in blocks)
            tensors[f"mtp.{stage}.{suffix.removesuffix('weight')}scale"] = ("e8m0", scale)
    for stage in range(num_stages):
        for expert in range(_num_experts(config)):
            for linear, symbols in _EXPERT.items():
                rows, columns = _shape(symbols, sizes)
                name = f"mtp.{stage}.ffn.experts.{expert}.{linear}"
                tensors[f"{name}.weight"] = ("fp4", (rows, columns // 2))
                tensors[f"{name}.scale"] = ("e8m0", (rows, columns // _FP4_GROUP))
    return tensors


def our_tensors(config: dict[str, Any], num_stages: int, *, is_packed: bool) -> dict[str, Part]:
    """What each tensor of the draft is made of, under our names."""
    sizes, parts = _sizes(config), {}
    for stage, suffix, ours, kind, symbols in _entries(num_stages):
        name = f"mtp.{stage}.{suffix}"
        is_fp8 = kind == "fp8"
        stored = (name, f"{name.removesuffix('weight')}scale") if is_fp8 else (name,)
        parts[ours] = Part("fp8" if is_fp8 else "plain", stored, _shape(symbols, sizes))
    num_experts, (width, hidden_size) = _num_experts(config), _shape("M D", sizes)
    for stage in range(num_stages):
        for ours, linears, rows, columns in (
            ("gate_up", ("w1", "w3"), 2 * width, hidden_size),
            ("down", ("w2",), hidden_size, width),
        ):
            names = [f"mtp.{stage}.ffn.experts.{e}.{linear}" for e in range(num_experts) for linear in linears]
            weights, scales = tuple(f"{n}.weight" for n in names), tuple(f"{n}.scale" for n in names)
            place = f"layers.{stage}.mlp.experts.{ours}"
            if is_packed:
                parts[f"{place}_codes"] = Part("codes", weights, (num_experts, rows, columns // 2))
                parts[f"{place}_scales"] = Part("scales", scales, (num_experts, rows, columns // _FP4_GROUP))
            else:
                parts[f"{place}_proj"] = Part("fp4", weights + scales, (num_experts, rows, columns))
    return parts


def block_size(config: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of an fp8 weight that share a scale."""
    rows, columns = config["quantization_config"]["weight_block_size"]
    return rows, columns


def _entries(num_stages: int):
    """(stage, native suffix, our name, kind, shape in symbols) of every tensor that is no routed expert's."""
    for stage in range(num_stages):
        for suffix, (ours, kind, symbols) in _STAGE.items():
            yield stage, suffix, f"layers.{stage}.{ours}", kind, symbols
    for stage, table in ((0, _FIRST_STAGE), (num_stages - 1, _LAST_STAGE)):
        for suffix, (ours, kind, symbols) in table.items():
            yield stage, suffix, ours, kind, symbols


def _num_experts(config: dict[str, Any]) -> int:
    return config.get("dspark_n_routed_experts") or config["n_routed_experts"]


def _sizes(config: dict[str, Any]) -> dict[str, int]:
    """Values of the symbols in the tables. Raises ValueError where a field is missing or is not V4's."""
    needed = [*_CONFIG_KEYS.values(), *BACKBONE_KEYS, "num_hidden_layers", "qk_rope_head_dim", "sliding_window"]
    needed += ["n_routed_experts", "num_experts_per_tok", "rope_theta", "rms_norm_eps", "hidden_act"]
    needed += ["max_position_embeddings", "dspark_block_size", "dspark_target_layer_ids", "dspark_noise_token_id"]
    missing = [name for name in needed if config.get(name) is None]
    if missing:
        raise ValueError(
            f"The checkpoint's config.json lacks {_some(missing)}, which the draft is built from and nothing else "
            "tells. Take config.json from the original repository."
        )
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != "fp8" or len(quantization.get("weight_block_size") or ()) != 2:
        raise ValueError(
            "`quantization_config` of config.json must be DeepSeek-V4's (quant_method fp8, weight_block_size), got "
            f"{quantization}. Re-quantised repositories are not read: take the original one."
        )
    expert_dtype = config.get("expert_dtype") or quantization.get("expert_dtype")
    if expert_dtype != "fp4":
        raise ValueError(
            f"`expert_dtype` must be fp4, as in the -DSpark repositories, got {expert_dtype!r}. Repositories that "
            "store experts otherwise (-Base: fp8) hold no DSpark draft."
        )
    sizes = {symbol: config[name] for symbol, name in _CONFIG_KEYS.items()}
    return sizes | {
        "E": _num_experts(config),
        "m": len(config["dspark_target_layer_ids"]),
        "mix": (2 + sizes["c"]) * sizes["c"],
        "3": 3,
        "1": 1,
    }


def _shape(symbols: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """(Q, D) from "Q D"; a dimension may be a product, with a divisor, or a sum."""
    shape = []
    for dimension in symbols.split():
        product, _, divisor = dimension.partition("/")
        size = sum(math.prod(sizes[s] for s in term.split("*")) for term in product.split("+"))
        shape.append(size // sizes[divisor] if divisor else size)
    return tuple(shape)


def _some(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:5]) + (" ..." if len(names) > 5 else "")
