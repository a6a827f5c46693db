"""Drafts on disk as other tools write them, each made from a tiny draft of ours: name -> (flags, config, tensors)."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import make_tiny_draft

TOKENS = list(range(0, 64, 2))
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 32.0, "original_max_position_embeddings": 8}
_LAYER_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
)
# What a target's config, copied into a flat one, says of the target and not of the draft.
_NOISE = {"partial_rotary_factor": 0.5, "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}


def _layers(draft) -> dict:
    return {name: getattr(draft.config, name) for name in _LAYER_FIELDS}


def _heads(draft) -> dict:
    names = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
    return {name: getattr(draft.config, name) for name in names}


def _taps(draft) -> dict:
    return {"target_layer_ids": draft.config.target_layer_ids, "mask_token_id": draft.config.mask_token_id}


def flat(draft, *, architecture="Qwen3DSparkModel", **more):
    """F1, the authors': everything at the top, theta flat, between fields of the target."""
    return (
        _NOISE
        | _layers(draft)
        | _heads(draft)
        | _taps(draft)
        | {
            "architectures": [architecture],
            "model_type": "qwen3",
            "rope_theta": draft.config.rope_parameters["rope_theta"],
            "block_size": draft.config.block_size,
            "num_anchors": 16,
            "hidden_act": "silu",
            "layer_types": ["full_attention"] * draft.config.num_hidden_layers,
        }
        | more
    )


def nested(draft):
    """F2, SpecForge's: `dflash_config`, and rope parameters that are meant."""
    return _layers(draft) | {
        "architectures": ["DSparkDraftModel"],
        "model_type": "qwen3",
        "auto_map": {"AutoModel": "dspark.DSparkDraftModel"},
        "block_size": draft.config.block_size,
        "rope_parameters": draft.config.rope_parameters,
        "dflash_config": {"projector_type": "dspark", "attention_mode": "gqa", **_heads(draft), **_taps(draft)},
    }


def speculators(draft, *, says_tokens=True, **more):
    """F3: layer ids one more, the layers in a config of their own, block sizes that may count the anchor."""
    config, theirs = draft.config, draft.config.block_size + draft.config.first_slot
    layers = _layers(draft) | {"model_type": "qwen3", "rope_theta": config.rope_parameters["rope_theta"]}
    if config.sliding_window is not None:
        layers |= {"layer_types": config.layer_types, "sliding_window": config.sliding_window}
        more.setdefault("sliding_window_non_causal", not config.causal)
    methods = [{"proposal_type": "greedy", "speculative_tokens": config.block_size}] if says_tokens else []
    return _heads(draft) | {
        "architectures": ["DSparkDraftModel"],
        "speculators_model_type": "dspark",
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": "dspark",
            "proposal_methods": methods,
            "default_proposal_method": "greedy",
        },
        "transformer_layer_config": layers,
        "aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "block_size": theirs,
        "mask_token_id": config.mask_token_id,
        **more,
    }


def nvidia(draft):
    """F4: the anchor is the bonus token, blocks are causal in a window, with sinks."""
    config = draft.config
    return flat(draft, dspark_bonus_anchor=True, sample_from_anchor=False, attention_sink_bias=True) | {
        "block_size": config.block_size + 1,
        "eagle_aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "dflash_config": {
            "causal": True,
            "use_swa": True,
            "swa_window_size": config.sliding_window,
            "attention_sink_bias": True,
            **_taps(draft),
        },
    }


def z_lab(draft):
    """z-lab's DFlash: no sequential head, and a block that counts the anchor."""
    return _layers(draft) | {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "rope_theta": 10000.0,
        "block_size": draft.config.block_size + 1,
        "dflash_config": _taps(draft),
    }


def gemma4(draft):
    """F1 with Gemma4's layers: flat global head size, rope parameters by layer type."""
    config = flat(draft, architecture="Gemma4DSparkModel")
    del config["rope_theta"], config["hidden_act"]
    return config | {
        "model_type": "gemma4_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "global_head_dim": draft.config.head_dim,
        "head_dim": 4,
        "num_global_key_value_heads": draft.config.num_key_value_heads,
        "num_key_value_heads": draft.config.num_key_value_heads,
        "attention_k_eq_v": draft.config.backbone_config["attention_k_eq_v"],
        "final_logit_softcapping": draft.config.final_logit_softcapping,
        "rope_parameters": {
            "full_attention": draft.config.rope_parameters,
            "sliding_attention": {"rope_type": "default", "rope_theta": 123.0},
            "rope_theta": None,
        },
    }


