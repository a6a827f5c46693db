"""generate_many: each request as if it were alone, results in order, and a request that fails fails alone."""

from dataclasses import replace

import pytest
import torch
from tiny import make_tiny_draft, make_tiny_target, plain
from tiny_files import byte_tokenizer

from hf_dspark import (
    ConfidenceThreshold,
    CostTable,
    FixedLength,
    GenerationRequest,
    ThroughputSchedule,
    generate_many,
)
from hf_dspark.schedule import DraftGate
from hf_dspark.serving import run_requests

TEMPLATE = "{% if messages[0].role == 'nobody' %}{{ raise_exception('Unknown role') }}{% endif %}"
TEMPLATE += "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
POSITIONS = 256  # of the tiny target
HOT = {"temperature": 5.0}  # a broad law: 12 tokens are never the same by chance


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def target(tokenizer):
    return make_tiny_target(vocab_size=len(tokenizer) + 1)


@pytest.fixture(scope="module")
def draft(target):
    return make_tiny_draft(target)


@pytest.fixture
def serve(target, draft, tokenizer):
    """generate_many on the pair, two rows at once."""
    return lambda *requests: generate_many(target, draft, requests, tokenizer=tokenizer, max_rows=2)


def _plain_ids(target, ids, count, **arguments):
    return tuple(plain(target, torch.tensor([ids]), max_new_tokens=count, **arguments)[0, len(ids) :].tolist())


def _token_ids(results):
    return [result.token_ids for result in results]


def test_greedy_results_equal_plain_generation_in_the_order_of_the_requests(serve, target, tokenizer):
    prompts = ["a", "a much longer prompt than the others", "bc", "the last"]
    counts = [9, 3, 1, 6]
    requests = [GenerationRequest(prompt, max_new_tokens=n) for prompt, n in zip(prompts, counts, strict=True)]
    results = serve(*requests)
    expected = [_plain_ids(target, tokenizer(p)["input_ids"], n) for p, n in zip(prompts, counts, strict=True)]
    assert _token_ids(results) == expected
    assert [result.index for result in results] == [0, 1, 2, 3]
    assert [result.text for result in results] == [tokenizer.decode(ids) for ids in expected]
    assert [result.stats.tokens for result in results] == counts


TABLE = CostTable([1, 2, 8], [1.0, 0.99, 0.9], 16)


@pytest.mark.parametrize("schedule", [FixedLength(0), ConfidenceThreshold(0.5), ThroughputSchedule(TABLE)], ids=str)
def test_schedule_of_the_callers_choice_leaves_greedy_results_as_they_are(schedule, target, draft, monkeypatch):
    seen = []
    monkeypatch.setattr(DraftGate, "observe", lambda self, *args, **measured: seen.append(measured["rooms"]))
    prompts = [[5, 9, 2], [7], [3, 3, 8, 1, 6]]
    requests = [GenerationRequest(ids, max_new_tokens=20) for ids in prompts]
    results = generate_many(target, draft, requests, max_rows=2, schedule=schedule)
    assert _token_ids(results) == [_plain_ids(target, ids, 20) for ids in prompts]
    drafts = [bool(result.stats.acceptance_at) for result in results]
    assert drafts == [schedule != FixedLength(0)] * 3
    assert set(seen) <= {None}  # rows are refilled: none waits for the last
    assert bool(seen) == isinstance(schedule, ThroughputSchedule)


def test_schedule_that_the_draft_cannot_serve_is_refused_before_anything_is_decoded(target):
    draft = make_tiny_draft(target, confidence=False)
    with pytest.raises(ValueError, match="needs a confidence head"):
        generate_many(target, draft, [GenerationRequest([1, 2])], schedule=ConfidenceThreshold(0.5))


