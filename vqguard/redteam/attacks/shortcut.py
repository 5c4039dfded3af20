"""The trained shortcut: a small network learns to imitate the quantiser and lends its gradient.

After the tokeniser shortcuts of arXiv 2410.03489, which broke a discrete-token model where the
straight-through gradient did not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vqguard.codebooks.surrogate import with_gradient_of
from vqguard.redteam.attacks.pgd import PGD
from vqguard.redteam.pixels import random_start
from vqguard.redteam.quantised import QuantisedTarget, quantised
from vqguard.redteam.trial import Steered, Trial


class Shortcut(nn.Module):
    """x + MLP(x): features (..., d) -> what stands in for their codewords (..., d)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        last = nn.Linear(hidden, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), last)

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        moved: Tensor = self.mlp(features)
        return features + moved


@dataclass(frozen=True, kw_only=True)
class TrainedShortcut(PGD):
    """PGD through a network that was trained on the features around the attacked pictures."""

    name: ClassVar[str] = "shortcut"
    label: ClassVar[str] = "Trained shortcut"
    sentence: ClassVar[str] = (
        "PGD whose gradient goes through a small network that was trained to imitate the quantiser "
        "around the attacked pictures."
    )
    measured: ClassVar[bool] = False
    quantised: ClassVar[bool] = True
    gradients: ClassVar[tuple[str, ...]] = ("straight_through",)

    hidden: int = 256
    """Width of its hidden layer."""
    training_steps: int = 100
    """AdamW steps of its training."""
    value: Literal["codeword", "shortcut"] = "codeword"
    """What the language model reads meanwhile: the codeword, or the network's output."""

    @property
    def seeded(self) -> bool:
        """See `MeasuredAttack.seeded`: it draws what it trains on."""
        return True

    def run(self, trial: Trial, start: Tensor) -> None:
        """See `Attack.run`."""
        target = quantised(trial.target, self.name)
        network = self._trained(target, trial)

        def crossed(features: Tensor, codewords: Tensor, indices: Tensor) -> Tensor:
            soft: Tensor = network(features.float()).to(features.dtype)
            if self.value == "shortcut":
                return soft
            return with_gradient_of(soft, codewords.detach()[indices].to(features.dtype))

        def objective(pixels: Tensor, request: Tensor) -> Tensor:
            return target.loss_through(pixels, request, crossed)

        self.descend(Steered(trial, objective), start)

    def _trained(self, target: QuantisedTarget, trial: Trial) -> Shortcut:
        features, words = [], target.codewords
        with torch.no_grad():
            for draw in range(4):
                noisy = random_start(
                    trial.clean, min(self.eps_255, 64.0), self.seed, 1000 + draw, trial.request
                )
                features.append(target.features(noisy if draw else trial.clean))
            given = torch.cat(features).flatten(0, 1)
            wanted = words[target.codes(given)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = Shortcut(given.shape[-1], self.hidden).to(given.device)
        scale = wanted.square().mean().clamp_min(1e-12)
        optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3)
        generator = torch.Generator().manual_seed(self.seed)
        with torch.enable_grad():
            for _ in range(self.training_steps):
                rows = torch.randint(len(given), (256,), generator=generator).to(given.device)
                loss = (network(given[rows]) - wanted[rows]).square().mean() / scale
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        return network.requires_grad_(False).eval()
