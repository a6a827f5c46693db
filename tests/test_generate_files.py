"""`hf-dspark generate --input --output`: every row once and in order, however many processes, kills and restarts."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from tiny_files import ROOT
from tiny_rows import NUM_ROWS, environment, file_command, make_run
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_dspark.cli_generate as cli_generate
from hf_dspark.cli import main
from hf_dspark.processes import Processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "hf_dspark"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Pair, rows and one process's answers."""
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def answer(run, tmp_path, capsys):
    """Answer rows in this process, with options; returns the output's rows."""

    def answer(*rows, options=(), output="answers.jsonl"):
        source = tmp_path / "rows.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        source.write_text("\n".join(lines), encoding="utf-8")
        assert main([*file_command(run[0], source, tmp_path / output), *options]) == 0, capsys.readouterr().err
        return _read(tmp_path / output)

    return answer


@pytest.fixture
def answered(monkeypatch):
    """The numbers, which tiny_rows.py calls `answer`, of the rows that are decoded from now on."""
    seen = []
    original = cli_generate.answer_rows

    def answer_rows(target, draft, tokenizer, rows, *args, **kwargs):
        for place, found in original(target, draft, tokenizer, rows, *args, **kwargs):
            seen.append(rows[place]["answer"])
            yield place, found

    monkeypatch.setattr(cli_generate, "answer_rows", answer_rows)
    return seen


def _read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _plain_text(pair, prompt, count):
    tokenizer, target = AutoTokenizer.from_pretrained(pair.target), AutoModelForCausalLM.from_pretrained(pair.target)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = target.generate(ids, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_every_row_is_answered_in_order_with_its_id(run):
    pair, source, answers = run
    rows, found = _read(source), _read(answers)
    assert [row["index"] for row in found] == list(range(NUM_ROWS))
    assert [row.get("id") for row in found] == [row.get("id") for row in rows]
    assert [row["tokens"] for row in found] == [
        0 if index == 50 else row.get("max_new_tokens", 3) for index, row in enumerate(rows)
    ]
    assert [row["index"] for row in found if row["error"] is not None] == [50]
    assert found[0]["text"] == _plain_text(pair, rows[0]["prompt"], 3)
    assert found[3]["text"] == _plain_text(pair, rows[3]["prompt"], 7)
    assert found[0].keys() == found[50].keys()


def test_sampled_rows_differ_and_repeat_with_the_seed(answer):
    hot = {"prompt": "Hello", "temperature": 5.0, "max_new_tokens": 12}
    first = answer(hot, hot, {**hot, "seed": 3}, {**hot, "seed": 3})
    again = answer(hot, hot, {**hot, "seed": 3}, output="again.jsonl")
    other = answer(hot, hot, {**hot, "seed": 3}, options=("--seed", "1"), output="other.jsonl")
    assert [row["text"] for row in first[:3]] == [row["text"] for row in again]
    assert len({row["text"] for row in first}) == 3  # the last two have one seed
    assert first[0]["text"] != other[0]["text"]
    assert first[2]["text"] == other[2]["text"]


def test_a_rows_parameters_stand_before_the_commands(answer, run):
    greedy = _plain_text(run[0], "Hello", 12)
    rows = ({"prompt": "Hello", **own} for own in ({}, {"temperature": 0}, {"do_sample": False}, {"top_k": 1}))
    hot, *others = answer(*rows, options=("--temperature", "5", "--top-p", "0.99", "--max-new-tokens", "12"))
    assert hot["text"] != greedy
    assert [row["text"] for row in others] == [greedy] * 3


def test_prompts_turns_and_messages_are_rows(answer, run, monkeypatch):
    template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    original = cli_generate.load_models

    def with_template(*args, **kwargs):
        target, draft, tokenizer = original(*args, **kwargs)
        tokenizer.chat_template = template
        return target, draft, tokenizer

    monkeypatch.setattr(cli_generate, "load_models", with_template)
    chat = [{"role": "user", "content": "Hello"}]
    rows = {"prompt": "Hello"}, {"turns": ["Hello", "And then?"]}, {"messages": chat}
    texts = [row["text"] for row in answer(*rows)]
    assert texts == [_plain_text(run[0], "[Hello]", 3)] * 3
    as_they_are = answer(*rows, options=("--no-chat-template",), output="plain.jsonl")
    assert [row["text"] for row in as_they_are] == [_plain_text(run[0], "Hello", 3)] * 2 + texts[:1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "cut', "A row must be an object"),
        (["a", "list"], "A row must be an object"),
        ({"text": "Hello"}, "such as {\"prompt\": \"...\"}; got {'text': 'Hello'}"),
        ({"prompt": "Hello", "turns": ["Hello"]}, "it has prompt and turns"),
        ({"turns": []}, "The prompt is empty"),
        ({"messages": "Hello"}, "`messages` must be a list"),
        ({"messages": []}, "The prompt is empty"),
        ({"prompt": "Hello", "max_new_tokens": "many"}, "`max_new_tokens` must be an integer"),
        ({"prompt": "Hello", "temperature": 0, "top_p": 0.5}, "`top_p=0.5` is for sampling"),
    ],
)
def test_a_wrong_row_is_an_answer_with_an_error(answer, row, message):
    good = {"prompt": "Hello"}
    first, failed, last = answer(good, row, good)
    assert message in failed["error"]
    assert (failed["index"], failed["text"], failed["finish_reason"]) == (1, None, None)
    assert first["text"] == last["text"]
    assert first["error"] is None


