"""Guarded models on disk: the base model's usual files, the guard in `guard/`, and `vqguard.json`.

`vqguard.json` is written last and names the checksums of what it binds together; without it a
folder is not a guarded model.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vqguard.adapters.base import Adapter, original_method
from vqguard.adapters.link import link_of
from vqguard.adapters.registry import adapter_for_type
from vqguard.errors import ArtefactError, ChecksumError, ConfigError

MANIFEST = "vqguard.json"
GUARD_FOLDER = "guard"
SCHEMA = 1
_KEYS = {"schema", "model_type", "site", "refusal_ids", "guard_sha256", "projector_sha256"}


class SavedWithGuard:
    """Mixed into the class of a guarded model."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the base model as usual, without guard tensors, and the guard beside it.

        `from_pretrained` of transformers reads the same folder as the unguarded model;
        `load_guarded` reads the guarded one. Keywords as the original method's, except that
        `push_to_hub` and pickled weights are refused with `ConfigError`.
        """
        model: Any = self
        link = link_of(model)
        if kwargs.get("push_to_hub"):
            raise ConfigError(
                "push_to_hub would upload the model before its guard: save, then upload"
            )
        if kwargs.get("safe_serialization") is False:
            raise ConfigError(
                "safe_serialization=False writes pickles; guarded models are safetensors"
            )
        folder = Path(save_directory)
        state = kwargs.pop("state_dict", None)
        state = model.state_dict() if state is None else state
        kwargs["state_dict"] = {k: v for k, v in state.items() if not k.startswith("vqguard.")}
        if not kwargs.get("is_main_process", True):
            original_method(model, "save_pretrained")(folder, **kwargs)
            return
        (folder / MANIFEST).unlink(missing_ok=True)
        original_method(model, "save_pretrained")(folder, **kwargs)
        link.guard.save_pretrained(folder / GUARD_FOLDER)
        manifest = {
            "schema": SCHEMA,
            "model_type": model.config.model_type,
            "site": link.guard.config.site,
            "refusal_ids": list(link.refusal_ids),
            "guard_sha256": _file_sha256(folder / GUARD_FOLDER / "guard.json"),
            "projector_sha256": projector_sha256(folder, link.adapter),
        }
        draft = folder / f".{MANIFEST}.part"
        draft.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        draft.replace(folder / MANIFEST)


def load_guarded(path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The guarded model that `save_pretrained` wrote to a folder or that a hub id names.

    `kwargs` go to transformers' `from_pretrained` (`dtype`, `device_map`, ...). Nothing is
    executed: weights must be safetensors, and `trust_remote_code` is refused.

    Raises `ArtefactError` for a folder that is not a complete guarded model, `ChecksumError` when
    the guard or the projector is not the one that was saved.
    """
    from transformers import AutoModelForImageTextToText

    from vqguard.adapters.install import guard_model
    from vqguard.guard import VQGuard

    if kwargs.pop("trust_remote_code", False):
        raise ConfigError("trust_remote_code would execute what is loaded; it is refused")
    if kwargs.pop("use_safetensors", True) is not True:
        raise ConfigError("use_safetensors=False would read pickles; it is refused")
    folder = _local_folder(path)
    manifest = read_manifest(folder)
    _refuse_redirections(folder)
    adapter = adapter_for_type(manifest["model_type"])
    guard_file = folder / GUARD_FOLDER / "guard.json"
    if not guard_file.is_file():
        raise ArtefactError(f"{guard_file} is missing: copy the whole folder, or save again")
    if _file_sha256(guard_file) != manifest["guard_sha256"]:
        raise ChecksumError(
            f"{guard_file} is not the file that was saved with this model; restore it, or save "
            "the guarded model again"
        )
    if projector_sha256(folder, adapter) != manifest["projector_sha256"]:
        raise ChecksumError(
            f"the projector in {folder} is not the one the guard was saved with: codes and "
            "verdicts would mean nothing; restore the weights, or save the guarded model again"
        )
    guard = VQGuard.from_pretrained(folder / GUARD_FOLDER)
    if guard.config.site != manifest["site"]:
        raise ChecksumError(f"{folder}: {MANIFEST} and the guard disagree about the site")
    model = AutoModelForImageTextToText.from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False, **kwargs
    )
    if model.config.model_type != manifest["model_type"]:
        raise ChecksumError(
            f"{folder}: expected a {manifest['model_type']!r} model, its config.json says "
            f"{model.config.model_type!r}"
        )
    return guard_model(model, guard, refusal_ids=tuple(manifest["refusal_ids"]))