def test_text_messages_and_token_ids_are_prompts(serve, tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = "<system>Be brief.<user>Hi<assistant>"
    prompts = (text, messages, tokenizer(text)["input_ids"])
    by_text, by_messages, by_ids = serve(*(GenerationRequest(prompt, max_new_tokens=6) for prompt in prompts))
    assert by_text.error is None
    assert by_text.token_ids == by_messages.token_ids == by_ids.token_ids


def test_token_ids_need_no_tokenizer(target, draft):
    (result,) = generate_many(target, draft, [GenerationRequest([5, 9, 14], max_new_tokens=6)])
    assert result.token_ids == _plain_ids(target, [5, 9, 14], 6)
    assert result.text is None
    assert result.finish_reason == "length"


def test_requests_of_different_laws_are_served_together(serve):
    greedy = GenerationRequest("hello", max_new_tokens=12)
    results = serve(
        greedy,
        replace(greedy, **HOT, seed=1),
        replace(greedy, temperature=0),
        replace(greedy, **HOT, top_k=1),
        replace(greedy, top_p=1e-6),
        replace(greedy, do_sample=False),
    )
    first, hot, *others = _token_ids(results)
    assert hot != first
    # top_k=1 and a tiny top_p leave one token: the parameters came through.
    assert others == [first] * 4


def test_seed_makes_a_sampled_result_independent_of_the_other_requests(serve):
    request = GenerationRequest("hello", max_new_tokens=12, **HOT, seed=7)
    (alone,) = serve(request)
    unseeded = replace(request, seed=None)
    other, among, another, again = serve(unseeded, request, replace(request, seed=8), request)
    assert alone.token_ids == among.token_ids == again.token_ids
    assert len({alone.token_ids, other.token_ids, another.token_ids}) == 3


def test_request_without_parameters_follows_the_targets_own(serve, target, monkeypatch):
    request = GenerationRequest("hello", max_new_tokens=12, seed=1)
    (greedy,) = serve(request)
    monkeypatch.setattr(target.generation_config, "do_sample", True)
    monkeypatch.setattr(target.generation_config, "temperature", 5.0)
    monkeypatch.setattr(target.generation_config, "top_k", 0)
    by_config, by_request, overruled = serve(
        request, replace(request, **HOT, top_k=0), replace(request, do_sample=False)
    )
    assert by_config.token_ids == by_request.token_ids != greedy.token_ids
    assert overruled.token_ids == greedy.token_ids


def test_finish_reason_tells_a_stop_from_the_limit(serve, target, tokenizer, monkeypatch):
    ids = _plain_ids(target, tokenizer("hello")["input_ids"], 40)
    # The first place of a character; most bytes are none.
    stop, text = next(
        (n, c) for n in range(2, 39) if (c := tokenizer.decode(ids[n])).isascii() and ids.index(ids[n]) == n
    )
    request = GenerationRequest("hello", max_new_tokens=40)
    by_string, at_limit, cut = serve(
        replace(request, stop=["nowhere", text]), replace(request, stop=text, max_new_tokens=stop + 1), request
    )
    assert by_string.token_ids == at_limit.token_ids == ids[: stop + 1]
    assert [r.finish_reason for r in (by_string, at_limit, cut)] == ["stop", "stop", "length"]
    assert by_string.text.endswith(text)
    monkeypatch.setattr(target.generation_config, "eos_token_id", [ids[stop]])
    by_token, at_limit, cut = serve(
        request, replace(request, max_new_tokens=stop + 1), replace(request, max_new_tokens=stop)
    )
    assert by_token.token_ids == at_limit.token_ids == ids[: stop + 1]
    assert [r.finish_reason for r in (by_token, at_limit, cut)] == ["stop", "stop", "length"]


def test_answer_is_cut_to_the_positions_the_prompt_leaves(serve):
    (result,) = serve(GenerationRequest([5] * (POSITIONS - 3), max_new_tokens=50))
    assert len(result.token_ids) == 3
    assert result.finish_reason == "length"


POISON = {
    "empty text": (GenerationRequest(""), "prompt is empty"),
    "no messages": (GenerationRequest([]), "prompt is empty"),
    "a number": (GenerationRequest(7), "must be text, a list of chat messages or a list of token ids, got 7"),
    "mixed items": (GenerationRequest(["a", 1]), "must be text"),
    "too long": (GenerationRequest([5] * POSITIONS), f"has {POSITIONS} tokens, and the target has {POSITIONS}"),
    "foreign id": (GenerationRequest([5, 100_000]), "reach from 5 to 100000"),
    "negative id": (GenerationRequest([-1, 5]), "reach from -1 to 5"),
    "no tokens": (
        GenerationRequest("x", max_new_tokens=0),
        "`max_new_tokens` must be an integer of at least 1, got 0",
    ),
    "None tokens": (GenerationRequest("x", max_new_tokens=None), "`max_new_tokens` must be an integer"),
    "boolean": (GenerationRequest("x", max_new_tokens=True), "`max_new_tokens` must be an integer"),
    "cold": (GenerationRequest("x", temperature=-0.1), "`temperature` must be a number of at least 0"),
    "infinite": (GenerationRequest("x", temperature=float("inf")), "`temperature` must be a number"),
    "top_k": (GenerationRequest("x", top_k=1.5), "`top_k` must be an integer"),
    "top_p": (GenerationRequest("x", top_p=0), "`top_p` must be a number above 0"),
    "seed": (GenerationRequest("x", seed=-1), "`seed` must be an integer from 0"),
    "stop": (GenerationRequest("x", stop=["a", ""]), "`stop` must be a string that is not empty"),
    "do_sample": (GenerationRequest("x", do_sample="yes"), "`do_sample` must be true or false"),
    "greedy top_p": (GenerationRequest("x", do_sample=False, top_p=0.5), "`top_p=0.5` is for sampling"),
    "sampling at 0": (GenerationRequest("x", do_sample=True, temperature=0), "`do_sample=True` is for sampling"),
    "role": (GenerationRequest([{"role": "nobody", "content": "Hi"}]), "Unknown role"),
    "not a request": ("x", "must be a GenerationRequest, got str"),
}


@pytest.mark.parametrize("kind", POISON)
def test_a_wrong_request_fails_alone(serve, kind):
    poisoned, message = POISON[kind]
    good = GenerationRequest("hello", max_new_tokens=4)
    first, failed, last = serve(good, poisoned, replace(good, **HOT, seed=2))
    assert message in failed.error
    assert (failed.index, failed.token_ids, failed.text, failed.finish_reason, failed.stats) == (
        1,
        (),
        None,
        None,
        None,
    )
    assert [_token_ids([result]) for result in (first, last)] == [
        _token_ids(serve(good)),
        _token_ids(serve(replace(good, **HOT, seed=2))),
    ]


@pytest.fixture
def serve_poisoned(serve, target):
    """Serve a request whose prompt makes the target raise, between two that do not."""

    def serve_poisoned(error):
        def raise_at_poison(module, args, kwargs):
            if (kwargs["input_ids"] == 3).any():
                raise error

        good = GenerationRequest("hello", max_new_tokens=4)
        hook = target.register_forward_pre_hook(raise_at_poison, with_kwargs=True)
        try:
            return serve(good, GenerationRequest([5, 3], max_new_tokens=4), good)
        finally:
            hook.remove()

    return serve_poisoned


def test_an_exception_while_decoding_fails_alone(serve, serve_poisoned):
    first, failed, last = serve_poisoned(RuntimeError("poison"))
    assert failed.error == "RuntimeError: poison"
    assert first.token_ids == last.token_ids == serve(GenerationRequest("hello", max_new_tokens=4))[0].token_ids


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this torch has no error for a lost device")
def test_a_lost_device_is_no_requests_error(serve_poisoned):
    with pytest.raises(torch.AcceleratorError, match="device-side assert"):
        serve_poisoned(torch.AcceleratorError("device-side assert"))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (GenerationRequest("text"), "needs `tokenizer`"),
        (GenerationRequest([5, 9], stop="a"), "`stop` is compared with text"),
    ],
)
def test_text_without_tokenizer_is_the_requests_error(target, draft, request_, message):
    (result,) = generate_many(target, draft, [request_])
    assert message in result.error


def test_results_come_as_they_finish(target, draft, tokenizer):
    requests = [GenerationRequest("a", max_new_tokens=2), GenerationRequest("")]
    results = run_requests(target, draft, requests, tokenizer=tokenizer)
    assert [result.index for result in results] == [1, 0]  # what is wrong is known before anything is decoded


def test_no_rows_at_once_is_refused(target, draft):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        generate_many(target, draft, [], max_rows=0)
