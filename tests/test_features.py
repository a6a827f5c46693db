"""Captured features are the layers' raw outputs, by the list form and by hooks, on every supported transformers."""

import threading

import pytest
import torch
from tiny import KINDS, make_tiny_target, random_prompt
from transformers import AutoConfig, AutoModelForCausalLM

from hf_dspark.compat import CACHE
from hf_dspark.features import FeatureTap


@torch.no_grad()
def _layer_outputs(target, ids):
    """Input of layer 0 and raw output of every decoder layer, recorded with hooks of our own."""
    seen = []
    layers = target.get_decoder().layers
    hooks = [
        layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    ]
    for layer in layers:
        keep = lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
        hooks.append(layer.register_forward_hook(keep))
    target(ids)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.core
@pytest.mark.parametrize("by_hooks", [False, True], ids=["list", "hooks"])
@pytest.mark.parametrize("taps", [[0, 2], [1, 2], [-1, 1], [-1, 0, 3], [3], [0]], ids=str)
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3_text", "gpt_oss", "deepseek_v3", "gemma4_text"])
@torch.no_grad()
def test_features_are_the_raw_outputs_of_the_tapped_layers(kind, taps, by_hooks):
    target, ids = make_tiny_target(kind, seed=0), random_prompt(64, 7)
    expected = _layer_outputs(target, ids)
    with FeatureTap(target, taps, by_hooks=by_hooks) as tap:
        features = tap.take(target(ids, **tap.forward_kwargs))
    torch.testing.assert_close(features, torch.cat([expected[i + 1] for i in taps], dim=-1), atol=0, rtol=0)


@pytest.mark.core
def test_the_last_layer_is_tapped_raw_and_so_by_hooks():
    target = make_tiny_target("qwen3", seed=0)
    assert FeatureTap(target, [0, 3]).by_hooks
    assert FeatureTap(target, [0, 3]).forward_kwargs == {}
    assert not FeatureTap(target, [0, 2]).by_hooks


@torch.no_grad()
def test_hooks_join_the_forwards_of_a_chunked_prefill_and_are_gone_afterwards():
    target, ids = make_tiny_target("qwen3", seed=0), random_prompt(64, 8)
    expected = _layer_outputs(target, ids)
    with FeatureTap(target, [0, 2], by_hooks=True) as tap:
        outputs = target(ids[:, :5], use_cache=True)
        target(ids[:, 5:], **{CACHE: outputs[CACHE]})
        features = tap.take(None)
        target(ids[:, :2])
        assert tap.take(None).shape[1] == 2  # earlier forwards were taken
    torch.testing.assert_close(features, torch.cat([expected[1], expected[3]], dim=-1), atol=1e-5, rtol=1e-5)
    assert not any(layer._forward_hooks for layer in target.model.layers if not hasattr(layer, "_hf_hook"))


@torch.no_grad()
def test_hooks_ignore_forwards_of_other_threads():
    target, ids = make_tiny_target("qwen3", seed=0), random_prompt(64, 8)
    with FeatureTap(target, [0], by_hooks=True) as tap:
        other = threading.Thread(target=lambda: target(ids[:, :3]))
        other.start()
        other.join()
        target(ids)
        assert tap.take(None).shape[1] == 8


def test_decoder_that_calls_its_layers_h_is_tapped():
    config = AutoConfig.for_model(
        "gpt2", n_embd=32, n_layer=3, n_head=2, vocab_size=64, n_positions=64, bos_token_id=None, eos_token_id=None
    )
    target, ids = AutoModelForCausalLM.from_config(config).eval(), random_prompt(64, 6)
    with torch.no_grad(), FeatureTap(target, [0, 1], by_hooks=True) as hooked:
        by_hooks = hooked.take(target(ids))
    with torch.no_grad(), FeatureTap(target, [0, 1]) as listed:
        by_list = listed.take(target(ids, **listed.forward_kwargs))
    torch.testing.assert_close(by_hooks, by_list)


def test_every_kind_of_the_test_grid_has_layers_to_hook():
    assert all(make_tiny_target(kind).get_decoder().layers for kind in KINDS)
