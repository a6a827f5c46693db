"""Triton twins of the sampler and of the acceptance against the plain functions, which are their specification.

The test of a law raises a false alarm with probability 1e-4 for one choice of seeds; a planted bias is found at 1e-6.
"""

from typing import NamedTuple

import pytest
import torch
from kernel_cases import DEVICES, assert_close
from scipy.stats import chisquare
from tiny import make_tiny_draft, make_tiny_target, plain, random_prompt, speculate

from hf_dspark import dispatch
from hf_dspark.accept import accept_and_draw, accept_prefix
from hf_dspark.draft import sample_block
from hf_dspark.sampling import TemperatureSampler, search, softmax_at

kernels = pytest.importorskip("hf_dspark.kernels")
FALSE_ALARM, FOUND = 1e-4, 1e-6
on_devices = pytest.mark.parametrize("device", DEVICES)


class Block(NamedTuple):
    """A block that is sampled, and how far its logits may be from the plain function's, relative to the largest."""

    vocab_size: int
    rows: int
    temperature: float | None  # None: greedy
    dtype: torch.dtype
    tolerance: float
    reason: str
    rank: int = 8
    num_draft_tokens: int | None = None  # of a draft with a vocabulary of its own


ORDER, ROUNDED = "the sums are taken in another order", "and then rounded to the head's dtype"
BLOCKS = {
    "one tile": Block(50, 3, None, torch.float32, 1e-6, ORDER),
    "three tiles": Block(600, 2, 0.7, torch.float32, 1e-6, ORDER),
    "more rows than a program holds": Block(300, 18, 1.0, torch.float32, 1e-6, ORDER),
    "rank of several loads": Block(300, 2, 1.3, torch.float32, 1e-6, ORDER, rank=72),
    "bfloat16": Block(300, 3, 0.7, torch.bfloat16, 2**-8, f"{ORDER}, {ROUNDED}", rank=72),
    "float16, greedy": Block(300, 3, None, torch.float16, 2**-11, f"{ORDER}, {ROUNDED}"),
    "draft vocabulary": Block(600, 3, 1.0, torch.float32, 1e-6, ORDER, num_draft_tokens=340),
    "draft vocabulary, greedy": Block(
        600, 3, None, torch.bfloat16, 2**-8, f"{ORDER}, {ROUNDED}", num_draft_tokens=340
    ),
}


def _draft_of(block: Block, **kwargs):
    own = {} if block.num_draft_tokens is None else {"draft_vocab_size": block.num_draft_tokens}
    draft = make_tiny_draft(make_tiny_target(vocab_size=block.vocab_size), rank=block.rank, **own, **kwargs)
    generator = torch.Generator().manual_seed(1)
    if own:
        chosen = torch.randperm(block.vocab_size, generator=generator)[: block.num_draft_tokens]
        draft.set_draft_tokens(chosen.sort().values)
    with torch.no_grad():
        for parameter in draft.markov_head.parameters():
            parameter.normal_(std=block.rank**-0.25, generator=generator)
    return draft.to(block.dtype)


def _arguments_of(block: Block, device: str, num_tokens: int = 4):
    generator = torch.Generator().manual_seed(2)
    draft = _draft_of(block).to(device)
    shape = (block.rows, num_tokens, block.num_draft_tokens or block.vocab_size)
    base_logits = torch.randn(shape, generator=generator)
    anchor_ids = torch.randint(0, block.vocab_size, (block.rows, 1), generator=generator)
    sampler = TemperatureSampler()
    if block.temperature is not None:
        uniforms = torch.rand(block.rows, num_tokens, generator=generator, dtype=torch.double)
        sampler = TemperatureSampler(block.temperature, uniforms.to(device))
    states = torch.zeros(block.rows, num_tokens, draft.config.hidden_size, device=device)
    return base_logits.to(device), anchor_ids.to(device), states, draft, sampler


@on_devices
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_logits_are_the_plain_functions_and_tokens_are_chosen_from_the_very_logits_stored(name, device):
    """Tokens are taken as chosen: in low precision one may differ at a near-tie, and then all behind it would."""
    block = BLOCKS[name]
    base_logits, anchor_ids, states, draft, sampler = _arguments_of(block, device)
    assert kernels.why_not_sample_block(base_logits, anchor_ids, states, draft, sampler) is None
    token_ids, draft_logits, law = kernels.sample_block(base_logits, anchor_ids, states, draft, sampler)
    assert law is None
    assert len(token_ids.unique()) > 2
    previous = torch.cat([anchor_ids, token_ids[:, :-1]], dim=1)
    for k in range(token_ids.shape[1]):
        bias, _ = draft.markov_head(previous[:, k], None, None)
        expected = draft.to_target_vocabulary(base_logits[:, k] + bias.float())
        is_possible = expected > -torch.inf
        assert torch.equal(draft_logits[:, k] > -torch.inf, is_possible)
        assert_close(draft_logits[:, k][is_possible], expected[is_possible], block.tolerance)
        chosen, _ = sampler(draft_logits[:, k], token_ids[:, :k])
        assert token_ids[:, k].tolist() == chosen.tolist()


