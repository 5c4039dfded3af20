"""Guarded models to disk and to a hub.

A merged model is the base model's usual files, the guard in `guard/`, and `vqguard.json`; a guard
without its base is described in `guard_only.py`. `vqguard.json` is written last and names the
checksums of what it binds together; without it a folder is not a guarded model.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vqguard.adapters.runtime.guard_link import link_of
from vqguard.adapters.seams import original_method
from vqguard.adapters.storage.guard_only import GUARD_FOLDER, save_guard_only
from vqguard.adapters.storage.manifest import MANIFEST, MergedManifest, write_manifest
from vqguard.adapters.storage.upload import upload_guarded
from vqguard.adapters.storage.weight_files import projector_sha256
from vqguard.errors import ConfigError
from vqguard.files import file_sha256


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
            MergedManifest(
                model_type=model.config.model_type,
                site=link.guard.config.site,
                refusal_ids=link.refusal_ids,
                guard_sha256=file_sha256(folder / GUARD_FOLDER / "guard.json"),
                projector_sha256=projector_sha256(folder, link.adapter.projector_keys),
            ),
        )

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As the original, for states that hold the guard as well.

        Raises:
            ConfigError: for others, which would leave another guard, or none of the tensors, in
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
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            if base is not None:
                save_guard_only(self, folder, base, processor=processor)
            else:
                self.save_pretrained(folder)
                if processor is not None:
                    processor.save_pretrained(folder)
            return upload_guarded(folder, repo_id, card=card, **hub)
