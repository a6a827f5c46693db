"""A bitsandbytes target in 8 and 4 bit on the CPU, with a draft that is not quantised."""

import pytest
import torch
from tiny import make_tiny_draft, make_tiny_target, random_prompt
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize(
    "quantization",
    [
        BitsAndBytesConfig(load_in_8bit=True),
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    ],
    ids=["8bit", "4bit"],
)
def test_quantised_target_generates_its_own_greedy_output(tmp_path, quantization):
    make_tiny_target("llama", seed=0, hidden_size=64, intermediate_size=128, head_dim=16, scale=2.0).save_pretrained(
        tmp_path
    )
    target = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    )
    target.generation_config.eos_token_id = None
    assert type(target.model.layers[0].mlp.up_proj).__name__ in ("Linear8bitLt", "Linear4bit")
    draft = make_tiny_draft(target)
    accepted = 0
    for seed in range(4):
        prompt = random_prompt(64, 7, seed=seed)
        expected = target.generate(prompt, max_new_tokens=40, do_sample=False)
        output = target.generate(prompt, assistant_model=draft, max_new_tokens=40, do_sample=False)
        assert output.tolist() == expected.tolist()
        accepted += sum(draft.last_stats.survival_at)
    assert all(type(module) is torch.nn.Linear for module in draft.modules() if "Linear" in type(module).__name__)
