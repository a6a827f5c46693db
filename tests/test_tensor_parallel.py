"""A target that lies in two processes: both go on with the first one's decisions, whatever their seeds."""

import json
from pathlib import Path

import pytest
import torch
from launch import run_two_processes
from test_deepseek_v4_target import make_v4_target
from tiny import make_tiny_draft, make_tiny_target, plain

pytest.importorskip("transformers.distributed", reason="this transformers has no DistributedConfig")
SCRIPT = Path(__file__).parent / "tensor_parallel.py"
PROMPT = [5, 9, 14, 3, 7, 22, 8]
TARGETS = {"qwen3": lambda: make_tiny_target("qwen3", seed=3), "deepseek_v4": make_v4_target}


@pytest.mark.parametrize(
    ("kind", "plan"),
    [("qwen3", {"tp_size": 2}), ("deepseek_v4", {"tp_size": 2}), ("deepseek_v4", {"tp_size": 2, "ep_size": 2})],
    ids=["qwen3", "deepseek_v4", "deepseek_v4 experts"],
)
def test_processes_with_other_seeds_go_on_with_the_same_tokens(tmp_path, kind, plan):
    target = TARGETS[kind]()
    target.save_pretrained(tmp_path / "target")
    make_tiny_draft(target, seed=1).save_pretrained(tmp_path / "draft")
    run_two_processes(SCRIPT, tmp_path / "target", tmp_path / "draft", json.dumps(plan), json.dumps(PROMPT), tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["is_sharded"]
    expected = plain(target, torch.tensor([PROMPT]), max_new_tokens=40, pad_token_id=0)[0].tolist()
    for schedule in ("whole block", "by confidence"):
        assert first[f"greedy, {schedule}"]["sequence"] == expected
        assert first[f"sampled, {schedule}"]["sequence"] != expected
