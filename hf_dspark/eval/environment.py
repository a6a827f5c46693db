"""Where and with what a benchmark ran."""

import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

_PACKAGE = Path(__file__).parents[1]


def describe_environment(target: PreTrainedModel) -> dict[str, Any]:
    """Versions, device, dtype, threads and commit, under the names they have in a benchmark's JSON."""
    from .. import __version__

    return {
        "versions": {
            "hf_dspark": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": _describe_device(target.device),
        "dtype": str(target.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "git_sha": read_git_sha(_PACKAGE.parent),
    }


def read_git_sha(checkout: Path) -> str | None:
    """The commit checked out at `checkout`, read from its files; None where it is no checkout of its own."""
    folder = checkout / ".git"
    if folder.is_file():  # a worktree: the file names its folder, which names the one it shares
        folder = checkout / folder.read_text().removeprefix("gitdir:").strip()
    head = _read(folder / "HEAD")
    if head is None or not head.startswith("ref: "):
        return head
    reference = head.removeprefix("ref: ")
    common = folder / (_read(folder / "commondir") or ".")
    loose = _read(common / reference)
    if loose is not None:
        return loose
    packed = (line.split() for line in (_read(common / "packed-refs") or "").splitlines())
    return next((words[0] for words in packed if words[1:] == [reference]), None)


def _read(path: Path) -> str | None:
    return path.read_text().strip() if path.is_file() else None


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type != "cpu":
        return device.type
    lines = (_read(Path("/proc/cpuinfo")) or "").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(names, platform.processor() or platform.machine())
    return f"cpu ({name}, {torch.backends.cpu.get_cpu_capability()})"
