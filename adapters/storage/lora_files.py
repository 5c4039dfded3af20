"""LoRA weights over a guarded model, as PEFT keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vqguard.errors import ArtefactError, ConfigError
from vqguard.files import file_sha256
from vqguard.text_files import read_json

FOLDER = "lora"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = (f"{FOLDER}/{_CONFIG}", f"{FOLDER}/{_WEIGHTS}")


def base_of(model: Any) -> Any:
    """The model under PEFT's wrapper, or `model` itself.

    Raises:
        ConfigError: for several adapters, or another kind than LoRA.
    """
    if not hasattr(model, "get_base_model"):
        return model
    kinds = {name: str(config.peft_type.value) for name, config in model.peft_config.items()}
    if list(kinds.values()) != ["LORA"]:
        raise ConfigError(
            f"expected one LoRA adapter over the guarded model, got {kinds}; merge the others "
            "(merge_and_unload) first"
        )
    return model.get_base_model()


def own_state(inner: nn.Module) -> dict[str, Tensor]:
    """The state of a model without the LoRA layers that PEFT put into it, by its own names."""
    state: dict[str, Tensor] = {}
    for name, tensor in inner.state_dict().items():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        state[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
    return state


def save(model: Any, folder: Path) -> None:
    """Write the adapter over `model` into a new folder; nothing without one."""
    if hasattr(model, "get_base_model"):
        model.save_pretrained(folder, safe_serialization=True)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's, with questions left open
        config = read_json(folder / _CONFIG, ArtefactError)
        config["base_model_name_or_path"] = None  # the manifest names it, without machine paths
        (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def sha256(folder: Path) -> str | None:
    """The checksum of an adapter's two files; None where there is none. Raises `ArtefactError`."""
    if not folder.is_dir():
        return None
    return f"{file_sha256(folder / _CONFIG)}-{file_sha256(folder / _WEIGHTS)}"


def merge(model: Any, folder: Path) -> Any:
    """`model` with the adapter in `folder` added to its weights. Raises `ArtefactError`."""
    from peft import PeftModel  # heavy, and few folders hold an adapter

    config = read_json(folder / _CONFIG, ArtefactError)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ArtefactError(
            f"{folder}: expected a LoRA adapter, got {config!r:.100}; export it again"
        )
    if config.get("megatron_config"):
        # PEFT imports the module that `megatron_core` beside it names.
        raise ArtefactError(f"{folder / _CONFIG} names Python modules to import; export it again")
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