@on_devices
@torch.no_grad()
def test_a_uniform_at_either_end_draws_a_token_the_draft_can_propose(device):
    block = Block(300, 2, 1.0, torch.float32, 0, "", num_draft_tokens=170)
    base_logits, anchor_ids, states, draft, _ = _arguments_of(block, device)
    ends = torch.tensor([[0.0], [1 - 2.0**-53]], dtype=torch.double, device=device).expand(-1, 4)
    token_ids, _, _ = kernels.sample_block(base_logits, anchor_ids, states, draft, TemperatureSampler(1.0, ends))
    assert token_ids.tolist() == [[draft.draft_token_ids[i].item()] * 4 for i in (0, -1)]


class Verified(NamedTuple):
    """Laws of `length` drafted tokens: logits of deviation `spread`, of which target and draft share `common`."""

    vocab_size: int
    length: int
    rows: int
    temperature: float = 1.0
    spread: float = 2.0
    common: float = 0.8
    num_draft_tokens: int | None = None  # the draft proposes only the first ones
    has_limits: bool = False  # of each row, only some drafted tokens are considered


# Lengths and tokens are the plain function's, all of them: tolerance 0, because a decision differs only where a
# uniform number lies within 1e-6 of a bound, and with these seeds none does.
VERIFIED = {
    "short": Verified(24, 1, 560, common=0.5),
    "a block": Verified(24, 4, 160),
    "cold and peaked": Verified(24, 5, 120, temperature=0.3, common=0.9),
    "three tiles": Verified(5000, 3, 60, temperature=0.7),
    "tiles without a drafted token": Verified(5000, 2, 60, num_draft_tokens=1500),
    "nothing drafted": Verified(24, 0, 60),
    "rows with limits": Verified(24, 3, 60, has_limits=True),
}


