"""Options that several commands share, and the checks that belong to them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from vqguard.cli.group import Session
from vqguard.errors import InputError
from vqguard.files import RESUME_OR_ANOTHER, expanded, require_empty

F = TypeVar("F", bound=Callable[..., Any])


class UserPath(click.Path):
    """A path in which `~` and environment variables are filled in (`vqguard.files.expanded`)."""

    def __init__(self, **checks: bool) -> None:
        super().__init__(path_type=Path, **checks)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, checked."""
        return super().convert(expanded(Path(value)), param, ctx)


DEFAULT_RUN = Path("runs/llava-tiny")


def _set_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(Session).debug = True
        logging.getLogger("vqguard").setLevel(logging.DEBUG)


def debug_option(function: F) -> F:
    """`--debug`: show tracebacks and the package's log. Taken before and after the command."""
    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_set_debug,
        help="Show tracebacks and the log.",
    )(function)


def set_option(example: str) -> Callable[[F], F]:
    """`--set key=value`, as often as wanted. `example` is one that the command takes."""
    return click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        callback=_check_settings,
        help=f"Change one setting of the recipe, as in {example}. Repeatable.",
    )


def resume_option(function: F) -> F:
    """`--resume`."""
    return click.option(
        "--resume", is_flag=True, help="Go on with the run in --output from its last checkpoint."
    )(function)


def skip_bad_option(function: F) -> F:
    """`--skip-bad`."""
    return click.option(
        "--skip-bad", is_flag=True, help="List images that cannot be used and go on without them."
    )(function)


def base_option(function: F) -> F:
    """`--base`: the model that a guard without its base is put into."""
    return click.option(
        "--base",
        metavar="MODEL",
        help="The base of a guard that is kept without it: a folder, a registered name or "
        "hub:owner/name. Needed where that base is a local model.",
    )(function)


def adapter_module_option(function: F) -> F:
    """`--adapter-module`: import modules that register parts of one's own.

    They are imported before anything is loaded.
    """
    return click.option(
        "--adapter-module",
        "adapter_modules",
        multiple=True,
        metavar="MODULE",
        expose_value=False,
        callback=_import_extensions,
        help="Import this Python module first, as in mypackage.my_adapter: it registers an "
        "adapter, attack, gradient mode, verdict rule, search back end or engine of your own. "
        "Importing a module runs its code. Repeatable.",
    )(function)


def _import_extensions(
    ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]
) -> None:
    if not values or ctx.resilient_parsing:  # the shell asks for completions
        return
    ctx.ensure_object(Session).extensions += values
    from vqguard.recipes.extensions import import_extension

    for module in values:
        import_extension(module)


def _check_settings(
    _ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    for value in values:
        key, separator, _ = value.partition("=")
        if not separator or not key.strip():
            raise click.BadParameter(f"expected KEY=VALUE, got {value!r}.")
    return values


def is_first_process() -> bool:
    """Whether this is the first process of those that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def check_output(output: Path, resume: bool) -> None:
    """Refuse to write into a directory that holds something, unless the run is resumed.

    The first process of a launched run looks; the others may find what it has begun.

    Raises:
        ConfigError: `output` is a file, or a directory that is not empty without `resume`.
    """
    if is_first_process() and not (resume and output.is_dir()):
        require_empty(output, RESUME_OR_ANOTHER)


def find_run(run: Path) -> Path:
    """`run` itself, or `runs/<name>` if only a name was given.

    Raises:
        InputError: neither exists; the message names the nearest run there is.
    """
    for candidate in (run, Path("runs") / run):
        if candidate.is_dir():
            return candidate
    parents = (run.parent, Path("runs"))
    there = {
        entry.name: entry
        for parent in parents
        if parent.is_dir()
        for entry in sorted(parent.iterdir())
        if entry.is_dir()
    }

    from vqguard.names import nearest_name

    guess = nearest_name(run.name, there)
    hint = f"Did you mean {there[guess]}?" if guess else "Make one: vqguard retrofit --model NAME"
    raise InputError(f"No run at {run}. {hint}")