def test_options_reach_the_draft_and_the_queue(answer, monkeypatch):
    asked = []
    original = cli_generate.answer_rows

    def answer_rows(target, draft, *args, max_rows, **kwargs):
        config = draft.generation_config
        asked.append((config.num_assistant_tokens, config.assistant_confidence_threshold, max_rows, target.dtype))
        return original(target, draft, *args, max_rows=max_rows, **kwargs)

    monkeypatch.setattr(cli_generate, "answer_rows", answer_rows)
    options = ("--num-assistant-tokens", "2", "--confidence-threshold", "0.25", "--batch-size", "3")
    answer({"prompt": "Hello"}, options=(*options, "--dtype", "bfloat16"))
    assert asked == [(2, 0.25, 3, torch.bfloat16)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input", "rows.jsonl"), "--input and --output belong together"),
        (("--output", "answers.jsonl"), "--input and --output belong together"),
        (("--input", "rows.jsonl", "--output", "answers.jsonl", "--prompt", "Hello"), "without --prompt"),
        (("--input", "nowhere.jsonl", "--output", "answers.jsonl"), "nowhere.jsonl"),
    ],
)
def test_wrong_usage_is_one_message(run, capsys, arguments, message):
    models = ("--target", str(run[0].target), "--draft", str(run[0].draft))
    assert main(["generate", *models, *arguments]) == 2
    assert message in capsys.readouterr().err


def _interrupted(run, folder, *kept_lines):
    """What a killed run leaves: a part with `kept_lines`. Returns the run's command and the part."""
    pair, source, _ = run
    command = file_command(pair, source, folder / "answers.jsonl")

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli_generate, "answer_rows", killed)
        assert main(command) == 130
    (part,) = folder.glob("answers.jsonl.part-0-of-1-*")
    part.write_text("".join("\n" + line for line in kept_lines))
    return command, part


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_resuming_redoes_only_what_a_kill_has_cut(run, tmp_path, answered, cut):
    answers = run[2]
    lines = answers.read_text().splitlines()
    command, _ = _interrupted(run, tmp_path, *lines[10:], lines[0], lines[1][:cut])
    assert main(command) == 0
    assert sorted(answered) == list(range(1, 10))
    assert (tmp_path / "answers.jsonl").read_text() == answers.read_text()
    assert list(tmp_path.iterdir()) == [tmp_path / "answers.jsonl"]  # the parts are gone


