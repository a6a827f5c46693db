"""CUDA graphs of rounds, and layers compiled one by one. Here a replay runs the captured function again."""

import threading

import pytest
import torch
from test_compiled import SAMPLED, VOCAB, _Never, _rows, _speculate, fresh_compiler  # noqa: F401
from tiny import make_tiny_draft, make_tiny_target, plain, random_prompt
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_dspark import ConfidenceThreshold, FixedLength, compiled, graphs, layerwise, sampling
from hf_dspark.dispatch import load_kernels
from hf_dspark.graphs import GraphedFunction
from hf_dspark.layerwise import LayerCompiler, part
from hf_dspark.model_state import modules_of


class _Space:
    """A GraphSpace where there is no GPU."""

    def __init__(self, device=None):
        self.device = -1


class _Tape(TorchDispatchMode):
    """A CUDA graph on a CPU: operations on the tensors they were captured with, wherever these are referred to now."""

    def __init__(self):
        super().__init__()
        self._steps = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.Tag.data_dependent_output in function.tags or torch.Tag.dynamic_output_shape in function.tags:
            if function is not torch.ops.aten.index.Tensor:  # by numbers, its shape is known
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self._steps.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        for function, args, kwargs, result in self._steps:
            for own, new in zip(_tensors(result), _tensors(function(*args, **kwargs)), strict=True):
                if own.data_ptr() != new.data_ptr():  # else it wrote in place
                    own.copy_(new)


def _capture(keep):
    """`graphs.capture` without a GPU. A capture computes nothing: what `keep()` gives is as before."""

    def capture(run, space):
        kept = [tensor for tensor in keep()]
        before, tape = [tensor.clone() for tensor in kept], _Tape()
        try:
            with tape:
                result = run()
        finally:
            for tensor, value in zip(kept, before, strict=True):
                tensor.copy_(value)
        return tape, result

    return capture


def _tensors(result):
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def _kept(round):
    """The tensors that graphs write in place."""
    for columns in round._columns.values():
        yield from (columns.ids, columns.lengths, columns.slots, columns.last_slots, columns.shifts)
    for frame in round._frames.values():
        yield from (frame.features, frame.slots, frame.ended)
    for caches in round._caches.values():
        for layer in (layer for cache in caches for layer in cache.layers if layer.is_initialized):
            yield from (layer.keys, layer.values)


@pytest.fixture
def graphed(monkeypatch):
    """(kind of target, fields of the draft) -> a pair whose rounds are graphs, as on CUDA."""
    monkeypatch.setattr(compiled, "is_graphed", lambda *models: True)
    monkeypatch.setattr(compiled, "free_memory", lambda device: 10**12)
    monkeypatch.setattr(compiled, "GraphSpace", _Space)

    def make(kind="qwen3", **fields):
        target = make_tiny_target(kind, seed=1, vocab_size=VOCAB)
        draft = make_tiny_draft(target, seed=1, **fields)
        draft.compile_round(target, backend="eager")
        monkeypatch.setattr(graphs, "capture", _capture(lambda: _kept(draft.compiled_rounds[target])))
        return target, draft

    return make


def _num_graphs(draft, target):
    round = draft.compiled_rounds[target]
    return round.draft_rows.num_graphs, round.verify_rows.num_graphs


@pytest.mark.core
def test_prompts_of_fifty_lengths_take_a_graph_of_each_side(graphed):
    target, draft = graphed()
    accepted = []
    for length in range(1, 51):
        prompt = random_prompt(VOCAB, length, seed=length)
        output = _speculate(target, draft, prompt, max_new_tokens=20)
        assert output.sequences.tolist() == plain(target, prompt, max_new_tokens=20).tolist()
        accepted += [round.num_accepted for round in output.rounds]
    assert _num_graphs(draft, target) == (1, 1)
    # A layer of each model, which all its layers share; three norms, two rotary embeddings, three parts.
    assert counters["stats"]["unique_graphs"] == 10
    assert not counters["graph_break"]
    assert draft.last_stats.kernels["compiled round"] == "whole"
    assert {0, 1, 2} <= set(accepted)


