"""Uploads: one commit that holds everything, shown by what a hub's client would be given."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from vqguard.adapters import load_guarded
from vqguard.adapters.storage.card import NO_FIGURES, model_card
from vqguard.adapters.storage.upload import upload_guarded
from vqguard.errors import ArtefactError, ConfigError

Make = Callable[..., Any]


COMMIT = "0123456789" * 4


class FakeHub:
    """Stands in for `HfApi` and `snapshot_download`: repositories are folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.commits: list[dict[str, Any]] = []

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.folder(repo_id).mkdir(parents=True, exist_ok=options["exist_ok"])
        return huggingface_hub.RepoUrl(
            f"https://hub.invalid/{repo_id}", endpoint="https://hub.invalid"
        )

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: Path,
        allow_patterns: list[str],
        delete_patterns: list[str],
        **options: Any,
    ) -> str:
        repository = self.folder(repo_id)
        for path in [p for p in repository.rglob("*") if p.is_file()]:
            name = str(path.relative_to(repository))
            if any(fnmatch(name, pattern) for pattern in delete_patterns):
                path.unlink()
        for path in [p for p in folder_path.rglob("*") if p.is_file()]:
            name = str(path.relative_to(folder_path))
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (repository / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, repository / name)
        self.commits.append({"repo_id": repo_id, **options})
        return f"https://hub.invalid/{repo_id}/commit/1"

    def snapshot_download(self, repo_id: str, **_: Any) -> str:
        return str(self.folder(repo_id))

    def folder(self, repo_id: str) -> Path:
        """Where a repository is: like a client's cache, under the hash of its commit."""
        return self.root / repo_id / COMMIT


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def test_a_merged_model_goes_up_and_comes_down(make_guarded: Make, hub: FakeHub) -> None:
    model = make_guarded(flag=(1,))
    address = model.push_to_hub("me/guarded", private=True, commit_message="First")
    assert address.endswith("me/guarded/commit/1")
    assert hub.commits == [{"repo_id": "me/guarded", "commit_message": "First"}]
    again = load_guarded("hub:me/guarded")
    assert again.vqguard.checksum("patch") == model.vqguard.checksum("patch")
    card = ModelCard.load(hub.folder("me/guarded") / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert NO_FIGURES in card.text
    assert "Loaders that do not know vqguard give an error" in card.text


def test_a_guard_alone_replaces_a_whole_model(
    make_guarded: Make, make_llava: Make, hub: FakeHub, tmp_path: Path
) -> None:
    make_llava().save_pretrained(hub.folder("them/base"))
    hub.folder("me/guard").mkdir(parents=True)
    (hub.folder("me/guard") / "NOTES.md").write_text("mine")
    model = make_guarded()
    model.push_to_hub("me/guard")
    model.push_to_hub("me/guard", base="hub:them/base", card="# My own card\n")
    assert not (hub.folder("me/guard") / "guarded.safetensors").exists()
    assert (hub.folder("me/guard") / "changed.safetensors").exists()
    assert (hub.folder("me/guard") / "README.md").read_text() == "# My own card\n"
    assert (hub.folder("me/guard") / "NOTES.md").read_text() == "mine"
    assert (
        load_guarded("hub:me/guard").vqguard.config == model.vqguard.config
    )  # finds its base itself
    card: Any = ModelCard(model_card(hub.folder("me/guard")))
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("them/base", "adapter")


def test_what_is_not_uploaded(make_guarded: Make, hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="not a guarded model"):
        upload_guarded(tmp_path, "me/nothing")
    with pytest.raises(ConfigError, match="unknown options"):
        make_guarded().push_to_hub("me/x", safe_serialization=False)
    assert hub.commits == []


@pytest.mark.network
def test_an_upload_to_the_hub_of_the_environment(make_guarded: Make) -> None:
    """Writes a private repository in the account that huggingface_hub is logged in with."""
    api = huggingface_hub.HfApi()
    name = f"{api.whoami()['name']}/vqguard-upload-test"
    try:
        make_guarded().push_to_hub(name, private=True)
        assert load_guarded(f"hub:{name}").vqguard.config.patch_codes == 24
    finally:
        api.delete_repo(name, missing_ok=True)