def test_a_run_that_is_merged_but_not_cleared_is_cleared(run, tmp_path, answered):
    lines = run[2].read_text().splitlines()
    command, _ = _interrupted(run, tmp_path, *lines[:5])
    (tmp_path / "answers.jsonl").write_text(run[2].read_text())
    assert main(command) == 0
    assert answered == []
    assert list(tmp_path.iterdir()) == [tmp_path / "answers.jsonl"]
    assert (tmp_path / "answers.jsonl").read_text() == run[2].read_text()


def test_finished_output_and_parts_of_another_run_are_not_touched(run, tmp_path, capsys):
    lines = run[2].read_text().splitlines()
    command, part = _interrupted(run, tmp_path, *lines[:5])
    before = part.read_text()
    assert main([*command, "--seed", "5"]) == 2
    assert "parts of a run with another input or other options" in capsys.readouterr().err
    assert part.read_text() == before
    part.unlink()
    (tmp_path / "answers.jsonl").write_text("kept")
    assert main(command) == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "answers.jsonl").read_text() == "kept"


def test_a_row_that_another_process_did_not_write_stops_the_merge(run, tmp_path, monkeypatch, capsys):
    lines = run[2].read_text().splitlines()
    command, part = _interrupted(run, tmp_path, *lines[:5], *lines[6:])
    monkeypatch.setattr(Processes, "share", lambda self, num_rows: range(5))
    assert main(command) == 2
    assert "1 of 200 rows are not in the parts" in (message := capsys.readouterr().err)
    assert "(the first: 5)" in message
    assert list(tmp_path.iterdir()) == [part]


def test_two_processes_write_what_one_writes(run, tmp_path):
    pair, source, answers = run
    output = tmp_path / "two.jsonl"
    command = [*TORCHRUN, *file_command(pair, source, output)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert output.read_text() == answers.read_text()
    assert done.stdout.count("200 rows, 1 of them with an error") == 1  # the first process alone says it
    assert list(tmp_path.iterdir()) == [output]


def test_a_process_killed_half_way_and_started_again_loses_and_repeats_nothing(run, tmp_path, answered):
    pair, source, answers = run
    output = tmp_path / "killed.jsonl"
    command = file_command(pair, source, output)
    with subprocess.Popen([*TORCHRUN, *command], env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL) as launcher:
        try:
            _wait_for_part(tmp_path, "part-1-of-2", lines=5)
            workers = psutil.Process(launcher.pid).children()
            next(worker for worker in workers if worker.environ()["RANK"] == "1").send_signal(signal.SIGKILL)
            launcher.wait(timeout=120)
        finally:
            launcher.terminate()
    assert launcher.returncode != 0
    assert not output.exists()
    kept = {json.loads(line)["index"] for part in tmp_path.iterdir() for line in _whole_lines(part)}
    assert 5 <= len(kept) < NUM_ROWS
    assert main(command) == 0  # one process now
    assert sorted([*answered, *kept]) == list(range(NUM_ROWS))
    assert output.read_text() == answers.read_text()
    assert list(tmp_path.iterdir()) == [output]


def _wait_for_part(folder, name, *, lines):
    for _ in range(9000):
        if any(len(_whole_lines(part)) >= lines for part in folder.glob(f"*{name}*")):
            return
        time.sleep(0.01)
    raise AssertionError("no part grew within a minute and a half")


def _whole_lines(part):
    return [line for line in part.read_text().split("\n") if line.endswith("}")]


def test_processes_share_rows_without_gap_or_overlap():
    shares = [Processes(rank, 3, rank).share(11) for rank in range(3)]
    assert sorted(index for share in shares for index in share) == list(range(11))
    assert list(shares[1]) == [1, 4, 7, 10]


def test_each_of_several_processes_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [Processes(rank, 4, rank % 2).device("auto") for rank in range(4)] == ["cuda:0", "cuda:1"] * 2
    assert Processes(1, 4, 1).device("cpu") == "cpu"
    assert Processes(0, 1, 0).device("auto") == "auto"
