"""Training on codes: pictures as codes, and a language model that is given them for pixels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vqguard.adapters.codes import VisualCodes
from vqguard.adapters.features import VisualFeatures
from vqguard.adapters.runtime.coded import codes_of
from vqguard.adapters.runtime.guard_link import Call, encoder_features, link_of, serving
from vqguard.adapters.runtime.offloaded import at_hand
from vqguard.adapters.seams import way_to
from vqguard.errors import SeamError
from vqguard.scopes.modes import evaluating


@torch.no_grad()
def visual_codes(
    model: nn.Module, features: VisualFeatures | None = None, **inputs: Any
) -> VisualCodes:
    """The codes of a batch's pictures, as inference finds them.

    Args:
        model: guarded.
        features: the vision encoder's outputs, in place of pixels, as `encoder_features` takes
            them.
        inputs: what a processor returns.

    Raises:
        InputError: when no pixels are given.
        SeamError: for pictures that cannot be put together again from codes.
        NonFiniteError: for NaN or infinite pixels or features.
    """
    link = link_of(model)
    seam = link.seams[0]
    if features is None:
        seams = link.adapter.given(model, inputs)
        if len(seams) != 1:
            raise SeamError("expected pictures or videos, got both: codes are kept of one kind")
        (seam,) = seams
        pixels = {name: inputs[name] for name in seam.pixels if inputs.get(name) is not None}
    else:
        pixels = {seam.pixels[0]: features.semantic}
    if not all(isinstance(value, Tensor) for value in pixels.values()):
        raise SeamError(f"expected a tensor in {' and '.join(pixels)}: codes stand for its shape")
    with evaluating(model.modules()), at_hand(way_to(model, seam)):
        arguments = link.adapter.seam_arguments(model, seam, inputs) if features is None else {}
        result = link.quantise(model, seam, arguments, features)
    return codes_of(seam, result, link.guard, pixels)


def units_of_rows(
    model: nn.Module, codes: VisualCodes, inputs: Mapping[str, Any]
) -> list[list[int]]:
    """Which units each row of a batch shows; `inputs` are what the codes were made of."""
    link = link_of(model)
    (seam,) = [s for s in link.seams if set(s.pixels) & set(codes.pixels)] or link.seams[:1]
    rows = link.adapter.rows(model, seam, inputs, codes.positions)
    ids = link.adapter.prompt_ids(inputs)
    units: list[list[int]] = [[] for _ in range(len(ids) if ids is not None else max(rows) + 1)]
    for unit, row in enumerate(rows):
        units[row].append(unit)
    return units


@contextmanager
def training_codes(model: nn.Module, codes: VisualCodes) -> Iterator[None]:
    """Inside, the guarded `model` takes these codes for the pixels of its next calls.

    For a language model that is trained on pictures whose codes were kept: the vision encoder does
    not run. What the language model sees is, bit for bit, what it saw of the pixels. Calls need no
    `pixel_values`; whatever else the processor gave beside them they do.

    It is no way in: calls raise `BypassError` unless the model is in training mode and gradients
    are recorded, and `generate` always does. Nothing that comes from codes has a verdict.
    """
    with serving(Call(link_of(model), features=codes)):
        yield


def require_same_logits(
    model: Any, codes: VisualCodes, inputs: Mapping[str, Any], features: VisualFeatures | None
) -> None:
    """Show that the language model sees the same of codes as of what they were made of.

    Raises:
        SeamError: it does not, or this family needs its pixels for more than their features.
    """
    link = link_of(model)
    pixels = {name for seam in link.seams for name in seam.pixels}
    rest = {name: value for name, value in inputs.items() if name not in pixels}
    below = [module for module in model.modules() if module is not model]
    was_training = model.training
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.training = True  # alone: nothing below draws random numbers
    for parameter in learning:
        parameter.requires_grad = False  # no activation is kept
    try:
        with evaluating(below), torch.enable_grad():
            given = nullcontext() if features is None else encoder_features(model, features)
            with given:
                seen = model(**(inputs if features is None else rest), use_cache=False).logits
            with training_codes(model, codes):
                read = model(**rest, use_cache=False).logits
    except Exception as error:  # whatever a family's own code raises
        raise SeamError(f"its forward needs more than codes ({error})") from error
    finally:
        model.training = was_training
        for parameter in learning:
            parameter.requires_grad = True
    if not torch.equal(seen, read):
        raise SeamError("its language model sees something else of codes than of pixels")
