"""The README is true: its quickstart runs, its file tree is the package, its two commands come first."""

import re
from pathlib import Path

import pytest
from tiny_files import save_random_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_dspark
from hf_dspark import DSparkDraftModel
from hf_dspark.predictor import load_models

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_two_commands_come_first():
    assert re.match(r"# hf_dspark\n\n```bash\nmake demo .*\nmake test .*\n```", README)


def test_quickstart_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    pair = save_random_pair(tmp_path)
    folders = {"Qwen/Qwen3-8B": pair.target, "deepseek-ai/dspark_qwen3_8b_block7": pair.draft}
    for loader in (AutoModelForCausalLM, AutoTokenizer, DSparkDraftModel):
        original = loader.from_pretrained
        monkeypatch.setattr(
            loader, "from_pretrained", lambda name, *args, _load=original, **kw: _load(folders[name], *args, **kw)
        )
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], {})
    printed = capsys.readouterr().out
    assert "The three laws of robotics are" in printed
    assert "GenerationStats(tau=" in printed


def test_many_prompts_run_as_they_stand(tmp_path, capsys):
    target, draft, tokenizer = load_models(*map(str, save_random_pair(tmp_path)))
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    code = re.search(r"## Many prompts.*?```python\n(.*?)```", README, re.DOTALL)[1]
    found = {"target": target, "draft": draft, "tokenizer": tokenizer}
    exec(code, found)
    assert len(found["requests"]) == 3
    assert len(re.findall(r" (?:length|stop)$", capsys.readouterr().out, re.M)) == 3


def test_file_tree_is_the_package():
    tree = re.search(r"```\nhf_dspark/\n(.*?)```", README, re.DOTALL)[1]
    listed = {name for line in tree.splitlines() for name in re.split(r" {2,}", line.strip())[0].split(", ")}
    package = ROOT / "hf_dspark"
    folders = {f"{path.name}/" for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert listed == {path.name for path in package.glob("*.py") if path.name != "__init__.py"} | folders


@pytest.mark.parametrize("name", re.findall(r"`(?:hf_dspark\.)?(\w+)\(", README))
def test_functions_the_readme_names_exist(name):
    owners = (hf_dspark, hf_dspark.DSparkDraftModel, AutoModelForCausalLM)
    known = {"generate"} | {attribute for owner in owners for attribute in dir(owner)}
    assert name in known or re.search(
        rf"(def|class) {name}\b", "".join(p.read_text() for p in ROOT.glob("hf_dspark/*.py"))
    )


def test_numbers_of_the_readme_and_the_model_card_agree():
    card = (ROOT / "model_cards" / "smollm2_dspark_2L_12k.md").read_text(encoding="utf-8")
    for figure in re.findall(r"\| (?:bf16|fp32) \| ([\d.]+) \| ([\d.]+)x", README):
        assert all(number in card for number in figure)
