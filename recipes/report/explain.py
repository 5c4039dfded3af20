"""Why pictures were flagged, for people: `explain.json`, `index.html` and `pictures/` in a folder.

Each picture is drawn anew with the region that decided outlined. Files are numbered: a name that
came from outside is shown, escaped, and never used as a path.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from vqguard.errors import ConfigError, ImageError
from vqguard.files import replace_files, replace_text, require_empty
from vqguard.images import open_image
from vqguard.judging.evidence import NEUTRAL
from vqguard.judging.verdict import DecidingRegion
from vqguard.names import printable
from vqguard.recipes.judging.examples import Examples
from vqguard.recipes.report.templates import rendered
from vqguard.safety_map import SafetyMap, Verdict
from vqguard.strict import StrictData

PICTURES = "pictures"
_MOST, _LEAST = 1024, 256  # pixels of a drawn picture's longer side


class Explanations:
    """The explanations of one scan. `close` writes the page and the JSON file."""

    def __init__(
        self,
        folder: Path,
        safety_map: SafetyMap,
        image_processor: Any,
        examples: Examples | None = None,
    ) -> None:
        """Make the folder.

        Args:
            folder: new or empty.
            safety_map: what judges.
            image_processor: the model's; it says which part of a picture the encoder is shown.
            examples: calibration images by code, where the run keeps them.

        Raises:
            ConfigError: unless `folder` is new or empty.
        """
        require_empty(folder, "Name another one for the explanations.")
        try:
            (folder / PICTURES).mkdir(parents=True)
        except OSError as error:  # another scan has begun to write here, or nobody can
            raise ConfigError(
                f"cannot make {folder / PICTURES} ({error.strerror}). Name another folder for the "
                "explanations."
            ) from error
        self.folder, self.safety_map = folder, safety_map
        self.image_processor = image_processor
        self.examples = None if examples is None else DrawnExamples(examples, folder / PICTURES)
        self.rows: list[dict[str, Any]] = []

    def add(
        self, path: Path, word: str, verdict: Verdict | None, picture: Image.Image, note: str = ""
    ) -> None:
        """Explain one picture of a file.

        Args:
            path: as it was named; shown only.
            word: what came of it, as `vqguard scan` calls it.
            verdict: None where the file was refused before a verdict.
            picture: what was judged.
            note: a remark on the file.
        """
        reason = None if verdict is None else verdict.reason
        region = None if reason is None else reason.region
        box = None
        if region is not None:
            box = region_in_picture(region, picture.size, self.image_processor)
        name = f"{PICTURES}/{len(self.rows) + 1:06d}.png"
        outlined(picture, box).save(self.folder / name, format="PNG")
        why = Explained()
        if verdict is not None:
            why = Explained.of(self.safety_map, verdict, region, outlined=box is not None)
        row = {
            "image": str(path),
            "picture": name,
            "verdict": word,
            "note": note,
            **why.to_dict(),
            "examples": self._examples(why.semantic_code),
        }
        self.rows.append(row)

    def close(self) -> Path:
        """Write `explain.json` and `index.html`; returns the page's path."""
        document = {
            "map_version": self.safety_map.version,
            # None: the run keeps none that belong to this map
            "calibration_images": None if self.examples is None else len(self.examples.files),
            "pictures": self.rows,
        }
        replace_text(self.folder / "explain.json", json.dumps(document, indent=2) + "\n")
        page = rendered(
            "explain.html.j2",
            rows=[{**row, "image": printable(row["image"])} for row in self.rows],
            version=self.safety_map.version[:12],
            keeps_examples=self.examples is not None,
        )
        replace_text(self.folder / "index.html", page)
        return self.folder / "index.html"

    def _examples(self, code: int | None) -> list[dict[str, Any]]:
        if self.examples is None or code is None:
            return []
        drawn = self.examples.of(code)
        return [
            {"picture": f"{PICTURES}/{path.name}", "labels": list(labels)} for path, labels in drawn
        ]


class DrawnExamples:
    """Calibration images by code, drawn anew into a folder of pictures, each once.

    Args:
        examples: those of a run.
        folder: of the pictures; it is there.
    """

    def __init__(self, examples: Examples, folder: Path) -> None:
        self._kept, self._folder = examples, folder
        self.files: dict[Path, Path] = {}
        """Of each image that was drawn, the picture."""

    def of(self, code: int) -> list[tuple[Path, tuple[str, ...]]]:
        """The pictures of a code with their labels; a copy that cannot be read is left out."""
        drawn = []
        for place, example in enumerate(self._kept.of(code)):
            if example.path not in self.files:
                with suppress(ImageError):
                    image = open_image(example.path, min_side=1)
                    path = self._folder / f"example-{code:05d}-{place}.png"
                    content = io.BytesIO()
                    image.save(content, "PNG")
                    replace_files({path: content.getvalue()})
                    self.files[example.path] = path
            if example.path in self.files:
                drawn.append((self.files[example.path], example.labels))
        return drawn


