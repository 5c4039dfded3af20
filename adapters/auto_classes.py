"""What transformers' Auto classes do with a guarded model's folder once vqguard is imported.

`AutoConfig` gives a configuration of the base's family. `AutoModelForImageTextToText`, the Auto
classes that mean the same class for that family, and `pipeline` with them give the guarded model.
Any other class finds no weights, and an error that says what to use. `vqguard/__init__.py` has this
registered as soon as transformers' table of configurations is there; it must stay light.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vqguard.adapters.storage.closed_config import MODEL_TYPE, base_within
from vqguard.errors import ConfigError

_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "subfolder", "token")
_OURS = ("_from_pipeline", "_from_auto", "adapter_kwargs", "trust_remote_code")
_classes: dict[type, type] = {}


class VQGuardConfig(PreTrainedConfig):
    """What `config.json` of a guarded model is read with; it becomes the base's configuration."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration of the base's class, whose weights no loader but vqguard finds.

        Raises:
            ArtefactError: when the file holds none, or names sizes that no model has.
        """
        closed = base_within(config_dict, CONFIG_MAPPING)
        made: Any = _marked(CONFIG_MAPPING[closed["model_type"]])
        return made.from_dict(closed, **kwargs)


class _Opener:
    """Stands for the guarded class in transformers' tables of models."""

    @classmethod
    def from_pretrained(cls, name: Any, *arguments: Any, config: Any = None, **kwargs: Any) -> Any:
        """The guarded model in a folder, or behind the hub id that the Auto class was given."""
        # Most processes that import vqguard and transformers never open a guarded model.
        from vqguard.adapters.guarding import load_guarded

        wrong = [name for name in _HUB if kwargs.pop(name, None)]
        if arguments or wrong:
            raise ConfigError(
                f"a guarded model takes no {', '.join(wrong) or 'further arguments'} here: use "
                "vqguard.load_guarded"
            )
        if kwargs.get("trust_remote_code"):
            raise ConfigError("trust_remote_code would execute what is loaded; it is refused")
        if kwargs.get("use_safetensors") is None:
            kwargs.pop("use_safetensors", None)
        for option in _OURS:
            kwargs.pop(option, None)
        revision = kwargs.pop("revision", None)
        if Path(name).is_dir():
            return load_guarded(Path(name), **kwargs)
        return load_guarded(f"hub:{name}", revision=revision, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        raise ConfigError(
            "this is the configuration of a guarded model; random weights have no guard. Use the "
            "base model's own configuration, or vqguard.load_guarded"
        )


def register() -> None:
    """Enter the model type `vqguard` into transformers' table of configurations."""
    CONFIG_MAPPING.register(MODEL_TYPE, VQGuardConfig, exist_ok=True)


def _marked(base: Any) -> type:
    """A subclass of the base's configuration class that leads the Auto classes to `_Opener`.

    It has the base's name: tables of processors and tokenizers go by that.
    """
    if base not in _classes:
        # transformers' packages import their modules when these are first named.
        modeling_auto = transformers.models.auto.modeling_auto
        marked = type(base.__name__, (base,), {"__module__": base.__module__})
        wanted = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(base, None)
        for auto in vars(modeling_auto).values():
            mapping = getattr(auto, "_model_mapping", None)
            if wanted is not None and mapping is not None and mapping.get(base, None) is wanted:
                mapping.register(marked, _Opener, exist_ok=True)
        _classes[base] = marked
    return _classes[base]


register()
