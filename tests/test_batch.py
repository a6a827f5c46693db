"""Several rows in one generate() call: each is what plain generate() says of it, round by round as if alone."""

from itertools import zip_longest

import pytest
import torch
from tiny import HEADS, KINDS, QUALITIES, NextToken, make_tiny_draft, make_tiny_target, speculate
from tiny_batch import (
    AHEAD,
    LENGTHS,
    MANY,
    NEW_TOKENS,
    Rows,
    assert_as_scripted,
    assert_equal_to_plain,
    make_rows,
    new_tokens_of,
    rounds_of,
)
from transformers import DynamicCache

from hf_dspark import ConfidenceThreshold, CostTable, FixedLength, ThroughputSchedule
from hf_dspark.compat import CACHE
from hf_dspark.schedule import DraftGate

BATCHED = [kind for kind in KINDS if kind != "lfm2"]


@pytest.mark.core
@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("kind", BATCHED)
def test_greedy_rows_equal_plain_and_rounds_are_as_good_as_the_draft(kind, quality):
    """Past the sliding window; 2, 3 or 16 rows with left padding."""
    rows = make_rows(kind, {"garbage": (1, 14), "noisy": MANY}.get(quality, LENGTHS))
    assert_equal_to_plain(rows, quality)


@pytest.mark.core
@pytest.mark.parametrize("attention", ["eager", "sdpa", "dspark"])
@pytest.mark.parametrize("kind", ["qwen3", "mistral", "deepseek_v3", "gemma2", "gpt_oss"])
def test_attention_of_the_users_choice_gives_the_same_rows(kind, attention):
    if kind in ("gemma2", "gpt_oss") and attention == "sdpa":
        pytest.skip("transformers refuses it: sdpa knows neither soft-caps nor sinks")
    rows = make_rows(kind, attention=attention)
    draft = rows.draft("near-perfect")
    output = rows.speculate(draft)
    assert output.sequences.tolist() == rows.said[:, :-AHEAD].tolist()
    assert_as_scripted(rows, draft, output)


@pytest.mark.core
@pytest.mark.parametrize("quality", ["noisy", "perfect"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "gpt_oss", "phi3"])
def test_rows_end_at_stop_tokens_of_their_own_and_are_padded_as_in_plain_generate(kind, quality):
    rows = make_rows(kind, MANY)
    draft = rows.draft(quality)
    eos = [rows.new_token(0, 0), rows.new_token(1, 5), rows.new_token(2, 17)]
    expected = rows.plain(eos_token_id=eos, pad_token_id=7)
    output = rows.speculate(draft, eos_token_id=eos, pad_token_id=7)
    assert output.sequences.tolist() == expected.tolist()
    lengths = {len(new) for new in new_tokens_of(expected, eos, max(MANY))}
    assert 1 in lengths  # the prefill's token
    assert len(lengths) >= 4
    assert_as_scripted(rows, draft, output, eos)


@pytest.mark.core
@pytest.mark.parametrize("quality", ["garbage", "perfect"])
@pytest.mark.parametrize("count", [1, 2, 3, 6, 11])
def test_number_of_tokens_is_exact(count, quality):
    rows = make_rows()
    expected = rows.said[:, : max(LENGTHS) + count].tolist()
    draft = rows.draft(quality)
    assert rows.speculate(draft, max_new_tokens=count).sequences.tolist() == expected
    limit = {"max_new_tokens": None, "max_length": max(LENGTHS) + count}
    assert rows.speculate(draft, **limit).sequences.tolist() == expected


def test_all_rows_may_end_with_the_first_token():
    rows = make_rows()
    eos = [rows.new_token(row, 0) for row in range(len(LENGTHS))]
    output = rows.speculate(rows.draft(), eos_token_id=eos)
    assert output.sequences.tolist() == rows.plain(eos_token_id=eos).tolist()
    assert output.rounds == ()
    assert output.stats.tokens == len(LENGTHS)


