"""One thread, no network, silent libraries."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tiny import make_tiny_draft, make_tiny_target
from transformers.utils import logging

torch.set_num_threads(1)
logging.set_verbosity_error()


@pytest.fixture(scope="session")
def target():
    """A small Qwen3 target with full attention."""
    return make_tiny_target("qwen3", seed=0)


@pytest.fixture(scope="session")
def sliding_target():
    """A small Gemma3 target with sliding and full layers."""
    return make_tiny_target("gemma3_text", seed=0)


@pytest.fixture
def draft(target):
    """A random draft of `target`."""
    return make_tiny_draft(target)


@pytest.fixture(autouse=True)
def _warnings_are_said_again():
    """What is said once in a process is said once in each test."""
    logging.warning_once.cache_clear()
