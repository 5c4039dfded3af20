"""The training of a regional judge half way: written by one process, taken up by the next.

Weights, the optimiser's moments, the state of the generator and the losses, in safetensors: a
training that is taken up gives the same judge as one that was never stopped, bit for bit.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from vqguard.files import replace_files

log = logging.getLogger(__name__)

_LOSSES, _DRAWN = "losses", "generator"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW


@dataclass(frozen=True)
class TrainingCheckpoint:
    """Where a training is kept, and which one it is."""

    path: Path
    identity: str
    """Of images, labels, schedule and seed: a file of another training is not taken up."""

    def save(
        self,
        losses: Sequence[float],
        projection: nn.Module,
        optimiser: torch.optim.Optimizer,
        generator: torch.Generator,
    ) -> None:
        """Write what the next step begins with, whole or not at all. Raises OSError."""
        tensors = {
            _LOSSES: torch.tensor(losses, dtype=torch.float64),
            _DRAWN: generator.get_state(),
        }
        for name, parameter in projection.named_parameters():
            tensors[f"weight.{name}"] = parameter.detach()
            for moment in _MOMENTS:
                tensors[f"{moment}.{name}"] = optimiser.state[parameter][moment]
        whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_files({self.path: serialise(whole, {"identity": self.identity})})

    @torch.no_grad()
    def load(
        self, projection: nn.Module, optimiser: torch.optim.Optimizer, generator: torch.Generator
    ) -> list[float]:
        """Take up what `save` wrote; returns the losses of the steps that are done.

        None are where there is no file, or one of another training, or a damaged one: the training
        then begins at its beginning, and the log says why.
        """
        if not self.path.is_file():
            return []
        try:
            tensors = self._read()
            parts = {
                parameter: [tensors[part] for part in _parts(name)]
                for name, parameter in projection.named_parameters()
            }
            if any(part[0].shape != parameter.shape for parameter, part in parts.items()):
                raise ValueError("its weights have other shapes")
            losses = [float(loss) for loss in tensors[_LOSSES].tolist()]
            generator.set_state(tensors[_DRAWN])
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError, TypeError) as error:
            log.warning(
                "%s is not taken up (%s): the regional judge is trained anew", self.path, error
            )
            return []
        for parameter, (weight, step, *moments) in parts.items():
            parameter.copy_(weight)
            state = optimiser.state[parameter]
            state["step"] = step
            for name, moment in zip(_MOMENTS[1:], moments, strict=True):
                state[name] = moment.to(parameter.device)
        log.info("%s: the training is taken up behind step %d", self.path, len(losses))
        return losses

    def _read(self) -> dict[str, Tensor]:
        with safe_open(self.path, framework="pt") as file:
            if (file.metadata() or {}).get("identity") != self.identity:
                raise ValueError("it is of another training")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _parts(parameter: str) -> Iterator[str]:
    yield f"weight.{parameter}"
    yield from (f"{moment}.{parameter}" for moment in _MOMENTS)


def training_identity(plain: object, tensors: Sequence[Tensor]) -> str:
    """SHA-256 of plain values and of tensors."""
    digest = hashlib.sha256(repr(plain).encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
