"""Guarded models on disk: saving, loading, uploading.

A merged model is the base model's usual files, the guard in `guard/`, and `vqguard.json`; a guard
without its base is described in `guard_only.py`. `vqguard.json` is written last and names the
checksums of what it binds together; without it a folder is not a guarded model.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqguard.adapters.base import Adapter
from vqguard.adapters.catalogue import REFUSED
from vqguard.adapters.registry import adapter_or_default, is_known_type
from vqguard.adapters.runtime.guard_link import link_of
from vqguard.adapters.seams import original_method
from vqguard.adapters.storage import lora_files as lora
from vqguard.adapters.storage.guard_only import GUARD_FOLDER, load_on_base, save_guard_only
from vqguard.adapters.storage.manifest import (
    GUARD_ONLY,
    MANIFEST,
    MERGED,
    read_manifest,
    write_manifest,
)
from vqguard.adapters.storage.weight_files import (
    INDEX,
    indexed_files,
    tensor_places,
    tensors_sha256,
)
from vqguard.errors import ArtefactError, ChecksumError, ConfigError
from vqguard.files import file_sha256

if TYPE_CHECKING:
    from vqguard.guard import VQGuard

_OTHER_ADAPTER = "; or import the adapter that it was saved with"


class SavedWithGuard:
    """Mixed into the class of a guarded model."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the base model as usual, without guard tensors, and the guard beside it.

        `from_pretrained` of transformers reads the same folder as the unguarded model;
        `load_guarded` reads the guarded one. Keywords as the original method's, except that
        `push_to_hub` (a method of its own here) and pickled weights are refused with
        `ConfigError`.
        """
        model: Any = self
        link = link_of(model)
        if kwargs.get("push_to_hub"):
            raise ConfigError(
                "push_to_hub=True would upload the model before its guard: call "
                "model.push_to_hub(repo_id)"
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
        write_manifest(
            folder,
            {
                "schema": MERGED,
                "model_type": model.config.model_type,
                "site": link.guard.config.site,
                "refusal_ids": list(link.refusal_ids),
                "guard_sha256": file_sha256(folder / GUARD_FOLDER / "guard.json"),
                "projector_sha256": projector_sha256(folder, link.adapter),
            },
        )

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As the original, for states that hold the guard as well.

        Raises `ConfigError` for others, which would leave another guard, or none of the tensors, in
        place: Trainer does that when it resumes from a whole-model checkpoint.
        """
        if not any(name.startswith("vqguard.") for name in state_dict):
            raise ConfigError(
                "the state holds no guard, so the guarded model would not be what was saved. To "
                "resume a Trainer, derive it from vqguard.adapters.GuardedCheckpoints as well; "
                "elsewhere use load_guarded"
            )
        model: Any = self
        return original_method(model, "load_state_dict")(state_dict, strict=strict, assign=assign)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base: str | os.PathLike[str] | None = None,
        processor: Any = None,
        card: str | None = None,
        **hub: Any,
    ) -> str:
        """Upload the guarded model, its guard and a model card in one commit; returns its address.

        Args:
            repo_id: "owner/name"; made if missing.
            base: upload the guard alone, for this base (see `save_guard_only`).
            processor: uploaded as well.
            card: the text of README.md. Default: one without figures; `vqguard export` makes one
                with those of a run's report.
            hub: `token`, `private`, `revision`, `commit_message`, `create_pr`.
        """
        from vqguard.adapters.storage.upload import upload_guarded

        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            if base is not None:
                save_guard_only(self, folder, base, processor=processor)
            else:
                self.save_pretrained(folder)
                if processor is not None:
                    processor.save_pretrained(folder)
            return upload_guarded(folder, repo_id, card=card, **hub)


@dataclass(frozen=True)
class Loaded:
    """What a folder holds, checked: the model without its guard, LoRA weights merged in, the guard,
    and the tokens of a refusal.
    """

    model: Any
    guard: VQGuard
    refusal_ids: tuple[int, ...]