@pytest.mark.core
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gemma4_text", "gpt_oss", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("rows", [1, 3])
def test_graphs_of_rounds_say_what_plain_generate_says(graphed, kind, rows):
    target, draft = graphed(kind)
    for seed in (0, 7):
        ids = _rows(12, rows, seed=seed)
        expected = plain(target, ids, max_new_tokens=24, pad_token_id=0)
        assert _speculate(target, draft, ids, max_new_tokens=24).sequences.tolist() == expected.tolist()
    assert _num_graphs(draft, target) == (1, 1)


KINDS_OF_DRAFT = [{"head": "gated"}, {"head": "rnn"}, {"draft_vocab_size": 4}, {"causal": True}]


@pytest.mark.parametrize("fields", KINDS_OF_DRAFT, ids=str)
def test_every_kind_of_draft_is_a_graph(graphed, fields):
    target, draft = graphed(**fields)
    if "draft_vocab_size" in fields:
        draft.set_draft_tokens(torch.tensor([0, 1, 3, 5]))
    ids = _rows(7, 3)
    expected = plain(target, ids, max_new_tokens=24, pad_token_id=0)
    assert _speculate(target, draft, ids, max_new_tokens=24).sequences.tolist() == expected.tolist()
    assert _num_graphs(draft, target) == (1, 1)


def test_rounds_keep_what_they_emitted(graphed):
    target, draft = graphed()
    output = _speculate(target, draft, _rows(9, 1), max_new_tokens=40)
    emitted = [token for round in output.rounds for token in round.emitted]
    assert emitted == output.sequences[0, 10:].tolist()
    eager = _speculate(target, make_tiny_draft(target, seed=1), _rows(9, 1), max_new_tokens=40)
    drafted = [[round.draft_ids.tolist() for round in rounds][:5] for rounds in (output.rounds, eager.rounds)]
    assert drafted[0] == drafted[1]


def test_rows_that_end_and_other_numbers_of_rows(graphed):
    target, draft = graphed()
    for rows in (6, 2, 6):
        for eos in range(VOCAB):
            settings = {"max_new_tokens": 30, "eos_token_id": eos, "pad_token_id": 0}
            ids = _rows(5, rows)
            output = _speculate(target, draft, ids, **settings)
            assert output.sequences.tolist() == plain(target, ids, **settings).tolist()
    assert _num_graphs(draft, target) == (2, 2)


@pytest.mark.parametrize("name", SAMPLED)
def test_graphs_draw_the_tokens_that_eager_rounds_draw(graphed, monkeypatch, name):
    monkeypatch.setattr(sampling, "_top_k_warper", lambda settings: None)  # as on a GPU
    target, draft = graphed()
    eager, ids = make_tiny_draft(target, seed=1), _rows(5, 2)
    settings = {"do_sample": True, "max_new_tokens": 50, **SAMPLED[name]}
    for seed in range(4):
        said = []
        for model in (draft, eager):
            torch.manual_seed(seed)
            output = _speculate(target, model, ids, **settings)
            said.append([[r.emitted for r in output.rounds if r.row == row][:9] for row in range(2)])
        assert said[0] == said[1]
    assert _num_graphs(draft, target) == (1, 1)


EXTRAS = {"output_logits": True, "output_hidden_states": True}
FORWARDS_ALONE = {
    "processor": {"repetition_penalty": 1.3},
    "criterion": {"stopping_criteria": [_Never()]},
    "extras": EXTRAS,
}


@pytest.mark.parametrize("settings", FORWARDS_ALONE.values(), ids=FORWARDS_ALONE)
def test_forwards_alone_are_graphs_that_others_may_keep_results_of(graphed, settings):
    target, draft = graphed()
    ids = _rows(6, 2)
    output = _speculate(target, draft, ids, max_new_tokens=24, **settings)
    expected = plain(target, ids, max_new_tokens=24, return_dict_in_generate=True, **settings)
    assert output.sequences.tolist() == expected.sequences.tolist()
    for own, other in zip(output.logits or (), expected.logits or (), strict=True):
        torch.testing.assert_close(own, other)
    round = draft.compiled_rounds[target]
    assert _num_graphs(draft, target) == (0, 0)
    # Hidden states that a user asks for, too, are captured by hooks, which no replay calls.
    num_graphs = 0 if "output_hidden_states" in settings else 1
    assert [f.num_graphs for f in (round.target_forward, round.draft_forward)] == [num_graphs, 1]


