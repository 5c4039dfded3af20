"""Tables of named things that reports show: one entry a line, open to entries from outside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from vqguard.errors import ConfigError


class Named(Protocol):
    """What an entry is called: in records, in tables, and in a sentence."""

    @property
    def name(self) -> str:
        """The word in records."""

    @property
    def label(self) -> str:
        """The words in a report's tables."""

    @property
    def sentence(self) -> str:
        """What it is, in one sentence."""


T = TypeVar("T", bound=Named)


class NamedTable(Generic[T]):
    """Entries by name, in the order in which they were entered.

    Args:
        kind: what the entries are, for messages.
        entries: those that the project brings.
        reserved: names that records use for something else.

    Raises:
        ConfigError: as in `register`.
    """

    def __init__(self, kind: str, *entries: T, reserved: tuple[str, ...] = ()) -> None:
        self._kind = kind
        self._reserved = reserved
        self._entries: dict[str, T] = {}
        for entry in entries:
            self.register(entry)

    def register(self, entry: T) -> T:
        """Enter one more; returns it, so that a class can be decorated.

        Raises:
            ConfigError: a name, label or sentence is missing, or the name is taken.
        """
        missing = [fact for fact in ("name", "label", "sentence") if not getattr(entry, fact, None)]
        if missing:
            raise ConfigError(f"{self._kind} {entry!r} has no {', '.join(missing)}; declare them")
        if entry.name in self._reserved or entry.name in self._entries:
            raise ConfigError(
                f"{self._kind} {entry.name!r}: the name is taken; taken are "
                f"{sorted([*self._entries, *self._reserved])}"
            )
        self._entries[entry.name] = entry
        return entry

    def named(self, name: str) -> T:
        """The entry of this name.

        Raises:
            ConfigError: there is none; the message names those that there are.
        """
        if name not in self._entries:
            raise ConfigError(
                f"unknown {self._kind} {name!r}; choose one of {sorted(self._entries)}"
            )
        return self._entries[name]

    @property
    def labels(self) -> dict[str, str]:
        """Name to label."""
        return {entry.name: entry.label for entry in self}

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[T]:
        return iter(tuple(self._entries.values()))
