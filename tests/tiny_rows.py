"""Two hundred mixed rows for a random pair, and one process's answers to them: what every other way must give."""

import json
import os
from pathlib import Path

import torch
from tiny_files import ROOT, Pair, save_random_pair

from hf_dspark.cli import main

NUM_ROWS = 200
GENERATION = ("--max-new-tokens", "3")


def write_rows(path: Path) -> None:
    """Greedy and sampled rows, with and without `id` and parameters of their own; row 50 is wrong."""
    rows = []
    for index in range(NUM_ROWS):
        row = {"prompt": f"Prompt {index}" + " and more" * (index % 5), "answer": index}
        if index % 2:
            row["id"] = f"row-{index}"
        if index % 3 == 1:
            row["temperature"] = 1.0 + index % 4  # a seed of its own decides
        if index % 10 == 3:
            row["max_new_tokens"] = 7
        rows.append(row)
    rows[50]["prompt"] = ""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def file_command(pair: Pair, source: Path, output: Path) -> list[str]:
    """Arguments of `hf-dspark` that answer `source`."""
    models = ["--target", str(pair.target), "--draft", str(pair.draft)]
    return ["generate", *models, "--input", str(source), "--output", str(output), *GENERATION]


def environment() -> dict[str, str]:
    """For a process that imports this checkout's package."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}


def make_run(folder: Path) -> tuple[Pair, Path, Path]:
    """The pair, its rows and the answers of one process."""
    torch.set_num_threads(1)
    pair, source, answers = save_random_pair(folder), folder / "rows.jsonl", folder / "one.jsonl"
    write_rows(source)
    assert main(file_command(pair, source, answers)) == 0
    return pair, source, answers
