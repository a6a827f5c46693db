"""compile_round(): rounds of fixed shapes. The compiler's back end is left out: what is traced, and how often."""

import pytest
import torch
from device_work import Launches, Reads
from tiny import make_tiny_draft, make_tiny_target, plain, random_prompt
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import _disable_current_modes
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteria
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hf_dspark import ConfidenceThreshold, FixedLength, sampling
from hf_dspark.compat import CACHE
from hf_dspark.sampling import SamplingRule
from hf_dspark.warpers import Warpers

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
    for length in [*range(1, 51), 236 - draft.config.num_block_inputs]:  # with the last, every slot is used
        prompt = random_prompt(VOCAB, length, seed=length)
        output = _speculate(target, draft, prompt, max_new_tokens=20)
        assert output.sequences.tolist() == plain(target, prompt, max_new_tokens=20).tolist()
        accepted += [round.num_accepted for round in output.rounds]
    assert counters["stats"]["unique_graphs"] == 2  # the draft's side, and the target's
    assert draft.last_stats.kernels["compiled round"] == "whole"
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
        assert all(round.num_accepted <= round.verify_length for round in output.rounds)
    assert counters["stats"]["unique_graphs"] == 2


def test_next_turn_goes_on_where_the_draft_was(pair, monkeypatch):
    from hf_dspark.batch_draft import BatchDraft

    target, draft = pair
    settings = {"max_new_tokens": 12, "return_dict_in_generate": True}
    ids, cache, own = _rows(6, 1), DynamicCache(config=target.config), DynamicCache(config=target.config)
    seen, read = [], BatchDraft._read

    def watched(self, features, *args):
        seen.append(features.shape[1])
        read(self, features, *args)

    monkeypatch.setattr(BatchDraft, "_read", watched)
    for turn in range(3):
        expected = plain(target, ids, **{CACHE: own}, **settings)
        seen.clear()
        output = _speculate(target, draft, ids, **{CACHE: cache}, **settings)
        assert output.sequences.tolist() == expected.sequences.tolist()
        assert cache.get_seq_length() == own.get_seq_length()
        assert draft.last_stats.kernels["compiled round"] == "whole"
        if turn:  # it reads what is new, and at the end a round's tokens and the last one
            assert seen
            assert max(seen) <= draft.config.block_size + 2
        ids = torch.cat([expected.sequences, _rows(3, 1, seed=turn)], dim=1)


def test_what_is_written_is_where_it_was_in_memory_in_the_next_call(pair):
    target, draft = pair
    compiled, addresses = draft.compiled_rounds[target], set()
    # The last needs all slots, and its rounds are eager but for the forwards.
    longest = 248 - draft.config.num_block_inputs
    for length, settings in ((4, {}), (9, {}), (longest, {"repetition_penalty": 1.1})):
        _speculate(target, draft, _rows(length, 1), max_new_tokens=8, **settings)
        (caches,), (columns,) = compiled._caches.values(), compiled._columns.values()
        (frame,) = compiled._frames.values()
        states = [layer.keys for cache in caches for layer in cache.layers]
        kept = (*states, columns.ids, columns.lengths, frame.features, frame.slots, frame.ended)
        addresses.add(tuple(tensor.data_ptr() for tensor in kept))
    assert len(addresses) == 1


def test_number_of_slots_is_rounded_up_by_an_eighth_at_most(pair):
    compiled = pair[1].compiled_rounds[pair[0]]
    for needed in range(1, 9000, 7):
        slots = compiled.num_slots(needed)
        assert needed <= slots <= max(256, needed * 9 / 8 + 256)
    assert len({compiled.num_slots(needed) for needed in range(2049, 4097)}) == 8


@pytest.mark.parametrize(
    "fields",
    [
        {"head": "none"},
        {"head": "gated"},
        {"head": "rnn"},
        {"draft_vocab_size": 4},
        {"first_slot": 1},
        {"causal": True},
    ],
    ids=str,
)
def test_every_kind_of_draft_is_captured_whole_and_says_what_plain_generate_says(fields):
    target, draft = _pair("qwen3", **fields)
    ids = _rows(7, 3)
    if "draft_vocab_size" in fields:
        draft.set_draft_tokens(torch.tensor([0, 1, 3, 5]))
    expected = plain(target, ids, max_new_tokens=24, pad_token_id=0)
    assert _speculate(target, draft, ids, max_new_tokens=24).sequences.tolist() == expected.tolist()
    assert draft.last_stats.kernels["compiled round"] == "whole"
    assert counters["stats"]["unique_graphs"] == 2


