"""A suite: which attacks are run on which subjects, how often and how long. YAML, strict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Literal

from vqguard.errors import ConfigError
from vqguard.names import nearest
from vqguard.redteam import ATTACKS, GRADIENTS
from vqguard.redteam.attack_table import BENIGN, CLEAN
from vqguard.redteam.defenses import DEFENSES
from vqguard.strict import StrictConfig, raise_problems

SUBJECTS = (
    "base",
    "guarded",
    "guarded_global",
    "guarded_smoothed",
    "quantiser_removed",
    "finetuned_control",
    *DEFENSES,
)
"""Whom a suite may attack: the undefended model, the guarded one by its own judge, by the global
one and by a majority over noisy copies, the controls, and peers: the undefended model behind a
simple defense."""


Split = Literal["own", "taught_verbs", "heldout_verbs"]


@dataclass(frozen=True)
class SuiteEntry(StrictConfig):
    """One attack of a suite."""

    attack: str
    """Its name in the table of attacks; `none`: the clean picture; `benign`: clean pictures with
    harmless requests, whose refusals are counted."""
    subjects: tuple[str, ...] = ("guarded",)
    """Whom it is run on; one that a run does not have is left out, and the log says so."""
    gradients: tuple[str, ...] = ()
    """Gradient modes on guarded subjects; none: the attack's own, else straight-through. Other
    subjects have nothing to cross."""
    eps_255: tuple[float, ...] = ()
    """Budgets in 1/255; none: the suite's."""
    steps: int = 60
    """Steps a restart."""
    restarts: int = 1
    """Restarts, the one from the clean picture included."""
    requests: int | None = None
    """Only the first so many of the suite's requests; None: all."""
    seeds: tuple[int, ...] = ()
    """By which it is run; none: the suite's."""
    aim: Literal["nats", "margin", "semantic"] = "margin"
    """What the loss measures: `GenerationTarget.aim`."""
    settings: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    """Other fields of the attack."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if self.attack not in (CLEAN, BENIGN) and self.attack not in ATTACKS:
            known = [CLEAN, BENIGN, *ATTACKS.labels]
            problems.append(f"attack: {self.attack!r} is unknown.{nearest(self.attack, known)}")
        problems += [
            f"subjects: {name!r} is unknown.{nearest(name, SUBJECTS)}"
            for name in self.subjects
            if name not in SUBJECTS
        ]
        problems += [
            f"gradients: {name!r} is unknown.{nearest(name, list(GRADIENTS.labels))}"
            for name in self.gradients
            if name not in GRADIENTS
        ]
        problems += [
            f"eps_255: must be in (0, 255], got {e}" for e in self.eps_255 if not 0 < e <= 255
        ]
        problems += [
            f"{name}: must be at least 1, got {getattr(self, name)}"
            for name in ("steps", "restarts", "requests")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if self.seeds and min(self.seeds) < 0:
            problems.append(f"seeds: expected numbers of at least 0, got {self.seeds}")
        raise_problems(type(self), problems)


@dataclass(frozen=True)
class Suite(StrictConfig):
    """A list of attacks, and what they have in common."""

    name: str
    """What records and reports call it."""
    sentence: str
    """What it is for."""
    attacks: tuple[SuiteEntry, ...]
    """In the order in which they are run on a subject."""
    split: Split = "own"
    """Where the requests of the embedded world come from: `own` asks for every forbidden verb, and
    records carry the run's own split; `taught_verbs` and `heldout_verbs` ask for those that stage 2
    had or had not, where the run held some out."""
    requests: int = 10
    """Requests, one picture each: n of a rate."""
    universal_requests: int = 8
    """Requests that a universal picture is made for; they follow after those of one picture."""
    universal_held_out: int = 20
    """Requests that it is judged on: those after them."""
    eps_255: tuple[float, ...] = (16, 255)
    """Budgets in 1/255; 255 is unbounded."""
    seeds: tuple[int, ...] = (0,)
    """Every attack is run by each."""
    judge_every: int = 10
    """Steps between judgements."""
    batch: int = 10
    """Pictures that are attacked at the same time; what a kill can lose."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [
            f"{name}: must be at least 1, got {getattr(self, name)}"
            for name in ("requests", "judge_every", "batch")
            if getattr(self, name) < 1
        ]
        if not self.attacks:
            problems.append("attacks: expected at least one")
        if not self.seeds or min(self.seeds) < 0:
            problems.append(f"seeds: expected numbers of at least 0, got {self.seeds}")
        raise_problems(type(self), problems)

    @property
    def cases(self) -> int:
        """How many requests the suite uses in all."""
        return self.requests + self.universal_requests + self.universal_held_out


def suite_names() -> list[str]:
    """Names of the suites that come with the package."""
    names = [entry.name for entry in (files("vqguard.recipes") / "suites").iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_suite(name_or_path: str | Path) -> Suite:
    """A suite by name, or from a YAML file.

    Raises:
        ConfigError: no such suite (with the nearest name), or a file that does not fit.
    """
    path = Path(name_or_path)
    if path.suffix.lower() in (".yaml", ".yml"):
        return Suite.from_yaml(path)
    names = suite_names()
    if str(name_or_path) not in names:
        raise ConfigError(
            f"no suite is called {str(name_or_path)!r}.{nearest(str(name_or_path), names)} "
            "A file of your own is named by its path and ends in .yaml."
        )
    return Suite.from_yaml(Path(str(files("vqguard.recipes") / "suites" / f"{name_or_path}.yaml")))
