"""Finding the files of a draft, locally or on the Hub, and reading their headers. State dicts and configs only."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from .dialects import rename_tensor

# The arguments of from_pretrained that say where files come from.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")

# The arguments of save_pretrained and push_to_hub that say where files go.
PUSH_ARGUMENTS = ("repo_id", "token", "private", "revision", "commit_message", "create_pr")

_CUSTOM_GENERATE = '''\
"""generate(custom_generate="<this repository>", assistant_model=draft, trust_remote_code=True)"""


def generate(model, *args, assistant_model=None, **kwargs):
    """Speculative decoding with a DSpark draft; arguments and result are those of `model.generate`."""
    if not hasattr(assistant_model, "speculative_decode"):
        raise ValueError(
            f"`assistant_model` must be the DSpark draft, got {type(assistant_model).__name__}. Load it with "
            "`AutoModel.from_pretrained(repository, trust_remote_code=True)`."
        )
    kwargs.pop("custom_generate", None)
    return model.generate(*args, assistant_model=assistant_model, **kwargs)
'''


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A draft's config and the header of every tensor: name -> (file, stored name, shape)."""

    config: dict[str, Any]
    entries: dict[str, tuple[str, str, tuple[int, ...]]]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, _, shape) in self.entries.items()}

    @property
    def is_renamed(self) -> bool:
        """Whether transformers' loading would look for other names than the files have."""
        return any(stored.removeprefix("model.") != name for name, (_, stored, _) in self.entries.items())

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, in the dtype it was stored in."""
        file, stored_name, _ = self.entries[name]
        with safe_open(file, framework="pt") as handle:
            return handle.get_tensor(stored_name)


def find_checkpoint(name_or_path: str | os.PathLike, **hub_arguments: Any) -> Checkpoint:
    """Config and tensor headers of the draft at `name_or_path`, under our names.

    Raises OSError where there are no safetensors, and ValueError where one cannot be read or two are one tensor.
    """
    config = _config(name_or_path, hub_arguments)
    entries = {}
    for file in _weight_files(name_or_path, hub_arguments):
        for stored_name, shape in _header(file).items():
            name = rename_tensor(stored_name)
            if name in entries:
                raise ValueError(
                    f"{name_or_path} holds `{name}` twice, as {entries[name][1]!r} and as {stored_name!r}. Remove the "
                    "file that is left over from another save."
                )
            entries[name] = (str(file), stored_name, shape)
    return Checkpoint(config, entries)


def upload(
    folder: str | os.PathLike,
    *,
    repo_id: str,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload draft",
    create_pr: bool = False,
) -> str:
    """Upload all of `folder` to the Hub; the repository is made where it is missing. Returns the commit's address."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    settings = {"revision": revision, "commit_message": commit_message, "create_pr": create_pr}
    return api.upload_folder(folder_path=folder, repo_id=repo_id, **settings).commit_url


def write_custom_generate(folder: str | os.PathLike) -> None:
    """Write `custom_generate/generate.py`, which makes a repository usable as `custom_generate=` of generate()."""
    directory = Path(folder) / "custom_generate"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "generate.py").write_text(_CUSTOM_GENERATE, encoding="utf-8")


def _config(name_or_path: str | os.PathLike, hub_arguments: dict[str, Any]) -> dict[str, Any]:
    file = cached_file(name_or_path, "config.json", **hub_arguments)
    if file is None:
        raise OSError(f"{name_or_path} has no config.json, which says what a draft is. Get the complete checkpoint.")
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no valid JSON ({error}). Get the file again, or mend it.") from None


def _header(file: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as handle:
            # A safetensors handle is no dict.
            return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{file} is no complete safetensors file ({error}). The download or copy may have been cut off: delete it "
            "and get it again."
        ) from None


def _weight_files(name_or_path: str | os.PathLike, hub_arguments: dict[str, Any]) -> list[str]:
    optional = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_gated_repo": True,
        "_raise_exceptions_for_connection_errors": True,
    }
    single = cached_file(name_or_path, SAFE_WEIGHTS_NAME, **hub_arguments, **optional)
    if single is not None:
        return [single]
    index_file = cached_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, **hub_arguments, **optional)
    if index_file is None:
        raise OSError(
            f"{name_or_path} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}. A draft is loaded from "
            "safetensors; pickle files (.bin, .pt) are not read, since loading them can run code. Give the folder or "
            "repository that holds safetensors, or convert the weights."
        )
    index = json.loads(Path(index_file).read_text(encoding="utf-8"))
    return [cached_file(name_or_path, file, **hub_arguments) for file in sorted(set(index["weight_map"].values()))]
