"""`hf-dspark train`: the command line of `train()`; a flag for every field of TrainConfig."""

import argparse
import json

from .train.config import TRAINABLE, TrainConfig


def add_commands(commands) -> None:
    """Register `train`."""
    parser = commands.add_parser(
        "train",
        help="a draft for any decoder, from text the target writes itself",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = {field: value for field, value in TrainConfig.__dataclass_fields__.items()}
    add = parser.add_argument

    def option(name: str, meaning: str, **kwargs) -> None:
        add(f"--{name.replace('_', '-')}", default=default[name].default, help=meaning, **kwargs)

    add("--target", required=True, help="name or folder of the target")
    add(
        "--prompts",
        required=True,
        nargs="+",
        help="jsonl with `turns`, text with a prompt a line, a data set, or self:N (the target writes N itself)",
    )
    add("--output", required=True, help="folder for the draft and for all that a resumed run needs")
    add("--exclude", nargs="*", default=[], help="prompt files that must not be trained on, such as a benchmark's")
    option("steps", "optimizer steps", type=int)
    option("batch_size", "sequences in a step, over all processes", type=int)
    option("micro_batch_size", "sequences of a process in one forward; a GPU idles with less than about 8", type=int)
    option("layers", "decoder layers of the draft", type=int)
    option("block_size", "tokens drafted at once", type=int)
    option("markov_rank", "rank of the sequential head; 0 is a draft without one", type=int)
    option("head", "sequential head", choices=("vanilla", "gated", "rnn"))
    add("--taps", type=int, nargs="+", help="target layers the draft reads; default: five, spread evenly")
    option("mask_token_id", "token of the block's masks; default: one that text does not use", type=int)
    add("--no-confidence", dest="confidence", action="store_false", help="no confidence head")
    option(
        "draft_vocab_size",
        "the draft proposes only so many tokens, the answers' most frequent; default: all",
        type=int,
    )
    option("warm_start", "draft to start from; its shape is kept")
    option("trainable", "what of it is trained", choices=TRAINABLE)
    option("optimizer", "muon for the matrices and AdamW for the rest, or AdamW alone", choices=("muon", "adamw"))
    option("learning_rate", "peak of the cosine; default: 4e-3 with muon, 6e-4 with adamw", type=float)
    option("warmup_ratio", "share of the steps with a rising rate", type=float)
    option("max_grad_norm", "gradients are clipped to it", type=float)
    option("num_anchors", "blocks trained in each sequence of a step", type=int)
    option("position_decay", "d of the weights exp(-(k-1)/d)", type=float)
    option("chunk_rows", "block positions whose logits exist at once", type=int)
    option("max_new_tokens", "of an answer", type=int)
    option("max_length", "of a sequence", type=int)
    option("answers_per_prompt", "answers written to each prompt", type=int)
    option("answer_batch_size", "answers written at once", type=int)
    add(
        "--generation",
        type=json.loads,
        default={},
        metavar="JSON",
        help='overrides of the target\'s generation config for the answers, such as {"do_sample": true}',
    )
    add("--no-chat-template", dest="chat_template", action="store_false", help="base models: prompts as they are")
    option("held_out", "conversations kept for the evaluation", type=int)
    option("eval_every", "steps", type=int)
    option("save_every", "steps", type=int)
    add("--feature-cache", action="store_true", help="keep the target's states on disk")
    add("--gradient-checkpointing", action="store_true", help="of the draft")
    option("mixed_precision", "of the draft's forward", choices=("no", "bf16", "fp16"))
    option("dtype", "of the target", choices=("auto", "bfloat16", "float16", "float32"))
    option("tracker", "one of accelerate's trackers, such as tensorboard")
    option("seed", "of prompts, answers, order, anchors and first weights", type=int)
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> None:
    from .train.trainer import train

    config = TrainConfig(**{name: getattr(args, name) for name in TrainConfig.__dataclass_fields__})
    print(f"The draft is in {train(config)}")