SAMPLED = {
    "temperature": {"temperature": 0.7, "top_k": 0},
    "top-p": {"temperature": 1.3, "top_k": 0, "top_p": 0.8},
    "top-k": {"top_k": 3},
    "all": {"temperature": 0.6, "top_k": 4, "top_p": 0.7},
}


@pytest.mark.parametrize(
    ("name", "rows"), [("temperature", 1), ("temperature", 3), ("top-p", 3), ("top-k", 1), ("all", 3)]
)
def test_whole_rounds_draw_the_tokens_that_eager_rounds_draw(name, rows, monkeypatch):
    monkeypatch.setattr(sampling, "_top_k_warper", lambda settings: None)  # as on a GPU
    target, draft = _pair("qwen3")
    eager, ids, accepted = make_tiny_draft(target, seed=1), _rows(5, rows), set()
    settings = {"do_sample": True, "max_new_tokens": 50, **SAMPLED[name]}
    for seed in range(6):
        said = []
        for model in (draft, eager):
            torch.manual_seed(seed)
            output = _speculate(target, model, ids, **settings)
            # Nine rounds of at most five tokens: behind them eager rounds may be of other shapes.
            said.append([[r.emitted for r in output.rounds if r.row == row][:9] for row in range(rows)])
            accepted |= {r.num_accepted for r in output.rounds}
        assert said[0] == said[1]
    assert draft.last_stats.kernels["compiled round"] == "whole"
    assert {0, 1, 2} <= accepted


def test_warpers_are_transformers_processors():
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(40, 12, generator=generator)).round() / 2  # with ties
    order = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
    settings = [(t, k, p) for t in (None, 0.6, 1.7) for k in (None, 1, 4, 99) for p in (None, 0.0, 0.3, 0.9)]
    for values in settings:
        processors = LogitsProcessorList(cls(v) for cls, v in zip(order, values, strict=True) if v is not None)
        rule = SamplingRule(processors, do_sample=True)
        expected = processors(None, logits.clone()).softmax(-1)
        assert torch.equal(rule.warpers(logits.device)(logits), expected), values


def _wide_scores(generator, step, dtype):
    """Scores [20, 300] with ties where they are rounded, and tokens that are ruled out."""
    logits = 4 * torch.randn(20, 300, generator=generator)
    logits = logits if step is None else (logits / step).round() * step
    logits[:10, 100:] = -torch.inf
    return logits.to(dtype).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [None, 0.02, 0.5])
def test_warpers_leave_out_the_ties_that_a_stable_sort_leaves_out(step, dtype, monkeypatch):
    """torch's sort of a large vocabulary is stable on CUDA, and need not be on a CPU."""
    generator = torch.Generator().manual_seed(0)
    sort = torch.sort
    monkeypatch.setattr(torch, "sort", lambda scores, descending: sort(scores, descending=descending, stable=True))
    for top_k in (1, 2, 20, 50, 299, 400):
        for top_p in torch.rand(6, generator=generator).tolist():
            logits = _wide_scores(generator, step, dtype)
            processors = LogitsProcessorList([TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)])
            expected = processors(None, logits.clone()).softmax(-1)
            rule = SamplingRule(processors, do_sample=True)
            assert torch.equal(rule.warpers(logits.device)(logits), expected), (top_k, top_p)


def test_a_top_k_keeps_the_vocabulary_from_being_sorted(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "sort", None)
    logits, temperature, tail = torch.randn(3, 1000), torch.tensor(0.7), torch.tensor(0.1)
    for own_tail in (None, tail):
        law = Warpers(temperature, 20, own_tail)(logits)
        assert 1 < (law > 0).sum() <= 60
    with pytest.raises(TypeError):  # there is no other way without
        Warpers(temperature, None, tail)(logits)


def test_numbers_of_a_sampling_rule_do_not_compile_again(pair):
    target, draft = pair
    for temperature in (0.5, 0.8, 1.0, 1.5):
        for top_p in (0.3, 0.9):
            settings = {"do_sample": True, "top_k": 0, "temperature": temperature, "top_p": top_p}
            _speculate(target, draft, _rows(5, 1), max_new_tokens=12, **settings)
    assert counters["stats"]["unique_graphs"] == 2


