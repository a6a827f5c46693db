"""What block attention saves when a target verifies 8 tokens: the operation alone, and the whole forward, paired.

Against transformers' sdpa as it runs in such a forward: keys and values repeated for the queries that share them, and
a mask. Random weights in the shape of Qwen3-0.6B; one thread on a CPU; medians of paired runs whose order alternates.

    python examples/attention_speed.py --dtype bfloat16 --repeats 9
"""

import argparse
import json
import statistics
import time

import torch
import transformers
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_dspark.attention import visible_keys
from hf_dspark.attention_interface import dspark_attention
from hf_dspark.compat import CACHE

TOKENS, LAYERS = 8, 8
SHAPE = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 1024}
QWEN3_8B = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 4096}


def paired(runs: dict, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each of two runs, in turn, the first pair left out."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name in sorted(runs, reverse=bool(repeat % 2)):
            start = time.perf_counter()
            runs[name]()
            if repeat:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def summary(times: dict[str, list[float]]) -> dict[str, float]:
    """Medians, and the median of the pairs' ratios."""
    ratio = statistics.median(a / b for a, b in zip(times["sdpa"], times["dspark"], strict=True))
    return {name: round(statistics.median(values), 3) for name, values in times.items()} | {"ratio": round(ratio, 2)}


def time_operation(shape: dict, context: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """One layer's attention over `context` keys and the block; layers differ, so keys come from memory, not caches."""
    heads, key_heads, head_dim = (shape[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    query = torch.randn(1, TOKENS, heads, head_dim, dtype=dtype).transpose(1, 2)
    states = torch.randn(LAYERS, 2, 1, key_heads, context + TOKENS, head_dim, dtype=dtype)
    module = torch.nn.Module()
    module.num_key_value_groups = heads // key_heads
    mask = visible_keys(query, states[0, 0], is_causal=True)
    functions = {"sdpa": (sdpa_attention_forward, mask), "dspark": (dspark_attention, None)}

    def run(name):
        attend, mask = functions[name]
        return [attend(module, query, *layer, mask, scaling=head_dim**-0.5)[0] for layer in states]

    torch.testing.assert_close(run("sdpa"), run("dspark"), atol=4 * torch.finfo(dtype).eps, rtol=0.0)
    times = paired({name: lambda name=name: run(name) for name in functions}, repeats)
    return summary({name: [value / LAYERS for value in values] for name, values in times.items()})


def time_forward(target, context: int, repeats: int) -> dict[str, float]:
    """A forward of `target` over the block, its cache brought back after each."""
    config = target.config
    cache = DynamicCache(config=config)
    keys = (1, config.num_key_value_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(*torch.randn(2, *keys, dtype=target.dtype), layer)
    ids = torch.arange(1, TOKENS + 1).unsqueeze(0)
    logits = {}

    def run(name):
        config._attn_implementation = name
        logits[name] = target(ids, **{CACHE: cache}).logits
        cache.crop(-TOKENS)

    times = paired({name: lambda name=name: run(name) for name in ("sdpa", "dspark")}, repeats)
    assert (logits["sdpa"] - logits["dspark"]).norm() < 0.1 * logits["sdpa"].norm()
    return summary(times)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocab-size", type=int, default=151936)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    sizes = {"num_hidden_layers": arguments.layers, "intermediate_size": 3 * SHAPE["hidden_size"]}
    config = Qwen3Config(**SHAPE, **sizes, vocab_size=arguments.vocab_size, tie_word_embeddings=True)
    config._attn_implementation = "sdpa"
    target = Qwen3ForCausalLM(config).to(dtype).eval()
    figures = {}
    for context in arguments.contexts:
        rows = {
            "operation, 16/8 heads": time_operation(SHAPE, context, dtype, arguments.repeats),
            "operation, 32/8 heads": time_operation(QWEN3_8B, context, dtype, arguments.repeats),
            "forward, 16/8 heads": time_forward(target, context, arguments.repeats),
        }
        figures[context] = rows
        for name, row in rows.items():
            print(f"{context:6d}  {name}: {row['sdpa']:8.2f} ms -> {row['dspark']:8.2f} ms, {row['ratio']:.2f}x")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"dtype": arguments.dtype, "tokens": TOKENS, "versions": versions, "milliseconds": figures}))


if __name__ == "__main__":
    main()
