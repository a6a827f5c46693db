"""What can raise in the middle of a call, and a conversation of two turns on one cache."""

import torch
from tiny import ScriptedDraft, plain, random_prompt, speculate
from transformers import StoppingCriteria

from hf_dspark.compat import CACHE


class Interrupt(Exception):
    pass


class RaisingStreamer:
    """Raises at its `count`-th token."""

    def __init__(self, count):
        self.left = count + 1  # the prompt comes first

    def put(self, value):
        self.left -= 1
        if self.left < 0:
            raise Interrupt

    def end(self):
        pass


class RaisingCriterion(StoppingCriteria):
    """Raises for the first prefix of `length` tokens."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] == self.length:
            raise Interrupt
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class RaisingDraft(ScriptedDraft):
    """Raises in its `calls_left`-th block, between its layers' cache updates and its logits."""

    calls_left = 3

    def compute_logits(self, hidden_states):
        self.calls_left -= 1
        if self.calls_left == 0:
            raise Interrupt
        return super().compute_logits(hidden_states)


def converse(target, draft, prompt, turns, max_new_tokens):
    """The second answer, with its cache, of two turns that are each "plain" or "speculative"."""
    kwargs = {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True}

    def answer(turn, ids, **more):
        if turn == "plain":
            return plain(target, ids, **kwargs, **more)
        return speculate(target, draft, ids, **kwargs, **more)

    first = answer(turns[0], prompt)
    longer = torch.cat([first.sequences, random_prompt(64, 5, seed=9)], dim=-1)
    return answer(turns[1], longer, **{CACHE: getattr(first, CACHE)})
