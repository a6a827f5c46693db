"""DSparkPredictor: columns in, columns out, alone and in two Ray actors."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from tiny_files import ROOT, save_random_pair
from tiny_rows import environment, make_run

from hf_dspark import DSparkPredictor
from hf_dspark.predictor import row_seed


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_random_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def predictor(pair):
    return DSparkPredictor(str(pair.target), str(pair.draft), max_new_tokens=6)


def test_columns_are_kept_and_answered(predictor):
    batch = {"prompt": np.array(["Hello", "", "Bye"], dtype=object), "score": np.array([1.0, 2.0, 3.0])}
    answers = predictor(batch)
    assert answers["prompt"] is batch["prompt"]
    assert answers["score"] is batch["score"]
    assert answers["tokens"] == [6, 0, 6]
    assert answers["finish_reason"] == ["length", None, "length"]
    assert answers["error"] == [None, "The prompt is empty. Give text, chat messages or token ids.", None]
    assert all(tau >= 1 for tau in (answers["tau"][0], answers["tau"][2]))


def test_missing_values_of_a_column_are_the_predictors_own(predictor):
    # Integers with a gap reach a batch as floats.
    batch = {"prompt": np.array(["Hello", "Hello"]), "max_new_tokens": np.array([3.0, float("nan")])}
    batch |= {"stop": np.array([None, None], dtype=object)}
    assert predictor(batch)["tokens"] == [3, 6]


def test_messages_may_be_arrays(predictor):
    predictor.tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    messages = np.empty(1, dtype=object)
    messages[0] = np.array([{"role": "user", "content": "Hello"}], dtype=object)
    assert predictor({"messages": messages})["text"] == predictor({"prompt": ["Hello"]})["text"]


def test_a_sampled_row_depends_on_its_index_and_not_on_its_batch(pair):
    predictor = DSparkPredictor(str(pair.target), str(pair.draft), max_new_tokens=12, temperature=5.0, seed=3)
    together = predictor({"index": np.arange(4), "prompt": ["Hello"] * 4})["text"]
    apart = predictor({"index": np.array([2, 1]), "prompt": ["Hello"] * 2})["text"]
    assert apart == [together[2], together[1]]
    assert len(set(together)) == 4


def test_an_empty_batch_stays_empty(predictor):
    assert predictor({"prompt": np.array([], dtype=object)}).keys() == {"prompt"}


def test_unknown_parameters_are_refused_by_name(pair):
    with pytest.raises(ValueError, match="Unknown parameters \\['max_tokens'\\]"):
        DSparkPredictor(str(pair.target), str(pair.draft), max_tokens=6)


def test_seeds_of_rows_differ():
    assert len({row_seed(seed, index) for seed in range(10) for index in range(100)}) == 1000
    assert row_seed(1, 23) != row_seed(12, 3)


def test_two_ray_actors_answer_as_one_process(tmp_path):
    pytest.importorskip("ray.data", reason="ray is not installed: pip install hf_dspark[ray]")
    pair, source, answers = make_run(tmp_path)
    command = [sys.executable, ROOT / "examples" / "ray_data.py", "--target", pair.target, "--draft", pair.draft]
    command += ["--input", source, "--output", tmp_path / "ray.jsonl", "--max-new-tokens", "3"]
    done = subprocess.run(list(map(str, command)), env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found, expected = ([json.loads(line) for line in path.open()] for path in (tmp_path / "ray.jsonl", answers))
    assert [{k: v for k, v in row.items() if (k, v) != ("id", None)} for row in found] == expected
    assert (
        len(set(re.findall(r"MapWorker\(MapBatches\(DSparkPredictor\)\) pid=(\d+)", done.stdout + done.stderr))) == 2
    )