class _EveryOther(FixedLength):
    turn = 0

    def should_draft(self):
        _EveryOther.turn += 1
        return _EveryOther.turn % 2 > 0


SCHEDULES = {"every other": _EveryOther(), "confidence": ConfidenceThreshold(0.5), "short": FixedLength(2)}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_blocks_drafted_ahead_are_dropped_where_they_do_not_fit(graphed, schedule):
    target, draft = graphed()
    ids, lengths = _rows(6, 6), set()
    for eos in range(VOCAB):
        settings = {"max_new_tokens": 30, "eos_token_id": eos, "pad_token_id": 0}
        output = _speculate(target, draft, ids, schedule=schedule, **settings)
        assert output.sequences.tolist() == plain(target, ids, **settings).tolist()
        lengths |= {round.verify_length for round in output.rounds}
    assert len(lengths) > 1 or lengths == {2}
    assert _num_graphs(draft, target) == (1, 1)


def test_modes_that_make_graphs_themselves_are_refused(graphed):
    target, draft = graphed()
    with pytest.raises(ValueError, match="'reduce-overhead' makes CUDA graphs.*max-autotune-no-cudagraphs"):
        draft.compile_round(target, mode="reduce-overhead")


def _refuse(run, space):
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


def test_what_cannot_be_captured_runs_without_graphs(graphed, monkeypatch):
    target, draft = graphed()

    monkeypatch.setattr(graphs, "capture", _refuse)
    said = []
    monkeypatch.setattr(graphs.logger, "warning_once", said.append)
    ids = _rows(6, 2)
    output = _speculate(target, draft, ids, max_new_tokens=24)
    assert output.sequences.tolist() == plain(target, ids, max_new_tokens=24).tolist()
    assert _num_graphs(draft, target) == (0, 0)
    assert len(said) == 2
    assert all("operation not permitted when stream is capturing" in text and "more" not in text for text in said)


def test_sizes_that_were_used_before_are_given_up_where_memory_is_short(graphed, monkeypatch):
    target, draft = graphed()
    free, held = [10**12], []
    monkeypatch.setattr(compiled, "free_memory", lambda device: free[0])
    for rows in (1, 2, 3, 1):
        ids = _rows(6, rows)
        free[0] = 10**12 if rows < 3 else 0
        for _ in range(2):
            output = _speculate(target, draft, ids, max_new_tokens=16)
            assert output.sequences.tolist() == plain(target, ids, max_new_tokens=16).tolist()
        round = draft.compiled_rounds[target]
        held.append((len(round._caches), len(round._columns), len(round._frames), *_num_graphs(draft, target)))
    assert held == [(1,) * 5, (2,) * 5, (1,) * 5, (2,) * 5]


def test_what_ran_in_graphs_is_told_in_every_call(graphed):
    target, draft = graphed()
    for _ in range(3):
        _speculate(target, draft, _rows(6, 1), max_new_tokens=16)
        assert "packed queries" in draft.last_stats.kernels["block_attention"]
        assert "sample_block" in draft.last_stats.kernels


def test_switch_is_heeded_by_graphs_that_were_captured_before(graphed, kernels_everywhere, monkeypatch):
    target, draft = graphed()
    monkeypatch.setattr(graphs, "capture", _refuse)
    said = []
    for value in ("1", "0", "1"):
        monkeypatch.setenv("HF_DSPARK_KERNELS", value)
        _speculate(target, draft, _rows(6, 1), max_new_tokens=8)
        said.append((draft.last_stats.kernels["sample_block"], draft.compiled_rounds[target]))
    assert [text for text, _ in said] == ["Triton", "not Triton: HF_DSPARK_KERNELS is 0", "Triton"]
    assert len({id(round) for _, round in said}) == 3


def _check_batches(target, draft, *sizes):
    for rows in sizes:
        ids = _rows(6, rows)
        output = _speculate(target, draft, ids, max_new_tokens=16)
        assert output.sequences.tolist() == plain(target, ids, max_new_tokens=16).tolist()


