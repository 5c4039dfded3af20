"""Another safety map for a guarded model on disk, whatever form its folder has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vqguard.adapters.encoders.stored import holds_encoder, replace_encoder_map
from vqguard.adapters.storage.bound_files import GUARD, GUARD_FOLDER
from vqguard.adapters.storage.card import CARD, renewed_card
from vqguard.adapters.storage.folder_update import folder_update
from vqguard.adapters.storage.manifest import read_manifest, write_manifest
from vqguard.files import file_sha256
from vqguard.guard import VQGuard
from vqguard.safety_map import SafetyMap


def replace_map(folder: Path, safety_map: SafetyMap) -> None:
    """Give the guarded model in `folder`, whole, without its base, or an encoder, another map.

    The guard, the manifest that binds it and what the model card says of them are written; nothing
    else is touched.

    Raises:
        ArtefactError: `folder` holds no guarded model, or a damaged guard.
        ConfigError: the map was made for other codewords.
    """
    if holds_encoder(folder):
        replace_encoder_map(folder, safety_map)
        return
    with folder_update(folder) as draft:
        manifest = read_manifest(folder)
        guard = VQGuard.from_pretrained(folder / GUARD_FOLDER)
        guard.safety_map = safety_map
        guard.save_pretrained(draft.path / GUARD_FOLDER)
        checksum = file_sha256(draft.path / GUARD)
        card = renewed_card(folder, manifest, draft.path / GUARD)
        if card is not None:
            (draft.path / CARD).write_text(card, encoding="utf-8")
        write_manifest(draft.path, replace(manifest, guard_sha256=checksum))
