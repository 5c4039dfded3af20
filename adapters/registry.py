"""Which adapter serves which `config.model_type`.

The project's own adapters register themselves when their module is imported, which happens at the
first look-up; those of other packages when `plugins.py` finds one for a type, or when a user names
the module.
"""

from __future__ import annotations

import importlib
from typing import Any

from vqguard.adapters.base import Adapter
from vqguard.adapters.families import FAMILIES
from vqguard.adapters.families.default import DefaultAdapter
from vqguard.adapters.families.family import Family
from vqguard.adapters.families.registration import adapter_table, family_table
from vqguard.adapters.plugins import declared_module
from vqguard.errors import SeamError, VQGuardError, first_line
from vqguard.names import nearest_name


def registered() -> dict[str, type[Adapter]]:
    """The adapter of every type that has one now, the project's own among them."""
    _import_families()
    return dict(adapter_table())


def adapter_types() -> tuple[str, ...]:
    """The model types that have an adapter, sorted."""
    return tuple(sorted(registered()))


def adapter_for_type(model_type: str) -> Adapter:
    """The adapter of a `config.model_type`; an installed package's where this project has none.

    Raises:
        SeamError: when none names it.
    """
    adapter = _find(model_type)
    if adapter is None:
        types = sorted(adapter_table())
        close = nearest_name(model_type, types)
        hint = f" (nearest: {close!r})" if close else ""
        raise SeamError(
            f"no adapter for model type {model_type!r}{hint}: expected one of "
            f"{', '.join(types)}; declare one with register_adapter"
        )
    return adapter()


def adapter_or_default(model_type: str) -> Adapter:
    """The adapter that names a type, else the default one, with which it is tried.

    Raises:
        SeamError: for types that are not guarded at all.
    """
    adapter = _find(model_type)
    refused = declared_family(model_type).refused
    if refused:
        raise SeamError(f"models of type {model_type!r} are not guarded: {refused}")
    return DefaultAdapter() if adapter is None else adapter()


def get_adapter(model: Any) -> Adapter:
    """The adapter of a transformers model, by `model.config.model_type`.

    A type that no adapter names gets the default one, if its seams can be found by looking;
    `guard_model` accepts such a model only on proof.

    Raises:
        SeamError: when the object has no config, or nothing is known about where its images enter.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model_type, str) or not model_type:
        raise SeamError(
            f"expected a transformers model with config.model_type, got {type(model).__name__}; "
            "wrap other vision encoders with GuardedEncoder"
        )
    if hasattr(type(model), "get_image_features") or declared_family(model_type).refused:
        return adapter_or_default(model_type)
    return adapter_for_type(model_type)


def is_known(model: Any) -> bool:
    """`is_known_type` of a model's type."""
    return is_known_type(model.config.model_type)


def is_known_type(model_type: str) -> bool:
    """Whether an adapter names the type and was proven on the installed transformers."""
    return _find(model_type) is not None and declared_family(model_type).is_proven()


def declared_family(model_type: str) -> Family:
    """What is declared of a type; of one that nobody declares, a `Family` that says nothing."""
    _find(model_type)
    return family_table().get(model_type, Family(model_type))


def _find(model_type: str) -> type[Adapter] | None:
    _import_families()
    known = family_table().get(model_type)
    if model_type not in adapter_table() and not (known and known.refused):
        module = declared_module(model_type)
        if module is not None:
            _import_declared(module, model_type)
    return adapter_table().get(model_type)


def _import_declared(module: str, model_type: str) -> None:
    """Import what an installed package declares for this type.

    Raises:
        SeamError: when that fails or does not register the type: going on without it would guard
            the model in another way than it says.
    """
    what = f"the adapter of {model_type!r}, which an installed package declares at {module},"
    try:
        importlib.import_module(module)
    except VQGuardError:
        raise
    except Exception as error:
        raise SeamError(
            f"{what} cannot be imported ({first_line(error)}): repair that package, or uninstall it"
        ) from error
    if model_type not in adapter_table():
        raise SeamError(
            f"{what} registers no adapter for it: expected register_adapter({model_type!r}) there"
        )


def _import_families() -> None:
    for module in FAMILIES:
        importlib.import_module(f"vqguard.adapters.families.{module}")
