"""Finding the files of a draft, locally or on the Hub, and reading their headers. State dicts and configs only."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

# The arguments of from_pretrained that say where files come from.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A draft's config and the header of every tensor: name -> (file, stored name, shape)."""

    config: dict[str, Any]
    entries: dict[str, tuple[str, str, tuple[int, ...]]]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, _, shape) in self.entries.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, in the dtype it was stored in."""
        file, stored_name, _ = self.entries[name]
        with safe_open(file, framework="pt") as handle:
            return handle.get_tensor(stored_name)


def find_checkpoint(name_or_path: str | os.PathLike, **hub_arguments: Any) -> Checkpoint:
    """Config and tensor headers of the draft at `name_or_path`; a `model.` prefix of tensor names is dropped."""
    config_file = cached_file(name_or_path, "config.json", **hub_arguments)
    config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    entries = {}
    for file in _weight_files(name_or_path, hub_arguments):
        with safe_open(file, framework="pt") as handle:
            for stored_name in handle.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                shape = tuple(handle.get_slice(stored_name).get_shape())
                entries[stored_name.removeprefix("model.")] = (str(file), stored_name, shape)
    return Checkpoint(config, entries)


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
            "safetensors: give the folder or repository that holds them, or convert the weights."
        )
    index = json.loads(Path(index_file).read_text(encoding="utf-8"))
    return [cached_file(name_or_path, file, **hub_arguments) for file in sorted(set(index["weight_map"].values()))]
