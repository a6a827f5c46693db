"""compile_round(): rounds of fixed shapes. The compiler's back end is left out: what is traced, and how often."""

import pytest
import torch
from tiny import make_tiny_draft, make_tiny_target, plain, random_prompt
from torch._dynamo.utils import counters
from transformers import DynamicCache

from hf_dspark import ConfidenceThreshold
from hf_dspark.compat import CACHE

VOCAB = 6  # so small that a random draft is right now and then


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def pair():
    return _pair("qwen3")


def _pair(kind, **fields):
    target = make_tiny_target(kind, seed=1, vocab_size=VOCAB)
    draft = make_tiny_draft(target, seed=1, **fields)
    draft.compile_round(target, backend="eager")
    return target, draft


def _rows(length, count, seed=0):
    return torch.cat([random_prompt(VOCAB, length, seed=seed + i) for i in range(count)])


def _speculate(target, draft, ids, **kwargs):
    settings = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True} | kwargs
    return target.generate(ids, assistant_model=draft, **settings)


def test_nothing_is_compiled_again_over_prompts_of_fifty_lengths(pair):
    target, draft = pair
    accepted = []
    for length in range(1, 51):
        prompt = random_prompt(VOCAB, length, seed=length)
        output = _speculate(target, draft, prompt, max_new_tokens=20)
        assert output.sequences.tolist() == plain(target, prompt, max_new_tokens=20).tolist()
        accepted += [round.num_accepted for round in output.rounds]
    assert counters["stats"]["unique_graphs"] == 2  # the target's and the draft's
    assert not counters["recompiles"]
    assert {0, 1, 2} <= set(accepted)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gemma4_text", "gpt_oss", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("rows", [1, 3])
def test_compiled_rounds_say_what_plain_generate_says(kind, rows):
    target, draft = _pair(kind)
    ids = _rows(12, rows)
    expected = plain(target, ids, max_new_tokens=24, pad_token_id=0)
    assert _speculate(target, draft, ids, max_new_tokens=24).sequences.tolist() == expected.tolist()


def test_rows_that_end_keep_their_place_and_say_nothing_more(pair):
    target, draft = pair
    ids = _rows(5, 6)
    for eos in range(VOCAB):
        settings = {"max_new_tokens": 30, "eos_token_id": eos, "pad_token_id": 0}
        expected = plain(target, ids, **settings)
        answers = [row[: row.index(eos) + 1] if eos in row else row for row in expected[:, 5:].tolist()]
        if len(set(map(len, answers))) > 2:  # they end at different rounds
            break
    output = _speculate(target, draft, ids, **settings)
    assert output.sequences.tolist() == expected.tolist()
    assert len(set(map(len, answers))) > 2
    for row, tokens in enumerate(answers):
        emitted = [token for round in output.rounds if round.row == row for token in round.emitted]
        assert emitted == tokens[1:]
    assert counters["stats"]["unique_graphs"] == 2


def test_schedules_do_not_change_the_shapes(pair):
    target, draft = pair
    for threshold in (0.2, 0.5, 0.8):
        ids = _rows(6, 2)
        expected = plain(target, ids, max_new_tokens=30, pad_token_id=0)
        output = _speculate(target, draft, ids, max_new_tokens=30, schedule=ConfidenceThreshold(threshold))
        assert output.sequences.tolist() == expected.tolist()
        assert len({round.verify_length for round in output.rounds}) > 1
    assert counters["stats"]["unique_graphs"] == 2


def test_next_turn_goes_on_where_the_draft_was(pair):
    target, draft = pair
    settings = {"max_new_tokens": 12, "return_dict_in_generate": True}
    ids, cache, own = _rows(6, 1), DynamicCache(config=target.config), DynamicCache(config=target.config)
    for turn in range(3):
        expected = plain(target, ids, **{CACHE: own}, **settings)
        seen = []
        handle = draft.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].shape[1]))
        output = _speculate(target, draft, ids, **{CACHE: cache}, **settings)
        handle.remove()
        assert output.sequences.tolist() == expected.sequences.tolist()
        assert cache.get_seq_length() == own.get_seq_length()
        if turn:  # it reads what is new, and at the end a round's tokens and the last one
            assert max(seen, default=0) <= draft.config.block_size + 2
        ids = torch.cat([expected.sequences, _rows(3, 1, seed=turn)], dim=1)


def test_caches_are_the_same_in_memory_in_the_next_call(pair):
    target, draft = pair
    addresses = set()
    for length in (4, 9):
        _speculate(target, draft, _rows(length, 1), max_new_tokens=8)
        (caches,) = draft.compiled_rounds[target]._caches.values()
        addresses.add(tuple(layer.keys.data_ptr() for cache in caches for layer in cache.layers))
    assert len(addresses) == 1


def test_number_of_slots_is_rounded_up_by_an_eighth_at_most(pair):
    compiled = pair[1].compiled_rounds[pair[0]]
    for needed in range(1, 9000, 7):
        slots = compiled.num_slots(needed)
        assert needed <= slots <= max(256, needed * 9 / 8 + 256)
    assert len({compiled.num_slots(needed) for needed in range(2049, 4097)}) == 8


def test_target_that_cannot_be_compiled_is_refused_by_name():
    target = make_tiny_target("lfm2")
    with pytest.raises(ValueError, match="layers of the types"):
        make_tiny_draft(target).compile_round(target)
