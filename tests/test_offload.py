"""A DeepSeek-V4 target of which layers lie on the disk, as `device_map="auto"` puts them where memory is short."""

import pytest
import torch
from test_deepseek_v4_target import make_v4_target
from tiny import make_tiny_draft, plain, speculate
from transformers import AutoModelForCausalLM

from hf_dspark import DSparkDraftModel

PROMPT = torch.tensor([[5, 9, 14, 3]])
HERE = ("model.embed_tokens", "model.norm", "model.hc_head", "model.rotary_emb", "model.layers.1", "model.layers.3")


@pytest.mark.parametrize("lm_head", ["cpu", "disk"])
def test_text_with_layers_on_the_disk_is_the_plain_one(tmp_path, lm_head):
    whole = make_v4_target()
    whole.save_pretrained(tmp_path / "target")
    make_tiny_draft(whole, seed=1).save_pretrained(tmp_path / "draft")
    device_map = dict.fromkeys(HERE, "cpu") | {"model.layers.0": "disk", "model.layers.2": "disk", "lm_head": lm_head}
    target = AutoModelForCausalLM.from_pretrained(
        tmp_path / "target", dtype=torch.float32, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert any(parameter.device.type == "meta" for parameter in target.parameters())
    draft = DSparkDraftModel.from_pretrained(tmp_path / "draft", target=target, dtype=torch.float32)
    expected = plain(whole, PROMPT, max_new_tokens=40, pad_token_id=0)
    assert torch.equal(speculate(target, draft, PROMPT, max_new_tokens=40, pad_token_id=0), expected)
