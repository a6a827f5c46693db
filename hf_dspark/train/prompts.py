"""Training prompts: conversations of user turns, from files, from a data set, or written by the target itself."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A turn stands here while the chat template is asked what it writes around one.
_PLACEHOLDER = "PLACEHOLDER_OF_A_USER_TURN"
_SELF_BATCH = 64
_MAX_TURN_TOKENS = 96


def read_prompts(
    sources: Sequence[str],
    *,
    target: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    exclude: Sequence[str] = (),
) -> list[list[str]]:
    """Conversations (lists of user turns) of all `sources`, without doubles, in the order given.

    Args:
        sources: `self:N` (the target writes N first turns itself; needs `target` and `tokenizer`), a `.jsonl` file
            whose rows have `turns`, a text file with a prompt a line, or the name of a data set for `datasets`, whose
            rows have `turns`, `messages`, `prompt`, `question` or `text`.
        exclude: first turns that must not be trained on, such as those of a benchmark.

    Raises ValueError where a source holds no prompts, and ImportError where `datasets` is needed and missing.
    """
    conversations: dict[str, list[str]] = {}
    forbidden = set(exclude)
    for source in sources:
        found = _read_source(source, target, tokenizer, seed)
        if not found:
            raise ValueError(f"{source!r} holds no prompts: give a file or a data set with at least one.")
        for turns in found:
            if turns[0] not in forbidden:
                conversations.setdefault(turns[0], turns)
    return list(conversations.values())


def self_prompts(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, *, seed: int = 0
) -> list[list[str]]:
    """`count` first user turns sampled from the target after its chat template's user header.

    Temperature 1, top-p 0.95, up to the end of the turn; turns that do not end, and doubles, are left out.
    """
    header, end = _around_user_turn(tokenizer)
    end_ids = tokenizer(end, add_special_tokens=False).input_ids
    ids = tokenizer(header, add_special_tokens=False, return_tensors="pt").input_ids.to(target.device)
    found: dict[str, None] = {}
    for attempt in range(10 * (count // _SELF_BATCH + 1)):
        torch.manual_seed(seed + attempt)
        output = target.generate(
            ids.expand(_SELF_BATCH, -1),
            attention_mask=torch.ones_like(ids).expand(_SELF_BATCH, -1),
            max_new_tokens=_MAX_TURN_TOKENS,
            do_sample=True,
            temperature=1.0,
            top_p=0.95,
            top_k=0,
            eos_token_id=end_ids[0],
            pad_token_id=end_ids[0],
        )
        for row in output[:, ids.shape[1] :].tolist():
            if end_ids[0] in row:
                text = tokenizer.decode(row[: row.index(end_ids[0])], skip_special_tokens=True).strip()
                if len(text.split()) >= 3:
                    found.setdefault(text)
        if len(found) >= count:
            return [[text] for text in list(found)[:count]]
    raise ValueError(
        f"The target wrote only {len(found)} usable user turns of the {count} asked for: its template's user turn "
        f"({header[-40:]!r} ... {end!r}) may be one it was not trained on. Give prompts from a file instead."
    )


def _around_user_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template writes before and after a first user turn."""
    if tokenizer.chat_template is None:
        raise ValueError("`self:N` needs a chat template, and this tokenizer has none. Give prompts from a file.")
    text = tokenizer.apply_chat_template([{"role": "user", "content": _PLACEHOLDER}], tokenize=False)
    header, _, end = text.partition(_PLACEHOLDER)
    return header, end


def _read_source(source: str, target, tokenizer, seed: int) -> list[list[str]]:
    if source.startswith("self:"):
        if target is None or tokenizer is None:
            raise ValueError(f"{source!r} is written by the target: give `target` and `tokenizer`.")
        return self_prompts(target, tokenizer, int(source.removeprefix("self:")), seed=seed)
    path = Path(source)
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        return [turns for row in rows if (turns := _turns(row, source))]
    if path.exists():
        return [[line.strip()] for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    return [turns for row in _load_dataset(source) if (turns := _turns(row, source))]


def _turns(row: dict, source: str) -> list[str]:
    if "turns" in row:
        return list(row["turns"])
    if "messages" in row:
        return [message["content"] for message in row["messages"] if message["role"] == "user"]
    for name in ("prompt", "question", "text"):
        if name in row:
            return [row[name]]
    raise ValueError(
        f"A row of {source!r} has the fields {sorted(row)}, but a prompt is read from "
        "`turns`, `messages`, `prompt`, `question` or `text`."
    )


def _load_dataset(name: str):
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"{name!r} is no file, so it is taken for a data set, which needs: pip install hf-dspark[train]"
        ) from None
    loaded = datasets.load_dataset(name)
    return loaded["train"] if "train" in loaded else next(iter(loaded.values()))


def split_held_out(conversations: list[list[str]], count: int, seed: int) -> tuple[list[list[str]], list[list[str]]]:
    """`conversations` in a seeded order, parted into training and `count` held-out ones."""
    shuffled = list(conversations)
    random.Random(seed).shuffle(shuffled)
    return shuffled[count:], shuffled[:count]
