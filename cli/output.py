"""What commands print: results on stdout, everything else on stderr, nothing of it as it came.

Names of files, categories and models, answers and errors come from outside. Every command prints by
the functions of this module, which escape what a terminal would obey.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vqguard.names import printable

if TYPE_CHECKING:
    from vqguard.records import Record


class OutputClosedError(Exception):
    """Who reads stdout has gone, as `head` does when it has seen enough."""


def say(template: str, *values: object, err: bool = False) -> None:
    """Print a line: `template.format(*values)`, each value escaped so that it stays inside."""
    shown = (v if isinstance(v, int | float) else printable(str(v)) for v in values)
    _write(template.format(*shown), err)


def say_lines(text: str, *, err: bool = False) -> None:
    """Print a text that may have several lines; other control characters in it are escaped."""
    _write(printable(text, lines=True), err)


def say_json(document: Any, *, indent: int | None = None, err: bool = False) -> None:
    """Print JSON in ASCII: names are exact there, and nothing in it reaches a terminal."""
    # DEL is the one control character that JSON in ASCII leaves as it is.
    _write(json.dumps(document, indent=indent).replace("\x7f", "\\u007f"), err)


def say_traceback(error: BaseException) -> None:
    """Print the traceback of an error on stderr."""
    say_lines("".join(traceback.format_exception(error)).rstrip("\n"), err=True)


def field(text: object) -> str:
    """A name as it stands in a line of `name: verdict (...)`: the first `": "` ends it."""
    return printable(str(text)).replace(": ", "\\x3a ")


def say_usage_error(error: click.ClickException) -> None:
    """Print what click has to say about a wrong call, which may quote file names."""
    shown = io.StringIO()
    message = printable(error.format_message())
    click.UsageError(message, getattr(error, "ctx", None)).show(shown)
    say_lines(shown.getvalue().rstrip("\n"), err=True)


def show_report(records: Sequence[Record], html: Path | None, numbers: Path) -> None:
    """Print the before/after table of a run and where its report is."""
    from vqguard.recipes.report.headline import format_summary

    say_lines(format_summary(records))
    if html is not None:
        say("Report: {}", html)
    say("Numbers: {}", numbers)


def escape_logs_and_warnings() -> None:
    """From now on, what any library of this process logs or warns of is escaped as well."""
    logging.setLogRecordFactory(_PrintableRecord)
    warnings.formatwarning = _format_warning


def abandon_stdout() -> None:
    """Send what is still to be written to stdout nowhere: nobody reads it."""
    try:
        stdout = sys.stdout.fileno()
    except (OSError, ValueError):  # not a file, as in tests
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stdout)
    os.close(nowhere)


def _write(text: str, err: bool) -> None:
    try:
        click.echo(text, err=err)
    except BrokenPipeError as error:
        raise OutputClosedError from error


class _PrintableRecord(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802 - the name of `logging`
        ours = self.name.partition(".")[0] == "vqguard"
        return printable(super().getMessage(), lines=not ours)


_plain_format = warnings.formatwarning


def _format_warning(*args: Any, **kwargs: Any) -> str:
    return printable(_plain_format(*args, **kwargs), lines=True)
