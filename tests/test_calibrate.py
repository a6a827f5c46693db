"""Sequential temperature scaling: the fit finds what is true, the loop uses it, and files change in one key only."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from tiny import ScriptedDraft, make_tiny_draft, plain, random_prompt, speculate
from tiny_files import save_random_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dspark import ConfidenceThreshold, DSparkConfig, DSparkDraftModel, FixedLength
from hf_dspark.calibrate import (
    Calibration,
    calibrate,
    expected_calibration_error,
    fit_shift,
    fit_temperatures,
    record_confidences,
    survival_probs,
    write_temperatures,
)
from hf_dspark.cli import main
from hf_dspark.draft import draft_block

TRUTH = [2.0, 2.5, 1.4, 1.8]
TEMPERATURES = [0.5, 3.0, 0.25, 2.0]
REPORT = ["temperatures", "dataset", "num_samples", "ece_before", "ece_after", "reliability", "shift"]


def _over_confident(num_rounds=40_000, seed=0):
    """Logits that are TRUTH times the true ones, and outcomes drawn by the true ones."""
    generator = torch.Generator().manual_seed(seed)
    true_logits = 1.2 * torch.randn(num_rounds, 4, generator=generator) + 1.0
    is_kept = torch.rand(num_rounds, 4, generator=generator) < true_logits.sigmoid()
    return true_logits * torch.tensor(TRUTH), is_kept.long().cumprod(-1).bool()


def _prompts(count, length=6):
    return [random_prompt(64, length, seed) for seed in range(count)]


def test_ece_is_the_mean_gap_of_bins_weighted_by_count():
    probs = torch.tensor([[0.05, 0.15], [0.95, 1.0], [0.55, 0.55]])
    outcomes = torch.tensor([[False, True], [True, True], [True, False]])
    below, above = abs(0.2 - 1), abs(0.95 + 1.0 + 0.55 + 0.55 - 3)  # sums of probabilities and of outcomes at 0.5
    assert expected_calibration_error(probs, outcomes, num_bins=2) == pytest.approx((below + above) / 6)
    assert expected_calibration_error(probs[1:], outcomes[1:], num_bins=10) == pytest.approx((0.05 + 0.1) / 4)


def test_ece_has_fifteen_bins_unless_told():
    probs, outcomes = torch.tensor([0.5 / 15, 1.02 / 15]), torch.tensor([True, False])
    assert expected_calibration_error(probs, outcomes) == expected_calibration_error(probs, outcomes, num_bins=15)
    assert expected_calibration_error(probs, outcomes) > expected_calibration_error(probs, outcomes, num_bins=14)


def test_temperatures_recover_a_known_over_confidence():
    logits, accepted = _over_confident()
    temperatures = fit_temperatures(logits, accepted)
    assert temperatures == pytest.approx(TRUTH, rel=0.15)
    other_logits, outcomes = _over_confident(seed=1)
    before = expected_calibration_error(survival_probs(other_logits), outcomes)
    after = expected_calibration_error(survival_probs(other_logits, temperatures), outcomes)
    assert before > 0.05
    assert after <= before / 3


def test_survival_is_the_product_of_calibrated_confidences():
    logits, _ = _over_confident(50)
    first, second = (logits[:, 0] / 2.0).sigmoid(), (logits[:, 1] / 2.5).sigmoid()
    torch.testing.assert_close(survival_probs(logits, TRUTH)[:, 1].float(), first * second)


def test_positions_are_fitted_left_to_right():
    """A temperature depends on its position and earlier ones only; each minimises the ECE of the product so far."""
    logits, accepted = _over_confident(3000)
    grid = [0.5, 0.7, 1.0, 1.4, 2.0, 2.8]
    fitted = fit_temperatures(logits, accepted, grid=grid)
    assert fit_temperatures(logits[:, :1], accepted[:, :1], grid=grid) == fitted[:1]
    changed = torch.cat([logits[:, :2], -logits[:, 2:]], dim=1)
    assert fit_temperatures(changed, accepted, grid=grid)[:2] == fitted[:2]
    for k in range(4):
        errors = {
            t: expected_calibration_error(survival_probs(logits, [*fitted[:k], t, 1, 1, 1])[:, k], accepted[:, k])
            for t in grid
        }
        assert fitted[k] == min(errors, key=errors.get)
    alone = [fit_temperatures(logits[:, k : k + 1], accepted[:, k : k + 1], grid=grid)[0] for k in range(4)]
    assert alone != fitted  # earlier positions matter


def test_position_without_evidence_keeps_its_temperature():
    assert fit_temperatures(torch.zeros(8, 2), torch.ones(8, 2, dtype=torch.bool)) == [1.0, 1.0]


def test_order_of_confidences_within_a_position_is_kept():
    logits, accepted = _over_confident(2000)
    calibrated = survival_probs(logits[:, :1], fit_temperatures(logits, accepted)[:1])[:, 0]
    assert torch.equal(calibrated.argsort(), logits[:, 0].double().argsort())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 2), torch.zeros(3, 4)), r"\[3, 2\] and \[3, 4\]"),
        ((torch.zeros(0, 2), torch.zeros(0, 2)), "N at least 1"),
    ],
)
def test_fit_without_matching_rounds_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_temperatures(*arguments)


@pytest.mark.parametrize("grid", [[], [0.0, 1.0]])
def test_grid_without_positive_temperatures_is_refused(grid):
    with pytest.raises(ValueError, match="`grid`"):
        fit_temperatures(torch.zeros(3, 2), torch.zeros(3, 2), grid=grid)


@torch.no_grad()
def test_block_is_calibrated_and_its_logits_stay_raw(target):
    raw, calibrated = make_tiny_draft(target), make_tiny_draft(target, confidence_temperatures=TEMPERATURES)
    features = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    blocks = []
    for draft in (raw, calibrated):
        draft.bind_target(target)
        blocks.append(draft_block(draft, features, torch.tensor([5]), draft.new_cache()))
        short = draft_block(draft, features, torch.tensor([5]), draft.new_cache(), num_tokens=2)
        torch.testing.assert_close(short.confidence, blocks[-1].confidence[:, :2])
    assert torch.equal(blocks[0].confidence_logits, blocks[1].confidence_logits)
    assert torch.equal(blocks[0].confidence, blocks[0].confidence_logits.sigmoid())
    expected = (blocks[1].confidence_logits / torch.tensor(TEMPERATURES)).sigmoid()
    torch.testing.assert_close(blocks[1].confidence, expected)


@pytest.mark.core
@pytest.mark.parametrize("loop", ["dspark", "transformers"])
def test_loop_verifies_what_calibrated_confidences_say_and_the_output_is_plain(target, loop):
    schedule, prompt = ConfidenceThreshold(0.75), random_prompt(64, 6)
    kwargs = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    expected = plain(target, prompt, max_new_tokens=40).tolist()
    lengths = {}
    for temperatures in (None, TEMPERATURES):
        draft = make_tiny_draft(target, confidence_temperatures=temperatures)
        decode = draft.as_custom_generate(loop=loop, schedule=schedule)
        output = target.generate(prompt, custom_generate=decode, **kwargs)
        assert output.sequences.tolist() == expected
        drafting = [r for r in output.rounds if r.drafted]
        for r in drafting:
            logits = r.confidence_logits
            scale = torch.tensor(temperatures or [1.0] * 4)[: logits.shape[1]]
            assert r.confidence == pytest.approx((logits / scale).sigmoid()[0].tolist())
            assert r.verified == schedule((logits / scale).sigmoid()).item()
        lengths[temperatures is None] = [r.verified for r in drafting]
    assert lengths[True] != lengths[False]


def test_record_of_a_draft_without_a_confidence_head_has_none(target):
    draft = make_tiny_draft(target, confidence=False)
    rounds = speculate(target, draft, random_prompt(64, 6), max_new_tokens=9, return_dict_in_generate=True).rounds
    assert rounds[0].confidence is None
    assert rounds[0].confidence_logits is None


def test_record_has_whole_blocks_with_raw_logits_and_accepted_prefixes(target):
    draft = make_tiny_draft(target, draft_class=ScriptedDraft, confidence_temperatures=TEMPERATURES)
    prompt = random_prompt(64, 6)
    draft.follow(plain(target, prompt, max_new_tokens=40)[0].tolist(), error_rate=0.3)
    logits, accepted = record_confidences(target, draft, [prompt, prompt], max_new_tokens=30, temperature=0)
    rounds = speculate(
        target, draft, prompt, max_new_tokens=30, schedule=FixedLength(), return_dict_in_generate=True
    ).rounds
    whole = [r for r in rounds if len(r.drafted) == 4]
    assert len(whole) < len(rounds)
    assert torch.equal(logits, torch.cat([r.confidence_logits for r in whole] * 2))
    assert accepted.tolist() == [[r.accepted > k for k in range(4)] for r in whole] * 2
    assert 0 < accepted.double().mean() < 1


def test_recording_ignores_the_draft_s_own_schedule(target, draft):
    draft.generation_config.num_assistant_tokens = 2
    logits, accepted = record_confidences(target, draft, _prompts(1), max_new_tokens=12)
    assert logits.shape == accepted.shape
    assert logits.shape[1] == 4


def test_recording_samples_at_temperature_one_and_by_the_generator_given(target, draft):
    def record(**kwargs):
        generator = torch.Generator().manual_seed(3)
        return record_confidences(target, draft, _prompts(2), max_new_tokens=12, generator=generator, **kwargs)[0]

    assert torch.equal(record(), record(temperature=1.0))
    assert not torch.equal(record()[:4], record(temperature=0)[:4])
    assert not torch.equal(record()[:4], record(temperature=5.0)[:4])


def test_recording_reads_a_prompt_that_contains_the_padding_token(target, draft, monkeypatch):
    monkeypatch.setattr(target.generation_config, "pad_token_id", 7)
    monkeypatch.setattr(target.generation_config, "eos_token_id", 9)
    prompt = torch.tensor([[7, 5, 6, 8]])
    logits, _ = record_confidences(target, draft, [prompt], max_new_tokens=8, temperature=0)
    rounds = speculate(
        target,
        draft,
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        return_dict_in_generate=True,
    ).rounds
    assert torch.equal(logits[:1], rounds[0].confidence_logits)


def test_recording_without_rounds_or_without_a_head_names_the_remedy(target, draft):
    with pytest.raises(ValueError, match="`max_new_tokens` well above 6"):
        record_confidences(target, draft, _prompts(1), max_new_tokens=3)
    with pytest.raises(ValueError, match="no confidence head"):
        record_confidences(target, make_tiny_draft(target, confidence=False), _prompts(1))


def test_calibrate_fits_on_every_second_prompt_and_measures_on_the_others(target, draft):
    prompts = _prompts(5)
    settings = {"max_new_tokens": 24, "temperature": 0}
    result = calibrate(target, draft, prompts, dataset="numbers", **settings)
    fit_logits, fit_accepted = record_confidences(target, draft, prompts[0::2], **settings)
    logits, accepted = record_confidences(target, draft, prompts[1::2], **settings)
    assert result.temperatures == fit_temperatures(fit_logits, fit_accepted)
    assert draft.config.confidence_temperatures == result.temperatures
    assert result.num_samples == len(fit_logits)
    assert result.ece_before == expected_calibration_error(survival_probs(logits), accepted)
    after = survival_probs(logits, result.temperatures)
    assert result.ece_after == expected_calibration_error(after, accepted)
    assert result.dataset == "numbers"
    # Calibrated a second time it starts from the raw head again.
    assert calibrate(target, draft, prompts, dataset="numbers", **settings) == result


def test_reliability_is_the_share_accepted_in_each_bin(target, draft):
    settings = {"max_new_tokens": 24, "temperature": 0}
    result = calibrate(target, draft, _prompts(4), **settings)
    logits, accepted = record_confidences(target, draft, _prompts(4)[1::2], **settings)
    reliability = result.reliability
    edges = reliability["bins"]
    assert edges == pytest.approx([b / 15 for b in range(16)])
    for when, probs in (("before", survival_probs(logits)), ("after", survival_probs(logits, result.temperatures))):
        for low, high, share in zip(edges, edges[1:], reliability[when], strict=False):
            inside = accepted[(low <= probs) & (probs < high)].double()
            assert share == (pytest.approx(inside.mean().item()) if len(inside) else None)
        assert reliability[f"ece_{when}"] == getattr(result, f"ece_{when}")


def test_calibrate_needs_two_prompts(target, draft):
    with pytest.raises(ValueError, match="at least 2"):
        calibrate(target, draft, _prompts(1))


def test_json_has_the_keys_other_engines_read():
    result = Calibration([1.5, 2.0], "numbers", 7, 0.1, 0.02, {"bins": [], "before": [None], "after": []})
    written = json.loads(result.to_json())
    assert list(written) == REPORT
    assert written["temperatures"] == [1.5, 2.0]
    assert written["reliability"] == {"bins": [], "before": [None], "after": []}


def test_shift_takes_away_what_temperatures_cannot():
    logits, accepted = _over_confident()
    true_logits = logits / torch.tensor(TRUTH)
    shifted = true_logits + 0.9  # too sure of everything, by the same
    assert fit_shift(shifted, accepted) == pytest.approx(-0.9, abs=0.03)
    assert fit_shift(true_logits, accepted) == pytest.approx(0.0, abs=0.03)
    alone = survival_probs(shifted, fit_temperatures(shifted, accepted))
    back = shifted + fit_shift(shifted, accepted)
    both = survival_probs(back, fit_temperatures(back, accepted))
    before, after_alone, after_both = (
        expected_calibration_error(probs, accepted) for probs in (survival_probs(shifted), alone, both)
    )
    assert after_both < before / 10
    assert after_alone > 3 * after_both


def test_calibrated_with_a_shift_the_loop_adds_it_and_without_one_it_is_gone(target, draft):
    prompts, settings = _prompts(8), {"max_new_tokens": 24, "temperature": 0}
    raw, accepted = record_confidences(target, draft, prompts[0::2], **settings)
    result = calibrate(target, draft, prompts, with_shift=True, **settings)
    assert result.shift == fit_shift(raw, accepted) != 0.0
    assert result.temperatures == fit_temperatures(raw + result.shift, accepted)
    assert draft.config.confidence_shift == result.shift
    output = speculate(target, draft, prompts[0], max_new_tokens=24, return_dict_in_generate=True)
    expected = ((raw[0].double() + result.shift) / torch.tensor(result.temperatures)).sigmoid()
    assert output.rounds[0].confidence == pytest.approx(expected.tolist(), abs=1e-5)
    assert calibrate(target, draft, prompts, **settings).shift == 0.0
    assert draft.config.confidence_shift == 0.0


def test_shift_is_written_beside_the_temperatures_and_taken_back(tmp_path, target):
    make_tiny_draft(target).save_pretrained(tmp_path)
    write_temperatures(TEMPERATURES, tmp_path, shift=-0.4)
    assert DSparkDraftModel.from_pretrained(tmp_path).config.confidence_shift == -0.4
    write_temperatures(TEMPERATURES, tmp_path)
    assert DSparkDraftModel.from_pretrained(tmp_path).config.confidence_shift == 0.0


@pytest.mark.core
def test_temperatures_survive_save_and_load(target, tmp_path):
    draft = make_tiny_draft(target)
    draft.config.confidence_temperatures = TEMPERATURES
    draft.save_pretrained(tmp_path)
    assert DSparkDraftModel.from_pretrained(tmp_path).config.confidence_temperatures == TEMPERATURES
    uncalibrated = DSparkDraftModel.from_pretrained(tmp_path, confidence_temperatures=None)
    assert uncalibrated.config.confidence_temperatures is None
    shorter = DSparkDraftModel.from_pretrained(tmp_path, block_size=3, target=target)
    output = speculate(target, shorter, random_prompt(64, 6), max_new_tokens=9, return_dict_in_generate=True)
    assert len(output.rounds[0].confidence) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"confidence_temperatures": [1.0, 2.0]}, r"the block's 4 positions, got \[1.0, 2.0\]"),
        ({"confidence_temperatures": []}, "4 positions"),
        ({"confidence_temperatures": [1.0, 0.0, 1.0, 1.0]}, "positive"),
        ({"confidence_temperatures": [1.0, -2.0, 1.0, 1.0]}, "positive"),
        ({"confidence_temperatures": [1.0, float("nan"), 1.0, 1.0]}, "positive"),
        ({"confidence_temperatures": [1.0, float("inf"), 1.0, 1.0]}, "positive"),
        ({"confidence_temperatures": [1.0] * 4, "confidence": False}, "draft has none"),
    ],
)
def test_temperatures_that_cannot_be_are_refused(target, fields, message):
    with pytest.raises(ValueError, match=message):
        make_tiny_draft(target, **fields)


def test_whole_numbers_are_temperatures_too(target):
    assert make_tiny_draft(target, confidence_temperatures=[1, 2, 3, 4]).config.confidence_temperatures[1] == 2
    assert DSparkConfig().confidence_temperatures is None


@pytest.fixture
def flat_folder(tmp_path, target):
    """A draft in the authors' flat layout with a file that is not ours."""
    draft = make_tiny_draft(target)
    fields = draft.config.to_dict()
    for name in ("backbone_type", "has_embed_tokens", "has_lm_head", "confidence_temperatures"):
        fields.pop(name, None)
    theta = fields.pop("rope_parameters")["rope_theta"]
    fields |= {"architectures": ["Qwen3DSparkModel"], "model_type": "qwen3", "rope_theta": theta, "num_anchors": 16}
    fields["author"] = "Zoë"
    folder = tmp_path / "flat"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields, indent=1, ensure_ascii=False), encoding="utf-8")
    save_file({name: t.contiguous() for name, t in draft.state_dict().items()}, folder / "model.safetensors")
    (folder / "optimizer.pt").write_bytes(b"of a training run")
    os.chmod(folder / "config.json", 0o640)
    return folder


