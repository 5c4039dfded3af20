"""The one-codeword probe: does anything visual reach the language model around the guard?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vqguard.adapters.base import Adapter
from vqguard.adapters.install import build_guard, guard_model, install_link, unguard_model
from vqguard.adapters.link import GuardLink
from vqguard.adapters.registry import get_adapter
from vqguard.errors import InputError

_NEW_TOKENS = 4


@dataclass(frozen=True)
class ProbeResult:
    """What moved when the pixels were redrawn.

    `forward_delta`: largest change of a logit in `forward` with a codebook of one entry.
    `generate_same`: greedy tokens and their scores in `generate` were the same, bit for bit.
    `control_delta`: largest change of a logit without the guard; at 0 the inputs show the model
    nothing, and the probe has proved nothing.
    """

    forward_delta: float
    generate_same: bool
    control_delta: float

    @property
    def passed(self) -> bool:
        """No path around the guard, shown on inputs that do reach the language model."""
        return self.forward_delta == 0.0 and self.generate_same and self.control_delta > 0.0


def one_codeword_probe(model: nn.Module, inputs: Mapping[str, Any], seed: int = 0) -> ProbeResult:
    """Give the guard a codebook with one entry and redraw the pixels: nothing may move.

    With one entry every visual token is the same vector whatever the image shows, so any change of
    the logits came around the guard. Needs no knowledge of the model. `inputs`: what its processor
    returns for at least one image. A guarded model is probed in its place and keeps its guard;
    the model is left as it was, in eval or train mode as before.

    Raises `InputError` when `inputs` hold no pixels.
    """
    adapter = get_adapter(model)
    redrawn = _redraw(adapter, inputs, seed)
    modes = {module: module.training for module in model.modules()}
    installed: GuardLink | None = model.__dict__.get("_vqguard_link")
    if installed is not None:
        unguard_model(model)
    model.eval()
    try:
        control = _delta(_logits(model, inputs), _logits(model, redrawn))
        site = installed.guard.config.site if installed is not None else "projected"
        guard_model(model, _one_entry(model, site), refusal_ids=(0,))
        try:
            forward = _delta(_logits(model, inputs), _logits(model, redrawn))
            before, after = _generate(model, inputs), _generate(model, redrawn)
        finally:
            unguard_model(model)
    finally:
        for module, training in modes.items():
            module.training = training
        if installed is not None:
            install_link(model, installed)
    same = len(before) == len(after) and all(
        torch.equal(one, other) for one, other in zip(before, after, strict=True)
    )
    return ProbeResult(forward, same, control)


def _one_entry(model: nn.Module, site: Any) -> Any:
    from vqguard.safety_map import SafetyMap

    guard = build_guard(model, site=site, patch_codes=1, semantic_codes=1, search="torch")
    counts = torch.tensor([[0, 1]])
    guard.safety_map = SafetyMap(("none",), counts, codebook_checksum=guard.checksum("semantic"))
    return guard.eval()


def _redraw(adapter: Adapter, inputs: Mapping[str, Any], seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    redrawn = dict(inputs)
    for name in adapter.pixel_arguments:
        pixels = inputs.get(name)
        if isinstance(pixels, Tensor):
            noise = torch.randn(pixels.shape, generator=generator)
            redrawn[name] = noise.to(pixels)
    if not adapter.has_pixels(inputs):
        raise InputError(f"expected pixels in {adapter.pixel_arguments[0]} to redraw, got none")
    return redrawn


@torch.no_grad()
def _logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    logits: Tensor = model(**inputs).logits
    return logits


@torch.no_grad()
def _generate(model: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    output = model.generate(
        **inputs,
        do_sample=False,
        num_beams=1,
        max_new_tokens=_NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return [output.sequences, *output.logits]


def _delta(one: Tensor, other: Tensor) -> float:
    moved = (one.double() - other.double()).abs()
    return float("inf") if not bool(torch.isfinite(moved).all()) else float(moved.max())
