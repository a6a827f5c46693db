"""Prompts of different lengths that go through one generate() call, and what plain generate() says of them."""

import functools
from dataclasses import dataclass

import torch
from tiny import QUALITIES, WINDOW, ScriptedRows, left_padded, make_tiny_draft, make_tiny_target, random_prompt
from transformers import PreTrainedModel

NEW_TOKENS = 2 * WINDOW + 6
LENGTHS = (5, 9, 2)
MANY = (5, 13, 2, 1, 9, 9, 4, 17, 3, 8, 6, 11, 7, 2, 10, 5)
AHEAD = 8  # tokens that scripts go on behind an output's end


@dataclass(frozen=True, eq=False)
class Rows:
    """A target, prompts of `lengths`, and what plain generate() says of them."""

    target: PreTrainedModel
    lengths: tuple[int, ...]
    prompts: dict[str, torch.Tensor]
    said: torch.Tensor  # [B, n]  without a stop, and AHEAD tokens longer than outputs

    def draft(self, quality: str | list[float] = "noisy", **fields) -> ScriptedRows:
        draft = make_tiny_draft(self.target, seed=2, draft_class=ScriptedRows, **fields)
        rates = QUALITIES[quality] if isinstance(quality, str) else quality
        return draft if rates is None else draft.follow_rows(self.unpadded(self.said), rates, seed=2)

    def unpadded(self, sequences: torch.Tensor) -> list[list[int]]:
        return [s[max(self.lengths) - n :].tolist() for s, n in zip(sequences, self.lengths, strict=True)]

    def plain(self, **kwargs):
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        return self.target.generate(**(self.prompts | settings | kwargs))

    def speculate(self, draft, **kwargs):
        return self.plain(assistant_model=draft, return_dict_in_generate=True, **kwargs)

    def new_token(self, row: int, count: int) -> int:
        """The `count`-th new token of a row."""
        return int(self.said[row, max(self.lengths) + count])


@functools.cache
def make_rows(kind="qwen3", lengths=LENGTHS, *, seed=1, attention=None, vocab_size=64, **fields) -> Rows:
    return rows_of_target(make_tiny_target(kind, seed, vocab_size, attention=attention, **fields), lengths, seed=seed)


def rows_of_target(target: PreTrainedModel, lengths: tuple[int, ...] = LENGTHS, *, seed: int = 1) -> Rows:
    vocab_size = target.config.vocab_size
    prompts = left_padded([random_prompt(vocab_size, n, seed=10 * seed + i)[0] for i, n in enumerate(lengths)])
    said = target.generate(**prompts, max_new_tokens=NEW_TOKENS + AHEAD, do_sample=False, pad_token_id=0)
    return Rows(target, lengths, prompts, said)


def rounds_of(output, row: int) -> list[int]:
    """Tokens that each round of a row emitted."""
    return [r.accepted_length for r in output.rounds if r.row == row]


def new_tokens_of(output, eos: list[int], prompt_length: int) -> list[list[int]]:
    """The new tokens of each row, up to its first stop token."""
    new = output[:, prompt_length:].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in eos), len(row))] for row in new]


def assert_as_scripted(rows: Rows, draft: ScriptedRows, output, eos: list[int] = ()):
    """Each row's rounds emit what its script lets them, and nothing behind its end."""
    ends = new_tokens_of(output.sequences, eos, max(rows.lengths))
    for row, (new, length) in enumerate(zip(ends, rows.lengths, strict=True)):
        prompt = rows.unpadded(rows.said)[row][:length]
        assert rounds_of(output, row) == draft.scripted_rounds(prompt + new, length)
    assert draft.last_stats.tokens == sum(map(len, ends))


def assert_equal_to_plain(rows: Rows, quality: str):
    """All rows say what plain generate() says, in rounds that are as good as the draft."""
    draft = rows.draft(quality)
    output = rows.speculate(draft)
    assert output.sequences.tolist() == rows.said[:, :-AHEAD].tolist()
    if QUALITIES[quality] is not None:
        assert_as_scripted(rows, draft, output)
