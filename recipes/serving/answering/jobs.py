"""What waits for the model: conversations to be answered, and pictures to be judged."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vqguard.recipes.serving.answering.prompts import EncodedPrompt
from vqguard.recipes.serving.answering.rows import Row
from vqguard.recipes.serving.answering.tickets import Ticket
from vqguard.regional.layout import Layout
from vqguard.safety_map import SafetyMap, Verdict


@dataclass(frozen=True)
class Origin:
    """Where pictures come from, for the audit log."""

    request: str
    hashes: tuple[str, ...]
    """SHA-256 of each picture's file."""


NOWHERE = Origin("", ())


@dataclass(frozen=True)
class PictureCodes:
    """What a picture is to the language model."""

    codes: tuple[int, ...]
    """Of its visual tokens, in the patch codebook."""
    layout: Layout | None
    """Where they lie; None: not known."""


@dataclass(frozen=True)
class Screened:
    """Verdicts on pictures without an answer."""

    verdicts: list[Verdict]
    safety_map: SafetyMap
    """The map that gave them, with its own policies."""
    codes: tuple[PictureCodes, ...] = ()
    """Of each picture, where they were asked for and the guard quantises."""

    @property
    def map_version(self) -> str:
        """Of the map."""
        return self.safety_map.version


@dataclass(eq=False)
class AnswerJob:
    """A conversation to be answered."""

    prompt: EncodedPrompt
    row: Row
    ticket: Ticket[Row]
    origin: Origin = NOWHERE
    recorded: bool = False
    """Whether its verdicts were written down."""

    @property
    def kind(self) -> tuple[str, ...]:
        """Jobs of one kind go together."""
        return ("answer", *self.prompt.kind)

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it."""
        return self.row.cancelled

    @property
    def deadline(self) -> float:
        """When it is too late, by `time.monotonic`."""
        return self.row.deadline


@dataclass(eq=False)
class ScreenJob:
    """Pictures to be judged."""

    inputs: dict[str, Tensor]
    """What the image processor gives for them."""
    pictures: int
    ticket: Ticket[Screened]
    deadline: float
    origin: Origin = NOWHERE
    cancelled: bool = False
    recorded: bool = False
    """Whether its verdicts were written down."""
    codes: bool = False
    """Whether the codes of its visual tokens are wanted too."""

    @property
    def kind(self) -> tuple[str, ...]:
        """Jobs of one kind go together."""
        return ("look" if self.codes else "screen", *sorted(self.inputs))


Job = AnswerJob | ScreenJob
