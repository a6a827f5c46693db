"""Models attend by `block_attention` when it is named, and in a speculative call; the output is as before."""

import functools
import threading

import pytest
import torch
import torch._dynamo.testing
from tiny import (
    KINDS,
    WINDOW,
    make_draft_of_quality,
    make_tiny_draft,
    make_tiny_target,
    plain,
    random_prompt,
    speculate,
)
from transformers import AttentionInterface, StaticCache

from hf_dspark import attention_interface
from hf_dspark.attention_interface import block_attention_on, block_mask, dspark_attention, why_not_switched
from hf_dspark.compat import CACHE, get_cache

BLOCK = 5


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of every call of `block_attention`."""
    calls, original = [], attention_interface.block_attention

    def spy(*states, **settings):
        calls.append(settings | {"rows": states[0].shape[2], "keys": states[1].shape[2]})
        return original(*states, **settings)

    monkeypatch.setattr(attention_interface, "block_attention", spy)
    return calls


@functools.cache
def _pair(kind):
    """The same target twice: with its usual attention, and with ours by name. A soft-cap is low enough to tell."""
    fields = {"attn_logit_softcapping": 0.5} if kind == "gemma2" else {}
    usual = "eager" if kind in ("gemma2", "gpt_oss") else None  # sdpa leaves out soft-caps and sinks
    return tuple(make_tiny_target(kind, seed=1, attention=name, **fields) for name in (usual, "dspark"))


def _block_logits(target, prompt, block, **kwargs):
    """Logits of a block behind a prompt, each in a forward of its own."""
    with torch.no_grad():
        cache = get_cache(target(prompt, use_cache=True))
        return target(block, **{CACHE: cache}, **kwargs).logits


@pytest.mark.core
@pytest.mark.parametrize("length", [3, WINDOW - 2, 3 * WINDOW])
@pytest.mark.parametrize("kind", KINDS)
def test_block_behind_a_prompt_gives_the_same_logits(kind, length):
    usual, named = _pair(kind)
    prompt, block = random_prompt(64, length, seed=2), random_prompt(64, BLOCK, seed=3)
    expected = _block_logits(usual, prompt, block)
    torch.testing.assert_close(_block_logits(named, prompt, block), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_named_attention_generates_what_the_usual_one_does(kind):
    usual, named = _pair(kind)
    prompt = random_prompt(64, 9, seed=4)
    expected = plain(usual, prompt, max_new_tokens=3 * WINDOW)
    assert plain(named, prompt, max_new_tokens=3 * WINDOW).tolist() == expected.tolist()


@pytest.mark.core
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "gemma2", "gpt_oss", "mistral"])
def test_named_attention_honours_padding_and_static_caches(kind):
    usual, named = _pair(kind)
    prompt = torch.cat([random_prompt(64, 9, seed=5), random_prompt(64, 9, seed=6)])
    prompt[0, :4] = 0
    mask = (prompt != 0).long()
    for settings in ({}, {"cache_implementation": "static"}):
        settings |= {"attention_mask": mask, "max_new_tokens": 2 * WINDOW, "pad_token_id": 0}
        expected = plain(usual, prompt, **settings, disable_compile=True)
        assert plain(named, prompt, **settings, disable_compile=True).tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "mistral"])
def test_block_in_a_static_cache_gives_the_same_logits(kind):
    usual, named = _pair(kind)
    prompt, block, logits = random_prompt(64, 7, seed=2), random_prompt(64, BLOCK, seed=3), []
    for target in (usual, named):
        cache = StaticCache(config=target.config, max_cache_len=40)
        with torch.no_grad():
            logits += [target(ids, **{CACHE: cache}).logits for ids in (prompt, block)]
    torch.testing.assert_close(logits[2:], logits[:2], atol=2e-5, rtol=2e-5)


def test_blocks_in_a_static_cache_compile_into_one_graph():
    usual, named = _pair("qwen3")
    prompt, blocks, logits = random_prompt(64, 7, seed=2), random_prompt(64, 3 * BLOCK, seed=3).split(BLOCK, dim=1), []
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(named.forward, backend=graphs, fullgraph=True)
    for target, forward in ((usual, usual.forward), (named, compiled)):
        cache = StaticCache(config=target.config, max_cache_len=40)
        with torch.no_grad():
            target(prompt, **{CACHE: cache})
            logits += [forward(block, **{CACHE: cache}).logits for block in blocks]
    torch.testing.assert_close(logits[3:], logits[:3], atol=2e-5, rtol=2e-5)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("length", [1, BLOCK, 20])
def test_training_is_sdpas_with_dropout_and_gradients(kind, length):
    usual, named = _pair(kind)
    ids, gradients = random_prompt(64, length, seed=7), []
    for target in (usual, named):
        target.train()
        target.zero_grad()
        for module in target.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.25
        torch.manual_seed(0)
        target(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in target.parameters() if p.grad is not None])
        target.eval()
    assert len(gradients[0]) > 10
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)


def test_dropout_behind_other_keys_ends_at_the_lower_right(target):
    """The one case in which sdpa is called with more keys than queries and no mask of the model's."""
    module = target.model.layers[0].self_attn
    query, key, value = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    expected, _ = dspark_attention(module, query, key, value, None)
    torch.testing.assert_close(dspark_attention(module, query, key, value, None, dropout=1e-9)[0], expected)