def test_perfect_and_wrong_rows_go_on_at_their_own_pace():
    lengths = (4, 7, 2, 7)
    rows = make_rows("gemma3_text", lengths, seed=3)
    draft = rows.draft([0.0, 1.0, 0.2, 0.0], block_size=7)
    output = rows.speculate(draft)
    assert output.sequences.tolist() == rows.said[:, :-AHEAD].tolist()
    assert_as_scripted(rows, draft, output)
    counts = [len(rounds_of(output, row)) for row in range(len(lengths))]
    assert counts[1] > 3 * counts[0]


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_rows_longer_than_the_cache_grows_at_once_equal_plain(kind):
    rows = make_rows(kind, (3, 6), seed=4, max_position_embeddings=1024)
    expected = rows.plain(max_new_tokens=330)
    draft = rows.draft("perfect", block_size=7).follow_rows(rows.unpadded(expected), [0.0, 0.3])
    assert rows.speculate(draft, max_new_tokens=330).sequences.tolist() == expected.tolist()
    assert draft.last_stats.tau > 3


@pytest.mark.core
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
@pytest.mark.parametrize("beyond", [0, 1])
def test_learned_positions_are_used_to_the_very_last(kind, beyond):
    """The last token is never read, so one more than there are positions can be made."""
    num_positions = 9 + NEW_TOKENS + AHEAD - 1  # for all that scripts know
    shape = {"n_positions": num_positions, "n_embd": 32, "n_head": 4, "n_layer": 4} if kind == "gpt2" else {}
    shape |= {"max_position_embeddings": num_positions, "word_embed_proj_dim": 32, "ffn_dim": 48}
    rows = make_rows(kind, (9, 5), seed=5, **shape)
    limit = {"max_new_tokens": num_positions - 9 + beyond}
    for quality in QUALITIES:
        output = rows.speculate(rows.draft(quality, block_size=7), **limit)
        assert output.sequences.tolist() == rows.plain(**limit).tolist()


# A row and its neighbours


def _alone(rows, draft, row: int, **kwargs):
    """The same row in a call of its own."""
    ids = rows.prompts["input_ids"][row : row + 1, max(rows.lengths) - rows.lengths[row] :]
    settings = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 0, "return_dict_in_generate": True}
    return speculate(rows.target, draft, ids, **(settings | kwargs))


DRAFTS = {
    **{f"head {head}": {"head": head} for head in HEADS},
    "embedding and last layer": {"taps": (-1, 1, 3)},
    "two layers, the first mask predicts": {"num_hidden_layers": 2, "first_slot": 1},
    "causal": {"causal": True, "block_size": 6},
    "sliding": {"num_hidden_layers": 2, "layer_types": ["sliding_attention"] * 2, "sliding_window": 3},
    "sliding and full, causal, sinks": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 4,
        "causal": True,
        "attention_sinks": True,
    },
    "block of one token": {"block_size": 1},
    "draft vocabulary": {"draft_vocab_size": 20},
}


@pytest.mark.core
@pytest.mark.parametrize("schedule", [FixedLength(), ConfidenceThreshold(0.2)], ids=["whole blocks", "ragged"])
@pytest.mark.parametrize("name", DRAFTS)
def test_each_row_drafts_and_accepts_what_it_would_alone(name, schedule):
    """What a draft says of its own depends on every part of the context it has read."""
    rows = make_rows("gemma3_text", (5, 9, 2, 16), seed=6)
    draft = make_tiny_draft(rows.target, seed=3, draft_class=NextToken, **DRAFTS[name])
    if draft.config.draft_vocab_size is None:
        draft.follow_rows(rows.unpadded(rows.said), 0.0)
    else:
        draft.set_draft_tokens(torch.arange(20) * 3)
    eos = [rows.new_token(1, 9), rows.new_token(3, 20)]
    output = rows.speculate(draft, eos_token_id=eos, schedule=schedule)
    assert output.sequences.tolist() == rows.plain(eos_token_id=eos).tolist()
    accepted = rejected = 0
    for row in range(4):
        alone = _alone(rows, draft, row, eos_token_id=eos, schedule=schedule).rounds
        together = [r for r in output.rounds if r.row == row]
        assert [r.emitted for r in together] == [r.emitted for r in alone]
        for ours, theirs in zip(together, alone, strict=True):  # alone, the last blocks are cut to what has room
            assert ours.drafted[: len(theirs.drafted)] == theirs.drafted
            assert ours.verified >= theirs.verified
            accepted += ours.accepted
            rejected += ours.verified - ours.accepted
    if schedule.needs_confidence:
        assert len({r.verified for r in output.rounds}) > 1
    else:
        assert rejected > 10
        assert accepted > 10 or name == "draft vocabulary"  # which is left to its own opinion


