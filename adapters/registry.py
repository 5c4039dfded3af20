"""Names of models, and which adapter serves which `config.model_type`.

This file imports neither torch nor transformers: listing names must be instant. Adapter classes
register themselves when their module is imported, which happens at the first `get_adapter`; those
of other packages as `plugins.py` says.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from vqguard.adapters.families.proven import is_proven
from vqguard.adapters.names import HUB, REFUSED
from vqguard.errors import InputError, SeamError

if TYPE_CHECKING:
    from vqguard.adapters.base import Adapter

AdapterClass = TypeVar("AdapterClass", bound="type[Adapter]")

Status = Literal["measured", "architecture"]
Source = Literal["hub", "package", "path"]


@dataclass(frozen=True)
class ModelEntry:
    """Where a name leads.

    `status` is `measured` when the project's own reports use these weights, `architecture` when
    only the architecture is tested, with random weights. `source` says what `location` is: the id
    of a public checkpoint, an importable package of this project that ships the weights, or a
    local folder (whose `status` is `architecture`).
    """

    name: str
    model_type: str
    source: Source
    location: str
    status: Status
    note: str = ""


_ENTRIES: tuple[ModelEntry, ...] = (
    ModelEntry(
        "llava-tiny", "llava", "package", "vqguard.recipes.tiny", "measured", "the embedded world"
    ),
    *(ModelEntry(name, kind, "hub", place, "architecture") for name, kind, place in HUB),
)

# Modules that define adapters; importing one fills `_ADAPTERS`.
_ADAPTER_MODULES: tuple[str, ...] = (
    "vqguard.adapters.families.discrete",
    "vqguard.adapters.families.encoder_decoder",
    "vqguard.adapters.families.conventional",
    "vqguard.adapters.families.forward_seams",
    "vqguard.adapters.families.llava",
    "vqguard.adapters.families.llava_next",
    "vqguard.adapters.families.qformer",
    "vqguard.adapters.families.qwen_vl",
)
_ADAPTERS: dict[str, type[Adapter]] = {}


def list_models() -> tuple[ModelEntry, ...]:
    """Every name the project knows, in the order of the registry."""
    return _ENTRIES


def resolve_model(name: str) -> ModelEntry:
    """Where `name` leads: an alias, the id of a listed checkpoint, any hub id, or a local folder.

    A folder wins over an alias only when it is written as a path (with a separator or a leading
    dot) or when no alias has that name. An unlisted id of the form `owner/name` is passed on as it
    is, with an empty `model_type`: the adapter is chosen when the model is loaded.

    Raises `InputError` for an unknown name, with the nearest known ones.
    """
    by_name = {entry.name: entry for entry in _ENTRIES}
    if name in by_name:
        return by_name[name]
    if name and Path(name).is_dir():
        return ModelEntry(name, "", "path", str(Path(name)), "architecture")
    for entry in _ENTRIES:
        if entry.source == "hub" and entry.location == name:
            return entry
    if _looks_like_path(name):
        raise InputError(
            f"no folder at {name!r}: expected a folder written by save_pretrained; check the path"
        )
    if name.count("/") == 1:
        return ModelEntry(name, "", "hub", name, "architecture")
    nearest = difflib.get_close_matches(name, by_name, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(repr(n) for n in nearest)}?" if nearest else ""
    raise InputError(
        f"unknown model {name!r}: {hint + ' ' if hint else ''}expected a folder, a hub id "
        f"'owner/name' or one of {', '.join(by_name)}"
    )


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or not name


def register_adapter(*model_types: str) -> Callable[[AdapterClass], AdapterClass]:
    """Class decorator: this adapter serves models whose `config.model_type` is one of these.

    Raises `SeamError` when a type already has another adapter: two answers to the question where
    a model must be guarded cannot both be right.
    """

    def register(adapter: AdapterClass) -> AdapterClass:
        for model_type in model_types:
            known = _ADAPTERS.get(model_type)
            if known is not None and known.__qualname__ != adapter.__qualname__:
                raise SeamError(
                    f"model type {model_type!r} already has the adapter {known.__qualname__}; "
                    f"give {adapter.__qualname__} a type of its own"
                )
            _ADAPTERS[model_type] = adapter
        return adapter

    return register


def registered() -> dict[str, type[Adapter]]:
    """The adapter of every type that has one now, the project's own among them."""
    _import_adapters()
    return dict(_ADAPTERS)


def adapter_types() -> tuple[str, ...]:
    """The model types that have an adapter, sorted."""
    return tuple(sorted(registered()))


def adapter_for_type(model_type: str) -> Adapter:
    """The adapter of a `config.model_type`; an installed package's where this project has none.

    Raises `SeamError` when none names it.
    """
    adapter = _find(model_type)
    if adapter is None:
        nearest = difflib.get_close_matches(model_type, _ADAPTERS, n=1)
        hint = f" (nearest: {nearest[0]!r})" if nearest else ""
        raise SeamError(
            f"no adapter for model type {model_type!r}{hint}: expected one of "
            f"{', '.join(sorted(_ADAPTERS))}; declare one with register_adapter"
        )
    return adapter()


def adapter_or_default(model_type: str) -> Adapter:
    """The adapter that names a type, else the default one, with which it is tried.

    Raises `SeamError` for types that are not guarded at all.
    """
    if model_type in REFUSED:
        raise SeamError(f"models of type {model_type!r} are not guarded: {REFUSED[model_type]}")
    adapter = _find(model_type)
    if adapter is None:
        from vqguard.adapters.families.conventional import DefaultAdapter

        return DefaultAdapter()
    return adapter()


def get_adapter(model: Any) -> Adapter:
    """The adapter of a transformers model, by `model.config.model_type`.

    A type that no adapter names gets the default one, if its seams can be found by looking;
    `guard_model` accepts such a model only on proof. Raises `SeamError` when the object has no
    config, or nothing is known about where its images enter.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model_type, str) or not model_type:
        raise SeamError(
            f"expected a transformers model with config.model_type, got {type(model).__name__}; "
            "wrap other vision encoders with GuardedEncoder"
        )
    if model_type in REFUSED or hasattr(type(model), "get_image_features"):
        return adapter_or_default(model_type)
    return adapter_for_type(model_type)


def is_known(model: Any) -> bool:
    """`is_known_type` of a model's type."""
    return is_known_type(model.config.model_type)


def is_known_type(model_type: str) -> bool:
    """Whether an adapter names the type and was proven on the installed transformers."""
    return _find(model_type) is not None and is_proven(model_type)


def _find(model_type: str) -> type[Adapter] | None:
    if model_type not in registered():
        from vqguard.adapters.plugins import import_entry_point

        import_entry_point(model_type)
    return _ADAPTERS.get(model_type)


def _import_adapters() -> None:
    for module in _ADAPTER_MODULES:
        importlib.import_module(module)
