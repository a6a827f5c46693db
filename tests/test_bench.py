"""hf-dspark bench: the command, its table, and the JSON that plots and cards read."""

import json
import sys
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from tiny_files import save_random_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dspark import DSparkDraftModel, __version__
from hf_dspark.cli import main
from hf_dspark.eval import PromptSet, read_prompts, run_benchmark
from hf_dspark.eval.environment import read_git_sha

TEXTS = ("Hello", "one two one two one two", "Bye")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_random_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "words.jsonl"
    file.write_text("".join(json.dumps({"turns": [text, "never read"]}) + "\n" for text in TEXTS))
    return file


@pytest.fixture(scope="module")
def bench(pair, prompts_file):
    """Run `hf-dspark bench` on the pair; returns the table's lines and the JSON."""

    def bench(*arguments: str, draft=pair.draft) -> tuple[list[str], dict]:
        fixed = ("--target", str(pair.target), "--draft", str(draft), "--prompts", str(prompts_file))
        printed = StringIO()
        with redirect_stdout(printed):
            assert main(["bench", *fixed, "--max-new-tokens", "8", *arguments]) == 0
        *table, line = printed.getvalue().splitlines()
        return table, json.loads(line)

    return bench


def test_json_has_the_keys_that_plots_and_cards_read(bench, pair):
    _, result = bench("--threads", "1")
    assert list(result) == [
        "versions", "device", "dtype", "threads", "git_sha", "command", "prompts", "arms",
    ]  # fmt: skip
    assert result["versions"]["hf_dspark"] == __version__
    assert result["versions"]["torch"] == torch.__version__
    assert result["device"].startswith("cpu (")
    assert (result["dtype"], result["threads"]) == ("float32", 1)
    assert result["prompts"] == {"file": "words.jsonl", "number": 3}
    assert list(result["arms"]) == ["plain", "prompt_lookup", "draft@transformers", "draft"]
    for arm in result["arms"].values():
        assert list(arm) == [
            "tau", "acceptance_at", "survival_at", "verify_rate", "tokens_per_second", "ratio_to_plain", "identical",
        ]  # fmt: skip
        assert list(arm["ratio_to_plain"]) == ["median", "p25", "p75"]
        assert arm["identical"] == [3, 3]
    assert result["arms"]["plain"]["tau"] == 1
    assert result["arms"]["plain"]["ratio_to_plain"] == {"median": 1, "p25": 1, "p75": 1}
    for name in ("plain", "prompt_lookup"):
        arm = result["arms"][name]
        assert arm["acceptance_at"] is arm["survival_at"] is arm["verify_rate"] is None


def test_table_has_a_row_for_every_arm_and_the_file_has_the_printed_line(bench, tmp_path):
    table, result = bench("--json", str(tmp_path / "bench.json"))
    assert json.loads((tmp_path / "bench.json").read_text()) == result
    assert [row.split()[0] for row in table] == ["arm", *result["arms"]]
    assert f"{result['arms']['draft']['tau']:.2f}" in table[-1]
    assert "3/3" in table[-1]


