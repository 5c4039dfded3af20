"""A model without its language model, for those who only judge: the weights are not loaded.

Pictures are judged by the tower, what projects its features, and the guard. transformers builds the
whole model without memory, then the modules of the language model are put out of it, before any
weight is read: the files' other tensors belong to nothing, and are not read.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from vqguard.adapters.base import Adapter
from vqguard.adapters.registry import get_adapter, is_known_type
from vqguard.adapters.seams import submodule
from vqguard.errors import SeamError


class LeftOut(nn.Module):
    """Stands where a module of the language model was, with what that module was configured by."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name in ("config", "generation_config"):
            if hasattr(module, name):
                setattr(self, name, getattr(module, name))

    def forward(self, *_: Any, **__: Any) -> Any:
        """Raise SeamError."""
        raise SeamError("the language model was left out: this model judges, and answers nothing")

    def get_input_embeddings(self) -> nn.Module:
        """Itself: models ask their language model for these."""
        return self

    def get_output_embeddings(self) -> nn.Module:
        """Itself."""
        return self


def require_whole(model: nn.Module) -> None:
    """Raise SeamError for a model whose language model was left out: it is not worth saving."""
    if any(isinstance(module, LeftOut) for module in model.modules()):
        raise SeamError(
            "the language model was left out when this model was loaded, so that it could not be "
            "saved whole: load it again with load_guarded(path)"
        )


def judging_class(config: Any) -> Any:
    """The class of a configuration's models, which leaves the language model out of each.

    None for types that need a proof first: it asks the model for answers. `restore_class` makes
    what was loaded a model of the class itself.
    """
    if not is_known_type(config.model_type):
        return None
    cls: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]

    class Judging(_Judging, cls):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            _leave_out(self, _language_paths(self, get_adapter(self)))

    # By its name transformers finds how older files of the class are read.
    Judging.__name__, Judging.__qualname__ = cls.__name__, cls.__qualname__
    return Judging


def restore_class(model: Any) -> None:
    """Make a model of `judging_class` one of the class that it stands for; others stay."""
    if issubclass(type(model), _Judging):
        model.__class__ = type(model).__mro__[2]


class _Judging:
    """Marks the classes that `judging_class` makes."""


def _leave_out(model: Any, paths: list[str]) -> None:
    """Put these modules out of a model that has no weights yet, and what ties weights to theirs."""
    for path in paths:
        above, _, name = path.rpartition(".")
        owner = submodule(model, above, "owner of the language model")
        setattr(owner, name, LeftOut(getattr(owner, name)))
    model.all_tied_weights_keys = {
        tied: source
        for tied, source in model.all_tied_weights_keys.items()
        if not any(name.startswith(f"{path}.") for name in (tied, source) for path in paths)
    }
    # Or transformers would warn of each of their tensors.
    ignored = (rf"(^|\.){re.escape(path.rpartition('.')[2])}\." for path in paths)
    model._keys_to_ignore_on_load_unexpected = {
        *(model._keys_to_ignore_on_load_unexpected or ()),
        *ignored,
    }


def _language_paths(model: nn.Module, adapter: Adapter) -> list[str]:
    """The language model's modules, none inside another; none where one has a part of the seams."""
    adapter.check(model)
    needed = {*adapter.projectors(model), *adapter.vision_modules(model)}
    for seam in adapter.seams(model):
        needed |= {submodule(model, seam.path, "seam"), adapter.watched(model, seam)}
    names = {module: name for name, module in model.named_modules()}
    paths = []
    for language in dict.fromkeys(adapter.language_modules(model)):
        if needed & set(language.modules()) or not names.get(language):
            return []
        paths.append(names[language])
    return [p for p in paths if not any(p.startswith(f"{other}.") for other in paths)]
