"""`hf-dspark bench`, `plot` and `card`: the command line of eval/ and cards.py. It parses, calls and prints."""

import argparse
import itertools
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
from .eval.roofline import measure_rates
from .eval.simulate import run_simulation
from .eval.simulated_arms import ARMS, arms_for
from .eval.simulated_pair import SHAPES, make_pair
from .modeling_dspark import DSparkDraftModel

_HEADINGS = ("arm", "tau", "tokens/s", "vs plain", "p25-p75", "equal", "verify rate", "acceptance at 1, 2, ...")
_SIMULATION_HEADINGS = (
    "arm", "tokens/s", "vs plain", "vs compiled", "of the limit", "tau", "ms a round", "draft/verify/rest",
    "launches", "host reads", "text",
)  # fmt: skip
# Options of `bench` that only a benchmark on prompts takes, the first ones must be given; and only a simulation.
_NEEDED = ("--target", "--draft", "--prompts")
_ON_PROMPTS = (*_NEEDED, "--num-prompts", "--temperature", "--no-chat-template", "--threshold-sweep")
_SIMULATED = ("--tau", "--batch-size", "--context", "--repeats", "--arms")


def add_commands(commands) -> None:
    """Register `bench`, `plot` and `card`."""
    bench = commands.add_parser("bench", help="drafts against plain generation and prompt lookup, as a table and JSON")
    _add_bench_arguments(bench)
    bench.set_defaults(run=lambda args: _run_bench(bench, args))

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
    add("--target", help="folder or Hub name of the target")
    add("--draft", action="append", help="folder or Hub name of a draft; may be repeated")
    add("--prompts", metavar="FILE", help="jsonl with `turns`; the first turn is the prompt")
    add("--num-prompts", type=positive, metavar="N", help="only the first N")
    add("--max-new-tokens", default=128, type=positive)
    add("--temperature", default=0.0, type=float, help="0 (default) is greedy")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32", "float16"))
    add("--block-size", type=positive, help="drafted tokens verified in a round; default: the draft's own, or 7")
    add("--no-chat-template", dest="chat_template", action="store_false", help="take the prompts as they are")
    add("--threshold-sweep", action="store_true", help="also the first draft at confidence thresholds 0 to 0.8")
    _add_simulation_arguments(parser)
    add("--json", metavar="FILE", help="write the JSON there, too")
    add("--threads", type=positive, help="of PyTorch on a CPU")
    add("--seed", default=0, type=int, help="of the first prompt's sampling; the next prompt has the next")
    add("--device", default="auto", type=device, help='"auto" (default), "cpu", "cuda:1", ...')


def _add_simulation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("simulation", "random weights of a real shape, in place of target and draft")
    add, several = group.add_argument, {"action": "extend", "nargs": "+"}
    add("--simulate", metavar="SHAPE", choices=tuple(SHAPES), help=", ".join(SHAPES))
    add("--tau", default=6.17, type=float, help="tokens a round emits; default 6.17, Qwen3-8B's on GSM8K in the paper")
    add("--batch-size", **several, type=positive, metavar="B", help="sequences at once, one or several; default 1")
    add("--context", **several, type=positive, metavar="N", help="tokens before the new ones; default 2048")
    add("--repeats", default=3, type=positive, help="timed runs of each arm; figures are their medians")
    names = tuple(arm.name for arm in ARMS)
    not_on_cpu = ", ".join(arm.name for arm in ARMS if not arm.on_cpu)
    default = f"default: all of {', '.join(names)}; on a CPU all but {not_on_cpu}"
    add("--arms", **several, choices=names, metavar="ARM", help=f"what is measured, one or several; {default}")


