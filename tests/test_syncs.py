"""Device synchronisations: the host reads the device once a round, and once more only where it must.

Counted for the whole call behind generate()'s own preparation, whoever reads. The one of top-k sampling is made on a
CPU only, where it is free.
"""

from collections import Counter

import pytest
import torch
from device_work import Reads
from tiny import make_tiny_draft, make_tiny_target, random_prompt
from transformers import StoppingCriteria

from hf_dspark import ConfidenceThreshold, generate


@pytest.fixture
def count_work(monkeypatch):
    """(target, draft) -> reads during speculative decoding, and calls of the two models."""

    def counted(target, draft):
        reads, calls = Reads(), Counter()
        decode = draft.speculative_decode

        def decode_counted(*args, **kwargs):
            with reads:
                return decode(*args, **kwargs)

        for name, model in (("target", target), ("draft", draft)):
            model.register_forward_pre_hook(lambda *_, _name=name: calls.update([_name]))
        monkeypatch.setattr(draft, "speculative_decode", decode_counted)
        return reads.counts, calls

    return counted


class _Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class _Streamer:
    def put(self, value):
        pass

    def end(self):
        pass


# What a round reads besides its decision, and which file reads it: on a target's own cache, and in rows of slots.
COMMON = {"criteria": ("terms", "tolist"), "streamer": ("batch_call", "cpu"), "ties": ("sampling", "tolist")}
READERS = {
    "own cache": COMMON | {"decision": ("generate", "tolist"), "confidences": ("candidate_generator", "tolist")},
    "slots": COMMON
    | {
        "decision": ("batch", "tolist"),
        "confidences": ("batch", "tolist"),
        "once a call": ("batch_call", "tolist"),
    },
}


@pytest.mark.parametrize(("where", "batch_size"), [("own cache", 1), ("slots", 1), ("slots", 8)])
@pytest.mark.parametrize(
    ("kwargs", "second"),
    [
        ({}, None),
        ({"do_sample": True, "top_k": 0}, None),
        ({"do_sample": True, "top_k": 0, "temperature": 0.7, "top_p": 0.9}, None),
        ({"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9}, "ties"),
        ({"repetition_penalty": 1.2, "eos_token_id": [3, 5], "pad_token_id": 0}, None),
        ({"streamer": _Streamer()}, "streamer"),
        ({"schedule": ConfidenceThreshold(0.4)}, "confidences"),
        ({"stopping_criteria": [_Never()]}, "criteria"),
        ({"max_time": 100.0}, "criteria"),
    ],
)
def test_a_round_reads_the_device_once_and_once_more_only_where_it_must(
    count_work, monkeypatch, kwargs, second, where, batch_size
):
    if where == "own cache":
        monkeypatch.setattr(generate, "why_not_in_a_row", lambda *args, **kwargs: "a test")
    target = make_tiny_target("qwen3", seed=0)
    draft = make_tiny_draft(target)
    prompts = torch.cat([random_prompt(64, 9, seed) for seed in range(batch_size)])
    reads, calls = count_work(target, draft)
    torch.manual_seed(0)
    target.generate(prompts, assistant_model=draft, **{"do_sample": False, "max_new_tokens": 20} | kwargs)
    readers = READERS[where]
    expected = Counter({readers["decision"]: calls["target"]})  # the prefill decides a token, too
    if second is not None:  # the schedule is asked only where something was drafted
        expected[readers[second]] += calls["draft" if second == "confidences" else "target"]
    if "once a call" in readers:
        expected[readers["once a call"]] += 1
    assert reads == expected
    assert calls["target"] > 4
