"""The default adapter: seams found by looking, modules by their usual names.

And the registration of families that need nothing else.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from vqguard.adapters.base import Adapter
from vqguard.adapters.families.family import Family
from vqguard.adapters.families.registration import register_adapter
from vqguard.adapters.seams import Seam, find_seams, submodule
from vqguard.errors import SeamError

TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower")
LANGUAGES = ("language_model", "text_model", "decoder", "text_decoder")
PROJECTORS = (
    "multi_modal_projector",
    "connector",
    "aligner",
    "embed_vision",
    "projector",
    "merger",
    "mm_projector",
    "vision_projection",
    "visual.merger",
    "vision_tower.merger",
    "vision_model.connector",
    "vision_tower.patch_merger",
    "resampler_model",
)


class DefaultAdapter(Adapter):
    """`get_image_features` and `get_video_features` found by looking, modules by their usual names.

    Serves the families that are `conventional`, and is what an unknown type is tried with: there
    the one-codeword probe decides.
    """

    vision_path = ""
    language_path = ""
    projector_paths: ClassVar[tuple[str, ...]] = ()

    @property
    def projector_keys(self) -> tuple[str, ...]:
        return self.projector_paths or PROJECTORS

    def seams(self, model: nn.Module) -> tuple[Seam, ...]:
        return find_seams(model)

    def tower(self, model: nn.Module) -> nn.Module:
        return self._part(model, (self.vision_path,) if self.vision_path else TOWERS, "encoder")

    def language_model(self, model: nn.Module) -> nn.Module:
        paths = (self.language_path,) if self.language_path else LANGUAGES
        return self._part(model, paths, "language model")

    def projectors(self, model: nn.Module) -> list[nn.Module]:
        if self.projector_paths:
            owner = self.owner(model)
            return [submodule(owner, path, "projector") for path in self.projector_paths]
        return [self._part(model, PROJECTORS, "projector")]

    def _part(self, model: nn.Module, paths: tuple[str, ...], what: str) -> nn.Module:
        owner = self.owner(model)
        for path in paths:
            try:
                part = owner.get_submodule(path)
            except AttributeError:
                continue
            return part
        raise SeamError(
            f"expected the {what} of {type(model).__name__} at one of {', '.join(paths)}, found "
            "none: declare an adapter with register_adapter"
        )


def conventional(*families: str | Family, **declared: Any) -> None:
    """Register the default adapter for these types, with what differs from the usual names."""
    for said in families:
        model_type = said if isinstance(said, str) else said.model_type
        parts = model_type.replace("-", "_").split("_")
        name = "".join(part.capitalize() for part in parts) + "Adapter"
        body = {"__doc__": f"The default adapter for {model_type}.", "__module__": __name__}
        adapter = type(name, (DefaultAdapter,), {**body, **declared})
        globals()[name] = adapter  # pickle, which copies a model to a process, finds it by name
        register_adapter(said)(adapter)