@pytest.mark.parametrize("given", [{"softcap": 1.0}, {"s_aux": torch.zeros(4)}, {"kv_lengths": torch.tensor([7])}])
@pytest.mark.parametrize("asked", [{"dropout": 0.1}, {"position_bias": torch.zeros(1, 4, 3, 7)}])
def test_what_neither_can_do_is_refused(target, given, asked):
    states = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    with pytest.raises(ValueError, match="eager"):
        dspark_attention(target.model.layers[0].self_attn, *states, None, **given, **asked)


@pytest.mark.core
def test_block_of_full_attention_has_no_mask_and_one_past_the_window_only_there(calls):
    named = _pair("gemma3_text")[1]
    prompt, block = random_prompt(64, 3 * WINDOW, seed=2), random_prompt(64, BLOCK, seed=3)
    _block_logits(named, prompt, block, attention_mask=torch.ones(1, 3 * WINDOW + BLOCK))
    windows = [WINDOW if name == "sliding_attention" else None for name in named.config.layer_types]
    assert [(call["mask"], call["window"], call["rows"]) for call in calls] == [(None, w, BLOCK) for w in windows]
    assert [call["keys"] for call in calls] == [WINDOW - 1 + BLOCK if w else 3 * WINDOW + BLOCK for w in windows]


def test_model_that_names_no_window_keeps_its_mask(calls):
    """Some models say a window by the mask alone."""
    named = make_tiny_target("gemma3_text", seed=1, attention="dspark")
    for layer in named.model.layers:
        layer.self_attn.sliding_window = None
    prompt, block = random_prompt(64, 3 * WINDOW, seed=2), random_prompt(64, BLOCK, seed=3)
    expected = _block_logits(_pair("gemma3_text")[0], prompt, block)
    torch.testing.assert_close(_block_logits(named, prompt, block), expected, atol=2e-5, rtol=2e-5)
    assert [call["mask"] is None for call in calls] == [False, True, False, True]


def test_padded_block_has_its_mask(calls):
    named = _pair("qwen3")[1]
    mask = torch.ones(1, 9 + BLOCK)
    mask[:, :2] = 0
    prompt, block = random_prompt(64, 9, seed=2), random_prompt(64, BLOCK, seed=3)
    _block_logits(named, prompt, block, attention_mask=mask)
    assert all(call["mask"] is not None and not call["mask"][..., :2].any() for call in calls)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "gpt_oss", "gemma2"])
def test_lengths_of_the_rows_replace_the_mask(kind):
    """A batch whose rows' keys lie in slots 0, 1, ...: each row attends as it does alone."""
    named = _pair(kind)[1]
    module = named.model.layers[0].self_attn
    settings = {"sliding_window": WINDOW, "softcap": 2.0 if kind == "gemma2" else None}
    settings["s_aux"] = getattr(module, "sinks", None)
    query, key, value = torch.randn(3, 4, BLOCK, 8), torch.randn(3, 2, 30, 8), torch.randn(3, 2, 30, 8)
    lengths = torch.tensor([30, BLOCK, 17])
    wrong = torch.zeros(3, 1, BLOCK, 30, dtype=torch.bool)
    together, _ = dspark_attention(module, query, key, value, wrong, kv_lengths=lengths, **settings)
    for row, length in enumerate(lengths.tolist()):
        states = query[[row]], key[[row], :, :length], value[[row], :, :length]
        columns = torch.arange(length)
        position = columns[-BLOCK:, None]
        mask = ((columns <= position) & (columns > position - WINDOW))[None, None]
        alone, _ = dspark_attention(module, *states, mask, **settings)
        torch.testing.assert_close(together[[row]], alone)


