"""`hf-dspark calibrate`: the command line of `calibrate()` and of `load_or_profile()`. It parses, calls and prints."""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from .calibrate import calibrate, output_folder, write_temperatures
from .cli_options import positive
from .costs import load_or_profile
from .eval.prompts import encode_prompt
from .modeling_dspark import DSparkDraftModel
from .schedule import CostTable
from .train.prompts import read_prompts


def add_commands(subparsers) -> None:
    """Register `calibrate`."""
    parser = subparsers.add_parser("calibrate", help="make a draft's confidences probabilities, on held-out prompts")
    add = parser.add_argument
    add("--target", required=True, help="folder or Hub name of the target")
    add("--draft", required=True, help="folder or Hub name of its DSpark draft")
    add(
        "--prompts",
        nargs="+",
        help="jsonl with `turns` (the first is the prompt), text with a prompt a line, a data set, or self:N (the "
        "target writes N itself); none that the draft was trained on",
    )
    add("--num-prompts", default=128, type=positive, help="only the first of them (default 128); half are fitted on")
    add("--max-new-tokens", default=128, type=positive)
    add("--temperature", default=1.0, type=float, help="that the draft will be used at (default 1); 0 is greedy")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32", "float16"))
    add("--no-chat-template", dest="chat_template", action="store_false", help="take the prompts as they are")
    add(
        "--shift",
        action="store_true",
        help="fit one shift of all confidence logits first: where the head is too sure of everything, as at another "
        "temperature than it was trained for, temperatures alone do not help",
    )
    add("--output", metavar="DIR", help="copy the draft there; default: its own config.json is written, nothing else")
    add("--json", metavar="FILE", help="write temperatures, ECE and reliability there, or with --cost the table")
    add("--seed", default=0, type=int, help="of the sampling")
    add(
        "--cost",
        action="store_true",
        help="instead, measure what forwards and drafting take here, for ThroughputSchedule; needs no prompts",
    )
    add("--batch-size", default=1, type=positive, help="with --cost: requests that will run together (default 1)")
    add("--max-tokens", type=positive, help="with --cost: of a forward; default: whole blocks of all requests")
    add("--prompt-length", default=256, type=positive, help="with --cost: tokens of context (default 256)")
    add("--repeats", default=15, type=positive, help="with --cost: each size is timed so often (default 15)")
    add("--threads", type=positive, help="of PyTorch on a CPU")
    parser.set_defaults(run=lambda args: _run(parser, args))


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not args.cost and args.prompts is None:
        parser.error("the following arguments are required: --prompts (or --cost)")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    (_measure_costs if args.cost else _calibrate)(args)


def _measure_costs(args: argparse.Namespace) -> None:
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=args.dtype, device_map="auto")
    draft = DSparkDraftModel.from_pretrained(args.draft, target=target, dtype=args.dtype)
    names = ("max_tokens", "batch_size", "prompt_length", "repeats")
    table = load_or_profile(target, draft, **{name: getattr(args, name) for name in names}, refresh=True)
    if args.json is not None:
        Path(args.json).write_text(table.to_json() + "\n", encoding="utf-8")
    _print_table(table)


def _print_table(table: CostTable) -> None:
    first = table.sample_steps_per_sec[0]
    print("tokens      ms  steps/s  of the first")
    for tokens, rate in zip(table.sample_batch_tokens, table.sample_steps_per_sec, strict=True):
        print(f"{tokens:6} {1000 / rate:7.1f} {rate:8.1f} {first / rate:13.2f}")
    for requests, seconds in zip(table.sample_draft_requests, table.sample_draft_seconds, strict=True):
        print(f"drafting for {requests}: {1000 * seconds:.1f} ms, {first * seconds:.2f} of the first")


def _calibrate(args: argparse.Namespace) -> None:
    output_folder(args.draft, args.output)  # what cannot be written is said before minutes of work
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=args.dtype, device_map="auto")
    draft = DSparkDraftModel.from_pretrained(args.draft, target=target, dtype=args.dtype)
    conversations = read_prompts(args.prompts, target=target, tokenizer=tokenizer, seed=args.seed)
    prompts = [
        encode_prompt(tokenizer, turns[0], as_chat=args.chat_template)["input_ids"]
        for turns in conversations[: args.num_prompts]
    ]
    set_seed(args.seed)
    calibration = calibrate(
        target,
        draft,
        prompts,
        dataset=", ".join(Path(source).name if Path(source).exists() else source for source in args.prompts),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        with_shift=args.shift,
    )
    folder = write_temperatures(calibration.temperatures, args.draft, args.output, shift=calibration.shift)
    if args.json is not None:
        Path(args.json).write_text(calibration.to_json() + "\n", encoding="utf-8")
    print(f"temperatures {' '.join(f'{t:.2f}' for t in calibration.temperatures)}")
    if args.shift:
        print(f"shift {calibration.shift:.2f}")
    print(
        f"ECE {calibration.ece_before:.1%} before, {calibration.ece_after:.1%} after, on other prompts than the "
        f"{calibration.num_samples} rounds of the fit; written to {folder}"
    )
