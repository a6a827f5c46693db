"""The command line: it prints the text as it streams, then one line of figures; the user's errors are messages."""

import io
import os
import re
import subprocess
import sys

import pytest
import torch
from tiny_files import ROOT, byte_tokenizer, save_random_pair, trained_pair
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_dspark.cli import RoundPrinter, main

FIGURES = r"tau \d+\.\d\d, \d+\.\d tokens/s"
COMPARED = FIGURES + r", plain \d+\.\d \(\d+\.\d\dx\); "


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_random_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def run(pair, capsys):
    """Run `generate` on the pair; returns what it printed."""

    def run(*arguments: str) -> str:
        fixed = ("--target", str(pair.target), "--draft", str(pair.draft), "--max-new-tokens", "12")
        assert main(["generate", *fixed, *arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def _plain_text(pair, prompt):
    tokenizer = AutoTokenizer.from_pretrained(pair.target)
    target = AutoModelForCausalLM.from_pretrained(pair.target)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = target.generate(**inputs, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_generate_prints_the_text_and_one_line_of_figures(run, pair):
    text, line = run("--prompt", "Hello").rstrip("\n").rsplit("\n", 1)
    assert text == _plain_text(pair, "Hello")
    assert re.fullmatch(COMPARED + "the text equals plain generation's", line)


def test_generate_without_compare_prints_its_own_figures_only(run):
    line = run("--prompt", "Hello", "--no-compare").splitlines()[-1]
    assert re.fullmatch(FIGURES, line)


def test_generate_reads_the_prompt_from_stdin(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert _text(run()) == _text(run("--prompt", "Hello"))


def test_several_prompts_are_named_before_their_text(run):
    printed = run("--prompt", "Hello", "--prompt", "Bye")
    assert "> Hello\n" in printed
    assert "> Bye\n" in printed
    assert len(re.findall(COMPARED, printed)) == 2


def test_seed_repeats_a_sampled_text_whether_compared_or_not(run):
    sampled = ("--prompt", "Hello", "--temperature", "1.5", "--top-p", "0.9", "--seed", "7")
    first = run(*sampled)
    assert "sampled, so the text is another" in first
    assert _text(run(*sampled)) == _text(run(*sampled, "--no-compare")) == _text(first)
    assert _text(run(*sampled[:-1], "8")) != _text(first)  # 12 tokens of a broad law: never the same by chance


def test_number_of_assistant_tokens_reaches_the_draft(run):
    assert run("--prompt", "Hello", "--num-assistant-tokens", "0").splitlines()[-1].startswith("tau 1.00, ")


def test_confidence_threshold_reaches_the_draft(run):
    assert run("--prompt", "Hello", "--confidence-threshold", "1").splitlines()[-1].startswith("tau 1.00, ")


def test_chat_template_frames_the_prompt_unless_it_is_not_wanted(run, pair, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(pair.target)
    tokenizer.chat_template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    framed = tmp_path / "target"
    AutoModelForCausalLM.from_pretrained(pair.target).save_pretrained(framed)
    tokenizer.save_pretrained(framed)
    asked = ("--target", str(framed), "--prompt", "Hello")
    assert _text(run(*asked)) == _text(run("--prompt", "[Hello]"))
    assert _text(run(*asked, "--no-chat-template")) == _text(run("--prompt", "Hello"))


def test_number_of_threads_is_set(run, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    run("--prompt", "Hello", "--threads", "3")
    assert asked == [3]


def test_dtype_is_of_both_models(run, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        "hf_dspark.cli._run_prompts", lambda args, target, draft, *rest: loaded.extend([target, draft])
    )
    run("--prompt", "Hello", "--dtype", "bfloat16")
    assert [model.dtype for model in loaded] == [torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "The prompt is empty"),
        (["--prompt", "Hello", "--top-p", "0.9"], "Set --temperature"),
        (["--prompt", "Hello", "--target", "no/such/folder"], "no/such/folder"),
        (["--prompt", "Hello", "--num-assistant-tokens", "-1"], "at least 0, got -1"),
    ],
)
def test_errors_of_the_user_are_one_message_and_exit_code_2(pair, capsys, arguments, message):
    assert main(["generate", "--target", str(pair.target), "--draft", str(pair.draft), *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "required: --target, --draft"),
        (["demo", "--threads", "0"], "at least 1, got 0"),
        (["demo", "--device", "nonsense"], "'nonsense' cannot be used here"),
        ([], "required: command"),
    ],
)
def test_wrong_usage_is_exit_code_2(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_closed_pipe_ends_the_command_quietly(pair):
    command = [sys.executable, "-m", "hf_dspark", "generate", "--target", pair.target, "--draft", pair.draft]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*map(str, command), "--prompt", "Hello"], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, text=True
        )
    finally:
        os.close(writer)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr


def test_missing_rich_leaves_the_text_without_colours(run, monkeypatch):
    expected = run("--prompt", "Hello")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert _text(run("--prompt", "Hello")) == _text(expected)


def test_printed_pieces_join_to_the_text_when_characters_span_tokens(capsys):
    tokenizer = byte_tokenizer()
    text = "Größe 日本語 🦊\n\ttab  end"
    _print_rounds(RoundPrinter(tokenizer), tokenizer(text)["input_ids"])
    assert capsys.readouterr().out == text + "\n"


def test_printed_pieces_keep_leading_spaces_of_sentencepiece_like_tokens(capsys):
    words = ["▁Once", "▁upon", "▁a", "▁time", ",", "▁there", "s"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="s"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    printer = RoundPrinter(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    for _ in range(2):  # a second text begins as the first did
        _print_rounds(printer, range(len(words)))
        assert capsys.readouterr().out == "Once upon a time, theres\n"


def test_an_unfinished_character_is_printed_at_the_end(capsys):
    tokenizer = byte_tokenizer()
    ids = tokenizer("a🦊")["input_ids"][:-1]
    _print_rounds(RoundPrinter(tokenizer), ids)
    assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"


def test_accepted_tokens_and_the_targets_own_have_different_colours_on_a_terminal(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    tokenizer = byte_tokenizer()
    printer = RoundPrinter(tokenizer)
    printer.print_legend()
    printer.put_round(torch.tensor(tokenizer("abc")["input_ids"]), num_accepted=2)
    printer.end()
    legend, text = capsys.readouterr().out.splitlines()
    green, magenta, plain = "\x1b[32m", "\x1b[35m", "\x1b[0m"
    assert legend == f"{green}accepted drafted tokens{plain}, {magenta}the target's own{plain}"
    assert text == f"{green}a{plain}{green}b{plain}{magenta}c{plain}"


def test_trained_pair_streams_a_story(capsys):
    pair = trained_pair()
    arguments = ["--target", str(pair.target), "--draft", str(pair.draft), "--prompt", "Once upon a time"]
    assert main(["generate", *arguments, "--max-new-tokens", "40"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(", there was a")
    assert float(re.search(r"tau (\d+\.\d\d)", printed)[1]) > 2


def _text(printed: str) -> str:
    """What was printed before the line of figures."""
    return printed.rstrip("\n").rpartition("\n")[0]


def _print_rounds(printer, ids) -> None:
    """Print `ids` in rounds of three, through `put` for the prompt as generate() does."""
    printer.put(torch.tensor([[0]]))
    for tokens in torch.tensor(list(ids)).split(3):
        printer.put_round(tokens, len(tokens) - 1)
    printer.end()