def test_layers_run_by_kernels_are_traced_as_on_cuda(graphed, kernels_everywhere, read_as_on_cuda, monkeypatch):
    target, draft = graphed()
    monkeypatch.setattr(graphs, "capture", _refuse)  # what Triton's interpreter does is on no tape
    load_kernels()
    _check_batches(target, draft, 1, 2)
    assert counters["stats"]["unique_graphs"] == 2 * 10


def test_layers_are_as_they_were_when_they_are_not_being_compiled(graphed):
    target, draft = graphed()
    hooks = [dict(module._forward_hooks) for module in target.modules()]
    compiler = LayerCompiler(target, draft, backend="eager")
    layers = [*target.model.layers, *draft.layers]

    def fail():
        with compiler():
            assert all("forward" in vars(layer) for layer in layers)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not any("forward" in vars(layer) for layer in layers)
    assert [dict(module._forward_hooks) for module in target.modules()] == hooks


def test_no_layer_takes_from_the_number_of_graphs_that_others_may_have(graphed, monkeypatch):
    monkeypatch.setattr(layerwise, "MAX_GRAPHS", 6)  # of three sizes, and of both models' rotary embeddings
    target, draft = graphed()
    monkeypatch.setattr(graphs, "capture", _refuse)  # nothing is compiled on a tape
    _check_batches(target, draft, 1, 2, 3)
    assert counters["stats"]["unique_graphs"] == 3 * 10


def test_parts_are_compiled_where_a_compiler_is_open_and_in_no_other_thread(graphed):
    target, draft = graphed()
    traced = []

    @part
    def double(numbers):
        traced.append(torch.compiler.is_compiling())
        return numbers * 2

    def run():
        assert double(torch.ones(3)).tolist() == [2, 2, 2]

    run()
    with LayerCompiler(target, draft, backend="eager")():
        run()
        other = threading.Thread(target=run)
        other.start()
        other.join()
    run()
    assert traced.count(False) == 3
    assert counters["stats"]["unique_graphs"] == 1


def test_what_is_beside_the_layers_and_has_no_matrix_is_compiled(graphed):
    target, draft = graphed("gemma3_text")
    with LayerCompiler(target, draft, backend="eager")():
        taken = {name for name, module in target.get_decoder().named_children() if "forward" in vars(module)}
        assert taken == {"norm", "rotary_emb"}
        taken = {name for name, module in draft.named_children() if "forward" in vars(module)}
        assert taken == {"norm", "hidden_norm", "rotary_emb"}


def test_modules_are_those_that_torch_lists(graphed):
    models = graphed()
    listed = [module for model in models for module in model.modules()]
    assert sorted(map(id, modules_of(*models))) == sorted(map(id, listed))


def test_hooks_of_others_are_called_in_rounds_that_are_no_graphs(graphed):
    target, draft = graphed()
    ids, settings = _rows(6, 2), {"max_new_tokens": 24}
    before = plain(target, ids, **settings)
    assert _speculate(target, draft, ids, **settings).sequences.tolist() == before.tolist()
    layer = target.model.layers[1]
    handle = layer.register_forward_hook(lambda module, args, output: output + torch.linspace(-1, 1, output.shape[-1]))
    steered = plain(target, ids, **settings)
    assert steered.tolist() != before.tolist()
    for _ in range(2):
        assert _speculate(target, draft, ids, **settings).sequences.tolist() == steered.tolist()
    assert "hooks" in draft.last_stats.kernels["compiled round"]
    handle.remove()
    assert _speculate(target, draft, ids, **settings).sequences.tolist() == before.tolist()
    assert draft.last_stats.kernels["compiled round"] == "whole"


def test_graphs_read_weights_that_were_changed_in_place(graphed):
    target, draft = graphed(draft_vocab_size=4)
    draft.set_draft_tokens(torch.tensor([0, 1, 3, 5]))
    ids, drafted = _rows(6, 2), []
    for _ in range(2):
        expected = plain(target, ids, max_new_tokens=24)
        for model in (draft, make_tiny_draft(target, seed=1, draft_vocab_size=4)):
            model.set_draft_tokens(torch.tensor([0, 1, 3, 5]))
            output = _speculate(target, model, ids, max_new_tokens=24)
            assert output.sequences.tolist() == expected.tolist()
            drafted.append([round.draft_ids.tolist() for round in output.rounds[:4]])
        with torch.no_grad():
            target.lm_head.weight.mul_(-1)
    assert drafted[0] == drafted[1] != drafted[2] == drafted[3]
    assert _num_graphs(draft, target) == (1, 1)