class _Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"do_sample": True, "top_k": 3}, "top-k"),  # a CPU looks for ties
        ({"repetition_penalty": 1.3}, "processors"),
        ({"do_sample": True, "top_k": 0, "typical_p": 0.9}, "processors"),
    ],
)
def test_other_rules_have_their_forwards_compiled_alone(pair, settings, reason):
    target, draft = pair
    ids = _rows(6, 2)
    torch.manual_seed(0)
    output = _speculate(target, draft, ids, max_new_tokens=16, **settings)
    assert reason in draft.last_stats.kernels["compiled round"]
    assert counters["stats"]["unique_graphs"] == 2
    if "do_sample" not in settings:
        assert output.sequences.tolist() == plain(target, ids, max_new_tokens=16, **settings).tolist()


def test_rounds_in_step_have_their_forwards_compiled_alone(pair):
    target, draft = pair
    ids = _rows(6, 2)
    output = _speculate(target, draft, ids, max_new_tokens=16, stopping_criteria=[_Never()])
    assert output.sequences.tolist() == plain(target, ids, max_new_tokens=16).tolist()
    assert "compiled round" not in draft.last_stats.kernels


@pytest.fixture
def outside(pair, monkeypatch):
    """(settings) -> operations a round outside of the graphs, and what the host read of a call, without the prompt."""
    target, draft = pair
    compiled = draft.compiled_rounds[target]

    def alone(function):
        def call(*args, **kwargs):
            with _disable_current_modes():
                return function(*args, **kwargs)

        return call

    for name in ("target_forward", "draft_forward", "draft_rows", "verify_rows"):
        monkeypatch.setattr(compiled, name, alone(getattr(compiled, name)))

    def run(num_tokens, settings):
        launches, reads = Launches(), Reads()
        torch.manual_seed(0)
        with launches, reads:
            _speculate(target, draft, _rows(6, 1), max_new_tokens=num_tokens, **settings)
        return sum(launches.counts.values()), reads.counts, draft.last_stats.rounds

    def measured(settings):
        prompt, reads_of_prompt, _ = run(6, settings)
        whole, reads, rounds = run(40, settings)
        return (whole - prompt) / rounds, reads - reads_of_prompt, rounds

    return measured


@pytest.mark.parametrize(
    ("settings", "most"),
    [({}, 4), ({"eos_token_id": 99, "pad_token_id": 0}, 4), ({"do_sample": True, "top_k": 0, "temperature": 0.8}, 8)],
)
def test_little_of_a_round_is_outside_of_its_graphs(outside, settings, most):
    operations, reads, rounds = outside(settings)
    assert operations <= most
    assert set(reads) == {("captured", "tolist")}
    assert 0 < reads["captured", "tolist"] <= rounds


def test_forwards_alone_leave_far_more_of_a_round_outside(outside, monkeypatch):
    from hf_dspark import batch

    monkeypatch.setattr(batch, "why_not_captured", lambda *args: "measured")
    operations, reads, _ = outside({})
    assert operations > 60
    assert set(reads) == {("batch", "tolist")}


def test_more_shapes_are_compiled_than_torch_allows_by_itself(pair):
    target, draft = pair
    for rows in range(1, 4):
        ids = _rows(4, rows)
        with torch._dynamo.config.patch(recompile_limit=1):
            output = _speculate(target, draft, ids, max_new_tokens=5)
        assert output.sequences.tolist() == plain(target, ids, max_new_tokens=5).tolist()


def test_rounds_that_do_not_draft_between_whole_ones_leave_the_answer_as_it_is(pair):
    class EveryOther(FixedLength):
        turn = 0

        def should_draft(self):
            EveryOther.turn += 1
            return EveryOther.turn % 2 > 0

    target, draft = pair
    ids, lengths = _rows(6, 6), set()
    for eos in range(VOCAB):
        settings = {"max_new_tokens": 30, "eos_token_id": eos, "pad_token_id": 0}
        output = _speculate(target, draft, ids, schedule=EveryOther(), **settings)
        assert output.sequences.tolist() == plain(target, ids, **settings).tolist()
        lengths |= {round.verify_length for round in output.rounds}
    assert lengths == {0, 4}


def test_target_that_cannot_be_compiled_is_refused_by_name():
    target = make_tiny_target("lfm2")
    with pytest.raises(ValueError, match="layers of the types"):
        make_tiny_draft(target).compile_round(target)