@pytest.mark.core
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_order_and_company_of_rows_leave_each_row_alone(kind):
    rows = make_rows(kind, MANY[:6])
    draft = rows.draft("noisy")
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 4], [3, 1], [1, 1, 3, 1]):
        prompts = {name: tensor[order] for name, tensor in rows.prompts.items()}
        output = rows.speculate(draft, **prompts)
        assert output.sequences.tolist() == rows.said[order, :-AHEAD].tolist()
        for place, row in enumerate(order):
            assert rounds_of(output, place) == rounds_of(_alone(rows, draft, row), 0)


@pytest.mark.core
def test_ended_rows_are_in_no_later_forward_and_nothing_is_read_twice():
    rows = make_rows("qwen3", MANY)
    draft = rows.draft("near-perfect")
    eos = [rows.new_token(0, 0), rows.new_token(1, 5), rows.new_token(2, 17)]
    shapes = {"target": [], "draft": []}
    hooks = [
        rows.target.get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda module, args, kwargs: shapes["target"].append(tuple(args[0].shape[:2])), with_kwargs=True
        ),
        draft.register_forward_pre_hook(lambda module, args: shapes["draft"].append(tuple(args[0].shape[:2]))),
    ]
    output = rows.speculate(draft, eos_token_id=eos, use_cache=False)
    for hook in hooks:
        hook.remove()
    ends = new_tokens_of(output.sequences, eos, max(MANY))
    rounds = [rounds_of(output, row) for row in range(len(MANY))]
    live = [sum(len(row) > i for row in rounds) for i in range(max(map(len, rounds)))]
    assert [num_rows for num_rows, _ in shapes["target"]] == [len(MANY), *live]
    assert [num_rows for num_rows, _ in shapes["draft"]] == live[: len(shapes["draft"])]
    assert len(live) - len(shapes["draft"]) <= 1  # a last round for one token a row drafts nothing
    assert max(width for _, width in shapes["target"][1:]) == draft.config.block_size + 1
    assert live[-1] < live[0] < len(MANY)  # one ended with the prefill's token, others on the way
    assert sum(map(sum, rounds)) == sum(len(new) - 1 for new in ends)


# What users give


COSTS = CostTable([1, 4, 16, 64], [10.0, 9.0, 7.0, 3.0], 64)
OPEN = DraftGate(COSTS, patience=1e9)  # whatever rounds take here
SCHEDULES = {
    "confidence": ConfidenceThreshold(0.5),
    "throughput": ThroughputSchedule(COSTS, gate=OPEN),
    "throughput, padded": ThroughputSchedule(COSTS, packed=False, gate=OPEN),
    "throughput, asynchronous": ThroughputSchedule(COSTS, mode="asynchronous", num_tokens=3, gate=OPEN),
    "none": FixedLength(0),
    "two": FixedLength(2),
}


