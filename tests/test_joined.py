"""Projections of one input as one product: what they compute, how often, and what is left of it in the model."""

import pytest
import torch
from tiny import make_tiny_draft, make_tiny_target
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from hf_dspark import joined as joined_module
from hf_dspark.dispatch import load_kernels, report
from hf_dspark.joined import _Linear, joined, lay_side_by_side


class Products(TorchDispatchMode):
    """Counts matrix products with weights."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


def _logits(model, ids):
    with torch.no_grad(), Products() as products:
        return model(ids, use_cache=False).logits, products.count


@pytest.mark.parametrize(("kind", "per_layer"), [("qwen3", 4), ("qwen2", 4), ("llama", 4), ("gemma3_text", 4)])
def test_model_computes_the_same_in_fewer_products(kind, per_layer):
    target = make_tiny_target(kind, seed=1)
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    expected, before = _logits(target, ids)
    pointers = [parameter.data_ptr() for parameter in target.parameters()]
    lay_side_by_side(target)
    assert pointers != [parameter.data_ptr() for parameter in target.parameters()]
    assert torch.equal(_logits(target, ids)[0], expected)
    with joined(target):
        output, after = _logits(target, ids)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    num_layers = target.config.num_hidden_layers
    assert (before - after, after) == (3 * num_layers, per_layer * num_layers + 1)
    assert all(type(module) is nn.Linear for module in target.modules() if isinstance(module, nn.Linear))
    assert torch.equal(_logits(target, ids)[0], expected)
    pointers = [parameter.data_ptr() for parameter in target.parameters()]
    lay_side_by_side(target)  # they lie there already
    assert pointers == [parameter.data_ptr() for parameter in target.parameters()]


def test_draft_joins_what_reads_the_context_and_the_block():
    draft = make_tiny_draft(make_tiny_target("qwen3"), seed=1)
    lay_side_by_side(draft)
    layer = draft.layers[0]
    with joined(draft):
        assert type(layer.self_attn.q_proj) is _Linear
        assert layer.self_attn.k_proj.product is layer.self_attn.v_proj.product
        assert layer.mlp.gate_proj.product is layer.mlp.up_proj.product


def test_parts_of_another_input_compute_their_own():
    target = make_tiny_target("llama", seed=1)
    attention = target.model.layers[0].self_attn
    inputs = torch.randn(3, 2, target.config.hidden_size)
    modules = (attention.q_proj, attention.k_proj, attention.v_proj)
    with torch.no_grad():
        expected = [module(states) for module, states in zip(modules, inputs, strict=True)]
        lay_side_by_side(attention)
        with joined(attention):
            outputs = [module(states) for module, states in zip(modules, inputs, strict=True)]
    for output, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, other)


@pytest.mark.parametrize("change", ["adapter", "dtype", "tied", "bias"])
def test_what_does_not_fit_together_is_left_alone(change):
    target = make_tiny_target("llama", seed=1)
    attention = target.model.layers[0].self_attn
    if change == "adapter":
        attention.k_proj = nn.Sequential(attention.k_proj)
    elif change == "dtype":
        attention.k_proj.double()
    elif change == "tied":
        attention.k_proj.weight = nn.Parameter(attention.q_proj.weight.t()[: len(attention.k_proj.weight)].t().t())
    else:
        attention.k_proj.bias = nn.Parameter(torch.ones(attention.k_proj.out_features))
    pointer = attention.q_proj.weight.data_ptr()
    lay_side_by_side(attention)
    assert attention.q_proj.weight.data_ptr() == pointer
    with joined(attention):
        assert type(attention.q_proj) is _Linear


def test_weights_stay_where_they_are_where_the_memory_is_short(monkeypatch):
    target = make_tiny_target("llama", seed=1)
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    expected, before = _logits(target, ids)
    cat, moved, warned = torch.cat, [], []

    def short(tensors):
        if len(moved) == 3:
            raise torch.OutOfMemoryError
        moved.append(tensors)
        return cat(tensors)

    monkeypatch.setattr(torch, "cat", short)
    monkeypatch.setattr(joined_module.logger, "warning_once", warned.append)
    lay_side_by_side(*target.model.layers)
    monkeypatch.undo()
    assert len(warned) == 1
    with joined(target):
        output, after = _logits(target, ids)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert before - after == 2 + 1 + 2  # of two layers' three groups


def test_groups_whose_biases_stayed_are_not_joined(monkeypatch):
    target = make_tiny_target("qwen2", seed=1)
    attention = target.model.layers[0].self_attn
    cat, modules = torch.cat, (attention.q_proj, attention.k_proj, attention.v_proj)

    def short(tensors):
        if tensors[0].ndim == 1:
            raise torch.OutOfMemoryError
        return cat(tensors)

    inputs = torch.randn(2, target.config.hidden_size)
    with torch.no_grad():
        expected = [module(inputs) for module in modules]
        monkeypatch.setattr(torch, "cat", short)
        lay_side_by_side(attention)
        monkeypatch.undo()
        with joined(attention):
            for module, output in zip(modules, expected, strict=True):
                assert type(module) is _Linear
                assert torch.equal(module(inputs), output)


def test_model_is_saved_moved_and_loaded_as_before(tmp_path):
    target = make_tiny_target("qwen3", seed=1)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    lay_side_by_side(target)
    target.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(loaded.state_dict()) == set(before)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, before[name]), name
    target.load_state_dict(before)
    target.to(torch.float64)  # elsewhere in memory: each by itself
    with joined(target):
        assert all(type(module) is _Linear for module in target.modules() if isinstance(module, nn.Linear))


def test_all_linear_layers_are_asked_for_the_kernel():
    target = make_tiny_target("llama", seed=1)
    load_kernels()
    with torch.no_grad(), joined(target):
        target(torch.zeros(1, 3, dtype=torch.long), use_cache=False)
        assert {type(module) for module in target.modules() if isinstance(module, nn.Linear)} == {_Linear}
    assert report()["few_rows_linear"].startswith("not Triton: there is no")
