"""Verification without padding: the target reads the tokens that count, and says what it says of padded rows."""

import functools

import pytest
import torch
from tiny import KINDS, make_tiny_draft, make_tiny_target, random_prompt
from tiny_batch import AHEAD, MANY, make_rows
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dspark import CostTable, FixedLength, ThroughputSchedule
from hf_dspark.batch import RowBatch
from hf_dspark.draft import draft_block
from hf_dspark.packing import Packing
from hf_dspark.schedule import DraftGate, Schedule

PADDED = {"lfm2", "gpt_oss", "gemma2"}  # not decoded in batches, or not by block attention


class Staggered(Schedule):
    """Row r verifies r tokens more than row 0, and begins again behind a whole block."""

    __slots__ = ()
    num_tokens, needs_confidence = None, True

    def __call__(self, confidence):
        return torch.arange(len(confidence), device=confidence.device) % (confidence.shape[1] + 1)


@pytest.fixture
def rounds_of(monkeypatch):
    """Collects the verify lengths of each round, and the shape of what the target reads in it."""

    def collect(target):
        rounds, forward, verify = [], target.forward, RowBatch.verify

        @functools.wraps(forward)
        def read(*args, **kwargs):
            if rounds and len(rounds[-1]) == 1:
                rounds[-1].append(tuple(kwargs["input_ids"].shape))
            return forward(*args, **kwargs)

        def kept(self, *args, **kwargs):
            rounds.append([list(self._lengths)])
            return verify(self, *args, **kwargs)

        monkeypatch.setattr(target, "forward", read)
        monkeypatch.setattr(RowBatch, "verify", kept)
        return rounds

    return collect  # behind the rounds comes a forward that fills the cache which is returned


def test_packing_is_the_rows_one_after_another():
    lengths = [2, 1, 4]
    packing = Packing.of_lengths(lengths, torch.device("cpu"))
    rows = torch.randn(3, 4, 2, 5)
    packed = packing.pack(rows)
    assert torch.equal(packed, torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)]).unsqueeze(0))
    unpacked = packing.unpack(packed)
    assert unpacked.shape == rows.shape
    for row, own, n in zip(rows, unpacked, lengths, strict=True):
        assert torch.equal(own[:n], row[:n])


@pytest.mark.core
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in PADDED])
def test_the_target_reads_only_what_is_verified_and_says_the_same(kind, rounds_of):
    rows = make_rows(kind, MANY)
    draft = rows.draft("near-perfect")
    rounds = rounds_of(rows.target)
    output = rows.speculate(draft, schedule=Staggered())
    assert output.sequences.tolist() == rows.said[:, :-AHEAD].tolist()
    for lengths, shape in rounds[:-1]:
        is_ragged = len(set(lengths)) > 1
        assert shape == ((1, sum(lengths) + len(lengths)) if is_ragged else (len(lengths), lengths[0] + 1))
    assert sum(shape[0] == 1 for _, shape in rounds) > len(rounds) / 2
    assert max(r.num_accepted for r in output.rounds) == draft.config.block_size


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "deepseek_v3"])
def test_packed_rows_have_the_logits_and_features_of_padded_ones(kind, monkeypatch):
    seen = {}
    for is_packed in (True, False):
        monkeypatch.setattr(RowBatch, "_can_pack", lambda self, is_packed=is_packed: is_packed)
        rows, verify, taken = make_rows(kind, MANY[:5]), RowBatch.verify, []

        def kept(self, *args, verify=verify, taken=taken, **kwargs):
            logits, outputs = verify(self, *args, **kwargs)
            taken += [logits[i, : n + 1].clone() for i, n in enumerate(self._lengths)]
            return logits, outputs

        with monkeypatch.context() as patch:
            patch.setattr(RowBatch, "verify", kept)
            # Where the table lets no drafted token be free, padded rows would verify other numbers: these are fixed.
            rows.speculate(rows.draft("noisy"), schedule=_Same())
        seen[is_packed] = taken
    assert len(seen[True]) == len(seen[False]) > 20
    for packed, padded in zip(seen[True], seen[False], strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-5)


class _Same(Staggered):
    __slots__ = ()

    def padded(self, confidence):
        return self(confidence)


@pytest.mark.parametrize(
    ("attention", "schedule"), [("eager", Staggered()), (None, FixedLength(2))], ids=["eager", "fixed"]
)
def test_rows_are_padded_where_attention_is_not_ours_or_all_verify_alike(attention, schedule, rounds_of):
    rows = make_rows("qwen3", MANY, attention=attention)
    rounds = rounds_of(rows.target)
    assert rows.speculate(rows.draft(), schedule=schedule).sequences.tolist() == rows.said[:, :-AHEAD].tolist()
    assert any(len(set(lengths)) > 1 for lengths, _ in rounds) == (attention == "eager")
    assert all(shape == (len(lengths), max(lengths) + 1) for lengths, shape in rounds[:-1])


def test_throughput_counts_single_tokens_where_rows_are_packed(rounds_of):
    """From a token for each row on, one more pays where it is accepted in about half of all cases."""
    table = CostTable([1, 16, 48], [1.0, 1.0, 0.5], 256)
    rows = make_rows("qwen3", MANY)
    rounds = rounds_of(rows.target)
    schedules = {packed: ThroughputSchedule(table, packed=packed, gate=_Open(table)) for packed in (True, False)}
    for packed, schedule in schedules.items():
        rounds.clear()
        output = rows.speculate(rows.draft("noisy"), schedule=schedule)
        assert output.sequences.tolist() == rows.said[:, :-AHEAD].tolist()
        assert any(len(set(lengths)) > 1 for lengths, _ in rounds) == packed


class _Open(DraftGate):
    def should_draft(self):
        return True


class _Products(TorchDispatchMode):
    """Shapes of the right-hand sides of matrix products of batches."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default:
            self.shapes.append(tuple(args[1].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("first_slot", [0, 1])
def test_lm_head_is_not_copied_for_every_row_of_a_shorter_block(first_slot):
    target = make_tiny_target("qwen3", seed=1, vocab_size=64)
    draft = make_tiny_draft(target, seed=1, first_slot=first_slot)
    draft.bind_target(target)
    ids = torch.cat([random_prompt(64, 4, seed=i) for i in range(3)])
    features = torch.randn(3, 4, len(draft.config.target_layer_ids) * target.config.hidden_size)
    with torch.no_grad(), _Products() as products:
        draft_block(draft, features, ids[:, -1], draft.new_cache(), num_tokens=2)
    assert not [shape for shape in products.shapes if shape[-1] == 64]
