"""Drafts from the Hub: revisions, caches and offline use as in transformers. The cache is made by hand, no network."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from packagings import make_packaged
from tiny import make_tiny_target

from hf_dspark import DSparkDraftModel
from hf_dspark import hub as hub_module

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture(scope="module")
def target():
    return make_tiny_target("qwen3", seed=1)


@pytest.fixture
def cache(target, tmp_path):
    """`org/draft` with two commits: main is the first, the tag v2 another draft."""
    root = tmp_path / "cache" / "models--org--draft"
    for commit, packaging in ((FIRST, "F1 flat"), (SECOND, "F2 nested")):
        make_packaged(target, packaging, root / "snapshots" / commit)
        (root / "snapshots" / commit / "README.md").write_text("a card")
        (root / "snapshots" / commit / "pytorch_model.bin").write_bytes(b"pickle")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(FIRST)
    (root / "refs" / "v2").write_text(SECOND)
    return tmp_path / "cache"


def test_revision_cache_dir_and_offline_use(target, cache):
    settings = {"target": target, "cache_dir": cache}
    draft = DSparkDraftModel.from_pretrained("org/draft", **settings)
    assert draft.config.markov_head_type == "gated"
    draft = DSparkDraftModel.from_pretrained("org/draft", **settings, local_files_only=True)
    assert draft.config.markov_head_type == "gated"
    for revision in ("v2", SECOND):
        draft = DSparkDraftModel.from_pretrained("org/draft", revision=revision, **settings)
        assert draft.config.rope_parameters["rope_type"] == "yarn"


def test_what_is_not_there_is_said_as_in_transformers(target, cache):
    with pytest.raises(OSError, match="connect|org/other"):
        DSparkDraftModel.from_pretrained("org/other", target=target, cache_dir=cache)
    with pytest.raises(OSError, match="connect|v9"):
        DSparkDraftModel.from_pretrained("org/draft", target=target, cache_dir=cache, revision="v9")


def test_subfolder_of_a_hub_repository(target, cache):
    snapshot = cache / "models--org--draft" / "snapshots" / FIRST
    (snapshot / "dspark").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.move(snapshot / name, snapshot / "dspark" / name)
    draft = DSparkDraftModel.from_pretrained("org/draft", subfolder="dspark", target=target, cache_dir=cache)
    assert draft.config.markov_head_type == "gated"


def test_only_config_and_safetensors_are_asked_for(target, cache, monkeypatch):
    asked = []
    original = hub_module.cached_file

    def recorded(name, file, **kwargs):
        asked.append(file)
        return original(name, file, **kwargs)

    monkeypatch.setattr(hub_module, "cached_file", recorded)
    DSparkDraftModel.from_pretrained("org/draft", target=target, cache_dir=cache)
    assert asked == ["config.json", "model.safetensors"]


class _Hub:
    """What HfApi is asked to do."""

    calls: list = []

    def __init__(self, token=None):
        self.calls.append(("token", token))

    def create_repo(self, repo_id, **kwargs):
        self.calls.append(("create", repo_id, kwargs))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, *, folder_path, repo_id, **kwargs):
        names = {str(file.relative_to(folder_path)) for file in Path(folder_path).rglob("*") if file.is_file()}
        self.calls.append(("upload", repo_id, names, kwargs))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.mark.parametrize("include_code", [False, True])
def test_pushing_uploads_all_that_is_saved(target, tmp_path, monkeypatch, include_code):
    make_packaged(target, "F1 flat", tmp_path / "theirs")
    draft = DSparkDraftModel.from_pretrained(tmp_path / "theirs", target=target)
    monkeypatch.setattr(hub_module, "HfApi", _Hub)
    monkeypatch.setattr(_Hub, "calls", [])
    url = draft.push_to_hub("named", include_code=include_code, private=True, token="t", commit_message="why")
    assert url == "https://hub/me/named/commit/1"
    draft.save_pretrained(tmp_path / "my-draft", push_to_hub=True, include_code=include_code, revision="v2")
    token, create, upload, _, create_again, upload_again = _Hub.calls
    assert token == ("token", "t")
    assert create == ("create", "named", {"private": True, "exist_ok": True})
    assert create_again[1] == "my-draft"
    assert upload[3]["commit_message"] == "why"
    assert upload_again[3]["revision"] == "v2"
    assert upload[2] == upload_again[2] >= {"config.json", "generation_config.json", "model.safetensors"}
    assert ({"modeling_dspark.py", "custom_generate/generate.py"} <= upload[2]) == include_code
