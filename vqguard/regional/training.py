"""Training of a regional judge from labels of whole images (multiple-instance learning).

No region is labelled: an image of a category holds it somewhere. So the score of a category is the
log-sum-exp of its logits over the image's regions, a soft maximum (J. Ramon, L. De Raedt, "Multi
instance neural networks", 2000), and the loss the binary cross-entropy of each category.

A semantic token is the evidence for each category: its logit above `FLOOR`, 0 below, where most
regions lie. The codebook is k-means of those of regions; half of them are drawn by how toxic they
look, for plain k-means would give rare things no entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vqguard.errors import InputError, NonFiniteError
from vqguard.regional.checkpoint import TrainingCheckpoint, training_identity
from vqguard.regional.judge import RegionalJudge
from vqguard.regional.layout import Layout, layouts_of
from vqguard.regional.projection import FLOOR
from vqguard.regional.schedule import RegionalTraining

CHECKPOINT_EVERY = 50
"""Steps between two states that are kept."""
_START_REGIONS = 2**18  # among which those are drawn that k-means looks at
_POINTS_AN_ENTRY = 64  # of either kind
_KMEANS = 20
_CORRELATED = 2**16  # neutral tokens, at least, by which correlations are estimated
_WARMUP = 0.15  # share of the steps with a rising learning rate


@dataclass(frozen=True)
class LabelledTokens:
    """Visual tokens of n images with their categories."""

    tokens: Sequence[Tensor]
    """(N_i, d) an image, floating, on the CPU."""
    marks: Tensor
    """(n, C) bool: the toxic categories of each image; none for a neutral one."""
    layouts: Sequence[Layout | None]

    def __post_init__(self) -> None:
        """Raise InputError unless there are neutral images, and some of each category."""
        layouts_of([len(image) for image in self.tokens], self.layouts)
        if self.marks.shape[:1] != (len(self.tokens),) or self.marks.dtype != torch.bool:
            raise InputError(
                f"{len(self.tokens)} images but marks {tuple(self.marks.shape)} {self.marks.dtype}"
            )
        held = [int(count) for count in self.marks.sum(dim=0)]
        if not held or min(held) < 1 or bool(self.marks.any(dim=1).all()):
            raise InputError(
                f"a regional judge is trained with images of each category and neutral ones, got"
                f" {held} images of the categories and {int((~self.marks.any(dim=1)).sum())}"
                " neutral ones"
            )


def train_regional(
    judge: RegionalJudge,
    images: LabelledTokens,
    schedule: RegionalTraining,
    *,
    seed: int = 0,
    each_step: Callable[[float], object] = lambda loss: None,
    checkpoint: Path | None = None,
) -> list[float]:
    """Train projection and codebook in place; returns the loss of each step.

    `each_step` is told the loss of each, when it is done. `checkpoint`: a file in which the
    training is kept every `CHECKPOINT_EVERY` steps; one of the same images, schedule and seed that
    is there is taken up, and ends in the same judge, bit for bit. A safety map that was made for
    the old codes no longer fits.

    Raises:
        InputError: for more categories than a semantic token is wide.
        NonFiniteError: on NaN or infinity in the tokens, or where the training diverges.
    """
    categories, width = images.marks.shape[1], judge.quantizer.codebook.dim
    if categories > width:
        raise InputError(
            f"{categories} categories do not fit semantic tokens of width {width}: build the guard"
            f" with regional.width={categories} at least"
        )
    training = _Training(judge, images, schedule, seed)
    kept = None if checkpoint is None else TrainingCheckpoint(checkpoint, training.identity)
    judge.requires_grad_(True)
    try:
        losses = training.learn(each_step, kept)
        training.start_codebook()
        training.fold()
        return losses
    finally:
        judge.requires_grad_(False)


class _Training:
    def __init__(
        self, judge: RegionalJudge, images: LabelledTokens, schedule: RegionalTraining, seed: int
    ) -> None:
        self.judge, self.images, self.schedule, self.seed = judge, images, schedule, seed
        self.device = judge.quantizer.codebook.weight.device
        self.generator = torch.Generator().manual_seed(seed)
        judge.projection.start(seed, images.marks.shape[1])
        self.mean, self.spread = self._moments()
        self.members = [
            (~images.marks.any(dim=1)).nonzero().flatten(),
            *(column.nonzero().flatten() for column in images.marks.T),
        ]
        self.whitening = self._whitening()

    @property
    def identity(self) -> str:
        """What makes this training the one that it is: nothing else decides its result."""
        images, sides = self.images, self.judge.projection.windows.sides
        each = zip(images.tokens, images.layouts, strict=True)
        shapes = [(len(tokens), layout) for tokens, layout in each]
        plain = [asdict(self.schedule), self.seed, sides, self.device.type, shapes]
        # the moments speak for the tokens
        return training_identity(plain, [images.marks, self.mean, self.spread])

    def learn(
        self, each_step: Callable[[float], object], kept: TrainingCheckpoint | None = None
    ) -> list[float]:
        """The projection, by the logits of the regions; from `kept` on, if it has been begun."""
        schedule = self.schedule
        projection = self.judge.projection
        optimiser = torch.optim.AdamW(
            projection.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
        )
        losses = [] if kept is None else kept.load(projection, optimiser, self.generator)
        cycle = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, schedule.learning_rate, total_steps=schedule.steps, pct_start=_WARMUP
        )
        optimiser.zero_grad()
        optimiser.step()  # changes nothing without gradients; the cycle insists on being second
        for earlier in losses:
            each_step(earlier)
            cycle.step()
        for chosen in self._batches(schedule.steps - len(losses)):
            loss = self._loss(chosen)
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(
                    "the training of the regional judge diverged: lower its learning_rate"
                )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            cycle.step()
            losses.append(float(loss.detach()))
            if kept is not None and len(losses) % CHECKPOINT_EVERY == 0:
                kept.save(losses, projection, optimiser, self.generator)
            each_step(losses[-1])
        return losses

    def _loss(self, chosen: Tensor) -> Tensor:
        scores, marks = [], []
        for numbers, evidence in self._evidence(chosen):
            logits = evidence[..., : self.images.marks.shape[1]] + FLOOR
            scores.append(logits.logsumexp(dim=1))
            marks.append(self.images.marks[numbers])
        wanted = torch.cat(marks).to(self.device, torch.float32)
        found = nn.functional.binary_cross_entropy_with_logits(
            torch.cat(scores), wanted, reduction="none"
        )
        return found.sum(dim=1).mean()

    def _evidence(self, chosen: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        """(numbers, evidence (b, S, r)) of the chosen images, those alike together."""
        alike: dict[tuple[int, Layout | None], list[int]] = {}
        for number in chosen.tolist():
            key = (len(self.images.tokens[number]), self.images.layouts[number])
            alike.setdefault(key, []).append(number)
        for (_, layout), numbers in alike.items():
            tokens = torch.stack([self.images.tokens[n] for n in numbers])
            scaled = (tokens.to(self.device, torch.float32) - self.mean) / self.spread
            if self.whitening is not None:
                scaled = scaled @ self.whitening
            yield numbers, self.judge.projection.approximate(scaled, layout)

    def _batches(self, steps: int) -> Iterator[Tensor]:
        """Images of each step: half of them neutral, the rest shared out among the categories."""
        categories = len(self.members) - 1
        each = max(1, self.schedule.batch // (2 * categories))
        for _ in range(steps):
            neutral = max(1, self.schedule.batch - each * categories)
            yield torch.cat(
                [
                    members[torch.randint(len(members), (count,), generator=self.generator)]
                    for members, count in zip(
                        self.members, [neutral, *[each] * categories], strict=True
                    )
                ]
            )

    @torch.no_grad()
    def start_codebook(self) -> None:
        """k-means of regions' semantic tokens, half of them drawn by how toxic they look."""
        regions: list[Tensor] = []
        for chosen in self._batches(_START_REGIONS):
            regions += [tokens.relu().flatten(0, 1) for _, tokens in self._evidence(chosen)]
            if sum(map(len, regions)) >= _START_REGIONS:
                break
        rows = torch.cat(regions)
        looks = (rows.amax(dim=1) + FLOOR).sigmoid().double().cpu()
        codebook = self.judge.quantizer.codebook
        points = min(len(rows), _POINTS_AN_ENTRY * codebook.codes)
        plain = torch.randint(len(rows), (points,), generator=self.generator)
        toxic = torch.multinomial(looks, points, True, generator=self.generator)
        drawn = rows[torch.cat([plain, toxic]).to(rows.device)]
        codebook.start_from(drawn, seed=self.seed, iterations=_KMEANS)

    @torch.no_grad()
    def fold(self) -> None:
        """Let the first layer take tokens as they are, instead of those that it has learnt from."""
        layer = self.judge.projection.tokens
        if self.whitening is not None:
            layer.weight.copy_(layer.weight @ self.whitening)
        layer.weight.div_(self.spread)
        layer.bias.sub_(layer.weight @ self.mean)

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and spread (d,) of the visual tokens."""
        total = squares = torch.zeros((), dtype=torch.float64)
        count = 0
        for image in self.images.tokens:
            rows = image.double()
            total, squares = total + rows.sum(dim=0), squares + rows.square().sum(dim=0)
            count += len(rows)
        mean = total / count
        spread = (squares / count - mean.square()).clamp_min(0.0).sqrt()
        if not bool(torch.isfinite(spread).all()):
            raise NonFiniteError("visual tokens hold NaN or infinity; the judge was not trained")
        spread = torch.where(spread > 0, spread, 1.0)
        return mean.float().to(self.device), spread.float().to(self.device)

    def _whitening(self) -> Tensor | None:
        """(d, d) float32, symmetric: C^(-1/2), C = w R + (1 - w) I with the correlations R.

        Those of neutral images' tokens, of which there are many: what is common tells nothing.
        """
        weight = self.schedule.whitening
        if weight == 0.0:
            return None
        neutral = self.members[0]
        total = torch.zeros(len(self.spread), len(self.spread), dtype=torch.float64)
        count = 0
        for number in neutral[torch.randperm(len(neutral), generator=self.generator)].tolist():
            rows = (self.images.tokens[number].float() - self.mean.cpu()) / self.spread.cpu()
            total += (rows.T @ rows).double()
            count += len(rows)
            if count >= _CORRELATED:
                break
        shrunk = weight * total / count + (1.0 - weight) * torch.eye(len(total))
        values, vectors = torch.linalg.eigh(shrunk)
        root: Tensor = (vectors * values.rsqrt()) @ vectors.T
        return root.float().to(self.device)
