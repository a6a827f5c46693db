"""`hf-dspark check`: the command line of the doctor. It parses, calls and prints."""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .cli_options import device, positive
from .doctor import POOR_TAU, PROMPTS, Diagnosis, examine
from .eval.prompts import read_prompts
from .modeling_dspark import DSparkDraftModel


def add_commands(commands) -> None:
    """Register `check`."""
    parser = commands.add_parser("check", help="what a draft is, what it is worth, and why it may be worth little")
    add = parser.add_argument
    add("draft", metavar="DRAFT", help="folder or Hub name of a draft in any packaging")
    add("--target", required=True, help="folder or Hub name of the target it was trained for")
    add("--prompts", metavar="FILE", help="jsonl with `turns`; default: ten of our own")
    add("--num-prompts", type=positive, default=8, help="only the first of them (default 8)")
    add("--max-new-tokens", default=64, type=positive)
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32", "float16"))
    add("--no-chat-template", dest="chat_template", action="store_false", help="take the prompts as they are")
    add("--device", default="auto", type=device, help='"auto" (default), "cpu", "cuda:1", ...')
    add("--threads", type=positive, help="of PyTorch on a CPU")
    parser.set_defaults(run=_check)


def _check(args: argparse.Namespace) -> int:
    """1 where something is wrong with the draft as it was loaded, else 0."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    prompts = PROMPTS if args.prompts is None else read_prompts(args.prompts, args.num_prompts).texts
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=args.dtype, device_map=args.device)
    draft = DSparkDraftModel.from_pretrained(args.draft, target=target, dtype=args.dtype)
    diagnosis = examine(
        draft, target, tokenizer, prompts, max_new_tokens=args.max_new_tokens, as_chat=args.chat_template
    )
    _print(diagnosis)
    return 0 if diagnosis.is_healthy else 1


def _print(diagnosis: Diagnosis) -> None:
    width = max(map(len, diagnosis.facts))
    for name, fact in diagnosis.facts.items():
        print(f"{name.ljust(width)}  {fact}")
    print()
    for comparison in diagnosis.comparisons:
        print(comparison.summary)
    print(f"\ngreedy self-test: tau {diagnosis.tau:.2f} (a draft worth having: {POOR_TAU} or more)")
    print(f"expected at temperature 1 on the same text: {diagnosis.expected_tau:.2f}")
    for variant in diagnosis.variants:
        changed = f"{variant.tau:.2f} instead of {variant.tau_as_is:.2f}"
        print(f"  {variant.name}: {changed}, better on {variant.num_better} of {variant.num_texts} texts")
    if diagnosis.fault is not None:
        print(f"FAULT: it is better with {diagnosis.fault.name}. To mend it, {diagnosis.fault.remedy}.")
    elif not diagnosis.is_healthy:
        print(
            "POOR: little is accepted and none of the usual faults explains it. The draft may belong to another "
            "version of the target, or was not trained for such prompts."
        )
    else:
        print("OK")