@pytest.mark.core
@pytest.mark.parametrize("kwargs", [{}, {"repetition_penalty": 1.3}], ids=["plain", "penalty"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_verify_lengths_may_differ_from_row_to_row(name, kwargs):
    rows = make_rows("gemma3_text", MANY)
    draft = rows.draft("noisy")
    output = rows.speculate(draft, schedule=SCHEDULES[name], **kwargs)
    assert output.sequences.tolist() == rows.plain(**kwargs).tolist()
    assert all(r.accepted <= r.verified for r in output.rounds)
    rounds = zip_longest(*([r for r in output.rounds if r.row == row] for row in range(len(MANY))))
    is_ragged = any(len({r.verified for r in records if r is not None}) > 1 for records in rounds)
    assert is_ragged == (name in {"confidence", "throughput", "throughput, asynchronous"})


@pytest.mark.core
@pytest.mark.parametrize(
    "kwargs",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 7, "eos_token_id": list(range(1, 60, 3))},
        {"min_length": 14, "eos_token_id": list(range(1, 60, 3))},
        {"exponential_decay_length_penalty": (4, 1.8), "eos_token_id": [3, 9]},
        {"bad_words_ids": [[5, 6], [9]], "suppress_tokens": [11, 12]},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "eos_token_id": [8, 20, 30]},
    ],
    ids=lambda kwargs: ", ".join(kwargs),
)
@pytest.mark.parametrize("schedule", [FixedLength(), ConfidenceThreshold(0.5)], ids=["whole blocks", "ragged"])
def test_processors_that_read_the_prefix_equal_plain_with_left_padding(kwargs, schedule):
    """transformers hands some of them a number for every row of the call, ended or not."""
    rows = make_rows("qwen3", MANY)
    expected = rows.plain(**kwargs)
    draft = rows.draft("noisy").follow_rows(rows.unpadded(expected), 0.3)
    output = rows.speculate(draft, schedule=schedule, **kwargs)
    assert output.sequences.tolist() == expected.tolist()
    assert output.sequences[:, max(MANY) :].tolist() != rows.said[:, max(MANY) : expected.shape[1]].tolist()
    assert draft.last_stats.tau > 1.3


@pytest.mark.core
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_prompts_are_read_in_every_way_that_plain_generate_knows(kind):
    rows = make_rows(kind)
    draft = rows.draft("near-perfect")
    expected = rows.said[:, :-AHEAD].tolist()
    config = rows.target.config
    embeds = rows.target.get_input_embeddings()(rows.prompts["input_ids"])
    for kwargs in (
        {"prefill_chunk_size": 4},
        {"use_cache": False},
        {CACHE: DynamicCache(config=config)},
        {CACHE: DynamicCache()},
        {"attention_mask": None},  # the padding's token is in the prompts
    ):
        assert rows.speculate(draft, **kwargs).sequences.tolist() == expected, kwargs
        assert draft.last_stats.tau > 2, kwargs
    output = rows.speculate(draft, input_ids=None, inputs_embeds=embeds)
    assert output.sequences.tolist() == rows.said[:, max(LENGTHS) : -AHEAD].tolist()
    assert draft.last_stats.tau > 2


def test_token_of_the_padding_may_stand_in_prompts():
    rows = make_rows("qwen3", (6, 6))
    ids = rows.prompts["input_ids"].clone()
    ids[0, 2], ids[1, 4] = 0, 0
    draft = rows.draft("noisy")
    for mask in ({"attention_mask": torch.ones_like(ids)}, {"attention_mask": None}):  # None: zeros where it stands
        kwargs = {"input_ids": ids, **mask}
        assert rows.speculate(draft, **kwargs).sequences.tolist() == rows.plain(**kwargs).tolist()


@pytest.mark.core
def test_several_answers_to_one_prompt_are_rows():
    rows = make_rows()
    draft = rows.draft("noisy")
    kwargs = {"num_return_sequences": 3, "do_sample": True, "top_k": 1}
    output = rows.speculate(draft, **kwargs)
    assert output.sequences.tolist() == rows.said[:, :-AHEAD].repeat_interleave(3, 0).tolist()
    torch.manual_seed(1)
    answers = rows.speculate(draft, **(kwargs | {"top_k": 0, "temperature": 3.0})).sequences.tolist()
    assert len({tuple(answer) for answer in answers}) == 9


