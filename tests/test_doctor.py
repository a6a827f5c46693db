"""`hf-dspark check` on a trained pair: healthy as it is, and each planted fault is found by its name."""

import copy
import re
from pathlib import Path

import pytest
import torch
from tiny import make_tiny_draft
from tiny_files import SHARED, byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dspark import DSparkDraftModel
from hf_dspark.cli import main
from hf_dspark.doctor import _encodings, examine

STORIES = (
    "Once upon a time there was a little girl",
    "One day, a dog named",
    "The sun was shining and",
    "Tom had a big red ball.",
    "Lily went to the park with her mom.",
    "There was a small cat who",
    "In the forest, a bear",
    "Mia wanted to bake a cake.",
)
TINY_PAIR = Path(__file__).parent / "tiny_pair"
FOLDER = SHARED / "tiny_dspark_1L_r64"
TAPS = [1, 4, 7, 10, 13]


@pytest.fixture(scope="module")
def pair():
    if not SHARED.is_dir():
        pytest.skip("the trained tiny pair is not there: no ../shared/models beside the repository")
    target = AutoModelForCausalLM.from_pretrained(SHARED / "tiny_target", dtype=torch.float32)
    return target, AutoTokenizer.from_pretrained(SHARED / "tiny_target")


def _load(target, **fields):
    return DSparkDraftModel.from_pretrained(FOLDER, target=target, dtype=torch.float32, **fields)


def _with_a_wrong_embedding(target):
    draft = _load(target)
    draft.config.has_embed_tokens = True
    draft.embed_tokens = copy.deepcopy(target.get_input_embeddings())
    with torch.no_grad():
        draft.embed_tokens.weight.copy_(draft.embed_tokens.weight.flip(0))
    return draft


FAULTS = {
    "taps one too high": (lambda t: _load(t, target_layer_ids=[i + 1 for i in TAPS]), f"taps {TAPS}"),
    "first slot": (lambda t: _load(t, first_slot=1), "first slot 0"),
    "causal": (lambda t: _load(t, causal=True), "causal False"),
    "rope": (lambda t: _load(t, rope_parameters={"rope_type": "default", "rope_theta": 500.0}), "the target's rope"),
    "embedding": (_with_a_wrong_embedding, "the target's embed_tokens"),
}


def test_trained_draft_is_healthy(pair):
    target, tokenizer = pair
    draft = _load(target)
    diagnosis = examine(draft, target, tokenizer, STORIES)
    assert diagnosis.is_healthy
    assert diagnosis.fault is None
    assert diagnosis.tau > 2.5
    assert all(comparison.is_equal for comparison in diagnosis.comparisons)
    assert draft.config.to_dict() == _load(target).config.to_dict()  # nothing that was tried is left


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_named(pair, name):
    target, tokenizer = pair
    plant, expected = FAULTS[name]
    diagnosis = examine(plant(target), target, tokenizer, STORIES)
    assert not diagnosis.is_healthy
    assert diagnosis.fault.name == expected


def test_command_tells_what_it_found_by_text_and_exit_code(pair, tmp_path, capsys):
    del pair
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"turns": ["{story}"]}}\n' for story in STORIES))
    arguments = ["--target", str(SHARED / "tiny_target"), "--prompts", str(prompts), "--dtype", "float32"]
    assert main(["check", str(FOLDER), *arguments]) == 0
    output = capsys.readouterr().out
    assert "the anchor predicts" in output
    assert "vanilla, rank 64" in output
    assert "embed_tokens and lm_head" in output
    assert re.search(r"^block_attention +not Triton: .+; packed queries$", output, re.M)
    assert output.endswith("OK\n")
    _load(AutoModelForCausalLM.from_pretrained(SHARED / "tiny_target"), first_slot=1).save_pretrained(tmp_path / "bad")
    assert main(["check", str(tmp_path / "bad"), *arguments]) == 1
    assert "FAULT: it is better with first slot 0. To mend it, set `first_slot` to 0." in capsys.readouterr().out


def test_random_draft_is_poor_without_a_named_fault(target):
    diagnosis = examine(make_tiny_draft(target), target, byte_tokenizer_of(target), ["ab", "cde"], max_new_tokens=24)
    assert not diagnosis.is_healthy


def byte_tokenizer_of(target):
    """Ids that the tiny target has."""
    tokenizer = byte_tokenizer()

    def encode(text, **kwargs):
        inputs = tokenizer(text, **kwargs)
        inputs["input_ids"] %= target.config.vocab_size
        return inputs

    encode.chat_template = None
    return encode


def test_ways_to_encode_a_prompt_follow_the_template():
    tokenizer = byte_tokenizer()
    assert list(_encodings(tokenizer, as_chat=True)) == ["as they are"]
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    assert list(_encodings(tokenizer, as_chat=True)) == ["with the chat template", "without a chat template"]
    assert next(iter(_encodings(tokenizer, as_chat=False))) == "without a chat template"
    tokenizer.chat_template += "{% if enable_thinking %}T{% endif %}"
    ways = _encodings(tokenizer, as_chat=True)
    assert len(ways) == 4
    on = ways["with thinking on (enable_thinking=True)"]("a")["input_ids"]
    off = ways["with thinking off (enable_thinking=False)"]("a")["input_ids"]
    assert on.shape[1] == off.shape[1] + 1


TEMPLATES = {
    "headings": "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant: {% endif %}",
    "tags": "{% for m in messages %}<<{{ m['role'] }}>> {{ m['content'] }} <</{{ m['role'] }}>> {% endfor %}"
    "{% if add_generation_prompt %}<<ASSISTANT 0123456789>> {{ messages[0]['content'] }}{% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_template_that_the_draft_was_not_trained_with_is_named(name):
    target = AutoModelForCausalLM.from_pretrained(TINY_PAIR / "target", dtype=torch.float32)
    draft = DSparkDraftModel.from_pretrained(TINY_PAIR / "draft", target=target, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY_PAIR / "target")
    tokenizer.chat_template = TEMPLATES[name]
    fault = examine(draft, target, tokenizer, STORIES, max_new_tokens=48).fault
    assert fault.name == "without a chat template"
    assert "encode prompts without a chat template" in fault.remedy
    assert examine(draft, target, tokenizer, STORIES, max_new_tokens=48, as_chat=False).fault is None