def test_lengths_reach_the_attention_through_a_models_forward(calls, target):
    lengths = torch.tensor([BLOCK])
    with block_attention_on(target, make_tiny_draft(target), attention_mask=None, output_attentions=False):
        target(random_prompt(64, BLOCK), kv_lengths=lengths)
    assert [call["lengths"] is lengths for call in calls] == [True] * 4


@pytest.mark.parametrize(
    ("arguments", "is_none"),
    [
        ({"q_length": 5, "kv_length": 9, "q_offset": 4}, True),
        ({"q_length": 5, "kv_length": 9, "q_offset": 4, "attention_mask": torch.ones(1, 9).bool()}, True),
        ({"q_length": 5, "kv_length": 9, "q_offset": 4, "attention_mask": torch.arange(9)[None] > 1}, False),
        ({"q_length": 5, "kv_length": 9, "q_offset": 4, "allow_is_causal_skip": False}, False),
        ({"q_length": 5, "kv_length": 9, "q_offset": 4, "local_size": 9}, True),
        ({"q_length": 5, "kv_length": 9, "q_offset": 4, "local_size": 8}, False),
        ({"q_length": 5, "kv_length": 9, "q_offset": 104, "kv_offset": 100}, True),
        ({"q_length": 5, "kv_length": 20, "q_offset": 0}, False),  # a prompt in a static cache
        ({"q_length": 5, "kv_length": 20, "q_offset": 4}, False),
        ({"q_length": 5, "kv_length": 20, "q_offset": torch.tensor(4)}, False),
        ({"q_length": 65, "kv_length": 69, "q_offset": 4}, False),
        ({"q_length": 5, "kv_length": 5}, True),
        ({"q_length": 1, "kv_length": 9, "q_offset": 8}, True),
    ],
)
def test_no_mask_is_built_where_none_is_needed_and_one_is_where_it_is(arguments, is_none):
    mask = block_mask(batch_size=1, device="cpu", **arguments)
    assert (mask is None) == is_none


def _implementations(*models):
    return [model.config._attn_implementation for model in models]


@pytest.mark.core
def test_both_models_attend_by_it_during_a_call_and_as_before_after_it(calls, target, draft, read_as_on_cuda):
    during = []

    class Streamer:
        def put(self, tokens):
            during.append(_implementations(target, draft))

        def end(self):
            pass

    prompt = random_prompt(64, 9)
    expected = plain(target, prompt, max_new_tokens=20)
    assert calls == []
    assert speculate(target, draft, prompt, max_new_tokens=20, streamer=Streamer()).tolist() == expected.tolist()
    assert ["dspark", "dspark"] in during
    assert _implementations(target, draft) == ["sdpa", "sdpa"]
    assert {call["is_causal"] for call in calls} == {True, False}  # the target's layers, and the draft's
    assert all(call["mask"] is None for call in calls)
    assert "packed queries" in draft.last_stats.kernels["block_attention"]


@pytest.mark.core
def test_attention_is_restored_after_an_exception(target, draft):
    class Broken:
        def put(self, tokens):
            if _implementations(target, draft) == ["dspark", "dspark"]:
                raise RuntimeError("the reader went away")

        def end(self):
            pass

    with pytest.raises(RuntimeError, match="went away"):
        speculate(target, draft, random_prompt(64, 9), max_new_tokens=20, streamer=Broken())
    assert _implementations(target, draft) == ["sdpa", "sdpa"]
    assert attention_interface._switched == {}


def test_two_calls_at_once_share_the_switch(target, draft):
    on = {"attention_mask": None, "output_attentions": False}
    first = block_attention_on(target, draft, **on)
    first.__enter__()
    with block_attention_on(target, draft, **on):
        first.__exit__(None, None, None)
        assert _implementations(target, draft) == ["dspark", "dspark"]
    assert _implementations(target, draft) == ["sdpa", "sdpa"]


def test_padding_that_one_thread_knows_of_is_not_anothers(target, draft):
    seen = []
    padded = torch.arange(9)[None] > 1
    with block_attention_on(target, draft, attention_mask=torch.ones(1, 9), output_attentions=False):
        ask = functools.partial(attention_interface._is_unpadded, padded)
        assert ask()  # not looked at again
        thread = threading.Thread(target=lambda: seen.append(ask()))
        thread.start()
        thread.join()
    assert seen == [False]
    assert not ask()


