"""`hf-dspark convert`: the command line of `convert()`. It parses, calls and prints."""

import argparse

from transformers import AutoModelForCausalLM

from .convert import convert
from .dialects_export import LAYOUTS
from .modeling_dspark import DSparkDraftModel


def add_commands(commands) -> None:
    """Register `convert`."""
    parser = commands.add_parser("convert", help="write a draft in the layout another engine reads")
    parser.add_argument("draft", metavar="DRAFT", help="folder or Hub name of a draft in any packaging")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="dspark is hf_dspark's own layout")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--target", help="folder or Hub name; needed where the layout names it or keeps its tensors")
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> None:
    target = None if args.target is None else AutoModelForCausalLM.from_pretrained(args.target, dtype="auto")
    draft = DSparkDraftModel.from_pretrained(args.draft, target=target, dtype="auto")
    print(convert(draft, args.to, args.output, target=target))
