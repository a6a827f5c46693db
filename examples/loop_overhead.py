"""The loop's own time per round, ours against transformers' assisted loop with the same candidates, paired in one run.

Own time = time of the call minus the time inside the forwards of the target and of the draft (backbone, lm_head and
sequential head). Random 8-layer target, so acceptance means nothing here; the figure is per round.

    python examples/loop_overhead.py --vocab-size 32000 --repeats 15
"""

import argparse
import json
import statistics
import time
from contextlib import contextmanager

import torch
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM

from hf_dspark import DSparkConfig, DSparkDraftModel

SETTINGS = {
    "greedy": {"do_sample": False},
    "temperature, top-k, top-p": {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.9},
    "temperature": {"do_sample": True, "temperature": 0.7, "top_k": 0},
}


@contextmanager
def timed(*methods):
    """Seconds spent in `methods`, each an (object, name), while open; in a list of one number."""
    seconds = [0.0]

    def wrap(function):
        def timed_function(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[0] += time.perf_counter() - start

        return timed_function

    for owner, name in methods:
        setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield seconds
    finally:
        for owner, name in methods:
            delattr(owner, name)


def own_time(target, draft, ids, loop: str, settings: dict, new_tokens: int) -> float:
    """Milliseconds a round outside the forwards."""
    torch.manual_seed(0)
    decode = draft.as_custom_generate(loop=loop)
    forwards = ((target, "forward"), (draft, "forward"), (draft, "compute_logits"), (draft.markov_head, "forward"))
    with timed(*forwards) as seconds:
        start = time.perf_counter()
        target.generate(ids, custom_generate=decode, max_new_tokens=new_tokens, **settings)
        total = time.perf_counter() - start
    return 1000 * (total - seconds[0]) / draft.last_stats.rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 16, "vocab_size": arguments.vocab_size}
    target = Qwen3ForCausalLM(Qwen3Config(**sizes, num_hidden_layers=8, eos_token_id=1, pad_token_id=0)).eval()
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = DSparkConfig(
        **sizes, num_hidden_layers=2, rope_parameters=rope, target_layer_ids=[1, 3, 5], mask_token_id=2, markov_rank=64
    )
    draft = DSparkDraftModel(config).eval()
    ids = torch.randint(3, arguments.vocab_size, (1, 32))
    figures = {}
    for name, settings in SETTINGS.items():
        times: dict[str, list[float]] = {"dspark": [], "transformers": []}
        for repeat in range(arguments.repeats + 1):
            for loop in sorted(times, reverse=bool(repeat % 2)):  # order rotated
                value = own_time(target, draft, ids, loop, settings, arguments.new_tokens)
                if repeat:  # the first pair warms up
                    times[loop].append(value)
        ratio = statistics.median(a / b for a, b in zip(times["dspark"], times["transformers"], strict=True))
        ours, theirs = (statistics.median(times[loop]) for loop in ("dspark", "transformers"))
        figures[name] = {"ours_ms": round(ours, 3), "transformers_ms": round(theirs, 3), "ratio": round(ratio, 3)}
        print(f"{name}: ours {ours:.2f} ms a round, transformers {theirs:.2f} ms, median ratio {ratio:.2f}")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"vocab_size": arguments.vocab_size, "threads": 1, "versions": versions, "own_time": figures}))


if __name__ == "__main__":
    main()
