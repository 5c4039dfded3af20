"""What an adapter declares about a family of models.

A family whose language model takes its images through `get_image_features(...).pooler_output`, and
whose projector is a module of its own, needs the class attributes below and `global_token`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from vqguard.errors import InputError, SeamError

Site = Literal["projected", "encoder"]


@dataclass(frozen=True)
class VisualFeatures:
    """Unquantised features of a batch of images, at one site.

    `tokens` (B, N, d) when every image has as many tokens, otherwise a list of (N_i, d).
    `semantic` (B, S, d_s): the global tokens that are judged, S = 1 as in the paper.
    Both have the model's floating dtype and carry gradients.
    """

    tokens: Tensor | list[Tensor]
    semantic: Tensor

    @property
    def counts(self) -> list[int]:
        """Visual tokens of each image, in order."""
        return [len(image) for image in self.tokens]


def stack_if_even(tokens: list[Tensor]) -> Tensor | list[Tensor]:
    """(B, N, d) when all images have as many tokens, otherwise the list as it is."""
    return torch.stack(tokens) if len({len(image) for image in tokens}) == 1 else tokens


def _means(tokens: Tensor | list[Tensor]) -> Tensor:
    return torch.stack([image.mean(0, keepdim=True) for image in tokens])


def original_method(module: nn.Module, name: str) -> Any:
    """A bound method of `module` as its class defined it before any guard was installed."""
    cls = getattr(type(module), "vqguard_original", type(module))
    return MethodType(getattr(cls, name), module)


def bind(method: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, as the bound `method` would receive them."""
    names = [
        name
        for name, parameter in inspect.signature(method).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if len(args) > len(names):
        raise TypeError(f"expected at most {len(names)} positional arguments, got {len(args)}")
    named = dict(zip(names, args, strict=False))
    twice = sorted(named.keys() & kwargs.keys())
    if twice:
        raise TypeError(f"got more than one value for {', '.join(twice)}")
    return named | dict(kwargs)


def submodule(root: nn.Module, path: str, what: str) -> nn.Module:
    """`root.<path>`; `SeamError` naming the path when the model does not have it."""
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise SeamError(
            f"expected the {what} at {path!r} in {type(root).__name__}, found nothing there: "
            "this model differs from its family; it was not guarded"
        ) from error


class Adapter:
    """Where one family must be guarded. Stateless: every method is given the model.

    Class attributes are the declaration; methods are for families that do not fit it. The *owner*
    is the module whose `get_image_features` feeds its own `forward`; the outer model's method of
    the same name only calls it.
    """

    sites: ClassVar[tuple[Site, ...]] = ("projected",)
    """Where the family can be quantised: after the projector, or before it as well."""
    owner_path: ClassVar[str] = "model"
    projector_path: ClassVar[str] = "multi_modal_projector"
    """Relative to the owner, as the two below."""
    vision_path: ClassVar[str] = "vision_tower"
    language_path: ClassVar[str] = "language_model"
    pixel_arguments: ClassVar[tuple[str, ...]] = ("pixel_values",)
    """Arguments that hold pixels; the first is the one that starts the encoder."""
    image_options: ClassVar[tuple[str, ...]] = ("image_sizes",)
    """Other arguments of `get_image_features` that some versions take without naming them."""
    refused_arguments: ClassVar[tuple[str, ...]] = ("inputs_embeds", "mm_encoder_outputs")
    """Arguments that would carry visual vectors past the guard."""

    # -- modules

    def owner(self, model: nn.Module) -> nn.Module:
        return submodule(model, self.owner_path, "owner of get_image_features")

    def projector(self, model: nn.Module) -> nn.Module:
        """The module between the encoder's width and the language model's (F_h)."""
        return submodule(self.owner(model), self.projector_path, "projector")

    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        """F_v: frozen in both stages."""
        return [submodule(self.owner(model), self.vision_path, "vision encoder")]

    def language_modules(self, model: nn.Module) -> list[nn.Module]:
        """The language model and its output head: frozen in stage 1, trained in stage 2."""
        modules = [submodule(self.owner(model), self.language_path, "language model")]
        head = model.get_output_embeddings()  # type: ignore[operator]
        return [*modules, head] if isinstance(head, nn.Module) else modules

    def check(self, model: nn.Module) -> None:
        """Raise `SeamError` unless everything that the adapter declares is there."""
        if not callable(getattr(self.owner(model), "get_image_features", None)):
            raise SeamError(
                f"expected {type(self.owner(model)).__name__}.get_image_features, found none: "
                "the installed transformers puts images somewhere else; it was not guarded"
            )
        self.projector(model)
        self.vision_modules(model)
        self.language_modules(model)

    # -- sizes

    def width(self, model: nn.Module, site: Site) -> int:
        """Width of a visual token at `site`."""
        self.require_site(site)
        return int(cast(Any, model).config.get_text_config().hidden_size)

    def require_site(self, site: str) -> None:
        if site not in self.sites:
            raise SeamError(
                f"site {site!r} is not available for {type(self).__name__}: "
                f"expected one of {', '.join(self.sites)}"
            )

    # -- features

    def features(self, model: nn.Module, site: Site | None = None, **inputs: Any) -> VisualFeatures:
        """Unquantised features of a batch, differentiable, whether or not `model` is guarded.

        `inputs`: what a processor returns; arguments that `get_image_features` does not take
        (`input_ids`, ...) are ignored. `site`: the guard's own when None, "projected" without one.

        Raises `InputError` when no pixels are given.
        """
        if site is None:
            guard = getattr(model, "vqguard", None)
            site = guard.config.site if guard is not None else "projected"
        self.require_site(site)
        owner = self.owner(model)
        return self.encode(owner, self.image_arguments(owner, inputs), site)[0]

    def image_arguments(self, owner: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `inputs` that `get_image_features` names, None left out."""
        call = original_method(owner, "get_image_features")
        names = {*inspect.signature(call).parameters, *self.image_options} - {"kwargs"}
        chosen = {k: v for k, v in inputs.items() if k in names and v is not None}
        if not self.has_pixels(chosen):
            raise InputError(
                f"expected pixels in {self.pixel_arguments[0]}, got "
                f"{', '.join(sorted(inputs)) or 'no arguments'}"
            )
        return chosen

    def has_pixels(self, arguments: Mapping[str, Any]) -> bool:
        return any(arguments.get(name) is not None for name in self.pixel_arguments)

    def encode(
        self, owner: nn.Module, arguments: Mapping[str, Any], site: Site
    ) -> tuple[VisualFeatures, Any]:
        """The features at `site`, and the family's own output object for `pack`.

        The default runs the original `get_image_features`, so that only what reads the global
        token has to know the family.
        """
        if site != "projected":
            raise SeamError(f"{type(self).__name__} does not read features before the projector")
        call = original_method(owner, "get_image_features")
        output = call(**{**arguments, "return_dict": True})
        tokens = self.split(output)
        semantic = self.global_token(owner, output, tokens, arguments, site)
        return VisualFeatures(stack_if_even(tokens), semantic), output

    def split(self, output: Any) -> list[Tensor]:
        """One (N_i, d) tensor an image, from what `get_image_features` returned."""
        return list(output.pooler_output)

    def pack(self, output: Any, tokens: list[Tensor]) -> Any:
        """Put the codewords where the language model will read them."""
        output.pooler_output = tokens
        return output

    def global_token(
        self,
        owner: nn.Module,
        output: Any,
        tokens: list[Tensor],
        arguments: Mapping[str, Any],
        site: Site,
    ) -> Tensor:
        """(B, S, d_s): what the semantic level judges; the mean of the image's tokens by default.

        METHOD: the CLS token where the encoder has one.
        """
        return _means(tokens)

    def has_global_token(self, owner: nn.Module) -> bool:
        """Whether the encoder has a token of its own for the whole image."""
        return False

    def project(self, owner: nn.Module, features: VisualFeatures) -> VisualFeatures:
        """Features of site "encoder" taken to site "projected", as the model itself does it."""
        projector = submodule(owner, self.projector_path, "projector")
        tokens = features.tokens
        if isinstance(tokens, Tensor):
            tokens = cast(Tensor, projector(tokens))
        else:
            tokens = [cast(Tensor, projector(image)) for image in tokens]
        if self.has_global_token(owner):
            return VisualFeatures(tokens, projector(features.semantic))
        return VisualFeatures(tokens, _means(tokens))

    # -- text

    def prompt_ids(self, arguments: Mapping[str, Any]) -> Tensor | None:
        """The prompt's token ids (B, T) among the arguments of `generate` or `forward`."""
        ids = arguments.get("inputs")
        return ids if ids is not None else arguments.get("input_ids")

    def image_rows(self, owner: nn.Module, input_ids: Tensor, counts: list[int]) -> list[int]:
        """The batch row of each image: images fill the placeholders in order.

        Raises `InputError` when a row's placeholders do not hold a whole number of images: the
        verdict of an image that is spread over two rows could not be acted upon.
        """
        image_token = cast(Any, owner).config.image_token_id
        slots = (input_ids == image_token).sum(-1).tolist()
        rows: list[int] = []
        row, free = 0, slots[0] if slots else 0
        for image, count in enumerate(counts):
            while free == 0 and row + 1 < len(slots):
                row += 1
                free = slots[row]
            if count > free:
                raise InputError(
                    f"image {image} has {count} tokens but row {row} of the prompt has {free} "
                    f"image placeholders left (placeholders by row: {slots}, image sizes: "
                    f"{counts}); build the prompt with the model's processor"
                )
            rows.append(row)
            free -= count
        if sum(counts) != sum(slots):
            raise InputError(
                f"the prompt has {sum(slots)} image placeholders (by row: {slots}) but the images "
                f"fill {sum(counts)} ({counts}); build the prompt with the model's processor"
            )
        return rows

    @torch.no_grad()
    def caption_hidden(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """H_caption (B, d_h): the language model's last hidden states, mean over the caption.

        The mean says what the caption names; the state at its last token, a full stop, is nearly
        the same for all captions (docs/decisions, 0002). `input_ids` and `attention_mask` (B, T),
        padded on either side; the mask defaults to ones. No gradient: the language model is
        frozen where this is a target (stage 1). Captions hold no image tokens.

        Raises `InputError` for an empty caption.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise InputError(
                f"expected attention_mask of shape {tuple(input_ids.shape)}, "
                f"got {tuple(mask.shape)}"
            )
        empty = (mask.sum(-1) == 0).nonzero().flatten().tolist()
        if empty or input_ids.shape[-1] == 0:
            raise InputError(f"expected at least one token a caption, rows {empty} have none")
        language = submodule(self.owner(model), self.language_path, "language model")
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        hidden = language(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        weights = mask.to(hidden.dtype).unsqueeze(-1)
        return cast(Tensor, (hidden * weights).sum(1) / weights.sum(1))

    # -- training

    def stage1_trainable(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Stage 1 trains the projector and both codebooks. Raises `SeamError` if not guarded."""
        return self._parameters_of(model, [self.projector(model), self._guard(model)])

    def stage2_trainable(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Stage 2 trains the language model and its head, nothing else."""
        return self._parameters_of(model, self.language_modules(model))

    def _guard(self, model: nn.Module) -> nn.Module:
        guard = getattr(model, "vqguard", None)
        if not isinstance(guard, nn.Module):
            raise SeamError("expected a guarded model; call guard_model(model, guard) first")
        return guard

    def _parameters_of(
        self, model: nn.Module, modules: list[nn.Module]
    ) -> list[tuple[str, nn.Parameter]]:
        wanted = {id(parameter) for module in modules for parameter in module.parameters()}
        return [(name, p) for name, p in model.named_parameters() if id(p) in wanted]
