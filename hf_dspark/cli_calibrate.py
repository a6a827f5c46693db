"""`hf-dspark calibrate`: the command line of `calibrate()`. It parses, calls and prints."""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from .calibrate import calibrate, output_folder, write_temperatures
from .cli_options import positive
from .eval.prompts import encode_prompt
from .modeling_dspark import DSparkDraftModel
from .train.prompts import read_prompts


def add_commands(subparsers) -> None:
    """Register `calibrate`."""
    parser = subparsers.add_parser("calibrate", help="make a draft's confidences probabilities, on held-out prompts")
    add = parser.add_argument
    add("--target", required=True, help="folder or Hub name of the target")
    add("--draft", required=True, help="folder or Hub name of its DSpark draft")
    add(
        "--prompts",
        required=True,
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
    add("--json", metavar="FILE", help="write temperatures, ECE and reliability there")
    add("--seed", default=0, type=int, help="of the sampling")
    parser.set_defaults(run=_calibrate)


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
