"""Accepted length has a floor: a draft that is fed wrongly stays lossless and is dead."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny_files import SHARED
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dspark import DSparkDraftModel
from hf_dspark.demo import DEMO_PROMPTS, demo_draft_folder, load_demo_target
from hf_dspark.features import FeatureTap

GSM8K = Path(__file__).resolve().parents[2] / "shared" / "data" / "eval" / "gsm8k.jsonl"
STORIES = [
    "Once upon a time there was a little girl",
    "One day, a dog named",
    "The sun was shining and",
    "Tom had a big red ball.",
    "Lily went to the park with her mom.",
    "There was a small cat who",
    "In the forest, a bear",
    "Mia wanted to bake a cake.",
]
# Recorded with this code, fp32, 64 greedy tokens: 2.667 and 2.118; 3 % below is a failure.
# Recorded with this code, fp32, 64 greedy tokens: 4.755; 3 % below is a failure.
OWN_FLOOR = 4.61
FLOORS = {"tiny_dspark_1L_r64": 2.59, "tiny_dflash_1L": 2.05}


def _tau(target, draft, prompts, **kwargs):
    """Accepted length pooled over prompts, where each output must equal plain generate()'s."""
    emitted = rounds = 0
    for inputs in prompts:
        expected = target.generate(**inputs, do_sample=False, **kwargs)
        output = target.generate(**inputs, do_sample=False, assistant_model=draft, **kwargs)
        assert output.tolist() == expected.tolist()
        emitted += draft.last_stats.tokens - 1
        rounds += draft.last_stats.rounds
    return emitted / rounds


@pytest.mark.core
@pytest.mark.parametrize("name", FLOORS)
def test_trained_tiny_draft_is_accepted_as_recorded(name):
    if not SHARED.is_dir():
        pytest.skip("the trained tiny pair is not there: no ../shared/models beside the repository")
    target = AutoModelForCausalLM.from_pretrained(SHARED / "tiny_target", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tiny_target")
    draft = DSparkDraftModel.from_pretrained(SHARED / name, target=target, dtype=torch.float32)
    assert draft.lm_head is None  # its copies are the target's
    prompts = [tokenizer(text, return_tensors="pt", return_token_type_ids=False) for text in STORIES]
    assert _tau(target, draft, prompts, max_new_tokens=64, eos_token_id=None) >= FLOORS[name]


OWN_PAIR = Path(__file__).parent / "tiny_pair"  # made by examples/train_tiny_pair.py
OWN_STORIES = [
    "Once upon a time there was a curious",
    "There once lived a clever rabbit called Anna. Anna",
    "There once lived a",
    "Mia was a",
    "Once upon a time there was a brave mouse named Leo.",
    "Tom was a shy fox who lived by the lake.",
    "There once lived a funny bear called",
    "Once upon a time",
]


@pytest.mark.core
def test_own_tiny_pair_writes_stories_and_is_accepted_as_recorded():
    target = AutoModelForCausalLM.from_pretrained(OWN_PAIR / "target", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(OWN_PAIR / "target")
    draft = DSparkDraftModel.from_pretrained(OWN_PAIR / "draft", target=target, dtype=torch.float32)
    prompts = [tokenizer(text, return_tensors="pt") for text in OWN_STORIES]
    assert _tau(target, draft, prompts, max_new_tokens=64, eos_token_id=None) >= OWN_FLOOR
    story = tokenizer.decode(target.generate(**prompts[0], max_new_tokens=120, do_sample=False)[0])
    assert re.search(r" named \w+\..*One .*\.", story)
    sizes = {name: (OWN_PAIR / name / "model.safetensors").stat().st_size for name in ("target", "draft")}
    assert sizes["target"] <= 8e6
    assert sizes["draft"] <= 3e6


def test_features_of_the_wrong_position_fall_below_the_floor(monkeypatch):
    if not SHARED.is_dir():
        pytest.skip("the trained tiny pair is not there: no ../shared/models beside the repository")
    target = AutoModelForCausalLM.from_pretrained(SHARED / "tiny_target", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tiny_target")
    folder = SHARED / "tiny_dspark_1L_r64"
    draft = DSparkDraftModel.from_pretrained(folder, target=target, dtype=torch.float32)
    take = FeatureTap.take
    monkeypatch.setattr(FeatureTap, "take", lambda tap, outputs: take(tap, outputs).roll(1, dims=1))
    prompts = [tokenizer(text, return_tensors="pt", return_token_type_ids=False) for text in STORIES[:4]]
    assert _tau(target, draft, prompts, max_new_tokens=64, eos_token_id=None) < FLOORS[folder.name]


def _chat(tokenizer, text):
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def test_real_target_is_equal_in_fp32_and_accepted_at_its_floor():
    pytest.importorskip("gguf")
    try:
        target, tokenizer = load_demo_target(torch.float32)
    except ImportError as error:
        pytest.skip(str(error))
    texts = DEMO_PROMPTS
    if GSM8K.is_file():
        texts = [json.loads(line)["turns"][0] for line in GSM8K.read_text().splitlines()[:2]]
    draft = DSparkDraftModel.from_pretrained(demo_draft_folder(), target=target, dtype=torch.float32)
    tau = _tau(target, draft, [_chat(tokenizer, text) for text in texts[:2]], max_new_tokens=32)
    assert tau >= 1.7  # recorded 2.27 over 20 unseen GSM8K prompts of 64 tokens; two short ones scatter
