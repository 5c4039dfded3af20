"""Options of the commands that serve over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vqguard.cli.options import UserPath

if TYPE_CHECKING:
    from socket import socket

F = TypeVar("F", bound=Callable[..., Any])


def server_options(function: F) -> F:
    """Where it listens, what it takes, what it tells, and how it ends."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def bound_socket(host: str, port: int) -> socket:
    """The socket to listen on; before the model is loaded, so that a taken port is said at once.

    Raises:
        UsageError: the extra `serve` is not installed.
        ConfigError: the address is taken, or none of this machine.
    """
    try:
        from vqguard.recipes.serving.door.server import bind
    except ImportError as error:
        raise click.UsageError(
            f"{error.name} is not installed: pip install 'vqguard[serve]'"
        ) from error
    return bind(host, port)


_OPTIONS = (
    click.option(
        "--host", default="127.0.0.1", show_default=True, help="The address to listen on."
    ),
    click.option(
        "--port",
        type=click.IntRange(0, 65535),
        default=8000,
        show_default=True,
        help="The port to listen on; 0 is any free one.",
    ),
    click.option(
        "--limits",
        "limits_file",
        type=UserPath(),
        help="A YAML file with limits, as docs/serving.md lists them.",
    ),
    click.option(
        "--reasons/--no-reasons",
        default=True,
        show_default=True,
        help="Tell clients category, score, threshold and region of what is flagged. Scores help "
        "whoever searches for a picture that passes.",
    ),
    click.option(
        "--image-host",
        "hosts",
        multiple=True,
        metavar="HOST",
        help="Fetch pictures from this host, by https. Repeatable; without it none are fetched.",
    ),
    click.option(
        "--audit",
        "audit_file",
        type=UserPath(),
        help="Append a JSON line for each picture to this file: its SHA-256, the verdict, its "
        "codes, and which map and model gave it. What cannot be written is not answered.",
    ),
    click.option(
        "--shadow",
        is_flag=True,
        help="Judge and write down, and refuse nothing.",
    ),
    click.option(
        "--drain",
        type=click.FloatRange(min=0),
        default=30.0,
        show_default=True,
        help="Seconds that requests have to end after SIGTERM.",
    ),
)
