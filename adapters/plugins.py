"""Adapters that other packages bring: found by entry point, or imported by a module's name.

A package declares them in its `pyproject.toml`, one line for each model type:

    [project.entry-points."vqguard.adapters"]
    my_type = "mypackage.my_adapter"

The module is imported, which runs it, when a model of that type is met and no adapter of this
project names the type. Importing the module must call `register_adapter("my_type")`.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points

from vqguard.adapters.registry import registered
from vqguard.errors import InputError, SeamError, VQGuardError

GROUP = "vqguard.adapters"


def import_entry_point(model_type: str) -> None:
    """Import the module that an installed package names for this type; nothing where none does.

    Raises `SeamError` when two packages name one, or when the module cannot be imported or does not
    register the type: going on without it would guard the model in another way than it says.
    """
    found = list(dict.fromkeys(one.value for one in entry_points(group=GROUP, name=model_type)))
    if not found:
        return
    if len(found) > 1:
        raise SeamError(
            f"several installed packages bring an adapter for {model_type!r}: {', '.join(found)}; "
            "uninstall all but one"
        )
    module = found[0].partition(":")[0].strip()
    what = f"the adapter of {model_type!r}, which an installed package declares at {module},"
    try:
        importlib.import_module(module)
    except VQGuardError:
        raise
    except Exception as error:
        raise SeamError(
            f"{what} cannot be imported ({_said(error)}): repair that package, or uninstall it"
        ) from error
    if model_type not in registered():
        raise SeamError(
            f"{what} registers no adapter for it: expected register_adapter({model_type!r}) there"
        )


def import_adapters(module: str) -> tuple[str, ...]:
    """Import a module by its dotted name, which runs it; returns the types that it registered.

    Raises `InputError` when there is no such module, when it fails, or when it registers nothing;
    `SeamError` when it names a type that has another adapter.
    """
    if not all(part.isidentifier() for part in module.split(".")):
        raise InputError(
            f"expected a module by its dotted name, as in mypackage.my_adapter, got {module!r}"
        )
    before = set(registered())
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
        raise InputError(f"the module {module!r} cannot be imported: {_said(error)}") from error
    found = tuple(
        sorted(
            kind
            for kind, adapter in registered().items()
            if kind not in before or f"{adapter.__module__}.".startswith(f"{module}.")
        )
    )
    if not found:
        raise InputError(
            f"the module {module!r} registers no adapter: expected a class in it under "
            '@register_adapter("model_type")'
        )
    return found


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
