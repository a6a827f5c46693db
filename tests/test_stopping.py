"""A call ends where plain generate() ends, also in the middle of a block; and streamers see each token once."""

import threading

import pytest
import torch
from tiny import make_draft_of_quality, make_tiny_draft, make_tiny_target, plain, random_prompt, speculate
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
)

PROMPT_LENGTH, NEW_TOKENS = 8, 24


@pytest.fixture(scope="module")
def tokenizer():
    """64 tokens of one character each."""
    characters = [chr(c) for span in ("az", "AZ", "09") for c in range(ord(span[0]), ord(span[1]) + 1)] + ["Ġ", "."]
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def prompt():
    return random_prompt(64, PROMPT_LENGTH, seed=5)


@pytest.fixture(scope="module")
def expected(target, prompt):
    """The plain continuation without any stop."""
    return plain(target, prompt, max_new_tokens=NEW_TOKENS)


@pytest.fixture(params=["perfect", "noisy"])
def pair(request, target, expected):
    """The target, and a draft that drafts past every stop."""
    return target, make_draft_of_quality(target, expected[0].tolist(), request.param, seed=1)


def _first_at(expected, count):
    """The earliest token from the `count`-th new one on that is new to the continuation."""
    tokens = expected[0, PROMPT_LENGTH:].tolist()
    return next(t for i, t in enumerate(tokens) if i >= count and t not in tokens[:i])


@pytest.mark.core
@pytest.mark.parametrize("count", range(8))
def test_stop_token_ends_the_call_wherever_it_stands_in_a_block(pair, prompt, expected, count):
    kwargs = {"eos_token_id": _first_at(expected, count), "pad_token_id": 0, "max_new_tokens": NEW_TOKENS}
    stopped = plain(pair[0], prompt, **kwargs)
    assert stopped.shape[1] < expected.shape[1]
    output = speculate(*pair, prompt, return_dict_in_generate=True, **kwargs)
    assert output.sequences.tolist() == stopped.tolist()
    assert sum(r.accepted_length for r in output.rounds) == stopped.shape[1] - PROMPT_LENGTH - 1


@pytest.mark.core
def test_any_of_several_stop_tokens_ends_the_call(pair, prompt, expected):
    early, late = _first_at(expected, 3), _first_at(expected, 9)
    for eos in ([late, early], [early, late], [late, 63], [63]):
        kwargs = {"eos_token_id": eos, "pad_token_id": 0, "max_new_tokens": NEW_TOKENS}
        assert speculate(*pair, prompt, **kwargs).tolist() == plain(pair[0], prompt, **kwargs).tolist()


@pytest.mark.core
@pytest.mark.parametrize("min_new_tokens", [1, 3, 6, NEW_TOKENS])
def test_stop_token_is_not_taken_before_the_least_number_of_tokens(pair, prompt, expected, min_new_tokens):
    kwargs = {"eos_token_id": _first_at(expected, 2), "pad_token_id": 0, "max_new_tokens": NEW_TOKENS}
    for least in ({"min_new_tokens": min_new_tokens}, {"min_length": PROMPT_LENGTH + min_new_tokens}):
        stopped = plain(pair[0], prompt, **kwargs, **least)
        assert speculate(*pair, prompt, **kwargs, **least).tolist() == stopped.tolist()


@pytest.mark.core
@pytest.mark.parametrize("max_new_tokens", range(1, 12))
def test_number_of_tokens_is_exact(pair, prompt, expected, max_new_tokens):
    wanted = expected[:, : PROMPT_LENGTH + max_new_tokens].tolist()
    assert speculate(*pair, prompt, max_new_tokens=max_new_tokens).tolist() == wanted
    assert speculate(*pair, prompt, max_length=PROMPT_LENGTH + max_new_tokens).tolist() == wanted
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False)
    assert pair[0].generate(prompt, config, assistant_model=pair[1]).tolist() == wanted