def load_guarded(
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    processor: Any = None,
    probe_inputs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """The guarded model in a folder or behind a hub id, merged or without its base.

    Args:
        path: what `save_pretrained`, `save_guard_only`, `push_to_hub` or `vqguard export` wrote.
        base: for a guard without its base, where that base is, in place of the recorded hub id
            or name; its weights must have the recorded checksum. LoRA weights are merged in.
        revision: of the hub id `path`.
        processor, probe_inputs: for a model type that no adapter names, or not on this
            transformers: its processor, or what that returns for an image and a prompt. The proof
            is made again, as `guard_model` makes it. Other types do not need them.
        kwargs: for transformers' `from_pretrained` (`dtype`, `device_map`, ...).

    Nothing is executed: weights must be safetensors, and `trust_remote_code` is refused.

    Raises `ArtefactError` for a folder that is not a complete guarded model, `ChecksumError` when
    the guard, the projector or the base is not the one that was saved, `SeamError` for a type that
    needs a proof and has none, before any weight is loaded, or that fails it.
    """
    from vqguard.adapters.install import guard_model, unproven

    if kwargs.pop("trust_remote_code", False):
        raise ConfigError("trust_remote_code would execute what is loaded; it is refused")
    if kwargs.pop("use_safetensors", True) is not True:
        raise ConfigError("use_safetensors=False would read pickles; it is refused")
    folder = _local_folder(path, revision)
    if probe_inputs is None and processor is None and _needs_proof(folder):
        raise unproven(read_manifest(folder)["model_type"])
    found = load_parts(folder, base, kwargs)
    guarded = guard_model(
        found.model,
        found.guard,
        processor,
        refusal_ids=found.refusal_ids,
        probe_inputs=probe_inputs,
    )
    return guarded.eval()


def _needs_proof(folder: Path) -> bool:
    kind = read_manifest(folder)["model_type"]
    return kind not in REFUSED and not is_known_type(kind)


def load_parts(
    folder: Path, base: str | os.PathLike[str] | None, kwargs: Mapping[str, Any]
) -> Loaded:
    """The model of a folder and its guard, not yet installed. Arguments and errors as above."""
    from transformers import AutoModelForImageTextToText

    from vqguard.guard import VQGuard

    manifest = read_manifest(folder)
    _refuse_redirections(folder)
    adapter = adapter_or_default(manifest["model_type"])
    guard_file = folder / GUARD_FOLDER / "guard.json"
    if not guard_file.is_file():
        raise ArtefactError(f"{guard_file} is missing: copy the whole folder, or save again")
    if file_sha256(guard_file) != manifest["guard_sha256"]:
        raise ChecksumError(
            f"{guard_file} is not the file that was saved with this model; restore it, or save "
            "the guarded model again"
        )
    whole = manifest["schema"] != GUARD_ONLY
    if whole and projector_sha256(folder, adapter) != manifest["projector_sha256"]:
        raise ChecksumError(
            f"the projector in {folder} is not the one the guard was saved with: codes and "
            "verdicts would mean nothing; restore the weights, or save the guarded model again"
            + ("" if is_known_type(manifest["model_type"]) else _OTHER_ADAPTER)
        )
    if whole and base is not None:
        raise ConfigError(f"{folder} holds a whole model: leave base= out")
    guard = VQGuard.from_pretrained(folder / GUARD_FOLDER)
    if guard.config.site != manifest["site"]:
        raise ChecksumError(f"{folder}: {MANIFEST} and the guard disagree about the site")
    if whole:
        model = AutoModelForImageTextToText.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, **kwargs
        )
    else:
        model = load_on_base(folder, manifest, base, kwargs)
    if model.config.model_type != manifest["model_type"]:
        raise ChecksumError(
            f"{folder}: expected a {manifest['model_type']!r} model, its config.json says "
            f"{model.config.model_type!r}"
        )
    if manifest.get("lora_sha256") is not None:
        model = lora.merge(model, folder / lora.FOLDER)
    return Loaded(model, guard, tuple(manifest["refusal_ids"]))


def _refuse_redirections(folder: Path) -> None:
    """Files that would make transformers take weights from where no checksum looks."""
    if (folder / "adapter_config.json").exists():
        raise ArtefactError(
            f"{folder / 'adapter_config.json'} would load an adapter over the checked weights: "
            "load the guarded model, then the adapter with peft"
        )
    if (folder / INDEX).is_file():
        indexed_files(folder)


def projector_sha256(folder: Path, adapter: Adapter) -> str:
    """SHA-256 over the projector's tensors as the files hold them: name, dtype, shape, bytes.

    Raises `ArtefactError` when no file holds weights.
    """
    places = tensor_places(folder)
    found = {
        tail: place
        for key, place in places.items()
        if (tail := _projector_key(key, adapter.projector_keys))
    }
    # Some families are saved under other names than they have: then every tensor counts.
    return tensors_sha256(found or places)


def _projector_key(key: str, paths: tuple[str, ...]) -> str:
    """What follows the projector's path in a key; with several projectors the whole key."""
    for path in paths:
        head, mark, tail = key.partition(path + ".")
        if mark and (not head or head.endswith(".")):
            return tail if len(paths) == 1 else key
    return ""


def _local_folder(path: str | os.PathLike[str], revision: str | None) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    text = os.fspath(path)
    if isinstance(text, str) and text.count("/") == 1 and not text.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download

        from vqguard.adapters.storage.upload import FILES

        return Path(snapshot_download(text, revision=revision, allow_patterns=FILES))
    raise ArtefactError(f"no folder at {text!r}: expected one that save_pretrained wrote")