@pytest.mark.core
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "mistral"])
def test_prompt_with_padding_is_lossless(kind):
    target = make_tiny_target(kind, seed=3)
    prompt = random_prompt(64, 9, seed=3)
    prompt[:, :3] = 0
    settings = {"attention_mask": (prompt != 0).long(), "max_new_tokens": 3 * WINDOW, "pad_token_id": 0}
    expected = plain(target, prompt, **settings)
    draft = make_draft_of_quality(target, expected[0, 3:].tolist(), "noisy")
    assert speculate(target, draft, prompt, **settings).tolist() == expected.tolist()
    assert _implementations(target) == ["sdpa"]


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_what_the_user_chose_is_left_alone(attention, calls):
    target = make_tiny_target("qwen3", attention=attention)
    draft = make_tiny_draft(target)
    speculate(target, draft, random_prompt(64, 9), max_new_tokens=6)
    assert f"'{attention}'" in draft.last_stats.kernels["block_attention"]
    assert {call["is_causal"] for call in calls} == {False}  # the draft's alone


@pytest.mark.core
@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_named_target_speculates_losslessly_with_what_sdpa_leaves_out(kind, calls):
    usual, named = _pair(kind)
    prompt = random_prompt(64, 9, seed=8)
    expected = plain(usual, prompt, max_new_tokens=3 * WINDOW)
    draft = make_draft_of_quality(named, expected[0].tolist(), "noisy")
    assert speculate(named, draft, prompt, max_new_tokens=3 * WINDOW).tolist() == expected.tolist()
    assert _implementations(named) == ["dspark"]
    blocks = [call for call in calls if call["rows"] > 1 and call["is_causal"]]
    assert all((call["softcap"] if kind == "gemma2" else call["sinks"]) is not None for call in blocks)
    assert any(call["window"] == WINDOW for call in blocks)


def test_targets_of_which_sdpa_leaves_out_something_keep_it():
    """Where transformers lets them run on sdpa, plain generation leaves it out, too."""
    target = make_tiny_target("gemma3_text")
    target.model.config.attn_logit_softcapping = 30.0
    assert "soft-cap" in why_not_switched(target)
    target = make_tiny_target("qwen3")
    assert why_not_switched(target) is None
    target.model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    assert "sinks" in why_not_switched(target)


def test_target_that_does_not_use_the_interface_keeps_its_own(monkeypatch, target):
    monkeypatch.setattr(type(target.model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    assert "does not take its attention from" in why_not_switched(target)


def test_attention_weights_that_are_asked_for_are_given():
    target = make_tiny_target("qwen3", attention="eager")
    draft = make_tiny_draft(target)
    settings = {"max_new_tokens": 6, "output_attentions": True, "return_dict_in_generate": True}
    output = speculate(target, draft, random_prompt(64, 9), **settings)
    assert all(weights is not None for token in output.attentions for weights in token)
    assert "attention weights are asked for" in draft.last_stats.kernels["block_attention"]


@pytest.mark.core
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_kernels_in_the_loop_are_lossless_and_named(kind, kernels_everywhere, read_as_on_cuda):
    """Heads of 16 channels, which the kernel takes; in Triton's interpreter where there is no GPU."""
    target = make_tiny_target(kind, seed=1, head_dim=16)
    prompt = random_prompt(64, 9, seed=1)
    expected = plain(target, prompt, max_new_tokens=20)
    draft = make_draft_of_quality(target, expected[0].tolist(), "noisy", head_dim=16)
    assert speculate(target, draft, prompt, max_new_tokens=20).tolist() == expected.tolist()
    assert draft.last_stats.kernels["block_attention"].startswith("Triton")


def test_heads_the_kernel_does_not_take_run_plainly_and_say_so(target, draft, kernels_everywhere, read_as_on_cuda):
    prompt = random_prompt(64, 9)
    expected = plain(target, prompt, max_new_tokens=12)
    assert speculate(target, draft, prompt, max_new_tokens=12).tolist() == expected.tolist()
    assert draft.last_stats.kernels["block_attention"] == "not Triton: head size 8; packed queries"


def test_name_is_registered_as_users_give_it():
    assert AttentionInterface()["dspark"] is dspark_attention