class _Adapter(torch.nn.Module):
    """As adapters do it: a switch on a module that takes another one's place."""

    def __init__(self, base):
        super().__init__()
        self.base, self.is_on = base, True

    def forward(self, states):
        return self.base(states) + (states.roll(1, -1) if self.is_on else 0)


def _move(target):
    head = target.lm_head
    head.weight = torch.nn.Parameter(head.weight.flip(0), requires_grad=False)
    key = target.model.layers[0].self_attn.k_proj  # its weight lies beside the query's
    key.weight.data = key.weight.data.clone()


def _adapt(target):
    attention = target.model.layers[0].self_attn
    attention.o_proj = _Adapter(attention.o_proj)


def _switch(target):
    target.model.layers[0].self_attn.o_proj.is_on = False


def test_graphs_are_captured_again_where_the_model_has_changed(graphed):
    target, draft = graphed()
    ids, settings, seen = _rows(6, 2), {"max_new_tokens": 24}, []
    rounds = [draft.compiled_rounds[target]]
    for change in (lambda target: None, _move, _adapt, _switch):
        change(target)
        expected = plain(target, ids, **settings).tolist()
        for turn in range(2):
            assert _speculate(target, draft, ids, **settings).sequences.tolist() == expected
            if not turn:
                rounds.append(draft.compiled_rounds[target])
        assert draft.compiled_rounds[target] is rounds[-1]
        seen.append(expected)
    assert rounds[0] is rounds[1]
    assert len(set(map(id, rounds))) == 4
    assert all(now != before for now, before in zip(seen[1:], seen, strict=False))


def test_arguments_of_a_kind_share_a_graph_and_are_copied(monkeypatch):
    monkeypatch.setattr(graphs, "capture", _capture(tuple))
    calls = []

    def double(pair, *, by):
        calls.append(by)
        return {"sum": pair["a"] + by * pair["b"]}

    run = GraphedFunction(double, scope=LayerCompiler(), space=_Space())
    results = [run({"a": torch.full((2,), float(i)), "b": torch.ones(2)}, by=2)["sum"] for i in range(5)]
    assert results[0].tolist() == [2, 2]
    assert results[1] is results[4]  # which the last call has written
    assert results[4].tolist() == [6, 6]
    assert run.num_graphs == 1
    first = torch.arange(3.0)
    for _ in range(3):  # another shape, another number
        assert run({"a": first, "b": first}, by=3)["sum"].tolist() == [0, 4, 8]
    assert first.tolist() == [0, 1, 2]
    assert run.num_graphs == 2


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "top_p": 0.9}], ids=["greedy", "sampled"])
def test_cuda_graphs_hold_whole_rounds(settings):
    target = make_tiny_target("qwen3", seed=1, vocab_size=VOCAB).to("cuda")
    draft = make_tiny_draft(target, seed=1).to("cuda")
    draft.compile_round(target)
    for rows in (1, 2):
        for length in (5, 9, 14):
            ids = _rows(length, rows).to("cuda")
            output = _speculate(target, draft, ids, max_new_tokens=24, **settings)
            assert output.sequences.shape == (rows, length + 24)
            if not settings:
                assert output.sequences.tolist() == plain(target, ids, max_new_tokens=24).tolist()
    assert draft.last_stats.kernels["compiled round"] == "whole"
    assert _num_graphs(draft, target) == (2, 2)
    assert counters["stats"]["unique_graphs"] == 2 * 10


@pytest.mark.gpu
def test_forwards_alone_are_cuda_graphs():
    target = make_tiny_target("qwen3", seed=1, vocab_size=VOCAB).to("cuda")
    draft = make_tiny_draft(target, seed=1).to("cuda")
    draft.compile_round(target)
    ids = _rows(7, 2).to("cuda")
    settings = {"max_new_tokens": 24, "repetition_penalty": 1.3}
    output = _speculate(target, draft, ids, **settings)
    assert output.sequences.tolist() == plain(target, ids, **settings).tolist()
    round = draft.compiled_rounds[target]
    assert [f.num_graphs for f in (round.target_forward, round.draft_forward)] == [1, 1]
