"""The shipped base model: fp16 safetensors with the checksum that the loader insists on."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vqguard.errors import ArtefactError, ChecksumError
from vqguard.files import file_sha256
from vqguard.recipes.tiny.model import TinySizes, build_model, build_processor, build_tokenizer
from vqguard.text_files import read_json

WEIGHTS, CARD = "model.safetensors", "card.json"


def shipped_folder() -> Path:
    """Where the package keeps the weights."""
    return Path(str(files("vqguard.recipes.tiny") / "weights"))


def shipped_sizes() -> TinySizes:
    """Sizes of the shipped model, from its card."""
    card = read_json(shipped_folder() / CARD, ArtefactError)
    return TinySizes.from_dict(card["sizes"])


def save_base(model: LlavaForConditionalGeneration, folder: Path, card: dict[str, Any]) -> Path:
    """Write the weights in float16 and a card that says what made them, with their checksum.

    Args:
        card: command, seed, sizes and figures; JSON values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tied = set(model.all_tied_weights_keys) if hasattr(model, "all_tied_weights_keys") else set()
    state = {
        name: tensor.to(torch.float16).contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    path = folder / WEIGHTS
    save_file(state, path)
    full = {**card, "sha256": file_sha256(path)}
    (folder / CARD).write_text(json.dumps(full, indent=1) + "\n", encoding="utf-8")
    return path


def load_processor() -> LlavaProcessor:
    """llava-tiny's processor, without its weights."""
    return build_processor(shipped_sizes(), build_tokenizer())


def load_base(folder: Path | None = None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """llava-tiny's base model in float32, in eval mode, and its processor.

    Args:
        folder: written by `vqguard pretrain-tiny`; None is the shipped one.

    Raises:
        ArtefactError: no weights there, or weights of other sizes.
        ChecksumError: the weights are not the ones that the card names.
    """
    folder = shipped_folder() if folder is None else folder
    try:
        card = read_json(folder / CARD, ArtefactError)
        checksum = file_sha256(folder / WEIGHTS)
    except (OSError, ValueError, ArtefactError) as error:
        raise ArtefactError(
            f"{folder}: no llava-tiny weights ({error}). Reinstall the package, or make them with "
            "`vqguard pretrain-tiny`."
        ) from error
    if checksum != card.get("sha256"):
        raise ChecksumError(
            f"{folder / WEIGHTS}: its SHA-256 is {checksum}, the card says {card.get('sha256')}. "
            "The file was changed or is damaged: reinstall the package, or make it again."
        )
    sizes = TinySizes.from_dict(card["sizes"])
    tokenizer = build_tokenizer()
    model = build_model(sizes, tokenizer)
    state = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    lacking = [n for n in missing if n != "lm_head.weight"]
    if lacking or unexpected:
        raise ArtefactError(
            f"{folder / WEIGHTS} does not fit this version: missing {lacking[:3]}, unexpected "
            f"{list(unexpected)[:3]}. Make it again with `vqguard pretrain-tiny`."
        )
    model.tie_weights()
    return model.eval(), build_processor(sizes, tokenizer)