def _run_bench(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    def is_given(option: str) -> bool:
        name = option.removeprefix("--no-" if option == "--no-chat-template" else "--").replace("-", "_")
        return getattr(args, name) != parser.get_default(name)

    foreign = list(filter(is_given, _ON_PROMPTS if args.simulate else _SIMULATED))
    if foreign:
        parser.error(f"{', '.join(foreign)} cannot be used with{'' if args.simulate else 'out'} --simulate")
    missing = [] if args.simulate else [option for option in _NEEDED if not is_given(option)]
    if missing:
        parser.error(f"the following arguments are required without --simulate: {', '.join(missing)}")
    (_simulate if args.simulate else _bench)(args, _command_line(parser, args))


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
    _print_table(_HEADINGS, [_row(name, arm) for name, arm in result["arms"].items()])
    line = json.dumps(result, allow_nan=False)
    print(line, flush=True)
    if args.json is not None:
        Path(args.json).write_text(line + "\n", encoding="utf-8")


def _simulate(args: argparse.Namespace, command: str) -> None:
    """A table and a line of JSON for each setting, as soon as it is measured."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(best if args.device == "auto" else args.device)
    natural = "float32" if where.type == "cpu" else "bfloat16"
    dtype = getattr(torch, natural if args.dtype == "auto" else args.dtype)
    models = {"block_size": args.block_size or 7, "dtype": dtype, "device": where, "seed": args.seed}
    rates, pair = measure_rates(where, dtype), make_pair(args.simulate, args.tau, **models)
    with open(args.json or os.devnull, "w", encoding="utf-8") as file:
        for context, batch_size in itertools.product(args.context or [2048], args.batch_size or [1]):
            result = run_simulation(
                pair, rates, batch_size=batch_size, context=context, max_new_tokens=args.max_new_tokens,
                repeats=args.repeats, arms=arms_for(where, args.arms),
            )  # fmt: skip
            result = {"shape": args.simulate, "command": command, **result}
            _print_simulation(result)
            line = json.dumps(result, allow_nan=False)
            print(line, flush=True)
            print(line, file=file, flush=True)


def _print_simulation(result: dict[str, Any]) -> None:
    limits = result["limit_tokens_per_second"]
    print(
        f"{result['shape']}, {result['dtype']}, batch {result['batch_size']}, {result['context']} tokens of context "
        f"and {result['new_tokens']} new ones, tau {result['tau_asked']}. The device copies "
        f"{result['copy_bandwidth'] / 1e9:.1f} GB/s and multiplies {result['matrix_rate'] / 1e12:.2f} TFLOP/s: "
        f"at most {limits['plain']:.0f} tokens/s plain, {limits['drafting']:.0f} with the draft."
    )
    arms = result["arms"]
    _print_table(_SIMULATION_HEADINGS, [_simulation_row(name, arm) for name, arm in arms.items()])
    for name, arm in arms.items():
        if "reason" in arm:
            print(f"{name}: {arm['reason']}")


def _simulation_row(name: str, arm: dict[str, Any]) -> tuple[str, ...]:
    if "reason" in arm:
        return (name, *["-"] * (len(_SIMULATION_HEADINGS) - 1))

    def ratio(key: str) -> str:
        return "-" if arm[key] is None else f"{arm[key]['median']:.2f}x"

    parts, counts = arm["part_ms"], (arm["launches_per_round"], arm["host_reads_per_round"])
    return (
        name,
        f"{arm['tokens_per_second']:.1f}",
        ratio("ratio_to_plain"),
        ratio("ratio_to_plain_compiled"),
        f"{arm['roofline_percent']:.0f} %",
        f"{arm['tau']:.2f}",
        f"{arm['round_ms']:.2f}",
        "-" if parts is None else "/".join(f"{parts[part]:.2f}" for part in ("draft", "verify", "rest")),
        *("-" if count is None else str(count) for count in counts),
        "right" if arm["is_right"] else "WRONG",
    )


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


def _print_table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """By rich where stdout is a terminal, else in columns of spaces."""
    rich_table = _rich_table(headings) if sys.stdout.isatty() else None
    if rich_table is not None:
        console, table = rich_table
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _rich_table(headings: tuple[str, ...]):
    """rich's console and an empty table; None without rich."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return None
    return Console(), Table(*headings)
