"""Tiny DeepSeek-V4 repositories in the native layout: the draft's stored tensors, in shards, with an index."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_dspark.dialects_deepseek_v4 import stored_tensors

FIXTURE = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "v4_flash_a"
NUM_STAGES = 3
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "fp8": torch.float8_e4m3fn, "fp4": torch.int8}


def native_config(**changes):
    """config.json of a tiny -DSpark repository; None removes a field."""
    config = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "compress_ratios": [0, 4, 128, 0, 0, 0],
        "compress_rope_theta": 160000,
        "dspark_block_size": 5,
        "dspark_markov_rank": 4,
        "dspark_noise_token_id": 95,
        "dspark_target_layer_ids": [1, 2],
        "expert_dtype": "fp4",
        "hc_eps": 1e-6,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 5,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 64,
        "index_head_dim": 32,
        "index_n_heads": 64,
        "index_topk": 512,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hash_layers": 1,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1,
        "o_groups": 2,
        "o_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 16,
        "swiglu_limit": 2.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "vocab_size": 96,
    }
    config |= changes
    return {name: value for name, value in config.items() if value is not None}


def random_tensor(kind, shape, generator):
    if kind == "e8m0":
        return torch.randint(120, 125, shape, generator=generator, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    if kind == "fp4":
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    values = torch.randn(shape, generator=generator)
    return (values if kind == "fp8" else values * 0.1).to(DTYPES[kind])


def draft_tensors(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wanted = stored_tensors(config, NUM_STAGES)
    return {name: random_tensor(kind, shape, generator) for name, (kind, shape) in wanted.items()}


def write_repository(folder, config=None, tensors=None, *, num_draft_shards=2):
    """A repository: one shard that a target would fill, then the draft's; returns the names of the draft's shards."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config or native_config()
    tensors = draft_tensors(config) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(config))
    total = num_draft_shards + 1
    names = [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    target = {"embed.weight": torch.zeros(config["vocab_size"], config["hidden_size"], dtype=torch.bfloat16)}
    save_file(target, folder / names[0])
    weight_map = dict.fromkeys(target, names[0])
    ordered = sorted(tensors)
    share = -(-len(ordered) // num_draft_shards)
    for number, file in enumerate(names[1:]):
        part = ordered[number * share : (number + 1) * share]
        save_file({name: tensors[name].contiguous() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return names[1:]
