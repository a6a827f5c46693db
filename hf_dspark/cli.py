"""The command line: `hf-dspark generate` and `hf-dspark demo`. It parses, calls and prints; the work is elsewhere."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import set_seed
from transformers.utils import logging

from .cli_calibrate import add_commands as add_calibrate_command
from .cli_check import add_commands as add_check_command
from .cli_convert import add_commands as add_convert_command
from .cli_eval import add_commands as add_eval_commands
from .cli_generate import add_file_options, apply_options, is_file_run, run_file
from .cli_options import device, positive
from .cli_train import add_commands as add_train_command
from .comparison import compare
from .demo import DEMO_PROMPTS, demo_draft_folder, demo_target_folder, load_demo_target
from .modeling_dspark import DSparkDraftModel
from .predictor import load_models

ACCEPTED, TARGETS_OWN = "green", "magenta"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code (2: an error the user can mend, told on stderr; 1: `check` found one)."""
    args = _parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"hf-dspark: {error}", file=sys.stderr)
        return 2
    return code or 0


class RoundPrinter:
    """A streamer that prints each round's text; on a terminal, accepted drafted tokens have a colour of their own."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._console = _terminal()
        self._start()

    def put(self, value: torch.Tensor) -> None:
        """The prompt, which is not printed."""

    def put_round(self, tokens: torch.Tensor, num_accepted: int) -> None:
        """One round's tokens [m]: the first `num_accepted` are the draft's, one behind them is the target's own."""
        for index, token in enumerate(tokens.tolist()):
            self._ids.append(token)
            self._print_new_text(ACCEPTED if index < num_accepted else TARGETS_OWN)

    def end(self) -> None:
        """Print what was held back, and be ready for the next text."""
        self._print_new_text(TARGETS_OWN, is_last=True)
        self._write("\n")
        self._start()

    def print_legend(self) -> None:
        """What the colours mean, where there are any."""
        if self._console is not None:
            self._write("accepted drafted tokens", ACCEPTED)
            self._write(", ")
            self._write("the target's own", TARGETS_OWN)
            self._write("\n")

    def _start(self) -> None:
        self._ids: list[int] = []
        self._window = 0  # decoding starts here: at the tokens printed last, for a leading space depends on them
        self._printed = 0  # tokens whose text is out

    def _print_new_text(self, style: str, *, is_last: bool = False) -> None:
        """Print what the newest tokens add to the text, unless they end within a character."""
        before = self._decode(self._ids[self._window : self._printed])
        text = self._decode(self._ids[self._window :])
        if len(text) > len(before) and (is_last or not text.endswith("\ufffd")):
            self._write(text[len(before) :], style)
            self._window, self._printed = self._printed, len(self._ids)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _write(self, text: str, style: str | None = None) -> None:
        if self._console is None:
            print(text, end="", flush=True)
        else:
            self._console.print(text, style=style, end="", soft_wrap=True, markup=False, emoji=False, highlight=False)


def _terminal():
    """rich's console where stdout is a terminal that shows colours; None elsewhere, and without rich."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console()
    return console if console.is_terminal and console.color_system is not None and not console.no_color else None


def _generate(args: argparse.Namespace) -> None:
    generation = _generation_arguments(args)
    if is_file_run(args):
        run_file(args, generation)
        return
    prompts = args.prompt or [sys.stdin.read().removesuffix("\n")]
    target, draft, tokenizer = load_models(args.target, args.draft, dtype=args.dtype, device=args.device)
    _run_prompts(args, target, draft, tokenizer, prompts, generation)


def _demo(args: argparse.Namespace) -> None:
    generation = _generation_arguments(args)
    logging.set_verbosity_error()
    if demo_target_folder().exists():
        logging.disable_progress_bar()
    else:
        print("Unpacking SmolLM2-135M-Instruct, this once: about 20 seconds ...", flush=True)
    dtype = getattr(torch, args.dtype)
    target, tokenizer = load_demo_target(dtype)
    target.to(args.device)
    draft = DSparkDraftModel.from_pretrained(demo_draft_folder(), target=target, dtype=dtype)
    _run_prompts(args, target, draft, tokenizer, args.prompt or DEMO_PROMPTS, generation)


def _run_prompts(
    args: argparse.Namespace, target, draft, tokenizer, prompts: Sequence[str], generation: dict[str, Any]
) -> None:
    """Stream each prompt's text, then print its line of figures."""
    apply_options(args, draft)
    printer = RoundPrinter(tokenizer)
    printer.print_legend()
    for prompt in prompts:
        if len(prompts) > 1:
            print(f"\n> {prompt}", flush=True)
        if args.seed is not None:
            set_seed(args.seed)
        inputs = _encode(tokenizer, prompt, as_chat=args.chat_template).to(target.device)
        if args.compare:
            line = compare(target, draft, inputs, tokenizer=tokenizer, streamer=printer, **generation).summary
        else:
            target.generate(**inputs, assistant_model=draft, streamer=printer, **generation)
            line = f"tau {draft.last_stats.tau:.2f}, {draft.last_stats.tokens_per_second:.1f} tokens/s"
        print(line, flush=True)


