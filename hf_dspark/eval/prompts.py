"""Prompt files of a benchmark: one JSON object a line, whose `turns` are the user's; the first one is the prompt."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts, and the file they were read from (its name without folders)."""

    file: str
    texts: tuple[str, ...]


def read_prompts(path: str | Path, limit: int | None = None) -> PromptSet:
    """The first turns of a jsonl file, at most `limit` of them. Raises ValueError where a line holds none."""
    path = Path(path)
    with path.open(encoding="utf-8") as lines:  # str.splitlines would also split at separators inside of a prompt
        rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    texts = tuple(_first_turn(line, f"{path.name}, line {number}") for number, line in rows[:limit])
    if not texts:
        raise ValueError(f"{path.name} holds no prompts. Give a jsonl file with an object with `turns` on each line.")
    return PromptSet(path.name, texts)


def encode_prompt(tokenizer, prompt: str, *, as_chat: bool):
    """The prompt as a user's turn, or as it is where the tokenizer has no chat template."""
    if not as_chat or tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True, return_tensors="pt")


def _first_turn(line: str, place: str) -> str:
    try:
        turn = json.loads(line)["turns"][0]
    except (json.JSONDecodeError, KeyError, IndexError, TypeError):
        turn = None
    if not isinstance(turn, str) or not turn:
        raise ValueError(f'{place} has no first turn. A line must be an object such as {{"turns": ["a prompt"]}}.')
    return turn