def _laws_of(case: Verified, device: str, seed: int = 0):
    """Logits of target and draft (slices of longer ones), tokens drawn from the draft, and uniforms."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.rows, case.length + 2, case.vocab_size)
    shared, target, draft = (torch.randn(shape, generator=generator) * case.spread for _ in range(3))
    target, draft = ((case.common * shared + (1 - case.common) * own)[:, 1:] for own in (target, draft))
    draft = draft[:, : case.length]
    if case.num_draft_tokens is not None:
        draft[..., case.num_draft_tokens :] = -torch.inf
    draft_probs = softmax_at(case.temperature, draft)
    draft_ids = torch.empty(case.rows, 0, dtype=torch.long)
    if case.length:
        draft_ids = draft_probs.flatten(0, 1).multinomial(1, generator=generator).view(case.rows, -1)
    uniforms = torch.rand(draft_ids.shape, generator=generator)
    return target.to(device), draft_ids.to(device), draft.to(device), uniforms.to(device)


def _expected(target_logits, draft_ids, draft_logits, uniforms, temperature, next_uniforms, limits):
    """Accepted lengths, and the token after them that the plain functions draw by one uniform number."""
    probs = (softmax_at(temperature, logits) for logits in (draft_logits, target_logits))
    acceptance = accept_prefix(draft_ids, *probs, uniforms, limits)
    return acceptance.num_accepted, search(acceptance.next_probs, next_uniforms)


def test_the_table_decides_on_a_thousand_rows():
    assert sum(case.rows for case in VERIFIED.values()) >= 1000


@on_devices
@pytest.mark.parametrize("name", VERIFIED)
def test_acceptance_keeps_as_many_tokens_and_draws_the_same_next_one_as_the_plain_function(name, device):
    case = VERIFIED[name]
    laws = _laws_of(case, device)
    generators = [torch.Generator(device).manual_seed(7) for _ in range(2)]
    limits = torch.arange(case.rows, device=device) % (case.length + 1) if case.has_limits else None
    assert kernels.why_not_accept_and_draw(*laws, case.temperature, generators[0], limits) is None
    choice = kernels.accept_and_draw(*laws, case.temperature, generators[0], limits)
    next_uniforms = torch.rand(case.rows, dtype=torch.double, device=device, generator=generators[1])
    num_accepted, next_ids = _expected(*laws, case.temperature, next_uniforms, limits)
    assert choice.num_accepted.tolist() == num_accepted.tolist()
    assert len(num_accepted.unique()) == case.length + 1
    for row, (kept, next_id) in enumerate(zip(num_accepted.tolist(), next_ids.tolist(), strict=True)):
        assert choice.token_ids[row, : kept + 1].tolist() == [*laws[1][row, :kept].tolist(), next_id]


@on_devices
def test_acceptance_takes_three_launches(device, monkeypatch):
    launched = []
    names = ["summarise_kernel", "decide_kernel", "draw_kernel"]
    for name in names:
        kernel = getattr(kernels.triton_acceptance, name)
        run = kernel.run
        monkeypatch.setattr(
            kernel, "run", lambda *a, _run=run, _name=name, **k: launched.append(_name) or _run(*a, **k)
        )
    kernels.accept_and_draw(*_laws_of(Verified(24, 4, 1), device), 1.0, None)
    assert launched == names


@on_devices
def test_uniform_of_zero_accepts_no_token_of_probability_zero_and_none_is_drawn(device):
    target_logits = torch.tensor([-torch.inf, 0.0, 1.0]).expand(50, 2, -1).to(device)
    draft_logits = torch.tensor([3.0, 0.0, 0.0]).expand(50, 1, -1).to(device)
    zeros = torch.zeros(50, 1, device=device)
    choice = kernels.accept_and_draw(target_logits, zeros.long(), draft_logits, zeros, 1.0, None)
    assert choice.num_accepted.tolist() == [0] * 50
    assert set(choice.token_ids[:, 0].tolist()) == {1, 2}
    possible = kernels.accept_and_draw(target_logits, zeros.long() + 1, draft_logits, zeros, 1.0, None)
    assert possible.num_accepted.tolist() == [1] * 50


@on_devices
def test_next_token_at_a_uniform_of_zero_is_one_the_target_can_produce(device, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, generator, **options: torch.zeros(*shape, **options))
    target_logits = torch.tensor([-torch.inf, 0.0, 1.0]).expand(2, 1, -1).to(device)
    nothing = torch.zeros(2, 0, device=device)
    choice = kernels.accept_and_draw(target_logits, nothing.long(), target_logits[:, :0], nothing, 1.0, None)
    assert choice.token_ids.tolist() == [[1], [1]]


@on_devices
def test_rejection_without_residual_mass_draws_from_the_targets_law(device):
    logits = torch.tensor([-30.0, 0.0, 0.0, -torch.inf]).expand(40, 3, -1).to(device)
    # A uniform of 1, which cannot be, stands for a draft law above the target's by rounding alone.
    ones = torch.ones(40, 2, device=device)
    choice = kernels.accept_and_draw(logits, ones.long(), logits[:, :2], ones, 1.0, None)
    assert choice.num_accepted.tolist() == [0] * 40
    assert set(choice.token_ids[:, 0].tolist()) == {1, 2}


def _p_value_of_first_token(device: str, rows: int, *, told: float = 1.0) -> float:
    """Chi-square of the token emitted first; the acceptance is told the draft's logits times `told`."""
    one_row = _laws_of(Verified(8, 1, 1, spread=1.0, common=0.3), "cpu", seed=5)
    target_logits, draft_logits = (logits.expand(rows, -1, -1) for logits in one_row[::2])
    generator = torch.Generator().manual_seed(5)
    draft_ids = draft_logits[:, 0].softmax(-1).multinomial(1, generator=generator)
    uniforms = torch.rand(draft_ids.shape, generator=generator)
    arguments = (target_logits, draft_ids, draft_logits * told, uniforms)
    noise = torch.Generator(device).manual_seed(6)
    choice = kernels.accept_and_draw(*(tensor.to(device) for tensor in arguments), 1.0, noise)
    counts = choice.token_ids[:, 0].cpu().bincount(minlength=8).double()
    expected = target_logits[0, 0].double().softmax(-1) * rows
    assert expected.min() >= 5
    return chisquare(counts, expected * counts.sum() / expected.sum()).pvalue


@on_devices
def test_emitted_token_has_the_targets_law(device):
    assert _p_value_of_first_token(device, 1000) > FALSE_ALARM