def _generation_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of generate() that `args` ask for."""
    sampling = {"top_p": args.top_p, "top_k": args.top_k}
    asked = {name: value for name, value in sampling.items() if value is not None}
    if args.temperature == 0:
        if asked:
            raise ValueError(f"{' and '.join(asked)} given at temperature 0, which is greedy. Set --temperature, too.")
        return {"max_new_tokens": args.max_new_tokens, "do_sample": False}
    return {"max_new_tokens": args.max_new_tokens, "do_sample": True, "temperature": args.temperature, **asked}


def _encode(tokenizer, prompt: str, *, as_chat: bool):
    """The prompt as a user's turn, or as it is where the tokenizer has no chat template."""
    if not prompt:
        raise ValueError("The prompt is empty. Give one with --prompt, or on stdin.")
    if not as_chat or tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True, return_tensors="pt")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-dspark", description="DSpark speculative decoding with transformers.")
    commands = parser.add_subparsers(required=True, metavar="command")

    generate = commands.add_parser("generate", help="your target with your draft: prompts, or a file of them")
    generate.add_argument("--target", required=True, help="folder or Hub name of the target")
    generate.add_argument("--draft", required=True, help="folder or Hub name of its DSpark draft")
    generate.add_argument("--prompt", action="append", help="may be repeated; without it, stdin is the prompt")
    generate.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32", "float16"))
    generate.add_argument("--device", default="auto", type=device, help='"auto" (default), "cpu", "cuda:1", ...')
    generate.add_argument("--threads", type=positive, help="of PyTorch on a CPU")
    add_file_options(generate)
    _add_generation(generate)
    generate.set_defaults(run=_generate)

    demo = commands.add_parser("demo", help="SmolLM2-135M-Instruct with the shipped draft, on three prompts")
    demo.add_argument("--prompt", action="append", help="instead of the demo's own; may be repeated")
    demo.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    demo.add_argument("--device", default="cpu", type=device)
    demo.add_argument("--threads", default=1, type=positive, help="default 1: so small a model gains nothing by more")
    _add_generation(demo)
    demo.set_defaults(run=_demo)
    add_train_command(commands)
    add_eval_commands(commands)
    add_calibrate_command(commands)
    add_convert_command(commands)
    add_check_command(commands)
    return parser


def _add_generation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--max-new-tokens", default=128, type=positive)
    add("--temperature", default=0.0, type=float, help="0 (default) is greedy")
    add("--top-p", type=float, help="with a temperature; default: the target's own")
    add("--top-k", type=int, help="with a temperature; default: the target's own")
    add("--num-assistant-tokens", type=int, help="drafted tokens verified in a round; default: the draft's own")
    add("--confidence-threshold", type=float, help="verify no drafted token of a lower confidence")
    add("--no-chat-template", dest="chat_template", action="store_false", help="take the prompt as it is")
    add("--seed", type=int, help="of the sampling")
    add("--no-compare", dest="compare", action="store_false", help="do not measure plain generation")
