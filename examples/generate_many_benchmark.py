"""A queue of requests through generate_many() against batches of plain generate(), paired in one run, order rotated.

    python examples/generate_many_benchmark.py --num-requests 200 --batch-size 8 --repeats 3

On the demo's target and the shipped draft. The requests ask for 8 to `--max-new-tokens` greedy tokens each, so rows
finish at different times: a batch of plain generation goes on to its longest row, a queue takes the next request. Only
tokens that were asked for are counted.
"""

import argparse
import json
import random
import statistics
import time

import torch
import transformers

from hf_dspark import DSparkDraftModel, GenerationRequest, ThroughputSchedule, generate_many
from hf_dspark.costs import load_or_profile
from hf_dspark.demo import demo_draft_folder, load_demo_target
from hf_dspark.doctor import PROMPTS
from hf_dspark.eval.prompts import encode_prompt, read_prompts


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    target, tokenizer = load_demo_target(dtype)
    target.to(args.device)
    draft = DSparkDraftModel.from_pretrained(demo_draft_folder(), target=target, dtype=dtype)
    prompts = PROMPTS if args.prompts is None else read_prompts(args.prompts, args.num_requests).texts
    requests = make_requests(tokenizer, prompts, args.num_requests, args.max_new_tokens)

    schedule = None
    if args.throughput:
        schedule = ThroughputSchedule(load_or_profile(target, draft, batch_size=args.batch_size))
    arms = {
        "plain": lambda some: plain_batches(target, tokenizer, some, args.batch_size),
        "generate_many": lambda some: serve(target, draft, some, args.batch_size, schedule),
    }
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for run in arms.values():
        run(requests[: args.batch_size])  # warms up
    for repeat in range(args.repeats):
        for name in sorted(arms, reverse=bool(repeat % 2)):
            start = time.perf_counter()
            tokens = arms[name](requests)
            rates[name].append(tokens / (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = statistics.median(a / b for a, b in zip(rates["generate_many"], rates["plain"], strict=True))
    for name, median in medians.items():
        print(f"{name}: {median:.1f} tokens/s (median of {args.repeats})")
    print(f"generate_many against plain: {ratio:.2f}x (median of the pairs)")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    figures = {"tokens_per_second": rates, "medians": medians, "ratio": ratio}
    print(json.dumps({**vars(args), "num_requests": len(requests), "versions": versions, **figures}))


def make_requests(tokenizer, prompts, count: int, longest: int) -> list[GenerationRequest]:
    rng = random.Random(0)
    ids = [encode_prompt(tokenizer, prompt, as_chat=True)["input_ids"][0].tolist() for prompt in prompts]
    return [GenerationRequest(ids[i % len(ids)], rng.randint(8, longest), do_sample=False) for i in range(count)]


def serve(target, draft, requests: list[GenerationRequest], batch_size: int, schedule) -> int:
    """New tokens of all requests."""
    results = generate_many(target, draft, requests, max_rows=batch_size, schedule=schedule)
    errors = [result.error for result in results if result.error is not None]
    if errors:
        raise RuntimeError(f"{len(errors)} requests failed, the first with: {errors[0]}")
    return sum(len(result.token_ids) for result in results)


def plain_batches(target, tokenizer, requests: list[GenerationRequest], batch_size: int) -> int:
    """New tokens of all requests, each up to its own limit and stop token."""
    stop, tokens = tokenizer.eos_token_id, 0
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        width = max(len(request.prompt) for request in batch)
        padding = [width - len(request.prompt) for request in batch]
        pairs = list(zip(padding, batch, strict=True))
        ids = torch.tensor([[stop] * pad + request.prompt for pad, request in pairs], device=target.device)
        mask = torch.tensor([[0] * pad + [1] * len(request.prompt) for pad, request in pairs], device=target.device)
        longest = max(request.max_new_tokens for request in batch)
        output = target.generate(
            ids, attention_mask=mask, max_new_tokens=longest, do_sample=False, pad_token_id=stop, eos_token_id=stop
        )
        for request, answer in zip(batch, output[:, width:].tolist(), strict=True):
            length = answer.index(stop) + 1 if stop in answer else len(answer)
            tokens += min(length, request.max_new_tokens)
    return tokens


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-requests", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8, help="rows decoded at once, in both arms")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="of the longest answer")
    parser.add_argument("--prompts", metavar="FILE.jsonl", help="jsonl with `turns`; default: ten of our own, in turn")
    parser.add_argument("--throughput", action="store_true", help="with ThroughputSchedule, not whole blocks")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
