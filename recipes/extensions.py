"""Modules of one's own, named on the command line, and what they enter in the project's tables."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

from vqguard.adapters.registry import registered
from vqguard.errors import InputError, VQGuardError, first_line
from vqguard.redteam.attack_table import ATTACKS
from vqguard.redteam.gradients import GRADIENTS
from vqguard.search.backend_table import AUTO, backend_choices, backend_class
from vqguard.verdict_rules import verdict_rule, verdict_rules

ENGINES = "vqguard.recipes.training.engines.engine"


class Entry(NamedTuple):
    """A line of one of the tables."""

    table: str
    name: str
    module: str
    """Where its code stands."""


def import_extension(module: str) -> tuple[str, ...]:
    """Import a module by its dotted name, which runs it; returns the types that it registered.

    It may enter something else instead: an attack, a gradient mode, a verdict rule, a search back
    end or an engine. Then there are no types.

    Raises:
        InputError: there is no such module, it fails, or it enters nothing.
        SeamError: it names a type that has another adapter.
        ConfigError: it takes a name that is given already.
    """
    if not all(part.isidentifier() for part in module.split(".")):
        raise InputError(
            f"expected a module by its dotted name, as in mypackage.my_adapter, got {module!r}"
        )
    before = set(_entries())
    _import(module)
    entered = [
        entry
        for entry in _entries()
        if entry not in before or f"{entry.module}.".startswith(f"{module}.")
    ]
    if not entered:
        raise InputError(
            f"the module {module!r} registers no adapter and nothing else: expected a class in it "
            'under @register_adapter("model_type"), or another call of docs/extending.md'
        )
    return tuple(sorted(entry.name for entry in entered if entry.table == "adapter"))


def _entries() -> Iterator[Entry]:
    for name, adapter in registered().items():
        yield Entry("adapter", name, adapter.__module__)
    for name in verdict_rules():
        yield Entry("verdict rule", name, type(verdict_rule(name)).__module__)
    for attack in ATTACKS:
        yield Entry("attack", attack.name, attack.__module__)
    for mode in GRADIENTS:
        yield Entry("gradient mode", mode.name, mode.estimator.__module__)
    for name in backend_choices():
        if name != AUTO:
            yield Entry("back end", name, backend_class(name).__module__)
    # The engines are slow to import, and nobody has added one who did not.
    if ENGINES in sys.modules:
        for engine in sys.modules[ENGINES].ENGINES:
            if not engine.__module__.startswith("vqguard."):
                yield Entry("engine", engine.name, engine.__module__)


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except VQGuardError:
        raise
    except Exception as error:
        missing = getattr(error, "name", None) or "" if isinstance(error, ImportError) else ""
        if missing and f"{module}.".startswith(f"{missing}."):
            raise InputError(
                f"no module {module!r} (there is no {missing!r}): install its package, or put the "
                "folder that holds it on PYTHONPATH"
            ) from error
        raise InputError(
            f"the module {module!r} cannot be imported: {first_line(error)}"
        ) from error
