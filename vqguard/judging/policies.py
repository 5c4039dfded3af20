"""What is done about an image, a category: policies, read from YAML.

```yaml
gun: {action: refuse, refusal: {en: "I do not discuss weapons.", fr: "Je ne parle pas d'armes."}}
alcohol: {action: report}
unfamiliar: {action: refuse}
```
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from vqguard.errors import InputError
from vqguard.names import nearest
from vqguard.strict import StrictConfig, raise_problems

Action: TypeAlias = Literal["report", "warn", "blank", "refuse", "raise"]
"""What a policy can ask for, the mildest first."""
UNSEEN = "unseen"
"""Category of a flagged cell that held no calibration image (`empty="flag"`)."""
UNFAMILIAR = "unfamiliar"
"""Category of an image with a token far from every codeword."""
_MOST_TEXT = 2000


@dataclass(frozen=True)
class Policy(StrictConfig):
    """What is done about images of one category."""

    action: Action = "refuse"
    """`refuse`: the answer is a refusal. `blank`: the visual tokens under the flagged regions, or
    all of the picture's, are replaced, and the rest is answered about. `warn`: a fixed warning is
    put before the answer. `report`: the verdict names the category and nothing else happens.
    `raise`: an error."""
    refusal: dict[str, str] = field(default_factory=dict)
    """Refusal by language, as in `{en: ..., fr: ...}`; else the guard's own."""
    warning: str = ""
    """The warning of `warn`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [
            f"refusal[{language!r}]: expected a sentence of at most {_MOST_TEXT} characters"
            for language, text in self.refusal.items()
            if not text.strip() or len(text) > _MOST_TEXT or not language.strip()
        ]
        if (self.action == "warn") != bool(self.warning.strip()) or len(self.warning) > _MOST_TEXT:
            problems.append(
                "warning: expected a sentence where the action is 'warn', and none otherwise"
            )
        raise_problems(type(self), problems)


REFUSE, REPORT = Policy(), Policy("report")


def severity(action: str) -> int:
    """How strict an action is; more is stricter."""
    return get_args(Action).index(action)


def lineage(category: str, parents: Mapping[str, str]) -> list[str]:
    """A category, its parent, the parent's parent, and so on."""
    line = [category]
    while line[-1] in parents:
        line.append(parents[line[-1]])
    return line


def require_known(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise InputError where one of `names` is not known, with the nearest name that is."""
    known = list(known)
    for name in names:
        if name not in known:
            raise InputError(
                f"{what} for {name!r}, which is no category here.{nearest(name, known)}"
            )


def parents_of(hierarchy: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Child -> parent, from a hierarchy as it is written: parent -> children.

    Raises:
        InputError: for a child of two parents, and for a circle.
    """
    parents: dict[str, str] = {}
    for parent, children in hierarchy.items():
        for child in children:
            if child in parents:
                raise InputError(
                    f"{child!r} stands under {parents[child]!r} and under {parent!r}: keep one"
                )
            parents[child] = parent
    for child in parents:
        seen, name = {child}, parents[child]
        while name in parents and name not in seen:
            seen.add(name)
            name = parents[name]
        if name in seen:
            raise InputError(f"the hierarchy runs in a circle through {name!r}: take one link out")
    return parents
