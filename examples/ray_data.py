"""Answer a jsonl file with Ray Data: actors that each load target and draft once, and take a batch of rows at a time.

    pip install hf_dspark[ray]
    python examples/ray_data.py --target T --draft D --input prompts.jsonl --output answers.jsonl --actors 2

With GPUs, give each actor one: --gpus-per-actor 1. The answers are those of `hf-dspark generate`.
"""

import argparse
import json
from pathlib import Path

import ray

from hf_dspark import DSparkPredictor


def main() -> None:
    args = parse_arguments()
    lines = Path(args.input).read_text(encoding="utf-8").split("\n")
    prompts = [json.loads(line) for line in lines if line.strip()]
    # With `index` a row is sampled alike whichever actor gets it. Columns must be the same in all rows.
    columns = sorted({name for row in prompts for name in row})
    rows = [{"index": index, **{name: row.get(name) for name in columns}} for index, row in enumerate(prompts)]

    ray.init(num_cpus=args.actors + 1)  # on a cluster: ray.init("auto"). The one more reads; without it nothing starts
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    answers = ray.data.from_items(rows).map_batches(
        DSparkPredictor,
        fn_constructor_kwargs={
            "target": args.target,
            "draft": args.draft,
            "dtype": args.dtype,
            "max_new_tokens": args.max_new_tokens,
            "temperature": args.temperature,
        },
        batch_size=args.batch_size,
        compute=ray.data.ActorPoolStrategy(size=args.actors),
        num_cpus=1,
        num_gpus=args.gpus_per_actor,
    )
    carried = ["index", *(name for name in ("id",) if name in columns)]
    answers = answers.select_columns([*carried, "text", "tokens", "finish_reason", "tau", "rounds", "error"])
    with Path(args.output).open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in answers.iter_rows())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Answer a jsonl file with Ray Data.")
    parser.add_argument("--target", required=True, help="folder or Hub name; every actor loads it")
    parser.add_argument("--draft", required=True)
    parser.add_argument("--input", required=True, help="jsonl with `prompt`, `turns` or `messages` in every row")
    parser.add_argument("--output", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--gpus-per-actor", type=float, default=0)
    parser.add_argument("--batch-size", type=int, default=32, help="rows given to an actor at once")
    return parser.parse_args()


if __name__ == "__main__":
    main()
