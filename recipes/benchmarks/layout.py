"""How a benchmark lies on the disk: a YAML file for each, in `layouts/`, strict.

A text or a path in a layout may hold `{column}`, which a row's value takes the place of, and
`{column:letter}` or `{column:options}`: the letter of a choice's number, and choices by letters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from vqguard.errors import DataError
from vqguard.strict import StrictConfig, raise_problems

Form = Literal["csv", "list", "mapping", "coco_captions"]
Use = Literal["attack", "benign", "question"]

_FIELD = re.compile(r"\{([^{}:]+)(?::(letter|options))?\}")
_OPENING = "Sure, here is"


@dataclass(frozen=True)
class Part(StrictConfig):
    """Records of one kind, with what to do with them."""

    name: str
    """Of the task or the part; the file's stem, where it is `{file}`."""
    records: str
    """Their file or files, as a pattern of paths in the benchmark's folder."""
    use: Use
    """`attack`: a request to be refused; `benign`: one to be answered; `question`: of utility."""
    request: str
    """What is asked."""
    form: Form = "list"
    """`csv` with a header; `list`: JSON of objects, or one a line; `mapping`: JSON of objects by
    their ids, which are the column `key`; `coco_captions`: COCO's images joined with captions."""
    image: tuple[str, ...] = ()
    """Where the picture may be, in the folder; none: the request is asked beside a grey one."""
    only: Mapping[str, str] = field(default_factory=dict)
    """Column -> a pattern that its value must fit, as in `safe` or `contrast_*`."""
    opening: str = _OPENING
    """What an attack aims at."""
    expected: str = ""
    """The right answer."""
    scoring: Literal["yes_no", "letter", "none"] = "none"
    """How an answer is compared with it; `none`: by the authors' own grader."""
    answers: str = ""
    """File that their grader reads, `.json` or `.jsonl`; empty: none is written."""
    answer: Mapping[str, str] = field(default_factory=dict)
    """An answer's keys there; `{answer}` is what the model said. Where the only key is `{key}`, the
    file is one object, by ids."""

    @property
    def by_key(self) -> bool:
        """Whether the grader's file is one object."""
        return list(self.answer) == ["{key}"]

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if self.use == "question" and bool(self.expected) != (self.scoring != "none"):
            problems.append("expected, scoring: one says nothing without the other")
        if bool(self.answers) != bool(self.answer):
            problems.append("answers, answer: one says nothing without the other")
        raise_problems(type(self), problems)


@dataclass(frozen=True)
class Layout(StrictConfig):
    """A benchmark as its authors publish it."""

    name: str
    """What records call it."""
    title: str
    """What messages call it."""
    published: str
    """Where its authors publish it."""
    source: str
    """Where this layout was read: paper, and repository or data card."""
    fetch: str
    """What is to be done with what they publish, in a sentence."""
    inside: tuple[str, ...] = (".",)
    """Where in the folder the paths may start from."""
    parts: tuple[Part, ...] = ()
    """Its records."""
    categories: tuple[str, ...] = ()
    """Folders of toxic pictures, where it has some in place of records."""
    signs: tuple[str, ...] = ()
    """Patterns of other paths by which a folder without the records is known."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.parts) == bool(self.categories):
            raise_problems(type(self), ["parts, categories: expected one of them"])


def layouts() -> list[Layout]:
    """The layouts that come with the package, by name."""
    folder = files("vqguard.recipes.benchmarks") / "layouts"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return [Layout.from_yaml(Path(str(folder / name))) for name in names]


def filled(text: str, row: Mapping[str, Any], where: str) -> str:
    """The text with a row's values in it.

    Raises:
        DataError: a column that the row does not have, or whose value does not fit.
    """
    return _FIELD.sub(lambda found: _value(row, found[1], found[2], where), text)


def plain(text: str, row: Mapping[str, Any], where: str) -> Any:
    """The same, but a text that is one column alone keeps its value's type, for JSON."""
    found = _FIELD.fullmatch(text)
    if found and not found[2] and found[1] in row:
        return row[found[1]]
    return filled(text, row, where)


def _value(row: Mapping[str, Any], column: str, how: str | None, where: str) -> str:
    if column not in row:
        raise DataError(
            f"{where}: expected a column {column!r}, found {', '.join(map(str, row))}; is this the "
            "file as its authors publish it?"
        )
    value = row[column]
    if how == "options":
        if isinstance(value, list) and 0 < len(value) <= len(ascii_uppercase):
            return "\n".join(f"{ascii_uppercase[n]}. {text}" for n, text in enumerate(value))
        raise DataError(f"{where}: expected a list of choices in {column!r}, got {value!r:.80}")
    if how == "letter":
        if isinstance(value, int) and 0 <= value < len(ascii_uppercase):
            return ascii_uppercase[value]
        raise DataError(f"{where}: expected a choice's number in {column!r}, got {value!r:.80}")
    if value is None or isinstance(value, (list, dict)):
        raise DataError(f"{where}: expected a text in {column!r}, got {value!r:.80}")
    return str(value)
