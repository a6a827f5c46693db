"""Finding the files of a draft, locally or on the Hub, and reading their headers. State dicts and configs only."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from .checkpoint import Checkpoint, DeepseekV4Checkpoint
from .dialects import rename_tensor
from .dialects_deepseek_v4 import PREFIX, check_inventory, check_is_draft, count_stages, holds_deepseek_v4_draft

# The arguments of from_pretrained that say where files come from.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")

# The arguments of save_pretrained and push_to_hub that say where files go.
PUSH_ARGUMENTS = ("repo_id", "token", "private", "revision", "commit_message", "create_pr")

_OPTIONAL = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_gated_repo": True,
    "_raise_exceptions_for_connection_errors": True,
}

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


def find_checkpoint(name_or_path: str | os.PathLike, **hub_arguments: Any) -> Checkpoint | DeepseekV4Checkpoint:
    """Config and tensor headers of the draft at `name_or_path`, under our names.

    Of a DeepSeek-V4 repository only the shards that hold the draft are fetched. Raises OSError where there are no
    safetensors or the disk is too small for them, and ValueError where one cannot be read or two are one tensor.
    """
    config = _config(name_or_path, hub_arguments)
    if holds_deepseek_v4_draft(config):
        return _find_in_target(name_or_path, config, hub_arguments)
    entries = {}
    for file in _weight_files(name_or_path, hub_arguments):
        for stored_name, (_, shape) in _header(file).items():
            name = rename_tensor(stored_name)
            if name in entries:
                raise ValueError(
                    f"{name_or_path} holds `{name}` twice, as {entries[name][1]!r} and as {stored_name!r}. Remove the "
                    "file that is left over from another save."
                )
            entries[name] = (str(file), stored_name, shape)
    return Checkpoint(config, entries)


def _find_in_target(name_or_path, config: dict[str, Any], hub_arguments: dict[str, Any]) -> DeepseekV4Checkpoint:
    """The `mtp.*` tensors of a DeepSeek-V4 target; shards without any are neither fetched nor opened."""
    index = _index(name_or_path, hub_arguments)
    if index is None:
        paths = {SAFE_WEIGHTS_NAME: _whole_file(name_or_path, hub_arguments)}
        listed = {}
    else:
        listed = {name: file for name, file in index.items() if name.startswith(PREFIX)}
        count_stages(config, set(listed))  # before gigabytes are fetched
        files = sorted(set(listed.values()))
        _check_space(name_or_path, files, hub_arguments)
        paths = {file: cached_file(name_or_path, file, **hub_arguments) for file in files}
    headers = {file: _header(path) for file, path in paths.items()}
    for name, file in listed.items():
        if name not in headers[file]:
            raise ValueError(
                f"The index of {name_or_path} names `{name}` in {file}, which does not hold it. Index and shards are "
                "of different revisions: get the complete repository again."
            )
    found = {
        name: (entry, str(paths[file]))
        for file, header in headers.items()
        for name, entry in header.items()
        if name.startswith(PREFIX)
    }
    num_stages = count_stages(config, set(found))
    check_inventory(config, {name: entry for name, (entry, _) in found.items()}, num_stages)
    return DeepseekV4Checkpoint(config, {name: path for name, (_, path) in found.items()}, num_stages)


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


def _header(file: str | os.PathLike) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (stored type, shape)."""
    try:
        with safe_open(file, framework="pt") as handle:
            # A safetensors handle is no dict.
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(
            f"{file} is no complete safetensors file ({error}). The download or copy may have been cut off: delete it "
            "and get it again."
        ) from None


def _weight_files(name_or_path: str | os.PathLike, hub_arguments: dict[str, Any]) -> list[str]:
    single = _whole_file(name_or_path, hub_arguments, is_optional=True)
    if single is not None:
        return [single]
    index = _index(name_or_path, hub_arguments)
    if index is None:
        raise OSError(
            f"{name_or_path} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}. A draft is loaded from "
            "safetensors; pickle files (.bin, .pt) are not read, since loading them can run code. Give the folder or "
            "repository that holds safetensors, or convert the weights."
        )
    check_is_draft(index)
    return [cached_file(name_or_path, file, **hub_arguments) for file in sorted(set(index.values()))]


def _whole_file(name_or_path, hub_arguments: dict[str, Any], *, is_optional: bool = False) -> str | None:
    return cached_file(name_or_path, SAFE_WEIGHTS_NAME, **hub_arguments, **(_OPTIONAL if is_optional else {}))


def _index(name_or_path: str | os.PathLike, hub_arguments: dict[str, Any]) -> dict[str, str] | None:
    """Tensor name -> file; None where there is no index."""
    file = cached_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, **hub_arguments, **_OPTIONAL)
    if file is None:
        return None
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no index of safetensors files ({error!r}). Get the file again.") from None


def _check_space(name_or_path: str | os.PathLike, files: list[str], hub_arguments: dict[str, Any]) -> None:
    """Raise OSError where the files that are not in the cache yet are larger than the free space beside it."""
    if os.path.isdir(name_or_path) or hub_arguments.get("local_files_only"):
        return
    folder = hub_arguments.get("subfolder") or ""
    place = {"cache_dir": hub_arguments.get("cache_dir"), "revision": hub_arguments.get("revision")}
    paths = [f"{folder}/{file}".lstrip("/") for file in files]
    missing = [path for path in paths if not isinstance(try_to_load_from_cache(name_or_path, path, **place), str)]
    try:
        urls = [hf_hub_url(name_or_path, path, revision=place["revision"]) for path in missing]
        needed = sum(get_hf_file_metadata(url, token=hub_arguments.get("token")).size or 0 for url in urls)
    except Exception:  # offline, gated, not found: the download itself says so, in transformers' words
        return
    root = Path(place["cache_dir"] or HF_HUB_CACHE)
    free = shutil.disk_usage(next(path for path in (root, *root.absolute().parents) if path.exists())).free
    if needed > free:
        raise OSError(
            f"The draft's shards of {name_or_path} need {needed / 2**30:.1f} GiB on the disk of {root}, which has "
            f"{free / 2**30:.1f} GiB free. Free some, or give another `cache_dir` (or HF_HOME)."
        )
