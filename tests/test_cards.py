"""hf-dspark card: a model card whose figures are those of the benchmarks, and none is typed."""

import json
import re

import pytest
import yaml
from tiny_bench import bench_json

from hf_dspark.cards import render_card
from hf_dspark.cli import main

FIELDS = {
    "base_model": "some/target",
    "data": "answers of the target",
    "steps": 4321,
    "license": "mit",
    "tags": ["maths"],
    "details": {"layers": "two"},
    "limits": ["English only."],
}


def _figures(text):
    return set(re.findall(r"\d+\.\d+|\d+", text))


def test_front_matter_says_what_the_hub_reads():
    _, front_matter, _ = render_card(FIELDS, bench_json()).split("---\n", 2)
    assert yaml.safe_load(front_matter) == {
        "license": "mit",
        "base_model": "some/target",
        "library_name": "transformers",
        "tags": ["dspark", "speculative-decoding", "draft-model", "maths"],
    }


def test_results_are_the_figures_of_the_json():
    card = render_card(FIELDS, bench_json())
    assert "| bfloat16 | 3.22 | 76.0 | 41.3 | 1.84x (1.66 to 2.03) | 1.22x (1.10 to 1.34) | 17 of 23 |" in card
    assert "| 23 of gsm8k.jsonl | bfloat16 | 0.83 | 0.71 |  |" in card


def test_no_figure_is_in_the_card_that_is_not_in_the_json_or_the_fields():
    bench = bench_json()
    card = render_card(FIELDS, bench)
    numbers = _figures(json.dumps(bench)) | {str(FIELDS["steps"])}
    arms = bench["arms"].values()
    for arm in arms:
        ratio = arm["ratio_to_plain"]
        numbers |= {f"{value:.2f}" for value in (arm["tau"], *ratio.values(), *(arm["acceptance_at"] or ())) if value}
        numbers |= {f"{arm['tokens_per_second']:.1f}"}
    numbers |= {"1", "2", "3"}  # positions in the block
    numbers |= {"6"}  # of 23 texts that differ
    text = card.replace("fp32", "").replace("max_new_tokens=256", "").replace("p25 to p75", "")
    assert _figures(text) <= numbers


def test_other_figures_make_another_card():
    assert "| 2.75 |" in render_card(FIELDS, bench_json(tau=2.75))
    assert "| 2.75 |" not in render_card(FIELDS, bench_json())


def test_every_benchmark_has_its_row_its_hardware_and_its_command():
    other = bench_json(
        dtype="float32",
        device="cuda (Made-up GPU)",
        threads=3,
        git_sha=None,
        command="hf-dspark bench --prompts chat.jsonl",
        prompts={"file": "chat.jsonl", "number": 80},
    )
    card = render_card(FIELDS, [bench_json(), other])
    assert "| 23 of gsm8k.jsonl | bfloat16 |" in card
    assert "| 80 of chat.jsonl | float32 |" in card
    assert "23 of gsm8k.jsonl: cpu (Made-up 9000, AVX512), bfloat16, threads: 7; hf_dspark 0.9.1, torch 2.98.7" in card
    assert "python 3.54.3, commit c0ffee\n\n```bash\nhf-dspark bench --target t" in card
    assert "80 of chat.jsonl: cuda (Made-up GPU), float32, threads: 3; " in card
    assert "python 3.54.3\n\n```bash\nhf-dspark bench --prompts chat.jsonl\n```" in card


def test_what_was_trained_and_the_licence_come_from_the_fields():
    card = render_card(FIELDS, bench_json())
    for row in (
        "| target | some/target |",
        "| trained on | answers of the target |",
        "| steps | 4321 |",
        "| layers | two |",
    ):
        assert row in card
    assert "- English only." in card
    assert "MIT, for the draft's weights" in card


def test_limits_name_losing_cases_and_texts_that_differ():
    card = render_card(FIELDS, bench_json(median=0.8412))
    assert "- Slower than plain generation on 23 of gsm8k.jsonl (bfloat16): 0.84x (0.76 to 0.93)." in card
    assert "- 6 of 23 greedy texts differ from plain generation's" in card
    assert "Slower" not in render_card(FIELDS, bench_json())


def test_sampled_benchmark_says_so():
    bench = bench_json()
    bench["arms"]["tiny_draft"]["identical"] = None
    card = render_card(FIELDS, bench)
    assert "| sampled |" in card
    assert "texts differ" not in card


def test_draft_of_the_card_is_named_where_there_are_several():
    bench = bench_json()
    bench["arms"]["other"] = bench["arms"]["tiny_draft"]
    with pytest.raises(ValueError, match=r"benchmarks have \['other', 'tiny_draft'\]"):
        render_card(FIELDS, bench)
    assert "# other\n" in render_card({**FIELDS, "draft": "other", "repo": "me/other"}, bench)
    assert 'from_pretrained("me/other"' in render_card({**FIELDS, "draft": "other", "repo": "me/other"}, bench)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_model": "t"}, r"lack \['data', 'steps'\]"),
        ({**FIELDS, "tau": 9.9}, r"unknown \['tau'\]"),
        ({**FIELDS, "draft": "absent"}, "no arm 'absent'"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        render_card(fields, bench_json())


def test_command_writes_the_card(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(bench_json()))
    (tmp_path / "b.json").write_text(json.dumps(bench_json(prompts={"file": "chat.jsonl", "number": 4})))
    (tmp_path / "fields.json").write_text(json.dumps(FIELDS))
    benches = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    output = tmp_path / "card.md"
    assert main(["card", "--bench", *benches, "--fields", str(tmp_path / "fields.json"), "--output", str(output)]) == 0
    assert output.read_text() == render_card(
        FIELDS, [bench_json(), bench_json(prompts={"file": "chat.jsonl", "number": 4})]
    )
    assert capsys.readouterr().out == f"{output}\n"
