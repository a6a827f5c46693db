"""The examples run as they stand, on a tiny pair."""

import json
import re
import runpy
import sys

import pytest
from tiny_files import ROOT, save_random_pair, trained_pair

from hf_dspark import DSparkDraftModel
from hf_dspark.predictor import load_models

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def random_pair(tmp_path_factory):
    return save_random_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(params=["random", "trained"])
def pair(request, random_pair):
    return trained_pair() if request.param == "trained" else random_pair


@pytest.fixture
def quickstart(monkeypatch, capsys):
    """Run quickstart.py; returns what it printed."""

    def quickstart(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["quickstart.py", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / "quickstart.py"), run_name="__main__")
        return capsys.readouterr().out

    return quickstart


def test_quickstart_prints_the_text_and_every_round(quickstart, pair):
    arguments = ("--target", pair.target, "--draft", pair.draft, "--prompt", "Once upon a time")
    printed = quickstart(*arguments, "--max-new-tokens", 24)
    tokens, rounds = map(int, re.search(r"(\d+) tokens, (\d+) rounds, tau", printed).groups())
    table = re.findall(r"^ +(\d+) +(\d+) +(\d+) +(\d+)  .+ \+ .+$", printed, re.M)
    assert len(table) == rounds
    counts = [tuple(map(int, row)) for row in table]
    assert all(drafted >= verified >= accepted for _, drafted, verified, accepted in counts)
    assert 1 + sum(accepted + 1 for *_, accepted in counts) == tokens == 24


def test_quickstart_wants_target_and_draft_together(quickstart, random_pair, capsys):
    with pytest.raises(SystemExit, match="2"):
        quickstart("--target", random_pair.target)
    assert "give --target and --draft together" in capsys.readouterr().err


def test_generate_many_benchmark_counts_the_same_tokens_in_both_arms(random_pair, monkeypatch, capsys):
    target, _, tokenizer = load_models(str(random_pair.target), str(random_pair.draft))
    monkeypatch.setattr("hf_dspark.demo.load_demo_target", lambda dtype: (target, tokenizer))
    monkeypatch.setattr("hf_dspark.demo.demo_draft_folder", lambda: random_pair.draft)
    arguments = ["--num-requests", "5", "--batch-size", "2", "--max-new-tokens", "12", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["generate_many_benchmark.py", *arguments])
    script = runpy.run_path(str(EXAMPLES / "generate_many_benchmark.py"), run_name="__main__")
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: len(rates) for name, rates in figures["tokens_per_second"].items()} == {
        "plain": 3,
        "generate_many": 3,
    }
    requests = script["make_requests"](tokenizer, ["Hello", "Good bye"], 5, 12)
    draft = DSparkDraftModel.from_pretrained(random_pair.draft, target=target)
    expected = sum(request.max_new_tokens for request in requests)
    assert script["plain_batches"](target, tokenizer, requests, 2) == expected
    assert script["serve"](target, draft, requests, 2, None) == expected


def test_notebook_is_stored_without_outputs():
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def test_notebook_runs_from_top_to_bottom(random_pair, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_DSPARK_TARGET", str(random_pair.target))
    monkeypatch.setenv("HF_DSPARK_DRAFT", str(random_pair.draft))
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = {
        cell.id: "".join(output.get("text", "") for output in cell.get("outputs", ())) for cell in notebook.cells
    }
    assert re.search(r"^tau \d+\.\d\d$", printed["rounds"], re.M)
    assert "plain" in printed["compare"]
    assert printed["length"].startswith("tau ")