def test_terminal_gets_a_table_of_rich_and_still_one_line_of_json(pair, prompts_file, capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    models = ["--target", str(pair.target), "--draft", str(pair.draft)]
    assert main(["bench", *models, "--prompts", str(prompts_file), "--max-new-tokens", "2"]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    assert any("│ plain " in row for row in table)
    assert "arms" in json.loads(line)


def test_command_in_the_json_asks_for_the_same_again(bench, pair, prompts_file):
    _, result = bench("--no-chat-template", "--num-prompts", "1", "--seed", "3", "--temperature", "0.5")
    assert result["command"] == (
        f"hf-dspark bench --target {pair.target} --draft {pair.draft} --prompts {prompts_file} --num-prompts 1 "
        "--max-new-tokens 8 --temperature 0.5 --no-chat-template --seed 3"
    )


def test_number_of_prompts_and_dtype_are_those_asked_for(bench):
    _, result = bench("--num-prompts", "2", "--dtype", "bfloat16")
    assert result["prompts"]["number"] == result["arms"]["plain"]["identical"][1] == 2
    assert result["dtype"] == "bfloat16"


def test_block_size_reaches_both_loops(bench):
    _, result = bench("--block-size", "2")
    assert len(result["arms"]["draft"]["acceptance_at"]) == len(result["arms"]["draft"]["survival_at"]) == 2
    assert len(result["arms"]["draft@transformers"]["acceptance_at"]) == 2


def test_every_draft_has_an_arm_and_the_first_one_also_in_transformers_loop(bench, pair, tmp_path):
    DSparkDraftModel.from_pretrained(pair.draft).save_pretrained(tmp_path / "copy")
    _, result = bench("--draft", str(tmp_path / "copy"), "--num-prompts", "1")
    assert list(result["arms"]) == ["plain", "prompt_lookup", "draft@transformers", "draft", "copy"]
    assert result["arms"]["copy"]["acceptance_at"] == result["arms"]["draft"]["acceptance_at"]


def test_chat_template_frames_the_prompts_unless_it_is_not_wanted(pair):
    tokenizer = AutoTokenizer.from_pretrained(pair.target)
    tokenizer.chat_template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    target = AutoModelForCausalLM.from_pretrained(pair.target)
    draft = DSparkDraftModel.from_pretrained(pair.draft, target=target)
    lengths = []
    handle = target.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for as_chat, length in ((True, len("[Hello]")), (False, len("Hello"))):
        prompts = PromptSet("one", ("Hello",))
        run_benchmark(target, {"draft": draft}, tokenizer, prompts, max_new_tokens=2, as_chat=as_chat)
        assert lengths[0] == length
        lengths.clear()
    handle.remove()


def test_sweep_is_asked_for_on_the_command_line(bench):
    _, result = bench("--threshold-sweep", "--num-prompts", "1")
    assert len(result["threshold_sweep"]) == 9


def test_errors_of_the_user_are_one_message_and_exit_code_2(pair, prompts_file, tmp_path, capsys):
    empty, wrong = tmp_path / "empty.jsonl", tmp_path / "wrong.jsonl"
    empty.write_text("\n")
    wrong.write_text('{"turns": ["one"]}\n{"prompt": "two"}\n')
    twin = tmp_path / "draft"
    for prompts, drafts, message in (
        (empty, [pair.draft], "empty.jsonl holds no prompts"),
        (wrong, [pair.draft], "wrong.jsonl, line 2 has no first turn"),
        (tmp_path / "none.jsonl", [pair.draft], "none.jsonl"),
        (prompts_file, [pair.draft, twin], "two have the same name"),
    ):
        options = [word for draft in drafts for word in ("--draft", str(draft))]
        assert main(["bench", "--target", str(pair.target), "--prompts", str(prompts), *options]) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.out == ""


def test_prompts_are_first_turns_whatever_separators_they_hold(tmp_path):
    file = tmp_path / "separators.jsonl"
    text = "a\u2028b\x85c"
    file.write_text("\n" + json.dumps({"turns": [text, "second"]}, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert read_prompts(file) == PromptSet("separators.jsonl", (text,))


def test_commit_is_read_from_the_checkout_and_null_elsewhere(tmp_path):
    assert read_git_sha(tmp_path) is None
    folder = tmp_path / ".git"
    (folder / "refs" / "heads").mkdir(parents=True)
    (folder / "HEAD").write_text("ref: refs/heads/main\n")
    assert read_git_sha(tmp_path) is None  # no commit yet
    (folder / "packed-refs").write_text("# pack-refs with: peeled\nabc refs/heads/other\ndef refs/heads/main\n")
    assert read_git_sha(tmp_path) == "def"
    (folder / "refs" / "heads" / "main").write_text("123\n")
    assert read_git_sha(tmp_path) == "123"
    (folder / "HEAD").write_text("456\n")
    assert read_git_sha(tmp_path) == "456"


def test_commit_of_a_worktree_is_its_own(tmp_path):
    own = tmp_path / "main" / ".git" / "worktrees" / "side"
    (tmp_path / "main" / ".git" / "refs" / "heads").mkdir(parents=True)
    own.mkdir(parents=True)
    (own / "HEAD").write_text("ref: refs/heads/side\n")
    (own / "commondir").write_text("../..\n")
    (tmp_path / "main" / ".git" / "refs" / "heads" / "side").write_text("789\n")
    (tmp_path / "side").mkdir()
    (tmp_path / "side" / ".git").write_text(f"gitdir: {own}\n")
    assert read_git_sha(tmp_path / "side") == "789"
