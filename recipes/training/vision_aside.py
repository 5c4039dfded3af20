"""The vision encoder's weights on disk while a stage trains from codes, and back again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vqguard.adapters import get_adapter
from vqguard.errors import FrozenTensorMovedError
from vqguard.files import checksums, drafts
from vqguard.recipes.placement import is_spread
from vqguard.recipes.processes import first_alone, is_first, wait


class VisionAside:
    """Weights that were taken out of a model; whoever puts them back has the whole again."""

    def __init__(self, model: Any, file: Path) -> None:
        """Write the weights to `file` and take them out of `model`, in every process."""
        self.file = file
        self.places = _places(model)
        """(module's path, its own name, name in the file) of each parameter."""
        weights = {
            name: model.get_submodule(path)._parameters[own] for path, own, name in self.places
        }
        self.checksums = checksums(weights) if is_first() else {}
        first_alone(lambda: _write(file, weights))
        for path, own, _ in self.places:
            model.get_submodule(path)._parameters[own] = None

    def put_back(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Give the weights to `model`, the one that they are of or what training made of it.

        Args:
            model: where the weights go, on its device.
            dtype: they are rounded to it; None leaves them as they were.

        Raises:
            FrozenTensorMovedError: the file was written to meanwhile.
        """
        weights = load_file(self.file)
        if self.checksums and checksums(weights) != self.checksums:
            raise FrozenTensorMovedError(
                f"{self.file}, which holds the vision encoder while stage 2 trains, changed. "
                "Nothing of this stage was kept: go on with --resume"
            )
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        made: dict[str, nn.Parameter] = {}
        for path, own, name in self.places:
            if name not in made:
                made[name] = nn.Parameter(weights[name].to(device, dtype), requires_grad=False)
            model.get_submodule(path)._parameters[own] = made[name]


@contextmanager
def vision_aside(model: Any, file: Path) -> Iterator[VisionAside | None]:
    """Inside, `model` is without its vision encoder's weights.

    Whoever trained it puts them back into the result; after an error they are put back here. None
    where the model's layers are spread over devices: Accelerate keeps their places.
    """
    if is_spread(model):
        yield None
        return
    aside = VisionAside(model, file)
    try:
        yield aside
    except BaseException:
        aside.put_back(model)
        raise
    wait()  # all have read it
    if is_first():
        file.unlink()


def _places(model: Any) -> list[tuple[str, str, str]]:
    """The parameters of the vision encoder that nothing behind it shares."""
    adapter = get_adapter(model)
    behind = [*adapter.projectors(model), *adapter.language_modules(model), model.vqguard]
    kept = {id(p) for module in behind for p in module.parameters()}
    vision = {id(part) for module in adapter.vision_modules(model) for part in module.modules()}
    names: dict[int, str] = {}
    places = []
    for path, module in model.named_modules():
        if id(module) not in vision:
            continue
        for own, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in kept:
                name = names.setdefault(id(parameter), f"{path}.{own}")
                places.append((path, own, name))
    return places


def _write(file: Path, weights: dict[str, torch.Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with drafts(file) as (draft,):
        save_file({n: weight.detach().cpu().contiguous() for n, weight in weights.items()}, draft)
