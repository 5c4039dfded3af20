"""What vLLM is told about a guarded model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.configuration_utils import PreTrainedConfig

from vqguard.adapters.storage.closed_config import MODEL_TYPE, POINTER_KEY, base_within

_MARK = "vqguard_closed"


class EngineConfig(PreTrainedConfig):
    """What `config.json` of a guarded model is read with: a configuration of the base's own class.

    The architectures that it names are those that the plugin registers, and nobody else.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration of the base's class. Raises `ArtefactError` as `base_within` does."""
        fields = base_within(config_dict, CONFIG_MAPPING)
        del fields[POINTER_KEY]
        made: Any = CONFIG_MAPPING[fields["model_type"]]
        return made.from_dict({**fields, _MARK: True}, **kwargs)


def is_guarded(model_config: Any) -> bool:
    """Whether vLLM's `ModelConfig` is that of a guarded model's folder, whatever class serves it.

    Where an operator names another class, pictures come without marks, and none is admitted.
    """
    return bool(getattr(model_config.hf_config, _MARK, False))


def folder_of(model_config: Any) -> Path:
    """The folder that the engine was given."""
    return Path(model_config.model)
