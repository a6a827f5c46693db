"""Train the tiny pair of the tests from nothing: a story grammar, a tokenizer, a small Qwen3 target, and its draft.

    python examples/train_tiny_pair.py --output tests/tiny_pair --work WORK

Seven minutes on one CPU core. The grammar stands below, so the pair depends on no other data or model.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    get_cosine_schedule_with_warmup,
)

from hf_dspark.train import TrainConfig, train

NAMES = "Mia Tom Lily Ben Anna Max Zoe Sam Ella Leo Nora Finn Ruby Jack Ivy Otto".split()
ANIMALS = "fox rabbit bear mouse owl hedgehog duck cat dog frog squirrel goat".split()
ADJECTIVES = "little brave shy clever funny sleepy kind curious lonely happy".split()
PLACES = ["in the forest", "by the lake", "near the old mill", "on a green hill", "at the edge of town", "by the sea"]
THINGS = "ball kite boat drum lamp basket blanket mirror whistle map flute ladder".split()
COLOURS = "red blue green yellow golden silver white purple".split()
WEATHER = ["the sun was shining", "it was raining", "the wind was strong", "snow was falling", "the sky was grey"]
FOODS = ["a cake", "some soup", "a bowl of berries", "warm bread", "apple pie", "a jar of honey"]
FEELINGS = {"sad": "happy again", "afraid": "brave", "tired": "full of joy", "angry": "calm", "bored": "excited"}
LESSONS = [
    "that it is good to share",
    "that friends help each other",
    "to ask before taking things",
    "that small ones can do great things",
    "to be patient",
    "never to give up",
]


def story(rng: random.Random) -> str:
    """One story: its hero, friend and thing stay the same from beginning to end."""
    pick = rng.choice
    hero, friend = rng.sample(NAMES, 2)
    kind, other_kind = rng.sample(ANIMALS, 2)
    he, him, his = pick([("he", "him", "his"), ("she", "her", "her")])
    thing, colour, place = pick(THINGS), pick(COLOURS), pick(PLACES)
    feeling = pick(list(FEELINGS))
    beginning = pick(
        [
            f"Once upon a time there was a {pick(ADJECTIVES)} {kind} named {hero}.",
            f"{hero} was a {pick(ADJECTIVES)} {kind} who lived {place}.",
            f"There once lived a {pick(ADJECTIVES)} {kind} called {hero}.",
        ]
    )
    wish = pick(
        [
            f"{hero} had a {colour} {thing} and loved it very much.",
            f"{hero} wanted a {colour} {thing} more than anything.",
            f"Every day {hero} played with {his} {colour} {thing}.",
        ]
    )
    trouble = pick(
        [
            f"One day {pick(WEATHER)}, and the {thing} was gone.",
            f"One morning {hero} went for a walk {place} and lost the {thing}.",
            f"But one day the {colour} {thing} broke.",
        ]
    )
    meeting = pick(
        [
            f'{hero} was {feeling}. "What is wrong?" asked {friend} the {other_kind}.',
            f'{hero} felt {feeling}. Then {friend} the {other_kind} came by and said, "I will help you."',
            f"{hero} was so {feeling} that {he} sat down and cried. {friend} the {other_kind} heard {him}.",
        ]
    )
    help_ = pick(
        [
            f"Together they looked for the {thing} {place}.",
            f'"We can look for it together," said {friend}. So they walked and walked.',
            f"{friend} had an idea. They shared {pick(FOODS)} and made a plan.",
        ]
    )
    end = pick(
        [
            f"At last they found the {colour} {thing}, and {hero} was {FEELINGS[feeling]}.",
            f"In the end {friend} gave {hero} a new {thing}, and {hero} was {FEELINGS[feeling]}.",
            f"Soon the {thing} was back, and {hero} was {FEELINGS[feeling]}.",
        ]
    )
    lesson = pick(
        ["", f" From that day on {hero} and {friend} were best friends.", f" {hero} learned {pick(LESSONS)}."]
    )
    return " ".join([beginning, wish, trouble, meeting, help_, end]) + lesson


def prompt_of(text: str) -> str:
    """The beginning of a story, as the prompt of a draft's training text or of a benchmark."""
    words = text.split()
    return " ".join(words[: 4 + len(text) % 9])


def build_tokenizer(stories: list[str], folder: Path, vocab_size: int = 768) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|mask|>"]
    alphabet = sorted({character for text in stories for character in text} | {"Ġ"})
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(stories, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", mask_token="<|mask|>"
    )
    wrapped.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def train_target(stories: list[str], tokenizer, folder: Path, *, steps: int, batch_size: int = 24) -> None:
    """Next-token training on whole stories, each followed by the end token."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    target = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(target.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    encoded = [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in stories]
    rng = random.Random(1)
    with tqdm(total=steps, desc="target") as bar:
        for _ in range(steps):
            rows = [torch.tensor(row) for row in rng.sample(encoded, batch_size)]
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.eos_token_id)
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            with torch.autocast("cpu", torch.bfloat16):
                loss = target(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
            loss.backward()
            nn.utils.clip_grad_norm_(target.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    target.generation_config.eos_token_id = target.generation_config.pad_token_id = tokenizer.eos_token_id
    target.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for what only the training needs")
    parser.add_argument("--target-steps", type=int, default=800)
    parser.add_argument("--draft-steps", type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = random.Random(0)
    stories = [story(rng) for _ in range(20000)]
    args.work.mkdir(parents=True, exist_ok=True)
    for name, texts in {"held_out": stories[:200], "prompts": stories[200:2200]}.items():
        lines = "".join(json.dumps({"turns": [prompt_of(text)]}) + "\n" for text in texts)
        (args.work / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    target_folder = args.output / "target"
    if not (target_folder / "model.safetensors").exists():
        train_target(stories[200:], build_tokenizer(stories, target_folder), target_folder, steps=args.target_steps)
    draft = train(
        TrainConfig(
            target=str(target_folder),
            prompts=[str(args.work / "prompts.jsonl")],
            exclude=[str(args.work / "held_out.jsonl")],
            output=str(args.work / "draft"),
            steps=args.draft_steps,
            layers=1,
            learning_rate=2e-3,
            num_anchors=32,
            max_new_tokens=160,
            answer_batch_size=128,
            chat_template=False,
            generation={"do_sample": True},
        )
    )
    (args.output / "draft").mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (args.output / "draft" / name).write_bytes((draft / name).read_bytes())


if __name__ == "__main__":
    main()
