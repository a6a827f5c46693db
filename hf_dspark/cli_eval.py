"""`hf-dspark bench`, `plot` and `card`: the command line of eval/ and cards.py. It parses, calls and prints."""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .cards import render_card
from .cli_options import device, positive
from .eval.benchmark import run_benchmark
from .eval.plots import plot_benchmark
from .eval.prompts import read_prompts
from .modeling_dspark import DSparkDraftModel

_HEADINGS = ("arm", "tau", "tokens/s", "vs plain", "p25-p75", "equal", "verify rate", "acceptance at 1, 2, ...")


def add_commands(commands) -> None:
    """Register `bench`, `plot` and `card`."""
    bench = commands.add_parser("bench", help="drafts against plain generation and prompt lookup, as a table and JSON")
    _add_bench_arguments(bench)
    bench.set_defaults(run=lambda args: _bench(args, _command_line(bench, args)))

    plot = commands.add_parser("plot", help="PNGs of a benchmark's JSON")
    plot.add_argument("file", metavar="FILE.json", help="of `hf-dspark bench --json`, or with the same keys")
    plot.add_argument("--output", metavar="DIR", help="default: the file's folder")
    plot.set_defaults(run=_plot)

    card = commands.add_parser("card", help="a model card whose figures come from benchmarks")
    card.add_argument("--bench", required=True, nargs="+", metavar="FILE", help="of `hf-dspark bench --json`")
    card.add_argument("--fields", required=True, metavar="FILE.json", help="base_model, data, steps, limits, ...")
    card.add_argument("--output", required=True, metavar="FILE.md")
    card.set_defaults(run=_card)


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--target", required=True, help="folder or Hub name of the target")
    add("--draft", required=True, action="append", help="folder or Hub name of a draft; may be repeated")
    add("--prompts", required=True, metavar="FILE", help="jsonl with `turns`; the first turn is the prompt")
    add("--num-prompts", type=positive, metavar="N", help="only the first N")
    add("--max-new-tokens", default=128, type=positive)
    add("--temperature", default=0.0, type=float, help="0 (default) is greedy")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32", "float16"))
    add("--block-size", type=positive, help="drafted tokens verified in a round; default: the draft's own")
    add("--no-chat-template", dest="chat_template", action="store_false", help="take the prompts as they are")
    add("--threshold-sweep", action="store_true", help="also the first draft at confidence thresholds 0 to 0.8")
    add("--json", metavar="FILE", help="write the JSON there, too")
    add("--threads", type=positive, help="of PyTorch on a CPU")
    add("--seed", default=0, type=int, help="of the first prompt's sampling; the next prompt has the next")
    add("--device", default="auto", type=device, help='"auto" (default), "cpu", "cuda:1", ...')


def _bench(args: argparse.Namespace, command: str) -> None:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    prompts = read_prompts(args.prompts, args.num_prompts)
    names = [Path(os.path.abspath(draft)).name for draft in args.draft]
    if len(set(names)) < len(names):
        raise ValueError(f"Arms are named after the drafts' folders, and two have the same name: {names}. Rename one.")
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=args.dtype, device_map=args.device)
    drafts = {}
    for name, source in zip(names, args.draft, strict=True):
        drafts[name] = DSparkDraftModel.from_pretrained(source, target=target, dtype=args.dtype)
        if args.block_size is not None:
            drafts[name].generation_config.num_assistant_tokens = args.block_size
    result = run_benchmark(
        target,
        drafts,
        tokenizer,
        prompts,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        as_chat=args.chat_template,
        seed=args.seed,
        threshold_sweep=args.threshold_sweep,
        command=command,
    )
    _print_table([_row(name, arm) for name, arm in result["arms"].items()])
    line = json.dumps(result, allow_nan=False)
    print(line, flush=True)
    if args.json is not None:
        Path(args.json).write_text(line + "\n", encoding="utf-8")


def _plot(args: argparse.Namespace) -> None:
    file = Path(args.file)
    result = json.loads(file.read_text(encoding="utf-8"))
    for path in plot_benchmark(result, args.output or file.parent, stem=file.stem):
        print(path)


def _card(args: argparse.Namespace) -> None:
    fields, *benches = (json.loads(Path(file).read_text(encoding="utf-8")) for file in [args.fields, *args.bench])
    Path(args.output).write_text(render_card(fields, benches), encoding="utf-8")
    print(args.output)


def _command_line(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The command that `args` were parsed from, without options that have their default."""
    words = parser.prog.split()
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if name == "run" or value == parser.get_default(name):
            continue
        if name == "chat_template":
            words.append("--no-chat-template")
        elif value is True:
            words.append(option)
        else:
            for item in value if isinstance(value, list) else [value]:
                words += [option, str(item)]
    return shlex.join(words)


def _row(name: str, arm: dict[str, Any]) -> tuple[str, ...]:
    ratio, is_drafting = arm["ratio_to_plain"], arm["acceptance_at"] is not None
    rates = ["-" if rate is None else f"{rate:.2f}" for rate in arm["acceptance_at"] or ()]
    return (
        name,
        f"{arm['tau']:.2f}",
        f"{arm['tokens_per_second']:.1f}",
        f"{ratio['median']:.2f}x",
        f"{ratio['p25']:.2f}-{ratio['p75']:.2f}",
        "sampled" if arm["identical"] is None else "{}/{}".format(*arm["identical"]),
        f"{arm['verify_rate']:.2f}" if is_drafting else "",
        " ".join(rates),
    )


def _print_table(rows: list[tuple[str, ...]]) -> None:
    """By rich where stdout is a terminal, else in columns of spaces."""
    rich_table = _rich_table() if sys.stdout.isatty() else None
    if rich_table is not None:
        console, table = rich_table
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(_HEADINGS, *rows, strict=True)]
    for row in (_HEADINGS, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _rich_table():
    """rich's console and an empty table; None without rich."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return None
    return Console(), Table(*_HEADINGS)