def _flat_heads(state: dict) -> dict:
    """ModelOpt's names of the heads."""
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("markov_head.").replace("confidence_head.proj.", "confidence_proj.")
        renamed[name] = tensor
    return renamed


def _nvidia_sinks(state: dict) -> dict:
    return {name.replace("self_attn.sinks", "self_attn.attention_sink_bias"): t for name, t in state.items()}


def _with_vocabulary(state: dict) -> dict:
    """What speculators keeps of a reduced vocabulary: both maps and the rows of the lm_head."""
    is_drafted = torch.zeros(64, dtype=torch.bool).index_fill(0, torch.tensor(TOKENS), True)
    return state | {"t2d": is_drafted}


_GEMMA = {
    "backbone_type": "gemma4",
    "embed_scale": 32**0.5,
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e6},
}
_NVIDIA = {"first_slot": 1, "causal": True, "sliding_window": 6, "attention_sinks": True, "confidence": False}
_MIXED = {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 5}

# name -> (arguments of make_tiny_draft, config of a draft, change of its tensors)
PACKAGINGS = {
    "F1 flat": ({"head": "gated"}, flat, None),
    "F1 LingDSparkModel": ({}, lambda d: flat(d, architecture="LingDSparkModel"), None),
    "F1 prefix": ({"head": "rnn"}, flat, lambda state: {f"model.{name}": t for name, t in state.items()}),
    "F1 temperatures": ({}, lambda d: flat(d, confidence_temperatures=[1.5] * d.config.block_size), None),
    "F1 gemma4": (_GEMMA | {"backbone_config": {"attention_k_eq_v": False}}, gemma4, None),
    "F1 gemma4 k=v": (_GEMMA | {"backbone_config": {"attention_k_eq_v": True}, "head": "rnn"}, gemma4, None),
    "F2 nested": ({"rope_parameters": YARN}, nested, None),
    "F2 logit_head": (
        {},
        nested,
        lambda state: {f"logit_head.{n}" if "head" in n else n: t for n, t in state.items()},
    ),
    "F3 anchor drafts": ({}, speculators, None),
    "F3 anchor reserved": ({"first_slot": 1}, speculators, None),
    "F3 silent": ({"first_slot": 1}, lambda d: speculators(d, says_tokens=False), None),
    "F3 sample_from_anchor": ({}, lambda d: speculators(d, says_tokens=False, sample_from_anchor=True), None),
    "F3 sliding": (_MIXED | {"causal": True}, speculators, None),
    "F3 sliding, non-causal": (_MIXED, speculators, None),
    "F3 vocabulary": ({"draft_vocab_size": len(TOKENS), "has_lm_head": True}, speculators, _with_vocabulary),
    "F4 NVIDIA": (_NVIDIA, nvidia, _nvidia_sinks),
    "F4 ModelOpt": ({}, nested, _flat_heads),
    "F5 hybrid": ({}, lambda d: nested(d) | {"architectures": ["DFlashDraftModel"]}, None),
    "F5 interleaved": ({"rope_interleaved": True}, lambda d: nested(d) | {"rope_is_neox_style": False}, None),
    "DFlash, the authors'": ({"head": "none", "confidence": False}, flat, None),
    "DFlash, z-lab's": ({"head": "none", "confidence": False, "first_slot": 1}, z_lab, None),
}


def make_packaged(target, name: str, folder: Path):
    """Write a draft for `target` to `folder` as packaging `name`; returns the draft it was made from."""
    arguments, config_of, change = PACKAGINGS[name]
    draft = make_tiny_draft(target, **arguments)
    with torch.no_grad():
        for parameter_name, parameter in draft.named_parameters():
            if parameter_name.endswith("sinks"):
                parameter.normal_(std=2.0, generator=torch.Generator().manual_seed(0))
    if draft.config.draft_vocab_size is not None:
        draft.set_draft_tokens(torch.tensor(TOKENS))
    state = {name: tensor.contiguous() for name, tensor in draft.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state if change is None else change(state), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(draft)))
    if name == "F1 temperatures":
        draft.config.confidence_temperatures = [1.5] * draft.config.block_size
    draft.bind_target(target)
    return draft