def _contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_flat_config_is_changed_in_one_key_only(flat_folder):
    before = _contents(flat_folder)
    assert write_temperatures(TEMPERATURES, flat_folder) == flat_folder
    after = _contents(flat_folder)
    old, new = before.pop("config.json").decode(), after.pop("config.json").decode()
    assert before == after
    assert json.loads(new) == json.loads(old) | {"confidence_temperatures": TEMPERATURES}
    assert new.startswith(old.removesuffix("\n}"))  # the other lines are the same ones
    assert (flat_folder / "config.json").stat().st_mode & 0o777 == 0o640
    assert DSparkDraftModel.from_pretrained(flat_folder).config.confidence_temperatures == TEMPERATURES
    write_temperatures([1.0] * 4, flat_folder)
    assert DSparkDraftModel.from_pretrained(flat_folder).config.confidence_temperatures == [1.0] * 4


def test_output_gets_a_copy_and_the_draft_is_left_alone(flat_folder, tmp_path):
    before = _contents(flat_folder)
    output = tmp_path / "new" / "calibrated"
    assert write_temperatures(TEMPERATURES, flat_folder, output) == output
    assert _contents(flat_folder) == before
    copied = _contents(output)
    assert set(copied) == {"config.json", "model.safetensors"}
    assert copied["model.safetensors"] == before["model.safetensors"]
    assert DSparkDraftModel.from_pretrained(output).config.confidence_temperatures == TEMPERATURES
    write_temperatures([1.0] * 4, output, output)  # its own folder as output is in place
    assert DSparkDraftModel.from_pretrained(output).config.confidence_temperatures == [1.0] * 4


