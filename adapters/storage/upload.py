"""Guarded models on a model hub: one commit with everything, the card included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub

from vqguard.adapters.storage.bound_files import GUARD_FOLDER
from vqguard.adapters.storage.card import CARD, model_card
from vqguard.adapters.storage.lora_files import FOLDER as LORA
from vqguard.adapters.storage.manifest import read_manifest
from vqguard.errors import ConfigError

FILES = [
    *("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"),
    f"{GUARD_FOLDER}/*",
    f"{LORA}/*",
]
"""What belongs to a guarded model in a repository: downloaded by `load_guarded`, replaced as a
whole by an upload."""

_OPTIONS = {"token", "private", "revision", "commit_message", "create_pr"}


def upload_guarded(folder: Path, repo_id: str, *, card: str | None = None, **hub: Any) -> str:
    """Upload a folder that holds a guarded model; returns the commit's address.

    A card in the folder stays, `card` replaces it, and one is written where there is none. Files
    of a model that was in the repository before do not stay beside the new one.

    Raises:
        ArtefactError: when `folder` is no complete guarded model.
        ConfigError: for an unknown option.
    """
    read_manifest(folder)
    unknown = sorted(hub.keys() - _OPTIONS)
    if unknown:
        raise ConfigError(f"unknown options {unknown}: expected some of {sorted(_OPTIONS)}")
    if card is None and not (folder / CARD).is_file():
        card = model_card(folder)
    if card is not None:
        (folder / CARD).write_text(card, encoding="utf-8")
    api = huggingface_hub.HfApi(token=hub.pop("token", None))
    private = hub.pop("private", None)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    message = hub.pop("commit_message", None) or "Upload a guarded model"
    return str(
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=message,
            allow_patterns=[*FILES, CARD],
            delete_patterns=FILES,
            **hub,
        )
    )