@on_devices
def test_logits_other_than_those_sampled_from_are_found_in_the_law(device):
    assert _p_value_of_first_token(device, 400, told=0.3) < FOUND


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head": "gated"}, "another head"),
        ({"head": "rnn"}, "another head"),
        ({"head": "none"}, "no sequential head"),
        ({"dtype": torch.float64}, "float64"),
        ({"offloaded": True}, "offloaded"),
        ({"adapted": True}, "adapted"),
        ({"sampler": lambda logits, drafted_ids: None}, "processors"),
        ({"logits": torch.bfloat16}, "bfloat16"),
        ({}, "gradient"),
    ],
)
def test_sampler_says_what_it_does_not_serve(change, reason):
    block = BLOCKS["one tile"]
    base_logits, anchor_ids, states, _, sampler = _arguments_of(block, "cpu")
    draft = make_tiny_draft(make_tiny_target(vocab_size=50), head=change.get("head", "vanilla"))
    draft = draft.to(change.get("dtype", torch.float32))
    if "offloaded" in change:
        draft.markov_head.to("meta")
    if "adapted" in change:
        draft.markov_head.markov_w2 = torch.nn.Sequential(draft.markov_head.markov_w2)
    arguments = (base_logits.to(change.get("logits", torch.float32)), anchor_ids, states, draft)
    assert reason in kernels.why_not_sample_block(*arguments, change.get("sampler", sampler))


def test_acceptance_says_what_it_does_not_serve():
    target_logits, draft_ids, draft_logits, uniforms = _laws_of(VERIFIED["short"], "cpu")
    rest = (uniforms, 1.0, None)
    assert "float64" in kernels.why_not_accept_and_draw(target_logits.double(), draft_ids, draft_logits, *rest)
    assert "23" in kernels.why_not_accept_and_draw(target_logits, draft_ids, draft_logits[..., :23], *rest)
    assert "devices" in kernels.why_not_accept_and_draw(target_logits, draft_ids.to("meta"), draft_logits, *rest)


@on_devices
@pytest.mark.parametrize(("rows", "own_vocabulary"), [(1, False), (1, True), (3, False)])
def test_generation_with_the_kernels_is_plains_and_they_ran(rows, own_vocabulary, device, kernels_everywhere):
    target = make_tiny_target("qwen3", seed=0).to(device)
    prompt = torch.cat([random_prompt(64, 9, seed) for seed in range(rows)]).to(device)
    draft = make_tiny_draft(target, **({"draft_vocab_size": 40} if own_vocabulary else {})).to(device)
    if own_vocabulary:
        draft.set_draft_tokens(torch.arange(3, 43))
    expected = plain(target, prompt, max_new_tokens=20)
    assert speculate(target, draft, prompt, max_new_tokens=20).tolist() == expected.tolist()
    assert dispatch.report()["sample_block"] == "Triton"


@on_devices
@pytest.mark.parametrize("rows", [1, 2])
def test_seed_governs_what_is_sampled_with_the_kernels_and_they_ran(rows, device, kernels_everywhere):
    target = make_tiny_target("qwen3", seed=0, scale=1.5).to(device)
    prompt = torch.cat([random_prompt(64, 9, seed) for seed in range(rows)]).to(device)
    draft = make_tiny_draft(target).to(device)

    def sample(seed):
        torch.manual_seed(seed)
        settings = {"do_sample": True, "top_k": 0, "temperature": 0.8, "max_new_tokens": 12}
        return target.generate(prompt, assistant_model=draft, **settings).tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert dispatch.report()["sample_block"] == dispatch.report()["accept_and_draw"] == "Triton"


def test_the_plain_functions_are_what_the_decorated_ones_run_without_kernels(monkeypatch):
    monkeypatch.setenv(dispatch.SWITCH, "0")
    dispatch.load_kernels()
    laws = _laws_of(VERIFIED["a block"], "cpu")
    choices = []
    for function in (accept_and_draw, accept_and_draw.__wrapped__):
        choices.append(function(*laws, 1.0, torch.Generator().manual_seed(3)).token_ids.tolist())
    arguments = _arguments_of(BLOCKS["bfloat16"], "cpu")
    with torch.no_grad():
        blocks = [function(*arguments)[1].tolist() for function in (sample_block, sample_block.__wrapped__)]
    assert choices[0] == choices[1]
    assert blocks[0] == blocks[1]
    assert dispatch.report() == {
        name: "not Triton: HF_DSPARK_KERNELS is 0" for name in ("accept_and_draw", "sample_block")
    }