@dataclass(frozen=True)
class Explained(StrictData):
    """What a page says of a verdict; None and empty where a file was refused before one."""

    category: str | None = None
    score: float | None = None
    threshold: float | None = None
    action: str | None = None
    semantic_code: int | None = None
    category_scores: Mapping[str, float] = field(default_factory=dict)
    """P(c|k) of the cell by category, neutral last."""
    region: DecidingRegion | None = None
    outlined: bool = False
    """Whether the picture shows the region."""
    also: tuple[str, ...] = ()
    """Other categories whose thresholds were exceeded."""

    @classmethod
    def of(
        cls,
        safety_map: SafetyMap,
        verdict: Verdict,
        region: DecidingRegion | None,
        *,
        outlined: bool,
    ) -> Explained:
        """Of a verdict of this map; `region`: what the page speaks of."""
        reason = verdict.reason
        names = (*safety_map.categories, NEUTRAL)
        shares = safety_map.probabilities[verdict.semantic_code].tolist()
        return cls(
            category=verdict.category,
            score=verdict.probability if reason is None else reason.score,
            threshold=None if reason is None else reason.threshold,
            action=verdict.action,
            semantic_code=verdict.semantic_code,
            category_scores=dict(zip(names, shares, strict=True)),
            region=region,
            outlined=outlined,
            also=() if reason is None else reason.also,
        )


def region_in_picture(
    region: DecidingRegion, size: tuple[int, int], image_processor: Any
) -> tuple[float, float, float, float] | None:
    """(left, top, right, bottom) of a region in pixels of a picture of `size` (width, height).

    The region is given in shares of what the encoder is shown: all of the picture, stretched; the
    square that LLaVA's processors pad it to; or the middle that a processor crops after it has
    scaled it. What lies in the padding is cut off. None where the region is a tile's or a frame's,
    where the processor pads in another way, and behind a vision encoder, which has none: the place
    is not known here.
    """
    if region.part != "picture" or image_processor is None:
        return None
    left, top, width, height = 0.0, 0.0, float(size[0]), float(size[1])
    tiled = getattr(image_processor, "image_grid_pinpoints", None) is not None
    if not tiled:  # tiles are stretched and put together; nothing is cropped away
        if getattr(image_processor, "do_pad", None):
            if not hasattr(image_processor, "pad_to_square"):
                return None
            width = height = max(width, height)
        if getattr(image_processor, "do_center_crop", None):
            cropped = _crop_of(image_processor, (width, height))
            if cropped is None:
                return None
            width, height = cropped
        left, top = (size[0] - width) / 2, (size[1] - height) / 2
    box = (
        max(0.0, left + region.left * width),
        max(0.0, top + region.top * height),
        min(float(size[0]), left + region.right * width),
        min(float(size[1]), top + region.bottom * height),
    )
    return box if box[0] < box[2] and box[1] < box[3] else None


def _crop_of(image_processor: Any, size: tuple[float, float]) -> tuple[float, float] | None:
    """(width, height) in pixels, before scaling, of what a crop in the middle leaves of a size."""
    scaled, crop = _sides(image_processor.size), _sides(image_processor.crop_size)
    if "height" not in crop or "width" not in crop:
        return None
    if not getattr(image_processor, "do_resize", True):
        across = down = 1.0
    elif "shortest_edge" in scaled and "longest_edge" not in scaled:
        across = down = scaled["shortest_edge"] / min(size)
    elif "height" in scaled and "width" in scaled:
        across, down = scaled["width"] / size[0], scaled["height"] / size[1]
    else:
        return None
    width, height = crop["width"] / across, crop["height"] / down
    pads = width > size[0] + 1 or height > size[1] + 1
    return None if pads else (width, height)


def _sides(size: Any) -> dict[str, float]:
    names = ("shortest_edge", "longest_edge", "height", "width")
    read = {name: size.get(name) for name in names} if hasattr(size, "get") else {}
    return {name: float(side) for name, side in read.items() if side}


def outlined(picture: Image.Image, box: tuple[float, float, float, float] | None) -> Image.Image:
    """A copy without metadata, of a size to look at, with a frame around `box` (in pixels)."""
    longest = max(picture.size)
    factor = _MOST / longest if longest > _MOST else max(1, _LEAST // longest)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    drawn = Image.new("RGB", size)
    drawn.paste(picture.convert("RGB").resize(size))
    if box is not None:
        thick = max(2, max(size) // 200)
        left, top, right, bottom = (round(edge * factor) for edge in box)
        edges = (left, top, max(left, right - 1), max(top, bottom - 1))
        pen = ImageDraw.Draw(drawn)
        # black beside yellow: seen on every ground
        pen.rectangle(edges, outline=(0, 0, 0), width=2 * thick)
        pen.rectangle(edges, outline=(255, 214, 0), width=thick)
    return drawn
