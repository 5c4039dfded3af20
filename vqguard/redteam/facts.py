"""What every attack tells of itself, so that an evaluation can run it and a report can show it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Protocol

from torch import Tensor

from vqguard.redteam.threat import ThreatModel
from vqguard.redteam.trial import AttackTarget


class Scope(Enum):
    """Which pictures and requests an attack is measured on. Reports list them in this order."""

    UNIVERSAL = "universal"
    """One picture against many requests, judged on others."""
    PER_REQUEST = "per_request"
    """Each picture by itself, against a request of its own."""


class Goal(Enum):
    """What an attacker wants of a guarded model."""

    ANSWER = "answer"
    """An answer that it refuses, from a harmless picture."""
    EVASION = "evasion"
    """That a toxic picture passes."""
    DENIAL = "denial"
    """That a harmless picture is refused."""


class MadeOn(Enum):
    """Other models that an attacker makes pictures on."""

    UNDEFENDED = "undefended"
    """The victim's base, without a guard."""
    OTHER_RUNS = "other_runs"
    """The models of other runs, guarded by themselves: another seed, say."""


@dataclass(frozen=True)
class Budget:
    """What an attacker may spend."""

    eps_255: float
    """Radius of the L-infinity ball in 1/255; 255 is unbounded."""
    steps: int
    """Gradient steps of one restart."""
    restarts: int
    """Restarts, the one from the clean image included."""
    seed: int
    """For the random starts."""
    judge_every: int
    """Steps between judgements by real generation."""


@dataclass(frozen=True)
class Message:
    """What is sent beside an attacked picture."""

    pictures: int = 1
    """Pictures of the message. Several are attacked as a strip: `vqguard.redteam.pixels.strip`."""
    words: str | None = None
    """What is said in place of the request; None: the request."""
    first: str | None = None
    """A question about the picture in a first turn; the request follows in a second. None: there
    is one turn."""


class Findings(Protocol):
    """What a report shows of an attack's result."""

    @property
    def scored(self) -> Tensor:
        """(n,) bool: the judged attempts whose share is the success rate."""

    @property
    def curve(self) -> list[float]:
        """The attack's loss over its steps."""

    @property
    def example(self) -> Tensor:
        """(3, H, W) float32 in [0, 1]: an adversarial picture to show."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes the result doubtful; empty if nothing does."""


@dataclass(frozen=True, kw_only=True)
class AttackOutcome:
    """What every attack's result states of the run: its doubts, and what was spent (`Budget`)."""

    eps_255: float
    steps: int
    restarts: int
    warnings: tuple[str, ...] = ()
    """What makes the result doubtful; empty if nothing does."""
    masked: int = 0
    """Images that never received a gradient other than zero."""


class MeasuredAttack(ABC):
    """An attack in the table of attacks. Its two bases are `Attack` and `UniversalAttack`."""

    name: ClassVar[str]
    """The word in records, as condition `attack`."""
    label: ClassVar[str]
    """The words in a report's tables."""
    sentence: ClassVar[str]
    """What it does, in one sentence."""
    scope: ClassVar[Scope]
    """What it is measured on; its base says so."""
    gradients: ClassVar[tuple[str, ...]] = ()
    """Names of the gradient modes that it is run with; none: with all that a report attacks the
    model by."""
    on_controls: ClassVar[bool] = True
    """Whether the controls are attacked too, or only the undefended and the guarded model."""
    measured: ClassVar[bool] = True
    """Whether every report runs it; else only a suite that names it does."""
    goal: ClassVar[Goal] = Goal.ANSWER
    """What counts as success, and on which pictures."""
    quantised: ClassVar[bool] = False
    """Whether it needs a quantiser to get past: a `QuantisedTarget`."""
    threat: ClassVar[ThreatModel | None] = None
    """The attacker, where no gradient of the victim is followed; None: by the gradient mode."""
    made_on: ClassVar[tuple[MadeOn, ...]] = ()
    """Whose pictures the victim is shown; none: its own. Such an attack has a field `stand_in`."""

    @property
    def seeded(self) -> bool:
        """Whether another seed is another attempt; if not, a suite runs it by its first seed."""
        return True

    @property
    def message(self) -> Message:
        """What its target sends. An attack that every report runs has the usual one."""
        return Message()

    @classmethod
    @abstractmethod
    def within(cls, budget: Budget) -> MeasuredAttack:
        """The attack as reports run it, at this budget; settings of its own are set here."""

    @abstractmethod
    def measure(self, target: AttackTarget, images: Tensor, held_out: Tensor) -> Findings:
        """Run on the pictures and requests of the attack's scope.

        Args:
            target: the victim, with all requests of the scope.
            images: (R, 3, H, W) float32 in [0, 1], request i's picture; (1, 3, H, W) in the
                universal scope.
            held_out: (H,) int64, the requests that are judged and not attacked; (0,) where each
                request has a picture of its own.
        """

    @classmethod
    def condition(cls, budget: Budget, gradient: str) -> dict[str, str | float]:
        """The condition of the attack's records, in the order in which reports say it."""
        return {
            "attack": cls.name,
            "gradient": gradient,
            "eps_255": budget.eps_255,
            "steps": budget.steps,
            "restarts": budget.restarts,
        }

    @classmethod
    def heading(cls, circumstances: str) -> str:
        """The title of the attack's curve: its name in words, then subject, gradient and budget."""
        return f"{cls.name.replace('_', ' ')}: {circumstances}"

    @classmethod
    def caption(cls, circumstances: str) -> str:
        """What is written below an adversarial picture."""
        return cls.heading(circumstances)