def test_positions_of_the_users_own_are_gone_on_from():
    shape = {"n_positions": 256, "n_embd": 32, "n_head": 4, "n_layer": 4}
    rows = make_rows("gpt2", **shape)
    positions = (rows.prompts["attention_mask"].cumsum(-1) - 1).clamp_min(0) + torch.tensor([[3], [0], [40]])
    draft = make_tiny_draft(rows.target, seed=2)
    expected = rows.plain(position_ids=positions)
    assert expected.tolist() != rows.said[:, :-AHEAD].tolist()
    assert rows.speculate(draft, position_ids=positions).sequences.tolist() == expected.tolist()


# What is refused


def _refused(rows, match, draft=None, **kwargs):
    with pytest.raises(ValueError, match=match):
        rows.speculate(draft or make_tiny_draft(rows.target), **kwargs)


@pytest.mark.core
@pytest.mark.parametrize(
    ("kind", "match", "fields"),
    [
        ("lfm2", "'conv'", {}),
        ("qwen3_next", "Qwen3NextForCausalLM, which keeps a state", {}),
        ("llama4_text", "'chunked_attention'", {}),
        ("gpt_neo", "'local'", {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_heads": 4}),
        ("bloom", "ALiBi", {"n_head": 4, "n_layer": 4}),
    ],
)
def test_targets_that_cannot_hold_rows_of_different_lengths_are_refused_by_name(kind, match, fields):
    target = make_tiny_target(kind, **fields)
    prompt = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with pytest.raises(ValueError, match=match):
        speculate(target, make_tiny_draft(target), prompt, max_new_tokens=4)


def test_what_several_rows_cannot_have_is_refused_before_any_forward():
    rows = Rows(make_tiny_target(), LENGTHS, make_rows().prompts, make_rows().said)
    other = make_tiny_target(seed=1)
    other.config._attn_implementation = "paged|eager"
    for target in (rows.target, other):
        target.get_decoder().layers[0].register_forward_pre_hook(lambda *args: pytest.fail("a forward ran"))
    mask = rows.prompts["attention_mask"]
    _refused(rows, "padding in front: `attention_mask` has a 0 behind a 1", attention_mask=mask.flip(1))
    _refused(rows, "`output_attentions`", output_attentions=True)
    with pytest.raises(ValueError, match='attn_implementation="paged\\|eager"'):
        other.generate(**rows.prompts, assistant_model=make_tiny_draft(other), max_new_tokens=4)
    decode = make_tiny_draft(rows.target).as_custom_generate(loop="transformers")
    with pytest.raises(ValueError, match="several sequences at once"):
        rows.target.generate(**rows.prompts, custom_generate=decode, max_new_tokens=4)


def test_gaps_between_tokens_are_refused_where_the_target_has_sliding_windows():
    rows = make_rows("gemma3_text")
    mask = rows.prompts["attention_mask"].clone()
    mask[1, 4] = 0
    _refused(rows, "none between tokens where the target has sliding windows", attention_mask=mask)


@pytest.mark.parametrize("lengths", [(7,), (5, 9, 2)], ids=["one row", "rows"])
def test_no_position_is_behind_the_block_and_the_targets_are_where_there_is_room(lengths):
    """Rope that scales with the longest position (dynamic, longrope) would change with any that no token has."""
    rows, seen = make_rows("qwen3", lengths), {"target": [], "draft": []}
    draft = rows.draft("noisy")
    hooks = [
        draft.register_forward_pre_hook(lambda _, args: seen["draft"].append(int(args[2].max()))),
        rows.target.get_decoder().register_forward_pre_hook(
            lambda _, args, kwargs: seen["target"].append(int(kwargs["position_ids"].max())), with_kwargs=True
        ),
    ]
    rows.speculate(draft, eos_token_id=rows.new_token(0, 9) if len(lengths) > 1 else None)
    for hook in hooks:
        hook.remove()
    room = max(lengths) + NEW_TOKENS
    assert 0 < max(seen["target"]) <= room - 2  # the last token is never read
    assert 0 < max(seen["draft"]) <= room - 1 + draft.config.num_block_inputs
    assert len(seen["draft"]) > 5
