"""Adapters that other packages bring, found by entry point.

A package declares them in its `pyproject.toml`, one line for each model type:

    [project.entry-points."vqguard.adapters"]
    my_type = "mypackage.my_adapter"

`registry.py` imports the module, which runs it, when a model of that type is met and no adapter of
this project names the type. Importing the module must call `register_adapter("my_type")`.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from vqguard.errors import SeamError

GROUP = "vqguard.adapters"


def declared_module(model_type: str) -> str | None:
    """The module that an installed package names for this type; None where none does.

    Raises:
        SeamError: when two packages name one.
    """
    # An editable install may be listed beside the one that it replaced.
    values = dict.fromkeys(entry.value for entry in entry_points(group=GROUP, name=model_type))
    if len(values) > 1:
        raise SeamError(
            f"several installed packages bring an adapter for {model_type!r}: {', '.join(values)}; "
            "uninstall all but one"
        )
    return next((value.partition(":")[0].strip() for value in values), None)
