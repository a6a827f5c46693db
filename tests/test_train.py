"""train() from prompts to a draft that loads: resumable to the bit, the same on two processes, refusing the wrong."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from launch import run_two_processes
from safetensors.torch import load_file
from tiny import random_prompt
from tiny_files import byte_tokenizer, save_random_pair
from transformers import AutoModelForCausalLM

from hf_dspark import DSparkDraftModel
from hf_dspark.cli import main
from hf_dspark.train import TrainConfig, train
from hf_dspark.train.answers import Sample, read_answers, write_answers
from hf_dspark.train.optimizers import build_optimizers
from hf_dspark.train.prompts import read_prompts, self_prompts, split_held_out
from hf_dspark.train.shape import spread_taps
from hf_dspark.train.states import StateSource
from hf_dspark.train.target import FrozenTarget
from hf_dspark.train.trainer import _Run

PROMPTS = [f"the {a} {b} went" for a in ("big", "red", "old") for b in ("dog", "cat", "cow", "fox")]


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture
def pair(tmp_path):
    return save_random_pair(tmp_path / "pair")


@pytest.fixture
def config(tmp_path, pair):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

    def make(output="out", **fields):
        settings = {
            "steps": 6,
            "batch_size": 2,
            "layers": 1,
            "block_size": 4,
            "markov_rank": 4,
            "num_anchors": 8,
            "max_new_tokens": 16,
            "held_out": 3,
            "eval_every": 3,
            "save_every": 2,
            "mask_token_id": 257,
            "chat_template": False,
            "mixed_precision": "no",
            "generation": {"do_sample": True},
            "learning_rate": 1e-2,
        }
        return TrainConfig(
            target=str(pair.target),
            prompts=[str(tmp_path / "prompts.txt")],
            output=str(tmp_path / output),
            **settings | fields,
        )

    return make


def _weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def test_training_ends_in_a_draft_that_loads_and_generates(config, pair):
    folder = train(config(steps=20, eval_every=10))
    target = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32)
    draft = DSparkDraftModel.from_pretrained(folder, target=target)
    assert "lm_head.weight" not in _weights(folder)
    assert draft.config.target_layer_ids == spread_taps(4, 5)
    prompt = random_prompt(256, 6)
    expected = target.generate(prompt, max_new_tokens=12, do_sample=False)
    assert (
        target.generate(prompt, assistant_model=draft, max_new_tokens=12, do_sample=False).tolist()
        == expected.tolist()
    )
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [10, 20]
    assert log[1]["loss"] < log[0]["loss"] * 1.2
    assert log[1]["tau_sampled"] >= 1


def test_interrupted_run_goes_on_to_the_same_weights(config, monkeypatch):
    whole = _weights(train(config("whole")))
    original = _Run.step_once

    def interrupted(self, number, training):
        if number == 3:  # the checkpoint of step 2 is there, step 3 is lost
            raise KeyboardInterrupt
        return original(self, number, training)

    monkeypatch.setattr(_Run, "step_once", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config("parts"))
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(_Run, "step_once", original)
    parts = _weights(train(config("parts")))
    assert whole.keys() == parts.keys()
    for name, weight in whole.items():
        assert torch.equal(weight, parts[name]), name


def test_other_settings_in_the_same_folder_are_refused(config):
    train(config(steps=2))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="block_size"):
        train(config(steps=2, block_size=5))


def test_feature_cache_changes_no_weight(config):
    online = _weights(train(config("online", steps=3)))
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = train(config("cached", steps=3, feature_cache=True))
    assert list((folder / "states").glob("*.safetensors"))
    for name, weight in _weights(folder).items():
        assert torch.equal(weight, online[name]), name


def test_states_that_another_run_left_are_computed_anew(pair, tmp_path):
    target = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32)
    draft = DSparkDraftModel.from_pretrained(pair.draft, target=target)
    frozen = FrozenTarget(target, draft.config.target_layer_ids)
    samples = [Sample(0, list(range(5, 5 + length)), [(2, length)]) for length in (9, 14)]
    source = StateSource(frozen, tmp_path, samples)
    for sample in (*samples, samples[1]):
        expected = frozen.read(sample.input_ids)
        assert torch.equal(source.read(sample).features, expected.features)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_gradient_checkpointing_changes_no_weight(config):
    plainly = _weights(train(config("plain", steps=2)))
    AcceleratorState._reset_state(reset_partial_state=True)
    for name, weight in _weights(train(config("checkpointed", steps=2, gradient_checkpointing=True))).items():
        torch.testing.assert_close(weight, plainly[name])


def test_micro_batches_end_in_the_weights_of_single_sequences(config):
    plainly = _weights(train(config("plain", steps=3, batch_size=4)))
    AcceleratorState._reset_state(reset_partial_state=True)
    for name, weight in _weights(train(config("three", steps=3, batch_size=4, micro_batch_size=3))).items():
        torch.testing.assert_close(weight, plainly[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("trainable", "heads"), [("heads", ("markov_head", "confidence_head")), ("confidence", "confidence_head")]
)
def test_warm_start_of_the_heads_leaves_the_rest_alone(config, pair, trainable, heads):
    before = _weights(pair.draft)
    after = _weights(train(config(warm_start=str(pair.draft), trainable=trainable)))
    changed = {name for name, weight in after.items() if not torch.equal(weight.float(), before[name].float())}
    assert changed
    assert all(name.startswith(heads) for name in changed)


def _environment():
    root = str(Path(__file__).resolve().parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


def test_sharded_run_ends_in_the_weights_of_one_process(config):
    """Also when it is resumed from a sharded checkpoint."""
    one = _weights(train(config("one", steps=4, optimizer="adamw")))
    script = str(Path(__file__).parent / "fsdp_training.py")
    for steps_left in (True, False):
        sharded = config("sharded", steps=4, optimizer="adamw")
        environment = _environment() | {"ACCELERATE_USE_CPU": "true", "PYTHONFAULTHANDLER": "1"}
        run_two_processes(script, json.dumps(asdict(sharded)), env=environment)
        weights = _weights(sharded.output)
        assert one.keys() == weights.keys()
        for name, weight in one.items():
            torch.testing.assert_close(weights[name], weight, msg=name)
        if steps_left:  # the newest checkpoint goes, so that the second run trains two steps again
            shutil.rmtree(Path(sharded.output) / "checkpoints" / "step_0000004")


def test_sharded_muon_is_refused(config, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match="Muon needs whole matrices.*adamw"):
        train(config())


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_optimizer_takes_every_parameter_once(pair, optimizer):
    draft = DSparkDraftModel.from_pretrained(pair.draft)
    draft.norm.requires_grad_(False)
    groups = [p for o in build_optimizers(draft, optimizer, 1e-3) for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, groups)) == sorted(id(p) for p in draft.parameters() if p.requires_grad)


def test_two_processes_have_the_gradients_of_one(tmp_path, pair):
    script = str(Path(__file__).parent / "ddp_gradients.py")
    arguments = [script, str(pair.target), str(pair.draft)]
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    command = [sys.executable, *arguments, str(files[0])]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "1"
    assert run_two_processes(*arguments, files[1], env=_environment()).split()[-1] == "2"
    one, two = (load_file(file) for file in files)
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_answers_are_the_targets_and_an_interrupted_file_is_completed(tmp_path, pair):
    target = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32)
    tokenizer = byte_tokenizer()
    conversations = [[text] for text in PROMPTS[:6]] + [["one", "two"]]
    arguments = {"max_new_tokens": 8, "batch_size": 2, "chat_template": False, "generation": {"do_sample": False}}
    write_answers(target, tokenizer, conversations, tmp_path / "whole", **arguments)
    whole = read_answers(tmp_path / "whole")
    assert [sample.index for sample in whole] == list(range(7))
    first = whole[0]
    (start, stop), ids = first.answer_spans[0], torch.tensor([first.input_ids])
    assert tokenizer.decode(first.input_ids[:start]) == PROMPTS[0]
    expected = target.generate(ids[:, :start], max_new_tokens=8, do_sample=False)
    assert expected[0, : len(first.input_ids)].tolist() == first.input_ids
    assert stop == len(first.input_ids)
    lines = (tmp_path / "whole" / "answers.0.jsonl").read_text().splitlines(keepends=True)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "answers.0.jsonl").write_text("".join(lines[:3]) + lines[3][:20])  # a kill in the middle of a line
    for process in (1, 0):  # and goes on with two processes
        write_answers(target, tokenizer, conversations, cut, **arguments, process_index=process, num_processes=2)
    assert read_answers(cut) == whole
    assert len((cut / "answers.1.jsonl").read_text().splitlines()) == 2  # its share but for what was there


def test_several_answers_are_written_to_the_prompts_trained_on_only(config, monkeypatch):
    trained_on = []
    monkeypatch.setattr(_Run, "loop", lambda self, training, held_out: trained_on.extend([training, held_out]))
    folder = train(config(answers_per_prompt=3, draft_vocab_size=20))
    training, held_out = trained_on
    count = len(PROMPTS)
    assert [s.index for s in held_out] == [0, 1, 2]
    assert {s.index for s in training} <= set(range(3, count + 2 * (count - 3)))
    by_prompt = {}
    for s in training:
        by_prompt.setdefault(tuple(s.input_ids[: s.answer_spans[0][0]]), set()).add(tuple(s.input_ids))
    assert len(by_prompt) == count - 3
    assert not {tuple(s.input_ids[: s.answer_spans[0][0]]) for s in held_out} & by_prompt.keys()
    assert max(map(len, by_prompt.values())) == 3  # sampled: they differ
    assert DSparkDraftModel.from_pretrained(folder).config.draft_vocab_size == 20


def test_prompts_are_read_from_every_kind_of_source(tmp_path):
    (tmp_path / "turns.jsonl").write_text('{"turns": ["a b", "c"]}\n{"prompt": "d"}\n{"question": "e"}\n')
    (tmp_path / "chat.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "f"}, {"role": "assistant", "content": "g"}]}) + "\n"
    )
    (tmp_path / "lines.txt").write_text("h\n\na b\n")
    sources = [str(tmp_path / name) for name in ("turns.jsonl", "chat.jsonl", "lines.txt")]
    assert read_prompts(sources) == [["a b", "c"], ["d"], ["e"], ["f"], ["h"]]
    assert read_prompts(sources, exclude=["d", "h"]) == [["a b", "c"], ["e"], ["f"]]
    (tmp_path / "bad.jsonl").write_text('{"answer": 1}\n')
    with pytest.raises(ValueError, match="`turns`"):
        read_prompts([str(tmp_path / "bad.jsonl")])
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts([str(tmp_path / "empty.txt")])


class _WritesTurns:
    """A target that ends three of four user turns, each another number of words."""

    device = torch.device("cpu")
    calls = 0

    def __init__(self, tokenizer, end):
        self.tokenizer, self.end = tokenizer, end

    def generate(self, ids, max_new_tokens, **kwargs):
        rows = []
        for row in range(ids.shape[0]):
            self.calls += 1
            text = self.tokenizer(f"tell me about {'very ' * (self.calls % 7)}number {self.calls % 50}").input_ids
            text = (text + ([self.end] if row % 4 else []))[:max_new_tokens]
            rows.append(text + [0] * (max_new_tokens - len(text)))
        return torch.cat([ids, torch.tensor(rows)], dim=1)


def test_the_target_writes_user_turns_after_its_templates_header():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '<end>' }}{% endfor %}"
    target = _WritesTurns(tokenizer, tokenizer.convert_tokens_to_ids("<end>"))
    found = self_prompts(target, tokenizer, 20, seed=1)
    assert len(found) == 20
    assert len({turns[0] for turns in found}) == 20
    assert all(turns[0].startswith("tell me about") for turns in found)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        self_prompts(target, tokenizer, 5)


def test_held_out_conversations_are_not_trained_on():
    conversations = [[str(i)] for i in range(20)]
    training, held_out = split_held_out(conversations, 5, seed=3)
    assert len(held_out) == 5
    assert sorted(training + held_out) == sorted(conversations)
    assert split_held_out(conversations, 5, seed=3) == (training, held_out)


def test_taps_are_spread_as_in_the_released_drafts():
    assert spread_taps(36, 5) == [1, 9, 17, 25, 33]
    assert spread_taps(40, 5) == [1, 10, 19, 28, 37]
    assert spread_taps(4, 5) == [1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"trainable": "tail"}, '"all", "heads" or "confidence"'),
        ({"held_out": 12}, "is left to train on"),
    ],
)
def test_settings_that_cannot_train_are_errors(config, fields, message):
    with pytest.raises(ValueError, match=message):
        train(config(**fields))


def test_command_line_trains_a_draft(tmp_path, pair, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = "--steps 2 --batch-size 2 --layers 1 --block-size 3 --markov-rank 4 --num-anchors 4 --max-new-tokens 8"
    flags += " --held-out 2 --mask-token-id 257 --no-chat-template --mixed-precision no --head rnn --seed 3"
    command = ["train", "--target", str(pair.target), "--prompts", str(tmp_path / "prompts.txt")]
    assert main([*command, "--output", str(tmp_path / "draft"), *flags.split()]) == 0
    assert str(tmp_path / "draft") in capsys.readouterr().out
    draft = DSparkDraftModel.from_pretrained(tmp_path / "draft")
    assert (draft.config.block_size, draft.config.markov_rank, draft.config.markov_head_type) == (3, 4, "rnn")
