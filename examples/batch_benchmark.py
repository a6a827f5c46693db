"""Schedules and plain generation on batches of mixed prompts, paired in one run, order rotated.

    python examples/batch_benchmark.py --prompts chat.jsonl gsm8k.jsonl --batch-size 1 4 16 --num-prompts 32

On the demo's target and the shipped draft, greedy. Batches hold prompts of all files in turn; with `--hostile` prompts
are random tokens, of which a draft knows nothing. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from itertools import chain

import torch
import transformers

from hf_dspark import ConfidenceThreshold, DSparkDraftModel, FixedLength, ThroughputSchedule
from hf_dspark.costs import load_or_profile
from hf_dspark.demo import demo_draft_folder, load_demo_target
from hf_dspark.eval.prompts import encode_prompt, read_prompts


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    target, tokenizer = load_demo_target(dtype)
    draft = DSparkDraftModel.from_pretrained(demo_draft_folder(), target=target, dtype=dtype)
    prompts = random_prompts(target, args.num_prompts) if args.hostile else mixed_prompts(tokenizer, args)
    figures = {}
    for batch_size in args.batch_size:
        table = load_or_profile(target, draft, batch_size=batch_size)
        arms = {
            "plain": {},
            "fixed": {"schedule": FixedLength()},
            "threshold_0.3": {"schedule": ConfidenceThreshold(0.3)},
            "throughput": {"schedule": ThroughputSchedule(table)},
        }
        arms = {name: own if name == "plain" else own | {"assistant_model": draft} for name, own in arms.items()}
        batches = [prompts[i : i + batch_size] for i in range(0, len(prompts) - batch_size + 1, batch_size)]
        figures[batch_size] = measure(target, draft, tokenizer, arms, batches, args.max_new_tokens)
        for name, figure in figures[batch_size].items():
            print(
                f"batch {batch_size:2}  {name:14} " + "  ".join(f"{key} {value:.3f}" for key, value in figure.items())
            )
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({**vars(args), "versions": versions, "figures": figures}))


def measure(target, draft, tokenizer, arms, batches, max_new_tokens: int) -> dict[str, dict[str, float]]:
    """For each arm: tokens a second over all batches, median ratio to plain of the batches, tau."""
    rates: dict[str, list[float]] = {name: [] for name in arms}
    counts, taus = dict.fromkeys(arms, 0), {name: [] for name in arms}
    seconds = dict.fromkeys(arms, 0.0)
    names = list(arms)
    for turn, batch in enumerate([batches[0], *batches]):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            tokens = run(target, tokenizer, batch, max_new_tokens, arms[name])
            elapsed = time.perf_counter() - start
            if turn > 0:  # the first one warms up
                rates[name].append(tokens / elapsed)
                counts[name] += tokens
                seconds[name] += elapsed
                taus[name].append(1.0 if name == "plain" else draft.last_stats.tau)
    return {
        name: {
            "tokens_per_second": counts[name] / seconds[name],
            "ratio_to_plain": statistics.median(a / b for a, b in zip(rates[name], rates["plain"], strict=True)),
            "tau": statistics.mean(taus[name]),
        }
        for name in arms
    }


def run(target, tokenizer, batch: list[list[int]], max_new_tokens: int, arguments) -> int:
    """New tokens of all rows, without the padding behind those that ended."""
    width, stop = max(map(len, batch)), tokenizer.eos_token_id
    ids = torch.tensor([[stop] * (width - len(row)) + row for row in batch])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": stop}
    output = target.generate(ids, attention_mask=mask, **settings, **arguments)[:, width:]
    ends = (output == stop).long()
    return int(torch.where(ends.any(-1), ends.argmax(-1) + 1, output.shape[1]).sum())


def mixed_prompts(tokenizer, args) -> list[list[int]]:
    share = -(-args.num_prompts // len(args.prompts))
    sets = [read_prompts(file, share).texts for file in args.prompts]
    mixed = list(chain.from_iterable(zip(*sets, strict=True)))[: args.num_prompts]
    return [encode_prompt(tokenizer, text, as_chat=True)["input_ids"][0].tolist() for text in mixed]


def random_prompts(target, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 64, (count,), generator=generator).tolist()
    return [torch.randint(100, target.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", help="jsonl files with `turns`")
    parser.add_argument("--hostile", action="store_true")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if not args.prompts and not args.hostile:
        parser.error("give --prompts or --hostile")
    return args


if __name__ == "__main__":
    main()
