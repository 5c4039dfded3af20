"""The one-codeword probe: does anything visual reach the language model around the guard?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vqguard.adapters.base import Adapter
from vqguard.adapters.features import Site
from vqguard.adapters.install import build_guard, install_link, unguard_model
from vqguard.adapters.registry import get_adapter, is_known
from vqguard.adapters.runtime.guard_link import GuardLink
from vqguard.adapters.runtime.known_arguments import AUDIO, FAMILIES, PROMPT, SIDES
from vqguard.safety_map import SafetyMap

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


def one_codeword_probe(
    model: nn.Module, inputs: Mapping[str, Any], seed: int = 0, *, site: Site | None = None
) -> ProbeResult:
    """Give the guard a codebook with one entry and redraw the pixels: nothing may move.

    With one entry every visual token is the same vector whatever the image shows, so any change of
    the logits came around the guard. Needs no knowledge of the model. `inputs`: what its processor
    returns for at least one image. A guarded model is probed in its place and keeps its guard;
    the model is left as it was, in eval or train mode as before. `site`: the guard's own when
    None, "projected" without one.

    Raises:
        InputError: when `inputs` hold no pixels.
    """
    adapter = get_adapter(model)
    redrawn = redraw(adapter, model, inputs, seed)
    with bare(model) as own_site:
        control = _delta(_logits(model, inputs), _logits(model, redrawn))
        with _one_entry(model, adapter, site or own_site or "projected", inputs):
            forward = _delta(_logits(model, inputs), _logits(model, redrawn))
            before, after = _generate(model, inputs), _generate(model, redrawn)
    same = len(before) == len(after) and all(
        torch.equal(first, other) for first, other in zip(before, after, strict=True)
    )
    return ProbeResult(forward, same, control)


def exercised(model: nn.Module, inputs: Mapping[str, Any]) -> frozenset[str] | None:
    """The arguments that a proof on `inputs` uses; None for a type that needs none."""
    if is_known(model):
        return None
    return frozenset(name for name, value in inputs.items() if value is not None)


def find_leak(model: nn.Module, inputs: Mapping[str, Any], *, site: Site = "projected") -> str:
    """Where the pixels got past a guard with one codeword, in words.

    Runs `forward` on two pictures and names the first module outside of the vision encoder whose
    output differs, or the argument that was redrawn when none can be told.
    """
    adapter = get_adapter(model)
    redrawn = redraw(adapter, model, inputs, 0)
    seen: dict[str, list[Any]] = {}
    inner = {
        id(part)
        for module in [*adapter.vision_modules(model), *adapter.projectors(model)]
        for part in module.modules()
    }

    def keep(name: str) -> Any:
        return lambda module, args, output: seen.setdefault(name, []).append(_first_tensor(output))

    with bare(model), _one_entry(model, adapter, site, inputs):
        handles = [
            module.register_forward_hook(keep(name))
            for name, module in model.named_modules()
            if name and id(module) not in inner
        ]
        try:
            _logits(model, inputs)
            _logits(model, redrawn)
        finally:
            for handle in handles:
                handle.remove()
    for name, outputs in seen.items():
        half = len(outputs) // 2
        pairs = zip(outputs[:half], outputs[half:], strict=False)
        if any(a is not None and b is not None and not _same(a, b) for a, b in pairs):
            return f"first seen in module {name!r}"
    names = [name for seam in adapter.seams(model) for name in seam.pixels if name in inputs]
    return f"seen only in generate or in the logits, with {', '.join(names)} redrawn"


@contextmanager
def bare(model: nn.Module) -> Iterator[Site | None]:
    """Inside, the model has no guard and is in eval mode; gives the site of the guard it had."""
    modes = {module: module.training for module in model.modules()}
    installed: GuardLink | None = model.__dict__.get("_vqguard_link")
    if installed is not None:
        unguard_model(model)
    model.eval()
    try:
        yield installed.guard.config.site if installed is not None else None
    finally:
        for module, training in modes.items():
            module.training = training
        if installed is not None:
            install_link(model, installed)


@contextmanager
def _one_entry(
    model: nn.Module, adapter: Adapter, site: Site, inputs: Mapping[str, Any]
) -> Iterator[None]:
    """Inside, the model has a guard with one entry on each level, which flags nothing."""
    guard = build_guard(model, site=site, patch_codes=1, semantic_codes=1, search="torch")
    counts = torch.tensor([[0, 1]])
    guard.safety_map = SafetyMap(("none",), counts, codebook_checksum=guard.checksum("semantic"))
    guard.to(next((p.device for p in model.parameters()), torch.device("cpu")))
    proven = exercised(model, inputs)
    install_link(model, GuardLink(guard.eval(), adapter, (0,), adapter.seams(model), proven))
    try:
        yield
    finally:
        unguard_model(model)


def redraw(
    adapter: Adapter, model: nn.Module, inputs: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """`inputs` with other pictures of the same form.

    Floats under a name that no family has are drawn again too: they may be pictures.

    Raises:
        InputError: without pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    redrawn = dict(inputs)
    for seam in adapter.given(model, inputs):
        for name in seam.pixels:
            if inputs.get(name) is not None:
                redrawn[name] = adapter.redraw(name, inputs[name], generator)
    pixels = {name for seam in adapter.seams(model) for name in seam.pixels}
    for name in sorted(redrawn.keys() - pixels - {*PROMPT, *AUDIO, *FAMILIES, *SIDES}):
        value = redrawn[name]
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2:
            redrawn[name] = adapter.redraw(name, value, generator)
    return redrawn


@torch.no_grad()
def _logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    logits: Tensor = get_adapter(model).logits(model, inputs)
    return logits


@torch.no_grad()
def _generate(model: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    return get_adapter(model).decode(model, inputs, _NEW_TOKENS)


def _delta(first: Tensor, other: Tensor) -> float:
    moved = (first.double() - other.double()).abs()
    return float("inf") if not bool(torch.isfinite(moved).all()) else float(moved.max())


def _same(first: Tensor, other: Tensor) -> bool:
    return first.shape == other.shape and torch.equal(first, other)


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output.detach().clone()
    parts = output.values() if isinstance(output, Mapping) else output
    if isinstance(parts, (list, tuple)) or isinstance(output, Mapping):
        return next((_first_tensor(part) for part in parts if part is not None), None)
    return None
