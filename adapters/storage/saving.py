"""Guarded models to disk and to a hub.

A merged model is the base model's usual files under names of their own, behind a `config.json` that
only vqguard opens (`closed_config.py`), the guard in `guard/`, and `vqguard.json`, which binds all
of it. A guard without its base is described in `guard_only.py`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vqguard.adapters.runtime.guard_link import link_of
from vqguard.adapters.seams import original_method
from vqguard.adapters.storage.bound_files import take_over, write_guard
from vqguard.adapters.storage.folder_update import folder_update
from vqguard.adapters.storage.guard_only import save_guard_only
from vqguard.adapters.storage.left_out import require_whole
from vqguard.adapters.storage.manifest import MergedManifest, write_manifest
from vqguard.adapters.storage.upload import upload_guarded
from vqguard.adapters.storage.weight_files import close_weights, weights_sha256
from vqguard.errors import ConfigError

_REFUSED = {
    "push_to_hub": "would upload the model before its guard: call model.push_to_hub(repo_id)",
    "variant": "would write weights that other loaders find: name another folder instead",
    "distributed_checkpoint": "writes weights that other loaders find, without checksums",
}


class SavedWithGuard:
    """Mixed into the class of a guarded model."""

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, processor: Any = None, **kwargs: Any
    ) -> None:
        """Write the whole model with its guard; `load_guarded` reads it.

        No other loader does: `from_pretrained` of transformers gives the guarded model where
        vqguard is imported, and an error elsewhere. When the save fails, what was in the folder
        before stays; files that no guarded model wrote are neither overwritten nor deleted.

        Args:
            save_directory: made if missing; may hold an earlier guarded model, which is replaced.
            processor: written into the same folder and bound by the same checksums.
            kwargs: as the original method's, except that `push_to_hub` (a method of its own here),
                pickled weights, `variant` and `distributed_checkpoint` are refused.

        Raises:
            ConfigError: for what is refused.
            ArtefactError: for a folder of somebody else's.
            SeamError: for a model that was loaded without its language model.
        """
        model: Any = self
        link = link_of(model)
        require_whole(model)
        for name, reason in _REFUSED.items():
            if kwargs.get(name):
                raise ConfigError(f"{name}={kwargs[name]!r} {reason}")
        if kwargs.get("safe_serialization") is False:
            raise ConfigError(
                "safe_serialization=False writes pickles; guarded models are safetensors"
            )
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ConfigError(
                "the model carries an adapter (add_adapter), and transformers would write that "
                "alone: wrap the guarded model with peft.get_peft_model, or delete the adapter"
            )
        folder = Path(save_directory)
        state = kwargs.pop("state_dict", None)
        state = model.state_dict() if state is None else state
        kwargs["state_dict"] = {k: v for k, v in state.items() if not k.startswith("vqguard.")}
        save = original_method(model, "save_pretrained")
        if not kwargs.get("is_main_process", True):
            save(folder, **kwargs)
            return
        with folder_update(folder) as draft:
            path = draft.path
            save(path, **kwargs)
            close_weights(path)
            bound = write_guard(path, model, link, processor)
            write_manifest(path, MergedManifest(**bound, weights_sha256=weights_sha256(path)))
            take_over(folder, draft, guard_only=False)

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
                self.save_pretrained(folder, processor=processor)
            return upload_guarded(folder, repo_id, card=card, **hub)
