"""What an adapter declares about a family of models.

A family whose language model takes its images through `get_image_features(...).pooler_output`, and
whose projector is a module of its own, needs nothing but the names of its modules; those are in
`families/conventional/`, a line or two each.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vqguard.adapters.features import Shown, Site, Tap, VisualFeatures, frames_of_videos
from vqguard.adapters.seams import (
    Seam,
    equal_parts,
    find_seams,
    join_units,
    means,
    original_method,
    split_units,
    submodule,
)
from vqguard.adapters.text import TextSide
from vqguard.errors import InputError, SeamError
from vqguard.judging.verdict import Part
from vqguard.regional.layout import Layout, grid_of


class Adapter(TextSide):
    """Where one family must be guarded. Stateless: every method is given the model.

    Class attributes are the declaration; methods are for families that do not fit it. Paths are
    relative to the *owner*, the module whose `get_image_features` feeds its own `forward`.
    """

    sites: ClassVar[tuple[Site, ...]] = ("projected",)
    """Where the family can be quantised: after the projector, or before it as well."""
    projector_paths: ClassVar[tuple[str, ...]] = ("multi_modal_projector",)
    """The modules between the encoder's width and the language model's (F_h): stage 1."""
    vision_path: ClassVar[str] = "vision_tower"
    language_path: ClassVar[str] = "language_model"
    tokenwise: ClassVar[bool] = False
    """Whether the projector maps each token by itself and nothing is added after it: then cached
    encoder features can stand in for pixels, and projected codewords be looked up."""
    pointwise: ClassVar[tuple[str, ...]] = ()
    """Modalities whose tokens the projector maps one by one and nothing mixes afterwards."""
    additive: ClassVar[bool] = False
    """Whether the family adds constants (embeddings, positions) to its codewords."""
    pools_time: ClassVar[bool] = False
    """Whether a video's tokens are means over its frames, so that no frame has any of its own."""
    row_by_row: ClassVar[bool] = False
    """Whether the tokens of a picture, and of each frame, lie row by row of it, all pictures being
    shown at one size: then the regional judge pools windows of them."""
    trains_projector: ClassVar[bool] = True
    """Whether stage 1 trains anything beside the codebooks."""
    static_parameters: ClassVar[tuple[str, ...]] = ()
    """Parameters of the owner that the family mixes into its features (newline, separator):
    positions that hold them are left as they are."""
    image_options: ClassVar[tuple[str, ...]] = ("image_sizes",)
    """Other arguments of `get_image_features` that some versions take without naming them."""
    side_arguments: ClassVar[tuple[str, ...]] = ()
    """Arguments of `forward` and `generate` beside pixels and prompt that the family was proven
    with, where the project's own families have none of that name. Any other that holds data is
    refused: a newer transformers may have given it a new way in."""
    global_token_note: ClassVar[str] = "mean"
    """What the semantic level judges, for docs/models.md."""
    refused_note: ClassVar[str] = ""
    """What the family refuses beyond the usual arguments, for docs/models.md."""

    @property
    def projector_keys(self) -> tuple[str, ...]:
        """Where the projector's tensors may lie in a file, for its checksum."""
        return self.projector_paths

    # -- seams and modules

    def seams(self, model: nn.Module) -> tuple[Seam, ...]:
        """Every place where visual features enter the language model."""
        return find_seams(model)

    def taps(self, model: nn.Module) -> tuple[Tap, ...]:
        """The modules whose input is quantised at site "encoder"."""
        path = self.owner_path(model)
        return (Tap(f"{path}.{self.projector_paths[0]}" if path else self.projector_paths[0]),)

    def owner_path(self, model: nn.Module) -> str:
        """The owner's path in `model`."""
        return next(seam.path for seam in self.seams(model) if seam.modality == "image")

    def owner(self, model: nn.Module) -> nn.Module:
        """The module whose `get_image_features` feeds its own `forward`."""
        return submodule(model, self.owner_path(model), "owner of get_image_features")

    def projectors(self, model: nn.Module) -> list[nn.Module]:
        owner = self.owner(model)
        return [submodule(owner, path, "projector") for path in self.projector_paths]

    def projector(self, model: nn.Module) -> nn.Module:
        """The first of them; the only one in most families."""
        return self.projectors(model)[0]

    def tower(self, model: nn.Module) -> nn.Module:
        """The vision encoder."""
        return submodule(self.owner(model), self.vision_path, "vision encoder")

    def watched(self, model: nn.Module, seam: Seam) -> nn.Module:
        """The module whose output holds the seam's global token."""
        return self.tower(model)

    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        """F_v: frozen in both stages."""
        return [self.tower(model)]

    def language_model(self, model: nn.Module) -> nn.Module:
        """Where visual features enter the language model, and a caption's last state is read."""
        return submodule(self.owner(model), self.language_path, "language model")

    def language_modules(self, model: nn.Module) -> list[nn.Module]:
        """The language model and its output head: frozen in stage 1, trained in stage 2."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        language = self.language_model(model)
        return [language, head] if isinstance(head, nn.Module) else [language]

    def check(self, model: nn.Module) -> None:
        """Raise `SeamError` unless everything that the adapter declares is there."""
        for seam in self.seams(model):
            module = submodule(model, seam.path, "seam")
            if not callable(getattr(module, seam.method, None)):
                raise SeamError(
                    f"expected {type(module).__name__}.{seam.method}, found none: the installed "
                    "transformers puts images somewhere else; it was not guarded"
                )
        self.projectors(model)
        self.vision_modules(model)
        self.language_modules(model)

    # -- sizes

    def width(self, model: nn.Module, site: Site) -> int:
        """Width of a visual token at `site`, and of a semantic one."""
        self.require_site(site)
        config = cast(Any, model).config
        if site == "projected":
            return int(config.get_text_config().hidden_size)
        return int(config.vision_config.hidden_size)

    def deep_levels(self, model: nn.Module) -> int:
        """How many deep-stack levels the family has, each with a codebook of its own."""
        return 0

    def require_site(self, site: str) -> None:
        if site not in self.sites:
            raise SeamError(
                f"site {site!r} is not available for {type(self).__name__}: "
                f"expected one of {', '.join(self.sites)}"
            )

    # -- features

    def given(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Seam]:
        """The seams whose pixels are among `inputs`.

        Raises:
            InputError: when there are none.
        """
        given = [seam for seam in self.seams(model) if self.has_pixels(seam, inputs)]
        if not given:
            names = [name for seam in self.seams(model) for name in seam.pixels]
            raise InputError(
                f"expected pixels in {' or '.join(dict.fromkeys(names))}, got "
                f"{', '.join(sorted(inputs)) or 'no arguments'}"
            )
        return given

    def has_pixels(self, seam: Seam, inputs: Mapping[str, Any]) -> bool:
        """Whether `inputs` have pixels that enter at this seam."""
        return any(inputs.get(name) is not None for name in seam.pixels)

    def seam_arguments(
        self, model: nn.Module, seam: Seam, inputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Those of `inputs` that the seam's method names, None left out."""
        call = original_method(submodule(model, seam.path, "seam"), seam.method)
        names = {*inspect.signature(call).parameters, *self.image_options} - {"kwargs"}
        return {k: v for k, v in inputs.items() if k in names and v is not None}

    def run(self, model: nn.Module, seam: Seam, arguments: Mapping[str, Any]) -> Any:
        """The original method's output: for seams inside `forward`, of the visual path up to it."""
        call = original_method(submodule(model, seam.path, "seam"), seam.method)
        return call(**{**arguments, "return_dict": True})

    def split(self, seam: Seam, features: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
        """One (N_i, d) tensor a unit, of what the seam's output holds."""
        return split_units(features)

    def join(self, seam: Seam, like: Any, units: list[Tensor]) -> Any:
        """The inverse of `split`: `units` in the form of `like`."""
        return join_units(like, units)

    def repeat(self, seam: Seam, value: Any, arguments: Mapping[str, Any], times: int) -> Any:
        """What the seam's output holds for pixels that were each repeated so many times."""
        units = [unit for unit in self.split(seam, value, arguments) for _ in range(times)]
        return self.join(seam, value, units)

    def encoder_units(
        self, model: nn.Module, seam: Seam, arguments: Mapping[str, Any], features: Tensor
    ) -> list[Tensor]:
        """One (N_i, d_v) tensor a unit, of what a tapped module is given."""
        return split_units(features)

    def unseen(self, model: nn.Module, states: Any) -> Any:
        """What stands for the tower's output where pictures come as codes, and nobody looks at it.

        Args:
            model: the guarded one.
            states: (..., N, d), what follows in the place of its features; the shape alone counts.

        Raises:
            SeamError: when they are no tensor.
        """
        if not isinstance(states, Tensor):
            raise SeamError("features of a seam inside forward are held in several tensors")
        width = int(cast(Any, model).config.vision_config.hidden_size)
        hidden = states.new_zeros(1).expand(*states.shape[:-1], width)
        return BaseModelOutputWithPooling(last_hidden_state=cast(Any, hidden))

    def static_vectors(self, model: nn.Module) -> Tensor | None:
        """(k, d) constants that the family mixes into its features."""
        owner = self.owner(model)
        constants = [getattr(owner, name, None) for name in self.static_parameters]
        rows = [
            vector.detach().reshape(-1, vector.shape[-1])
            for vector in constants
            if vector is not None
        ]
        return torch.cat(rows) if rows else None

    def global_token(self, shown: Shown) -> Tensor | list[Tensor]:
        """(B, S, d_s), or one (S_i, d_s) a unit: what the semantic level judges.

        By default the mean of a picture's tokens, of each frame's in a video. METHOD: the CLS token
        where the encoder has one. With several the map's rule decides.
        """
        return [
            torch.stack([part.mean(0) for part in equal_parts(unit, count)])
            for unit, count in zip(shown.units, self.frames_of(shown), strict=True)
        ]

    def layouts(self, shown: Shown) -> Sequence[Layout | None]:
        """Where the tokens of each unit lie, one grid after another: what the regional judge pools.

        None where that is not known: where the family mixes a picture's tokens so that they have no
        place, and where nothing says how many rows they make.
        """
        pixels = shown.seam.shown(shown.arguments)
        if not self.row_by_row or not isinstance(pixels, Tensor) or pixels.dim() not in (4, 5):
            return [None] * len(shown.units)
        height, width = pixels.shape[-2:]
        frames = self.frames_of(shown)
        grids = [
            grid_of(len(unit) // count, height, width)
            for unit, count in zip(shown.units, frames, strict=True)
        ]
        return [
            None if grid is None or len(unit) != count * grid[0] * grid[1] else (grid,) * count
            for unit, count, grid in zip(shown.units, frames, grids, strict=True)
        ]

    def part(self, seam: Seam, site: Site, layout: Layout | None) -> Part:
        """What each grid of a unit's layout shows."""
        if layout is None:
            return "grid"
        if seam.modality == "video":
            return "frame"
        return "picture" if len(layout) == 1 else "tile"

    def frames_of(self, shown: Shown) -> list[int]:
        """How many frames each unit holds one after another, all with as many tokens."""
        single = [1] * len(shown.units)
        if shown.seam.modality != "video" or self.pools_time:
            return single
        vision = getattr(cast(Any, shown.model).config, "vision_config", None)
        merged = int(getattr(vision, "temporal_merge_size", 1))
        frames = frames_of_videos(shown.seam.shown(shown.arguments), shown.arguments, merged)
        # Where frames come as units of their own each is judged as it is.
        return frames if frames is not None and len(frames) == len(single) else single

    def project(self, model: nn.Module, features: VisualFeatures) -> VisualFeatures:
        """Features of site "encoder" taken to site "projected", as the model itself does it."""
        if not self.tokenwise:
            raise SeamError(
                f"{type(self).__name__} does more than project tokens one by one: encoder features "
                "cannot stand in for pixels; pass pixels"
            )
        projector = self.projector(model)
        tokens = features.tokens
        if isinstance(tokens, Tensor):
            tokens = cast(Tensor, projector(tokens))
        else:
            tokens = [cast(Tensor, projector(image)) for image in tokens]
        if self.has_global_token(model):
            semantic = projector(features.semantic)
            return replace(features, tokens=tokens, semantic=semantic)
        return replace(features, tokens=tokens, semantic=means(tokens), semantic_mask=None)

    def has_global_token(self, model: nn.Module) -> bool:
        """Whether the encoder has a token of its own for the whole image."""
        return False

    # -- training

    def stage1_trainable(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Stage 1 trains the projector and all codebooks.

        Raises:
            SeamError: if not guarded.
        """
        return self._parameters_of(model, [*self.projectors(model), *self._levels(model)])

    def stage2_trainable(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Stage 2 trains the language model and its head, nothing else."""
        return self._parameters_of(model, self.language_modules(model))

    def _levels(self, model: nn.Module) -> list[nn.Module]:
        """The levels of the guard that the stages train: the regional judge is trained after."""
        guard = getattr(model, "vqguard", None)
        if not isinstance(guard, nn.Module):
            raise SeamError("expected a guarded model; call guard_model(model, guard) first")
        return [module for name, module in guard.named_children() if name != "regional"]

    def _parameters_of(
        self, model: nn.Module, modules: list[nn.Module]
    ) -> list[tuple[str, nn.Parameter]]:
        wanted = {id(parameter) for module in modules for parameter in module.parameters()}
        return [(name, p) for name, p in model.named_parameters() if id(p) in wanted]
