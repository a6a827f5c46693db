"""A tiny pair as files: random weights with a tokenizer made on the fly, or the trained pair of ../shared."""

from pathlib import Path
from typing import NamedTuple

import pytest
from tiny import make_tiny_draft, make_tiny_target
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "models"


class Pair(NamedTuple):
    """Folders of a target (its tokenizer included) and of its draft."""

    target: Path
    draft: Path


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte and one at the end that stops: any text, characters of several tokens among it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: index for index, byte in enumerate([*alphabet, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def save_random_pair(folder: Path) -> Pair:
    """Write a random pair with the byte tokenizer."""
    pair = Pair(folder / "target", folder / "draft")
    tokenizer = byte_tokenizer()
    target = make_tiny_target(vocab_size=len(tokenizer) + 1)  # one more for the draft's mask
    target.save_pretrained(pair.target)
    tokenizer.save_pretrained(pair.target)
    make_tiny_draft(target).save_pretrained(pair.draft)
    return pair


def trained_pair() -> Pair:
    """The trained pair, whose drafts are accepted; skips the test where it is not there."""
    pair = Pair(SHARED / "tiny_target", SHARED / "tiny_dspark_1L_r64")
    if not all(folder.is_dir() for folder in pair):
        pytest.skip("the trained tiny pair is not there: no ../shared/models beside the repository")
    return pair
