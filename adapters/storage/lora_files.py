"""LoRA weights over a guarded model, as PEFT keeps them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vqguard.adapters.sizes.built import shapes_in
from vqguard.errors import ArtefactError, ConfigError
from vqguard.files import file_sha256
from vqguard.text_files import read_json

FOLDER = "lora"
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save")
# PEFT takes these for regular expressions: a repeated group, or many repeats, try all splits.
_REPEATS = re.compile(r"[*+?{]")
_SLOW = re.compile(r"\)[*+{]")
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
    _require_sizes(config, folder)
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


def _require_sizes(config: dict[str, Any], folder: Path) -> None:
    """Refuse what PEFT would make or search before it reads the weights."""
    path = folder / _CONFIG
    ranks = [config.get("r"), *dict(config.get("rank_pattern") or {}).values()]
    widths = [width for shape in shapes_in(folder / _WEIGHTS) for width in shape]
    others = [rank for rank in ranks if rank not in widths]
    if others:
        raise ArtefactError(f"{path}: no weights of rank {others[0]!r:.40} are in {_WEIGHTS}")
    if config.get("layer_replication"):
        raise ArtefactError(f"{path} would repeat layers (layer_replication); it is not accepted")
    texts = [config.get(name) for name in _PATTERNS]
    texts += [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    for text in texts:
        if isinstance(text, str) and (_SLOW.search(text) or len(_REPEATS.findall(text)) > 3):
            raise ArtefactError(
                f"{path}: the pattern {text!r:.80} may take for ever; name the modules in a list"
            )
