"""What an adapter declares about a family of models.

A family whose language model takes its images through `get_image_features(...).pooler_output`, and
whose projector is a module of its own, needs nothing but the names of its modules; those are in
`families.py`, one line each.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from vqguard.adapters.rows import evenly, fill_placeholders
from vqguard.adapters.seams import (
    Seam,
    find_seams,
    join_units,
    means,
    split_units,
    stack_if_even,
    submodule,
)
from vqguard.errors import InputError, SeamError

Site = Literal["projected", "encoder"]


@dataclass(frozen=True)
class VisualFeatures:
    """Unquantised features of a batch of images, at one site; static positions left out.

    `tokens` (B, N, d) when every image has as many tokens, otherwise a list of (N_i, d).
    `semantic` (B, S, d_s): the global tokens that are judged, S = 1 as in the paper.
    `deep`: deep-stack features, for each level what `tokens` is.
    All have the model's floating dtype and carry gradients.
    """

    tokens: Tensor | list[Tensor]
    semantic: Tensor
    deep: tuple[Tensor | list[Tensor], ...] = field(default=())

    @property
    def counts(self) -> list[int]:
        """Visual tokens of each image, in order."""
        return [len(image) for image in self.tokens]


@dataclass(frozen=True)
class Tap:
    """A module whose *input* is quantised at site "encoder".

    `path` from the top of the model; `argument`: the keyword that holds the features, "" for the
    first argument; `level`: the deep-stack level, None for the patch level.
    """

    path: str
    argument: str = ""
    level: int | None = None


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


class Adapter:
    """Where one family must be guarded. Stateless: every method is given the model.

    Class attributes are the declaration; methods are for families that do not fit it. Paths are
    relative to the *owner*, the module whose `get_image_features` feeds its own `forward`.
    """

    sites: ClassVar[tuple[Site, ...]] = ("projected",)
    """Where the family can be quantised: after the projector, or before it as well."""
    projector_paths: ClassVar[tuple[str, ...]] = ("multi_modal_projector",)
    """The modules between the encoder's width and the language model's (F_h), trained in stage 1."""
    vision_path: ClassVar[str] = "vision_tower"
    language_path: ClassVar[str] = "language_model"
    tokenwise: ClassVar[bool] = False
    """Whether the projector maps each token by itself and nothing is added after it: then cached
    encoder features can stand in for pixels, and projected codewords be looked up."""
    pointwise: ClassVar[tuple[str, ...]] = ()
    """Modalities whose tokens the projector maps one by one and nothing mixes afterwards."""
    additive: ClassVar[bool] = False
    """Whether the family adds constants (embeddings, positions) to its codewords."""
    trains_projector: ClassVar[bool] = True
    """Whether stage 1 trains anything beside the codebooks."""
    static_parameters: ClassVar[tuple[str, ...]] = ()
    """Parameters of the owner that the family mixes into its features (newline, separator):
    positions that hold them are left as they are."""
    image_options: ClassVar[tuple[str, ...]] = ("image_sizes",)
    """Other arguments of `get_image_features` that some versions take without naming them."""
    placeholders: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "image": ("image_token_id", "image_token_index"),
        "video": ("video_token_id", "video_token_index"),
    }
    """Names in the config of the tokens that images and videos take the place of."""
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
        return next(seam.path for seam in self.seams(model) if seam.modality == "image")

    def owner(self, model: nn.Module) -> nn.Module:
        return submodule(model, self.owner_path(model), "owner of get_image_features")

    def projectors(self, model: nn.Module) -> list[nn.Module]:
        owner = self.owner(model)
        return [submodule(owner, path, "projector") for path in self.projector_paths]

    def projector(self, model: nn.Module) -> nn.Module:
        """The first of them; the only one in most families."""
        return self.projectors(model)[0]

    def tower(self, model: nn.Module) -> nn.Module:
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

    def features(self, model: nn.Module, site: Site | None = None, **inputs: Any) -> VisualFeatures:
        """Unquantised features of a batch, differentiable, whether or not `model` is guarded.

        `inputs`: what a processor returns; arguments that the encoder does not take (`input_ids`,
        ...) are ignored. Videos follow the images. `site`: the guard's own when None, "projected"
        without one.

        Raises `InputError` when no pixels are given.
        """
        from vqguard.adapters.encode import read_features

        if site is None:
            guard = getattr(model, "vqguard", None)
            site = guard.config.site if guard is not None else "projected"
        self.require_site(site)
        found = [
            read_features(self, model, seam, self.seam_arguments(model, seam, inputs), site)
            for seam in self.given(model, inputs)
        ]
        if len(found) == 1:
            return found[0]
        tokens = [unit for one in found for unit in one.tokens]
        deep = tuple(
            stack_if_even([unit for level in levels for unit in level])
            for levels in zip(*(one.deep for one in found), strict=True)
        )
        semantic = torch.cat([one.semantic for one in found])
        return VisualFeatures(stack_if_even(tokens), semantic, deep)

    def given(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Seam]:
        """The seams whose pixels are among `inputs`. Raises `InputError` when there are none."""
        found = [seam for seam in self.seams(model) if self.has_pixels(seam, inputs)]
        if not found:
            names = [name for seam in self.seams(model) for name in seam.pixels]
            raise InputError(
                f"expected pixels in {' or '.join(dict.fromkeys(names))}, got "
                f"{', '.join(sorted(inputs)) or 'no arguments'}"
            )
        return found

    def has_pixels(self, seam: Seam, inputs: Mapping[str, Any]) -> bool:
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

    def encoder_units(
        self, model: nn.Module, seam: Seam, arguments: Mapping[str, Any], features: Tensor
    ) -> list[Tensor]:
        """One (N_i, d_v) tensor a unit, of what a tapped module is given."""
        return split_units(features)

    def static_vectors(self, model: nn.Module) -> Tensor | None:
        """(k, d) constants that the family mixes into its features."""
        owner = self.owner(model)
        found = [getattr(owner, name, None) for name in self.static_parameters]
        rows = [one.detach().reshape(-1, one.shape[-1]) for one in found if one is not None]
        return torch.cat(rows) if rows else None

    def global_token(
        self,
        model: nn.Module,
        seam: Seam,
        output: Any,
        units: Sequence[Tensor],
        arguments: Mapping[str, Any],
        site: Site,
    ) -> Tensor:
        """(B, S, d_s): what the semantic level judges; the mean of the unit's tokens by default.

        METHOD: the CLS token where the encoder has one. `output`: of the seam at site
        "projected", of the tower at site "encoder" (None where the tap lies inside the tower).
        """
        return means(list(units))

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
            return VisualFeatures(tokens, projector(features.semantic))
        return VisualFeatures(tokens, means(tokens))

    def has_global_token(self, model: nn.Module) -> bool:
        """Whether the encoder has a token of its own for the whole image."""
        return False

    # -- text

    def prompt_ids(self, arguments: Mapping[str, Any]) -> Tensor | None:
        """The prompt's token ids (B, T) among the arguments of `generate` or `forward`."""
        ids = arguments.get("inputs")
        return ids if ids is not None else arguments.get("input_ids")

    def answer_prompt(self, model: nn.Module, arguments: Mapping[str, Any]) -> Tensor | None:
        """What `generate` returns in front of its answer (B, T).

        The prompt's ids, or the decoder's start where an encoder reads the prompt.
        """
        if not getattr(cast(Any, model).config, "is_encoder_decoder", False):
            return self.prompt_ids(arguments)
        start = self.started(model, arguments, "decoder_start_token_id")
        given = arguments.get("decoder_input_ids")
        if given is None or start is None:
            return given if start is None else start
        # As `generate` does it: what does not begin with the start token gets one.
        missing = bool((given[:, :1] != start).all())
        return torch.cat([start, given], dim=1) if missing else cast(Tensor, given)

    def started(self, model: nn.Module, arguments: Mapping[str, Any], name: str) -> Tensor | None:
        """(B, 1): the token that `generate` starts from without a prompt."""
        config = self.generation_config(model)
        token = getattr(config, name, None)
        token = config.bos_token_id if token is None else token
        ids = self.prompt_ids(arguments)
        names = [name for seam in self.seams(model) for name in seam.pixels]
        found = [arguments[n] for n in names if arguments.get(n) is not None]
        if token is None or (ids is None and not found):
            return None
        like = ids if ids is not None else found[0]
        return torch.full((len(like), 1), int(token), dtype=torch.long, device=like.device)

    def generation_config(self, model: nn.Module) -> Any:
        """The config whose end token and lengths `generate` goes by."""
        return cast(Any, model).generation_config

    def user_typed_images(self, model: nn.Module) -> Tensor | None:
        """Token ids that *are* image content and that a user could type; None in most families."""
        return None

    def rows(
        self, model: nn.Module, seam: Seam, arguments: Mapping[str, Any], counts: list[int]
    ) -> list[int]:
        """The batch row of each unit: they fill the placeholders of their kind in order.

        Families without placeholders have as many units in every row. Raises `InputError` when
        placeholders and units do not fit.
        """
        if seam.joins not in ("replace", "add"):
            rows = next(len(arguments[n]) for n in seam.pixels if arguments.get(n) is not None)
            return evenly(len(counts), rows, seam.modality)
        ids = self.prompt_ids(arguments)
        if ids is None:
            raise InputError("expected input_ids beside the pixels; use the model's processor")
        slots = self.slots(model, seam, ids).sum(-1).tolist()
        return fill_placeholders(slots, self.positions(model, counts), seam.modality)

    def positions(self, model: nn.Module, counts: list[int]) -> list[int]:
        """How many placeholders each unit takes, from how many tokens it has."""
        return counts

    def slots(self, model: nn.Module, seam: Seam, ids: Tensor) -> Tensor:
        """(B, T) bool: the positions that the seam's features take."""
        config = cast(Any, model).config
        for name in self.placeholders[seam.modality]:
            token = getattr(config, name, None)
            if token is not None:
                return cast(Tensor, ids == token)
        raise SeamError(f"{type(config).__name__} names no placeholder token of a {seam.modality}")

    def language_entries(self, model: nn.Module) -> list[nn.Module]:
        """The modules whose arguments are what enters the language model."""
        return [self.language_model(model)]

    def text_only(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """The same prompt with words in the place of pictures; None where it cannot be."""
        ids = inputs.get("input_ids")
        seams = self.seams(model)
        if ids is None or any(seam.joins not in ("replace", "add") for seam in seams):
            return None
        for seam in seams:
            ids = torch.where(self.slots(model, seam, ids), 3, ids)
        words: dict[str, Any] = {"input_ids": ids}
        for name, value in inputs.items():
            if name.endswith("token_type_ids"):
                words[name] = torch.zeros_like(value)
            elif name in ("attention_mask", "decoder_input_ids"):
                words[name] = value
        return words

    # -- runs, as the probe and the conformance kit make them

    def redraw(self, name: str, pixels: Any, generator: torch.Generator) -> Any:
        """Other pixels of the same form, for the argument `name`."""
        if isinstance(pixels, (list, tuple)):
            return type(pixels)(self.redraw(name, one, generator) for one in pixels)
        noise = torch.randn(pixels.shape, generator=generator).to(pixels)
        # Pictures that are all zero are padding and are counted as such.
        return noise * (pixels != 0).any(dim=-1, keepdim=True)

    def logits(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """What `forward` answers for `inputs`, labels and all being absent."""
        return cast(Tensor, model(**inputs).logits)

    def decode(self, model: nn.Module, inputs: Mapping[str, Any], new_tokens: int) -> list[Tensor]:
        """Greedy tokens and the scores behind them."""
        output = cast(Any, model).generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return [output.sequences, *output.logits]

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
        hidden = self.text_states(self.language_model(model), input_ids, mask)
        weights = mask.to(hidden.dtype).unsqueeze(-1)
        return cast(Tensor, (hidden * weights).sum(1) / weights.sum(1))

    def text_states(self, language: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T, d_h) last hidden states of text alone."""
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        output = language(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False
        )
        return cast(Tensor, output.last_hidden_state)

    # -- training

    def stage1_trainable(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Stage 1 trains the projector and all codebooks. Raises `SeamError` if not guarded."""
        return self._parameters_of(model, [*self.projectors(model), self._guard(model)])

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
