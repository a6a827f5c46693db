"""A draft saved with its code loads and generates where hf_dspark is not installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from deepseek_v4_files import native_config, write_repository
from packagings import make_packaged
from test_deepseek_v4_target import make_v4_target
from tiny import make_tiny_target

from hf_dspark import DSparkDraftModel

SCRIPT = Path(__file__).parent / "without_package.py"


def _make(name, folder):
    """A target and, in `folder`, a draft for it in the packaging `name`."""
    if name != "DeepSeek-V4":
        target = make_tiny_target("qwen3", seed=1)
        make_packaged(target, name, folder)
        return target
    ratios = [0, 4, 128, 4, 0, 0, 0]
    config = native_config(num_hidden_layers=4, compress_ratios=ratios, dspark_target_layer_ids=[1, 3])
    write_repository(folder, config)
    return make_v4_target(vocab_size=config["vocab_size"], hidden_size=config["hidden_size"])


@pytest.mark.parametrize("name", ["F1 flat", "F1 gemma4", "F3 vocabulary", "F4 NVIDIA", "DeepSeek-V4"])
def test_draft_with_its_code_needs_no_package(name, tmp_path):
    target = _make(name, tmp_path / "theirs")
    target.save_pretrained(tmp_path / "target")
    draft = DSparkDraftModel.from_pretrained(tmp_path / "theirs", target=target)
    draft.save_pretrained(tmp_path / "draft", include_code=True)
    assert (tmp_path / "draft" / "modeling_dspark.py").exists()
    assert not hasattr(draft.config, "auto_map")
    assert draft._auto_class is None
    folders = [str(tmp_path / folder) for folder in ("target", "draft", "resaved")]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *folders],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "equal"


def test_code_is_left_out_unless_asked_for(tmp_path, draft):
    draft.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert "auto_map" not in (tmp_path / "config.json").read_text()