class _OnLastToken(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


class _OnLength(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


class _OnPair(StoppingCriteria):
    """Two tokens in a row, as a stop sequence."""

    def __init__(self, first, second):
        self.pair = [first, second]

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([row[-2:] == self.pair for row in input_ids.tolist()])


class _Recorder(StoppingCriteria):
    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append((input_ids.tolist(), None if scores is None else len(scores)))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.core
@pytest.mark.parametrize("count", range(0, 10, 3))
def test_custom_criterion_ends_the_call_at_the_token_it_names(pair, prompt, expected, count):
    new = expected[0, PROMPT_LENGTH:].tolist()
    for criterion in (
        _OnLastToken(new[count]),
        _OnLength(PROMPT_LENGTH + count + 1),
        _OnPair(*new[count : count + 2]),
    ):
        kwargs = {"stopping_criteria": [criterion], "max_new_tokens": NEW_TOKENS}
        stopped = plain(pair[0], prompt, **kwargs)
        assert stopped.shape[1] < expected.shape[1]
        assert speculate(*pair, prompt, **kwargs).tolist() == stopped.tolist()


@pytest.mark.core
@pytest.mark.parametrize("extra", [{}, {"return_dict_in_generate": True, "output_scores": True}], ids=["ids", "dict"])
def test_custom_criterion_sees_each_prefix_once_as_in_plain_generate(pair, prompt, extra):
    seen = []
    for generate in (plain, lambda target, ids, **kwargs: speculate(*pair, ids, **kwargs)):
        recorder = _Recorder()
        generate(pair[0], prompt, stopping_criteria=[recorder], max_new_tokens=NEW_TOKENS, **extra)
        seen.append(recorder.seen)
    assert seen[0] == seen[1]
    assert len(seen[0]) == NEW_TOKENS


@pytest.mark.core
@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("count", range(1, 9, 2))
def test_stop_string_ends_the_call_inside_a_block_and_across_blocks(pair, prompt, expected, tokenizer, count, width):
    text = tokenizer.decode(expected[0, PROMPT_LENGTH + count : PROMPT_LENGTH + count + width])
    kwargs = {"stop_strings": [text, "never said"], "tokenizer": tokenizer, "max_new_tokens": NEW_TOKENS}
    stopped = plain(pair[0], prompt, **kwargs)
    assert stopped.shape[1] < expected.shape[1]
    assert speculate(*pair, prompt, **kwargs).tolist() == stopped.tolist()
    decode = pair[1].as_custom_generate(stop_strings=text, tokenizer=tokenizer)
    other_door = pair[0].generate(prompt, custom_generate=decode, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert other_door.tolist() == stopped.tolist()


def test_stop_strings_of_the_generation_config_are_found(pair, prompt, expected, tokenizer):
    text = tokenizer.decode(expected[0, PROMPT_LENGTH + 3 : PROMPT_LENGTH + 5])
    config = GenerationConfig(stop_strings=text, max_new_tokens=NEW_TOKENS, do_sample=False)
    stopped = pair[0].generate(prompt, config, tokenizer=tokenizer)
    assert stopped.shape[1] < expected.shape[1]
    got = pair[0].generate(prompt, config, tokenizer=tokenizer, assistant_model=pair[1])
    assert got.tolist() == stopped.tolist()


def test_stop_strings_without_a_tokenizer_are_refused(pair, prompt):
    with pytest.raises(ValueError, match="tokenizer"):
        speculate(*pair, prompt, stop_strings="a", max_new_tokens=4)
    with pytest.raises(ValueError, match="tokenizer"):
        pair[1].as_custom_generate(stop_strings="a")


@pytest.mark.core
def test_time_that_is_up_at_once_leaves_one_token_as_in_plain_generate(pair, prompt, expected):
    kwargs = {"max_time": 1e-9, "max_new_tokens": NEW_TOKENS}
    assert plain(pair[0], prompt, **kwargs).shape[1] == PROMPT_LENGTH + 1
    assert speculate(*pair, prompt, **kwargs).tolist() == expected[:, : PROMPT_LENGTH + 1].tolist()


class _Streamer:
    """Records every call; tokens as plain generate() hands them over."""

    def __init__(self):
        self.puts, self.ends = [], 0

    def put(self, value):
        assert self.ends == 0
        assert value.device.type == "cpu"
        self.puts.append(value.tolist())

    def end(self):
        self.ends += 1


def _by_door(target, draft, prompt, streamer, **kwargs):
    return speculate(target, draft, prompt, streamer=streamer, **kwargs)


def _by_callable(target, draft, prompt, streamer, **kwargs):
    decode = draft.as_custom_generate(streamer=streamer)
    return target.generate(prompt, custom_generate=decode, do_sample=False, **kwargs)


ROUTES = pytest.mark.parametrize("route", [_by_door, _by_callable])


@pytest.mark.core
@ROUTES
@pytest.mark.parametrize("eos_at", [None, 0, 5])
def test_streamer_gets_the_prompt_once_then_each_token_in_order(pair, prompt, expected, route, eos_at):
    kwargs = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    if eos_at is not None:
        kwargs["eos_token_id"] = _first_at(expected, eos_at)
    theirs, ours = _Streamer(), _Streamer()
    stopped = plain(pair[0], prompt, streamer=theirs, **kwargs)
    assert route(*pair, prompt, ours, **kwargs).tolist() == stopped.tolist()
    assert ours.puts == theirs.puts == [prompt.tolist(), *([t] for t in stopped[0, PROMPT_LENGTH:].tolist())]
    assert ours.ends == theirs.ends == 1


@pytest.mark.core
@ROUTES
def test_text_streamer_prints_the_new_text_and_skips_the_prompt(pair, prompt, expected, tokenizer, route, capsys):
    route(*pair, prompt, TextStreamer(tokenizer, skip_prompt=True), max_new_tokens=NEW_TOKENS)
    assert capsys.readouterr().out == tokenizer.decode(expected[0, PROMPT_LENGTH:]) + "\n"


@ROUTES
def test_text_can_be_read_from_another_thread_while_it_is_made(pair, prompt, expected, tokenizer, route):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    kwargs = {"max_new_tokens": NEW_TOKENS}
    worker = threading.Thread(target=route, args=(*pair, prompt, streamer), kwargs=kwargs)
    worker.start()
    text = "".join(streamer)
    worker.join()
    assert text == tokenizer.decode(expected[0, PROMPT_LENGTH:])


def test_stop_by_token_and_by_criterion_take_the_earlier_one(prompt):
    target = make_tiny_target("gemma3_text", seed=2)
    sequence = plain(target, prompt, max_new_tokens=NEW_TOKENS)
    draft = make_draft_of_quality(target, sequence[0].tolist(), "perfect", block_size=7)
    eos = _first_at(sequence, 5)
    for length in range(PROMPT_LENGTH + 2, PROMPT_LENGTH + 12, 3):
        kwargs = {"eos_token_id": eos, "pad_token_id": 0, "stopping_criteria": [_OnLength(length)]}
        stopped = plain(target, prompt, max_new_tokens=NEW_TOKENS, **kwargs)
        assert speculate(target, draft, prompt, max_new_tokens=NEW_TOKENS, **kwargs).tolist() == stopped.tolist()


def test_prompt_that_fills_the_length_limit_ends_as_in_plain_generate(target, prompt):
    draft = make_tiny_draft(target)
    for kwargs in ({"max_length": PROMPT_LENGTH}, {"max_length": PROMPT_LENGTH - 2}, {"max_new_tokens": 0}):
        outcomes = []
        for generate in (plain, lambda target, ids, **kwargs: speculate(target, draft, ids, **kwargs)):
            try:
                outcomes.append(generate(target, prompt, **kwargs).tolist())
            except ValueError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]
