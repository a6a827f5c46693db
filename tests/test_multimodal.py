"""The text stack of a multimodal target: an image in the prompt, drafted tokens are text."""

import pytest
import torch
from tiny import make_tiny_draft, plain, speculate
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

IMAGE, NUM_PATCHES, SOFT_TOKENS = 60, 16, 4


def _target() -> Gemma4ForConditionalGeneration:
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "max_position_embeddings": 128,
        "use_bidirectional_attention": "vision",
        "pad_token_id": 0,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "patch_size": 2,
        "pooling_kernel_size": 2,
        "position_embedding_size": 16,
    }
    tokens = {
        "image_token_id": IMAGE,
        "boi_token_id": 61,
        "eoi_token_id": 62,
        "video_token_id": 59,
        "audio_token_id": 58,
    }
    config = Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **tokens)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target = Gemma4ForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in target.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(3.0)
    target.generation_config.eos_token_id = None
    target.generation_config.pad_token_id = 0
    return target


@pytest.fixture(scope="module")
def target():
    return _target()


def _inputs(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[5, 6, 61, *[IMAGE] * SOFT_TOKENS, 62, 7, 8, 9]])
    side = int(NUM_PATCHES**0.5)
    positions = torch.tensor([[[i % side, i // side] for i in range(NUM_PATCHES)]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.rand(1, NUM_PATCHES, 12, generator=generator),
        "image_position_ids": positions,
    }


@pytest.mark.core
@pytest.mark.parametrize("seed", [0, 1])
def test_output_after_an_image_is_plains(target, seed):
    draft = make_tiny_draft(target, block_size=4)
    inputs = _inputs(seed)
    ids = inputs.pop("input_ids")
    expected = plain(target, ids, max_new_tokens=24, **inputs)
    output = speculate(target, draft, ids, max_new_tokens=24, **inputs)
    assert output.tolist() == expected.tolist()
    with torch.no_grad():  # the image matters
        seen, other = (
            target(ids, **inputs | {"pixel_values": p}).logits
            for p in (inputs["pixel_values"], 1 - inputs["pixel_values"])
        )
    assert (seen - other)[:, -1].abs().max() > 1e-3
