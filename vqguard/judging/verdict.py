"""What a safety map says about one image, and why."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from vqguard.strict import StrictData

Part: TypeAlias = Literal["picture", "tile", "frame", "grid"]
"""What one grid of an image's visual tokens shows: all of the picture, a tile of it, a frame of a
video; "grid" where nobody said."""


@dataclass(frozen=True)
class DecidingRegion(StrictData):
    """Where in an image the window lies that decided its verdict.

    Edges are shares, 0 to 1, of the height and width of the part as the encoder is shown it: after
    the image processor's cropping or padding.
    """

    part: Part
    """What the window lies in."""
    index: int
    """Which of the image's grids, from 0: the number of the tile or frame. Where a family shows a
    small version of the whole before its tiles, that is the first."""
    top: float
    left: float
    bottom: float
    right: float


@dataclass(frozen=True)
class Reason:
    """Why an image is refused or reported: ready for a log."""

    category: str
    """The category whose threshold was exceeded, "unseen" or "unfamiliar"."""
    score: float
    """What exceeded it: the image's score, 0 to 1; for "unfamiliar" a distance; 1 for a cell that
    is forbidden by hand."""
    threshold: float
    token: int
    """Which of the image's semantic tokens decided, padding not counted."""
    semantic_code: int
    """Its cell."""
    action: str
    """What the strictest policy of `category` and of `also` asks for: "report", "warn", "blank",
    "refuse" or "raise"."""
    map_version: str
    """`SafetyMap.version` of the map that judged."""
    region: DecidingRegion | None = None
    """Where it is; None where the judge is global, where no grid of the tokens is known, and where
    all of the image is unfamiliar."""
    also: tuple[str, ...] = ()
    """Others whose thresholds were exceeded too, the one that would name the verdict next first."""


@dataclass(frozen=True)
class Verdict:
    """What the safety map says about one image, and by which of its semantic tokens."""

    flagged: bool
    """Whether something must be done before the image is answered about: its policy is any but
    "report"."""
    category: str
    """The category whose threshold was exceeded; "neutral" if none was, "unseen" for an empty cell,
    "unfamiliar" for an image far from every codeword."""
    probability: float
    """The number that is compared with the threshold, 0 to 1: the image's score under the map's
    rule. Where that is 0, P of the deciding cell's most probable toxic category; 0 for an empty
    cell."""
    semantic_code: int
    """Semantic cell that decided."""
    token: int = 0
    """Which of the image's semantic tokens decided, padding not counted."""
    codes: tuple[int, ...] = ()
    """Semantic codes of all its tokens."""
    scores: tuple[float, ...] = ()
    """What the rule gives the cell of each, 0 to 1."""
    reason: Reason | None = None
    """Where a threshold was exceeded, whatever the policy."""
    quantised: bool = True
    """Whether the guard that judged quantises visual tokens too. False: it judges alone, and what
    is not flagged reaches the language model as it is."""

    @property
    def action(self) -> str:
        """What the policy asks for; "none" where no threshold was exceeded."""
        return "none" if self.reason is None else self.reason.action

    def to_dict(self) -> dict[str, Any]:
        """The verdict without its tokens, as plain values ready for JSON."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name in values if name not in ("codes", "scores")}
