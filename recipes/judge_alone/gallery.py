"""Pictures of a judge's report: what its codes stand for, and its worst mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vqguard.names import printable
from vqguard.recipes.evaluation.pictures import FOLDER
from vqguard.recipes.report.explain import outlined, region_in_picture
from vqguard.safety_map import NEUTRAL, SafetyMap, Verdict

CODES, MISTAKES = "Codes that flag, with pictures that they decided", "Worst mistakes"
_CODES, _OF_A_CODE, _OF_A_KIND = 12, 4, 8
_SIDE, _GAP = 160, 6  # pixels


@dataclass(frozen=True)
class JudgedImage:
    """A held-out image and what the guard's own judge says of it."""

    number: int
    name: str
    labels: tuple[str, ...]
    verdict: Verdict

    @property
    def is_neutral(self) -> bool:
        """Whether nothing of it is toxic."""
        return self.labels == (NEUTRAL,)

    @property
    def is_mistake(self) -> bool:
        """Neutral and flagged, or toxic and not."""
        return self.verdict.flagged == self.is_neutral


class Gallery:
    """Writes the report's pictures into a run's directory.

    Args:
        run: the directory.
        judged: the held-out images.
        safety_map: what judged them.
        image_processor: the model's; it says which part of a picture the encoder is shown.
    """

    def __init__(
        self,
        run: Path,
        judged: Sequence[JudgedImage],
        safety_map: SafetyMap,
        image_processor: Any,
    ) -> None:
        self.run, self.judged, self.safety_map = run, judged, safety_map
        self.image_processor = image_processor
        by_code: dict[int, list[JudgedImage]] = {}
        for image in sorted(judged, key=lambda image: -image.verdict.probability):
            if image.verdict.flagged:
                by_code.setdefault(image.verdict.semantic_code, []).append(image)
        most = sorted(by_code.items(), key=lambda item: (-len(item[1]), item[0]))
        self._of_codes = dict(most[:_CODES])
        wrong = sorted(
            (image for image in judged if image.is_mistake),
            key=lambda image: image.verdict.probability,
        )
        alarms = [image for image in reversed(wrong) if image.is_neutral][:_OF_A_KIND]
        misses = [image for image in wrong if not image.is_neutral][:_OF_A_KIND]
        self._mistakes = [*alarms, *misses]

    @property
    def needed(self) -> list[int]:
        """Numbers of the images whose pictures are shown."""
        shown = [image for some in self._of_codes.values() for image in some[:_OF_A_CODE]]
        return sorted({image.number for image in [*shown, *self._mistakes]})

    def write(self, pictures: dict[int, Image.Image]) -> list[dict[str, str]]:
        """Draw the pictures, by number, and return the report's entries of them."""
        folder = self.run / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        entries = []
        for code, images in self._of_codes.items():
            shown = images[:_OF_A_CODE]
            drawn = [self._drawn(image, pictures) for image in shown if image.number in pictures]
            if not drawn:
                continue
            path = folder / f"code-{code:04d}.png"
            _side_by_side(drawn).save(path)
            entries.append(_entry(path, CODES, self._about_code(code, len(images))))
        for place, image in enumerate(self._mistakes):
            if image.number not in pictures:
                continue
            path = folder / f"mistake-{place:02d}.png"
            self._drawn(image, pictures).save(path)
            entries.append(_entry(path, MISTAKES, _about_mistake(image)))
        return entries

    def _drawn(self, image: JudgedImage, pictures: dict[int, Image.Image]) -> Image.Image:
        picture, reason = pictures[image.number], image.verdict.reason
        box = None
        if reason is not None and reason.region is not None:
            box = region_in_picture(reason.region, picture.size, self.image_processor)
        drawn = outlined(picture, box)
        drawn.thumbnail((2 * _SIDE, 2 * _SIDE))
        return drawn

    def _about_code(self, code: int, decided: int) -> str:
        names = (*self.safety_map.categories, NEUTRAL)
        shares = zip(names, self.safety_map.probabilities[code].tolist(), strict=True)
        most = sorted(shares, key=lambda share: -share[1])[:2]
        said = ", ".join(f"{name} {share:.2f}" for name, share in most if share >= 0.005)
        counted = int(self.safety_map.counts[code].sum())
        return printable(
            f"Code {code}: {said} ({counted} calibration images). It decided {decided} of the "
            "held-out pictures."
        )


def _about_mistake(image: JudgedImage) -> str:
    verdict, reason = image.verdict, image.verdict.reason
    name = image.name if len(image.name) <= 60 else f"…{image.name[-59:]}"
    if image.is_neutral:
        above = "" if reason is None else f" above the threshold {reason.threshold:.3f}"
        text = f"Flagged as {verdict.category}, and neutral: score {verdict.probability:.3f}{above}"
    else:
        said = ", ".join(image.labels)
        text = f"Not flagged, and labelled {said}: score {verdict.probability:.3f}"
    return printable(f"{text}. {name}")


def _entry(path: Path, group: str, caption: str) -> dict[str, str]:
    return {"file": f"{FOLDER}/{path.name}", "caption": caption, "group": group}


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    small = [picture.copy() for picture in pictures]
    for picture in small:
        picture.thumbnail((_SIDE, _SIDE))
    width = sum(picture.width for picture in small) + _GAP * (len(small) - 1)
    both = Image.new("RGB", (width, max(picture.height for picture in small)), "white")
    left = 0
    for picture in small:
        both.paste(picture, (left, 0))
        left += picture.width + _GAP
    return both
