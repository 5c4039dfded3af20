"""A click group that imports a command's module only when the command is called."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import click

from vqguard.cli.output import OutputClosedError, say
from vqguard.names import nearest_name, printable


@dataclass
class Session:
    """What one call of the program carries along (`click.Context.obj`)."""

    command: str = "vqguard"
    """The command line as typed, quoted for a shell and printable: every record of a report carries
    it."""

    debug: bool = False
    """Show the traceback of an expected error as well."""

    extensions: tuple[str, ...] = ()
    """Modules that were imported for it (`--adapter-module`)."""


@dataclass(frozen=True)
class Entry:
    """Where a command lives, and its line in `vqguard --help`."""

    module: str
    help: str


@contextmanager
def _closed_pipes() -> Iterator[None]:
    """Keep a broken pipe from click, whose exit code for it is that of a flagged image."""
    try:
        yield
    except BrokenPipeError as error:  # of click's own output, such as --help, or of a connection
        with suppress(OutputClosedError):
            say("Stopped: the other end of a pipe or connection was closed.", err=True)
        raise OutputClosedError from error


class LazyGroup(click.Group):
    """Commands are listed from a table, so that `--help` imports none of them.

    Each module of the table holds its command under the name `command`.
    """

    def __init__(self, *args: Any, entries: Mapping[str, Entry], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.entries = dict(entries)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = self.entries.get(cmd_name)
        if entry is None:
            return None
        command = importlib.import_module(entry.module).command
        if not isinstance(command, click.Command):
            raise TypeError(f"{entry.module}.command is not a click command: {command!r}")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in self.entries.items()])

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **more: Any,
    ) -> click.Context:
        with _closed_pipes():
            return super().make_context(info_name, args, parent, **more)

    def invoke(self, ctx: click.Context) -> Any:
        with _closed_pipes():
            return super().invoke(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        session = ctx.ensure_object(Session)
        session.command = printable(shlex.join(["vqguard", *args]))
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self.entries and not ctx.resilient_parsing and not name.startswith("-"):
            guess = nearest_name(name, self.entries)
            hint = f"Did you mean '{guess}'?" if guess else f"Commands: {', '.join(self.entries)}."
            raise click.UsageError(f"No such command '{name}'. {hint}", ctx)
        return super().resolve_command(ctx, args)
