"""The sampler's and the acceptance's kernels against the plain functions on one GPU: microseconds a round.

Qwen3's vocabulary, blocks of 7, rank 256, bfloat16; medians, called from Python and replayed as a CUDA graph, in which
the host's part is gone. `equal` is the share of rows with the same drafted tokens, and the same accepted length.

    python examples/sampling_kernels.py --batch-sizes 1 8 32
"""

import argparse
import json
import statistics
import sys

import torch
import transformers

from hf_dspark import DSparkConfig, DSparkDraftModel
from hf_dspark.accept import accept_and_draw
from hf_dspark.draft import sample_block
from hf_dspark.sampling import TemperatureSampler, softmax_at

BLOCK_SIZE, TEMPERATURE = 7, 0.7


def make_draft(vocab_size: int) -> DSparkDraftModel:
    """A draft that is little more than its sequential head."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = DSparkConfig(
        **sizes,
        head_dim=16,
        vocab_size=vocab_size,
        num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        target_layer_ids=[0],
        mask_token_id=0,
        markov_rank=256,
        block_size=BLOCK_SIZE,
        has_embed_tokens=False,
        has_lm_head=False,
    )
    return DSparkDraftModel(config).to("cuda", torch.bfloat16).eval()


def microseconds(run, repeats: int = 30) -> float:
    """Median of `run` on the device."""
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(stop))
    return statistics.median(times)


def replay_of(run):
    """`run` captured as a CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@torch.no_grad()
def rows(draft: DSparkDraftModel, batch_size: int, kernels):
    """One dict for each function and setting."""
    vocab_size, shape = draft.config.vocab_size, (batch_size, BLOCK_SIZE)
    base_logits = 3 * torch.randn(*shape, vocab_size, device="cuda")
    anchor_ids = torch.randint(0, vocab_size, (batch_size, 1), device="cuda")
    uniforms = torch.rand(shape, device="cuda")
    samplers = {"greedy": TemperatureSampler(), "drawn": TemperatureSampler(TEMPERATURE, uniforms.double())}
    for name, sampler in samplers.items():
        arguments = (base_logits, anchor_ids, base_logits, draft, sampler)  # the head reads no hidden states
        yield measure(f"sample_block, {name}", batch_size, sample_block, kernels, arguments, lambda block: block[0])
    target_logits = torch.cat([base_logits, base_logits[:, :1]], dim=1)
    target_logits = target_logits + 0.3 * torch.randn_like(target_logits)
    law = softmax_at(TEMPERATURE, base_logits).flatten(0, 1)
    draft_ids = law.multinomial(1).view(shape)
    arguments = (target_logits, draft_ids, base_logits, uniforms, TEMPERATURE, None)
    yield measure(
        "accept_and_draw", batch_size, accept_and_draw, kernels, arguments, lambda choice: choice.num_accepted
    )


def measure(name: str, batch_size: int, function, kernels, arguments, result_of) -> dict:
    """Times of the plain function and of its kernel, and how often they agree."""
    plain, kernel = function.__wrapped__, getattr(kernels, function.__name__)
    results = [result_of(run(*arguments)) for run in (plain, kernel)]
    same = (results[0] == results[1]).reshape(batch_size, -1).all(-1).float().mean().item()
    row = {"function": name, "batch_size": batch_size, "equal": round(same, 3)}
    for label, run in (("plain", plain), ("kernel", kernel)):
        row[label] = round(microseconds(lambda run=run: run(*arguments)))
        row[f"{label}, graph"] = round(microseconds(replay_of(lambda run=run: run(*arguments))))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=151936)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This measures kernels on a GPU, and there is none.")
    from hf_dspark import kernels

    torch.manual_seed(0)
    draft, measured = make_draft(arguments.vocab_size), []
    columns = ("plain", "kernel", "plain, graph", "kernel, graph", "equal")
    print(f"{'microseconds':<22}{'B':>4}" + "".join(f"{column:>15}" for column in columns))
    for batch_size in arguments.batch_sizes:
        for row in rows(draft, batch_size, kernels):
            print(f"{row['function']:<22}{batch_size:>4}" + "".join(f"{row[column]:>15}" for column in columns))
            measured.append(row)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"device": torch.cuda.get_device_name(), "versions": versions, "rows": measured}))


if __name__ == "__main__":
    main()
