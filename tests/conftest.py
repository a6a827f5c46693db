"""One thread, no network, silent libraries."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported

from tiny import make_tiny_draft, make_tiny_target
from transformers.utils import logging

from hf_dspark import dispatch, slots, traced

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


@pytest.fixture
def kernels_everywhere(monkeypatch):
    """Where there is no GPU, twins run in Triton's interpreter on CPU tensors, which they else leave alone."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        monkeypatch.setattr(dispatch, "_kernel_devices", lambda: frozenset({torch.device("cpu")}))
    dispatch.load_kernels()
    yield
    monkeypatch.undo()
    dispatch.load_kernels()


@pytest.fixture
def read_as_on_cuda(monkeypatch):
    """Rows of slots are read up to where they end, and not whole with masks."""
    for module in (slots, traced):
        monkeypatch.setattr(module, "reads_by_masks", lambda device: False)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU, and there is none")
