"""`hf-dspark generate --input --output`: a file of prompts, shared between processes. It parses, calls and prints."""

import argparse
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .cli_options import positive
from .modeling_dspark import DSparkDraftModel
from .predictor import answer_rows, load_models, row_seed
from .processes import Processes
from .request_files import ResultFile, read_rows

# What decides on the results besides the file's rows; where and how many at once does not.
_OPTIONS = ("target", "draft", "dtype", "num_assistant_tokens", "confidence_threshold", "chat_template", "seed")


def add_file_options(parser: argparse.ArgumentParser) -> None:
    """Options of a run from file to file."""
    add = parser.add_argument
    add("--input", type=Path, metavar="FILE.jsonl", help="rows with `prompt`, `turns` or `messages`; see the README")
    add("--output", type=Path, metavar="FILE.jsonl", help="of --input: a row with `text` for each of its rows")
    add("--batch-size", default=8, type=positive, help="rows of --input decoded at once (default 8)")


def is_file_run(args: argparse.Namespace) -> bool:
    """Whether a file was asked for. Raises ValueError where one of the two is missing, or a prompt is given, too."""
    files = [name for name in ("input", "output") if getattr(args, name) is not None]
    if len(files) == 1 or (files and args.prompt):
        given = [f"--{name}" for name in (*files, *(["prompt"] if args.prompt else []))]
        raise ValueError(f"--input and --output belong together, without --prompt; given: {', '.join(given)}.")
    return bool(files)


def run_file(args: argparse.Namespace, generation: dict[str, Any]) -> None:
    """This process's share of the rows; the first process merges all shares and prints what came of them."""
    processes = Processes.of_launcher()
    rows = read_rows(args.input)
    options = {name: getattr(args, name) for name in _OPTIONS}
    results = ResultFile(args.output, args.input, options | generation)
    with processes.all_finished():
        done = results.start(len(rows))
        left = [index for index in processes.share(len(rows)) if index not in done]
        if left:
            with results.part(processes.rank, processes.world) as write:
                _answer_rows(args, generation, processes, {index: rows[index] for index in left}, write)
    if processes.rank == 0:
        merged = results.merge(len(rows))
        num_failed = sum(row["error"] is not None for row in merged)
        print(f"{args.output}: {len(merged)} rows, {num_failed} of them with an error", flush=True)


def apply_options(args: argparse.Namespace, draft: DSparkDraftModel) -> None:
    """Set the number of threads, and how much of the draft is verified."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.num_assistant_tokens is not None:
        draft.generation_config.num_assistant_tokens = args.num_assistant_tokens
    if args.confidence_threshold is not None:
        draft.generation_config.assistant_confidence_threshold = args.confidence_threshold


def _answer_rows(args, generation: dict[str, Any], processes: Processes, rows: dict[int, Any], write) -> None:
    device = processes.device(args.device)
    target, draft, tokenizer = load_models(args.target, args.draft, dtype=args.dtype, device=device)
    apply_options(args, draft)
    indices = list(rows)
    seeds = [row_seed(args.seed or 0, index) for index in indices]
    answers = answer_rows(
        target,
        draft,
        tokenizer,
        list(rows.values()),
        seeds,
        parameters=generation,
        chat_template=args.chat_template,
        max_rows=args.batch_size,
    )
    for place, answer in tqdm(answers, total=len(rows), desc="rows", disable=processes.rank > 0):
        row = rows[indices[place]]
        carried = {"id": row["id"]} if isinstance(row, dict) and "id" in row else {}
        write({"index": indices[place], **carried, **answer})
