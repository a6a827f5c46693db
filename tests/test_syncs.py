"""Device synchronisations: our code reads the device once a round, and once more only where it must.

Counted as reads of tensor values by our own files. The one of top-k sampling is made on a CPU only, where it is free.
"""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny import make_tiny_draft, make_tiny_target, random_prompt
from transformers import StoppingCriteria

from hf_dspark import ConfidenceThreshold

PACKAGE = str(Path(__file__).resolve().parents[1] / "hf_dspark")
READS = ("tolist", "item", "cpu", "__bool__", "__int__", "__float__", "nonzero", "numpy")


@pytest.fixture
def count_reads(monkeypatch):
    """Reads of tensor values that our own files make, in a list of (file, method)."""
    reads = []
    for name in READS:
        original = getattr(torch.Tensor, name)

        def spy(self, *args, _original=original, _name=name, **kwargs):
            caller = sys._getframe(1).f_code
            if caller.co_filename.startswith(PACKAGE):
                reads.append((Path(caller.co_filename).stem, _name))
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    return reads


class _Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class _Streamer:
    def put(self, value):
        pass

    def end(self):
        pass


@pytest.mark.parametrize(
    ("kwargs", "second_read"),
    [
        ({}, None),
        ({"do_sample": True, "top_k": 0}, None),
        ({"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9}, ("sampling", "tolist")),
        ({"repetition_penalty": 1.2, "eos_token_id": [3, 5]}, None),
        ({"streamer": _Streamer()}, ("generate", "cpu")),
        ({"schedule": ConfidenceThreshold(0.4)}, ("candidate_generator", "tolist")),
        ({"stopping_criteria": [_Never()]}, ("generate", "tolist")),
        ({"max_time": 100.0}, ("generate", "tolist")),
    ],
)
def test_a_round_reads_the_device_once_and_once_more_only_where_it_must(count_reads, kwargs, second_read):
    target = make_tiny_target("qwen3", seed=0)
    draft = make_tiny_draft(target)
    arguments = {"do_sample": False, "return_dict_in_generate": True, "max_new_tokens": 20} | kwargs
    output = target.generate(random_prompt(64, 9), assistant_model=draft, **arguments)
    reads = Counter(count_reads)
    rounds = len(output.rounds) + 1  # the prefill decides a token, too
    drafting = sum(bool(r.drafted) for r in output.rounds)
    expected = Counter({("generate", "tolist"): rounds})
    if second_read is not None:  # the schedule is asked only where something was drafted
        expected[second_read] += drafting if second_read[0] == "candidate_generator" else rounds
    assert reads == expected