def test_config_is_whole_at_every_moment(flat_folder, monkeypatch):
    before = _contents(flat_folder)
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_temperatures(TEMPERATURES, flat_folder)
    assert _contents(flat_folder) == before


def test_folder_that_cannot_be_written_is_refused(flat_folder, monkeypatch):
    monkeypatch.setattr("os.access", lambda *args: False)
    with pytest.raises(OSError, match="--output"):
        write_temperatures(TEMPERATURES, flat_folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_random_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def run(pair, tmp_path, capsys):
    """Run `calibrate` on the pair with four prompts; returns what it printed and its JSON."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello\nGood bye\nOnce upon\nThe end\n", encoding="utf-8")

    def run(*arguments, draft=None):
        file, draft = tmp_path / "report.json", draft or pair.draft
        fixed = ("--target", pair.target, "--draft", draft, "--prompts", prompts, "--max-new-tokens", 16)
        defaults = [] if "--output" in arguments else ["--output", tmp_path / "out"]
        words = ["calibrate", *fixed, "--json", file, *defaults, *arguments]
        assert main([str(word) for word in words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out, json.loads(file.read_text(encoding="utf-8"))

    return run


def _as_by_hand(pair, texts, *, dtype="auto", seed=0, **settings):
    """What calibrate() finds for `texts` at 16 new tokens."""
    tokenizer = AutoTokenizer.from_pretrained(pair.target)
    target = AutoModelForCausalLM.from_pretrained(pair.target, dtype=dtype)
    draft = DSparkDraftModel.from_pretrained(pair.draft, target=target, dtype=dtype)
    prompts = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    torch.manual_seed(seed)
    result = calibrate(target, draft, prompts, dataset="prompts.txt", **{"max_new_tokens": 16, **settings})
    return json.loads(result.to_json())


def test_command_writes_config_and_json_and_prints_the_figures(run, pair, tmp_path):
    printed, report = run()
    assert list(report) == REPORT
    assert report == _as_by_hand(pair, ["Hello", "Good bye", "Once upon", "The end"])
    calibrated = DSparkDraftModel.from_pretrained(tmp_path / "out")
    assert calibrated.config.confidence_temperatures == report["temperatures"]
    assert f"ECE {report['ece_before']:.1%} before, {report['ece_after']:.1%} after" in printed
    assert printed.startswith(f"temperatures {report['temperatures'][0]:.2f} ")


@pytest.mark.parametrize(
    ("arguments", "texts", "settings"),
    [
        (["--num-prompts", "2"], ["Hello", "Good bye"], {}),
        (["--temperature", "0"], None, {"temperature": 0.0}),
        (["--max-new-tokens", "30"], None, {"max_new_tokens": 30}),
        (["--dtype", "bfloat16"], None, {"dtype": torch.bfloat16}),
        (["--seed", "5"], None, {"seed": 5}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_of_the_command_reach_calibrate(run, pair, arguments, texts, settings):
    everything = ["Hello", "Good bye", "Once upon", "The end"]
    _, report = run(*arguments)
    assert report == _as_by_hand(pair, texts or everything, **settings)
    assert report != _as_by_hand(pair, everything)


def test_chat_template_frames_the_prompts_unless_it_is_not_wanted(run, pair, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(pair.target)
    tokenizer.chat_template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    framed = tmp_path / "target"
    AutoModelForCausalLM.from_pretrained(pair.target).save_pretrained(framed)
    tokenizer.save_pretrained(framed)
    texts = ["Hello", "Good bye", "Once upon", "The end"]
    assert run("--target", framed)[1] == _as_by_hand(pair, [f"[{text}]" for text in texts])
    assert run("--target", framed, "--no-chat-template")[1] == _as_by_hand(pair, texts)


def test_without_output_the_draft_s_own_config_is_written(flat_folder, pair, tmp_path, capsys):
    own = tmp_path / "own"
    write_temperatures([1.0] * 4, pair.draft, own)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"turns": ["Hello", "not read"]}\n{"turns": ["Good bye"]}\n', encoding="utf-8")
    words = ["calibrate", "--target", pair.target, "--draft", own, "--prompts", prompts, "--max-new-tokens", 16]
    assert main([str(word) for word in words]) == 0, capsys.readouterr().err
    expected = _as_by_hand(pair, ["Hello", "Good bye"])["temperatures"]
    assert DSparkDraftModel.from_pretrained(own).config.confidence_temperatures == expected


def test_hub_name_without_output_is_refused_before_any_work(pair, capsys, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    words = ["calibrate", "--target", str(pair.target), "--draft", "someone/draft", "--prompts", "prompts.txt"]
    assert main(words) == 2
    assert "'someone/draft' is no local folder" in (message := capsys.readouterr().err)
    assert "--output" in message
