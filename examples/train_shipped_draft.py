"""How the shipped draft was trained: the prompts of its split, then `hf_dspark.train.train` (resumable).

    torchrun --nproc-per-node 2 examples/train_shipped_draft.py --eval-data DIR --output DIR

DIR of --eval-data holds gsm8k.jsonl, math500.jsonl, mbpp.jsonl, humaneval.jsonl and mt-bench.jsonl with a prompt a
line (`{"turns": [...]}`); the lines listed in model_cards/smollm2_dspark_split.json are kept out of training and
written to OUTPUT/held_out, for `hf-dspark bench` and `calibrate`. The chat prompts beside that file are the target's
own (`self:700` with the seeds 1000 and 2000, `self:100` with 3000). Reported are the first 50 lines of each set.

    torchrun --nproc-per-node 2 examples/train_shipped_draft.py --eval-data DIR --output DIR2 --warm-start DIR/draft

is the second stage: the first one's answers and a second answer to each prompt, near the greedy one, from the first
stage's draft at a lower rate.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from accelerate import PartialState

from hf_dspark.demo import demo_target_folder, load_demo_target
from hf_dspark.train import TrainConfig, train

CARDS = Path(__file__).parent.parent / "model_cards"


def write_prompts(eval_data: Path, folder: Path) -> None:
    """`folder`/train/*.jsonl and `folder`/held_out/*.jsonl: every set's lines, parted as the split says, and chat."""
    split = json.loads((CARDS / "smollm2_dspark_split.json").read_text(encoding="utf-8"))["held_out_lines"]
    for part in ("train", "held_out"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        chat = (CARDS / f"smollm2_chat_{part}.jsonl").read_text(encoding="utf-8")
        (folder / part / "chat.jsonl").write_text(chat, encoding="utf-8")
    for name, held_out in split.items():
        lines = (eval_data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        parts = {"train": set(range(len(lines))).difference(held_out), "held_out": set(held_out)}
        for part, numbers in parts.items():
            text = "".join(lines[number] + "\n" for number in sorted(numbers))
            (folder / part / f"{name}.jsonl").write_text(text, encoding="utf-8")
    load_demo_target()  # unpacks it, where it is not yet


def take_over_answers(first_stage: Path, folder: Path) -> None:
    """Prompts and answers of the first stage's output; the run goes on writing where they end."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in (first_stage / "prompts.jsonl", *sorted(first_stage.glob("answers.*.jsonl"))):
        if not (folder / file.name).exists():
            shutil.copy(file, folder / file.name)


def config(folder: Path, warm_start: str | None, **given) -> TrainConfig:
    always = {"batch_size": 16, "eval_every": 100, "save_every": 100, "max_new_tokens": 192, "max_length": 640}
    first = {"steps": 1000, "learning_rate": 5e-3, "draft_vocab_size": 12288, "layers": 2}
    second = {"steps": 500, "learning_rate": 3e-3, "warm_start": warm_start, "answers_per_prompt": 2}
    temperature = 0.6 if warm_start is None else 0.3
    on_cpu = {"feature_cache": True}
    on_gpu = {"micro_batch_size": 16, "num_anchors": 192, "chunk_rows": 4096, "answer_batch_size": 512}
    stage = first if warm_start is None else second
    settings = always | stage | (on_gpu if torch.cuda.is_available() else on_cpu) | given
    return TrainConfig(
        target=str(demo_target_folder()),
        prompts=[str(file) for file in sorted((folder / "train").glob("*.jsonl"))],
        exclude=[str(file) for file in sorted((folder / "held_out").glob("*.jsonl"))],
        output=str(folder / "draft"),
        generation={"do_sample": True, "temperature": temperature, "top_k": 0},
        seed=20261125,
        **settings,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval-data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--warm-start")
    for name in ("steps", "layers", "batch_size", "answers_per_prompt"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    eval_data, output, warm_start = (given.pop(name) for name in ("eval_data", "output", "warm_start"))
    torch.set_num_threads(1)
    processes = PartialState(cpu=not torch.cuda.is_available())
    if processes.is_main_process:
        write_prompts(eval_data, output)
        if warm_start:
            take_over_answers(Path(warm_start), output / "draft")
    processes.wait_for_everyone()
    train(config(output, warm_start, **given))


if __name__ == "__main__":
    main()
