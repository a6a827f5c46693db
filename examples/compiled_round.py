"""Compiled rounds against eager ones and plain generation, over prompts of many lengths, paired, order rotated.

    python examples/compiled_round.py --prompts prompts.jsonl --num-prompts 50

On the demo's target and the shipped draft, greedy, one sequence at a time. Plain generation runs eagerly and, with a
static cache, compiled, and so does transformers' own assisted loop with our candidates. The last line is JSON;
`graphs_after_warm_up` counts what was compiled behind the warm-up: a prompt for each number of slots that they need.
"""

import argparse
import json
import statistics
import time

import torch
import transformers
from torch._dynamo.utils import counters
from transformers import CompileConfig

from hf_dspark import DSparkDraftModel
from hf_dspark.demo import demo_draft_folder, load_demo_target
from hf_dspark.eval.prompts import encode_prompt, read_prompts

ARMS = ["plain", "plain_compiled", "transformers_compiled", "eager", "compiled"]


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    target, tokenizer = load_demo_target(dtype)
    eager, compiled = (DSparkDraftModel.from_pretrained(demo_draft_folder(), target=target, dtype=dtype) for _ in "ab")
    compiled.compile_round(target)
    texts = read_prompts(args.prompts, args.num_prompts).texts
    prompts = [encode_prompt(tokenizer, text, as_chat=True)["input_ids"] for text in texts]
    static = CompileConfig()
    static._compile_all_devices = True  # generate() compiles on accelerators only
    longest = max(prompt.shape[1] for prompt in prompts) + args.max_new_tokens
    in_static_cache = {"cache_implementation": "static", "compile_config": static, "max_length": longest}
    stock_loop = eager.as_custom_generate(loop="transformers")
    arms = {
        "plain": {},
        "plain_compiled": in_static_cache,
        "transformers_compiled": {"custom_generate": stock_loop, **in_static_cache},
        "eager": {"assistant_model": eager},
        "compiled": {"assistant_model": compiled},
    }
    arms = {name: arguments for name, arguments in arms.items() if name in args.arms}
    drafts = {"eager": eager, "compiled": compiled}
    settings = {"do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    warm_up(target, compiled, prompts, arms, settings, args.max_new_tokens)
    graphs = counters["stats"]["unique_graphs"]
    rates = {name: [] for name in arms}
    round_ms = {name: [] for name in drafts}
    for turn, prompt in enumerate(prompts):
        names = list(arms)[turn % len(arms) :] + list(arms)[: turn % len(arms)]
        for name in names:
            limit = {} if "max_length" in arms[name] else {"max_new_tokens": args.max_new_tokens}
            start = time.perf_counter()
            output = target.generate(prompt, **settings, **limit, **arms[name])
            seconds = time.perf_counter() - start
            rates[name].append((output.shape[1] - prompt.shape[1]) / seconds)
            if name in drafts:
                stats = drafts[name].last_stats
                round_ms[name].append(1000 * (seconds - stats.prefill_seconds) / stats.rounds)
    figures = {
        "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "ratio_to_plain": {name: median_ratio(values, rates["plain"]) for name, values in rates.items()},
        "round_ms": {name: statistics.median(values) for name, values in round_ms.items() if values},
        "graphs_after_warm_up": counters["stats"]["unique_graphs"] - graphs,
    }
    for name, figure in figures.items():
        print(name, figure)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({**vars(args), "versions": versions, **figures}))


def warm_up(target, draft: DSparkDraftModel, prompts, arms, settings, max_new_tokens: int) -> None:
    num_slots, more = draft.compiled_rounds[target].num_slots, max_new_tokens + draft.config.num_block_inputs
    first = {num_slots(prompt.shape[1] + more): prompt for prompt in prompts}
    for prompt in first.values():
        for arguments in arms.values():
            limit = {} if "max_length" in arguments else {"max_new_tokens": max_new_tokens}
            target.generate(prompt, **settings, **limit, **arguments)


def median_ratio(values: list[float], plain: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(values, plain, strict=True))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="jsonl file with `turns`")
    parser.add_argument("--num-prompts", type=int, default=50)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