def _refuse_redirections(folder: Path) -> None:
    """Files that would make transformers take weights from where no checksum looks."""
    if (folder / "adapter_config.json").exists():
        raise ArtefactError(
            f"{folder / 'adapter_config.json'} would load an adapter over the checked weights: "
            "load the guarded model, then the adapter with peft"
        )
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ArtefactError(f"{index} is damaged ({error!r}); restore it") from error
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise ArtefactError(f"{index} points outside of {folder}: {name!r}; restore it")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked content of `vqguard.json`. Raises `ArtefactError`."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtefactError(
            f"{path} is missing: {folder} is not a guarded model, or saving it was interrupted; "
            "save it again with model.save_pretrained"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtefactError(
            f"{path} is not readable JSON ({error}); save the model again"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise ArtefactError(
            f"{path}: expected schema {SCHEMA}, got {found!r}; read it with the version of vqguard "
            "that wrote it"
        )
    if manifest.keys() != _KEYS:
        raise ArtefactError(
            f"{path}: missing keys {sorted(_KEYS - manifest.keys())}, unknown keys "
            f"{sorted(manifest.keys() - _KEYS)}; save the model again"
        )
    ids = manifest["refusal_ids"]
    texts = (manifest[key] for key in _KEYS - {"schema", "refusal_ids"})
    if not (
        isinstance(ids, list)
        and all(type(token) is int for token in ids)
        and all(isinstance(text, str) for text in texts)
    ):
        raise ArtefactError(f"{path}: a value has the wrong type; save the model again")
    return manifest


def projector_sha256(folder: Path, adapter: Adapter) -> str:
    """SHA-256 over the projector's tensors as the files hold them: name, dtype, shape, bytes.

    Read from the files, not from the model, so that loading in another dtype does not matter.
    Raises `ArtefactError` when no file holds
    weights.
    """
    keys: dict[str, tuple[Path, str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  not a mapping
                    if key in keys:
                        raise ArtefactError(f"{key} is in {path} and in {keys[key][0]}")
                    keys[key] = (path, key)
        except SafetensorError as error:
            raise ArtefactError(f"{path} is damaged ({error}); restore it") from error
    if not keys:
        raise ArtefactError(f"no *.safetensors in {folder} holds any weights; restore them")
    found = {
        tail: place
        for key, place in keys.items()
        if (tail := _projector_key(key, adapter.projector_keys))
    }
    # Some families are saved under other names than they have: then every tensor counts.
    found = found or keys
    digest = hashlib.sha256()
    for tail, (path, key) in sorted(found.items()):
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(key).contiguous()
            digest.update(f"{tail} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            tensor = tensor.flatten()
            digest.update(memoryview(tensor.view(torch.uint8).numpy()))
    return digest.hexdigest()


def _projector_key(key: str, paths: tuple[str, ...]) -> str:
    """What follows the projector's path in a key; with several projectors the whole key."""
    for path in paths:
        head, mark, tail = key.partition(path + ".")
        if mark and (not head or head.endswith(".")):
            return tail if len(paths) == 1 else key
    return ""


def _local_folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    text = os.fspath(path)
    if isinstance(text, str) and text.count("/") == 1 and not text.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download

        wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", f"{GUARD_FOLDER}/*"]
        return Path(snapshot_download(text, allow_patterns=wanted))
    raise ArtefactError(f"no folder at {text!r}: expected one that save_pretrained wrote")


def _file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
