"""What the guarded modules of one model share, and what one call passes between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast
from uuid import uuid4

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vqguard.adapters.base import Adapter
from vqguard.adapters.codes import VisualCodes
from vqguard.adapters.features import VisualFeatures
from vqguard.adapters.runtime.coded import quantised_from
from vqguard.adapters.runtime.offloaded import at_hand, bring_back
from vqguard.adapters.runtime.policy_texts import PolicyTexts
from vqguard.adapters.runtime.projected_codewords import ProjectedCodewords
from vqguard.adapters.runtime.quantise import Quantised, ask, quantise
from vqguard.adapters.seams import Seam, way_to
from vqguard.errors import BypassError, InputError, SeamError
from vqguard.judge import unjudged
from vqguard.scopes.modes import evaluating

if TYPE_CHECKING:
    from vqguard.guard import VQGuard
    from vqguard.judging.verdict import Verdict
    from vqguard.regional.layout import Layout

NO_TEXTS = PolicyTexts()


class GuardLink:
    """The guard as the guarded modules of one model reach it.

    Not a Module: the guard is registered once, at the top of the model, and appears once in the
    state dict. `copy.deepcopy` of the model copies the link with it, so that the copy's modules
    reach the copy's guard.
    """

    def __init__(
        self,
        guard: VQGuard,
        adapter: Adapter,
        refusal_ids: tuple[int, ...],
        seams: tuple[Seam, ...],
        proven: frozenset[str] | None = None,
        texts: PolicyTexts = NO_TEXTS,
    ) -> None:
        self.guard = guard
        self.adapter = adapter
        self.refusal_ids = refusal_ids
        self.seams = seams
        self.proven = proven  # names of the arguments that a proof used; None for known types
        self.texts = texts
        self.identity = uuid4().hex
        self.projected = ProjectedCodewords()

    def __deepcopy__(self, memo: dict[int, Any]) -> GuardLink:
        # A copy has an identity of its own: the two guards may be trained apart.
        guard = deepcopy(self.guard, memo)
        twin = GuardLink(guard, self.adapter, self.refusal_ids, self.seams, self.proven, self.texts)
        memo[id(self)] = twin
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        # So has one that was pickled.
        self.__dict__.update(state, identity=uuid4().hex)

    @property
    def codewords(self) -> Tensor:
        """(P, d) the patch codebook."""
        return self.guard.patch.codebook.weight

    def quantise(
        self,
        model: nn.Module,
        seam: Seam,
        arguments: Mapping[str, Any],
        features: VisualFeatures | VisualCodes | None = None,
    ) -> Quantised:
        """Run the encoder (unless its `features` are given), the guard and what follows it.

        Codes in place of features are looked up, in training alone.

        Raises:
            BypassError: for codes outside of training.
            NonFiniteError: for NaN or infinite features.
        """
        with self._judging_or_training(model), at_hand(way_to(model, seam)):
            return self._quantise(model, seam, arguments, features)

    def _judging_or_training(self, model: nn.Module) -> AbstractContextManager[None]:
        """What the way from pixels to codewords runs in: a verdict is one of eval mode.

        With gradients, modules in training mode are being trained: they run as they are, and what
        they give is not judged. The guard's own mode stays, its codebooks may be learning.
        """
        own = set(self.guard.modules())
        others = [module for module in model.modules() if module not in own]
        if not torch.is_grad_enabled():
            return evaluating(others)
        language = set(self.adapter.language_model(model).modules())
        trained = any(module.training for module in others if module not in language)
        return unjudged() if trained else nullcontext()

    def _quantise(
        self,
        model: nn.Module,
        seam: Seam,
        arguments: Mapping[str, Any],
        features: VisualFeatures | VisualCodes | None,
    ) -> Quantised:
        if isinstance(features, VisualCodes):
            require_training(model)
            return quantised_from(
                self.adapter,
                model,
                seam,
                arguments,
                self.guard,
                features,
                lambda tokens, codes: self._project(model, tokens, codes),
            )

        def project(tokens: Tensor, codes: Tensor) -> Tensor | None:
            if not self.adapter.tokenwise:
                return None
            projector = self.adapter.projector(model)
            return self.projected.lookup(tokens, codes, self.codewords, projector)

        if features is None:
            result = quantise(self.adapter, model, seam, arguments, self.guard, project)
            result.leading = leading(seam, arguments)
            return result
        counts = features.counts
        if self.guard.config.site == "projected":
            features = self.adapter.project(model, features)
        elif not self.adapter.tokenwise:
            self.adapter.project(model, features)  # says why not
        guarded = ask(self.guard, replace(features, deep=()))
        tokens = list(guarded.tokens)
        if self.guard.config.site == "encoder":
            tokens = self._project(model, tokens, list(guarded.codes))
        output = BaseModelOutputWithPooling()
        output.pooler_output = cast(Any, tokens)
        return Quantised(output, guarded, counts, arguments, len(features.semantic))

    def _project(self, model: nn.Module, tokens: list[Tensor], codes: list[Tensor]) -> list[Tensor]:
        """Codewords of site "encoder" through the projector, or out of the table."""
        projector = self.adapter.projector(model)
        sizes = [len(image) for image in tokens]
        flat, flat_codes = torch.cat(tokens), torch.cat(codes)
        projected = self.projected.lookup(flat, flat_codes, self.codewords, projector)
        if projected is None:
            projected = cast(Tensor, projector(flat))
        return list(torch.split(projected, sizes))

    def prepare(self, model: nn.Module, call: Call, *, inner_only: bool) -> None:
        """Quantise what the call's pixels show before the model runs."""
        for seam in self.seams:
            if (inner_only and not seam.inner) or not self.adapter.has_pixels(seam, call.arguments):
                continue
            with at_hand(way_to(model, seam)):
                arguments = self.adapter.seam_arguments(model, seam, call.arguments)
            result = self.quantise(model, seam, arguments, call.features)
            call.prepared[seam] = result
            call.seen.append((seam, result))

    def repeat(self, seam: Seam, result: Quantised, arguments: Mapping[str, Any]) -> Any:
        """The same features for as many pixels as came: beams repeat each image.

        Older versions of transformers repeat the pixels, newer ones what this returns. Inside
        `forward` the arguments are hidden states, as many as the features are.
        """
        value = seam.read(result.output)
        if seam.inner:
            given = next(
                argument for argument in arguments.values() if isinstance(argument, Tensor)
            )
            times = len(given) // len(value)
        else:
            times = leading(seam, arguments) // result.leading if result.leading else 1
        if times <= 1:
            return copy(result.output) if not isinstance(result.output, Tensor) else result.output
        return seam.write(result.output, self.adapter.repeat(seam, value, result.arguments, times))

    def located(
        self, seam: Seam, verdicts: list[Verdict], layouts: Sequence[Layout | None] | None
    ) -> list[Verdict]:
        """The verdicts on what was quantised at a seam, each with its deciding region."""
        if layouts is None:
            return verdicts
        site = self.guard.config.site
        parts = [self.adapter.part(seam, site, layout) for layout in layouts]
        return self.guard.located(verdicts, layouts, parts)

    def blank(
        self, model: nn.Module, seam: Seam, result: Quantised, images: Mapping[int, Tensor | None]
    ) -> None:
        """Take what these images show out of the output.

        Every visual token, or those at the places (N_i,) bool that `images` gives, becomes codeword
        0; deep-stack features become zero.
        """
        if not images:
            return
        value = seam.read(result.output)
        units = self.adapter.split(seam, value, result.arguments)
        blanked = [
            _put(self._blank(model, unit), unit, images[index]) if index in images else unit
            for index, unit in enumerate(units)
        ]
        result.output = seam.write(result.output, self.adapter.join(seam, value, blanked))
        if seam.deep:
            levels = [
                self.adapter.join(
                    seam,
                    level,
                    [
                        _put(torch.zeros_like(unit), unit, images[index])
                        if index in images
                        else unit
                        for index, unit in enumerate(
                            self.adapter.split(seam, level, result.arguments)
                        )
                    ],
                )
                for level in seam.levels(result.output)
            ]
            setattr(result.output, seam.deep, levels)

    def _blank(self, model: nn.Module, unit: Tensor) -> Tensor:
        """Codeword 0 in every place; zeros where it would still have to pass a resampler."""
        if self.guard.config.site == "projected":
            vector = self.guard.patch.lookup(torch.zeros(1, dtype=torch.int64), unit.dtype)
        elif self.adapter.tokenwise:
            zero = torch.zeros(1, dtype=torch.int64, device=self.codewords.device)
            vector = self._project(model, [self.guard.patch.lookup(zero, unit.dtype)], [zero])[0]
        else:
            vector = torch.zeros_like(unit[:1])
        return vector.to(unit).expand_as(unit).clone()


def _put(blank: Tensor, unit: Tensor, places: Tensor | None) -> Tensor:
    """The unit (N, d) with `blank` at these places (N,); at all of them where `places` is None."""
    return blank if places is None else torch.where(places.to(unit.device)[:, None], blank, unit)


def require_training(model: nn.Module) -> None:
    """Raise `BypassError` outside of training, where codes would be answered without a verdict."""
    if not (model.training and torch.is_grad_enabled()):
        raise BypassError(
            "codes stand in for pixels where a language model is trained (training mode, gradients "
            "recorded) and nowhere else: no verdict is computed of them; pass pixels"
        )


def leading(seam: Seam, arguments: Mapping[str, Any]) -> int:
    """First dimension of the pixels, 0 where there are none."""
    pixels = seam.shown(arguments)
    return 0 if pixels is None else len(pixels)


def link_of(module: nn.Module) -> GuardLink:
    """The link of a guarded module; `SeamError` for any other."""
    link = module.__dict__.get("_vqguard_link")
    if not isinstance(link, GuardLink):
        raise SeamError(
            f"expected a guarded model, got {type(module).__name__} without a guard; "
            "call guard_model(model, guard)"
        )
    if getattr(module, "_is_replica", False):
        raise SeamError(
            "DataParallel runs a guarded model's replicas around its guard: use "
            "DistributedDataParallel, one process a device"
        )
    bring_back(link.guard)
    guard = module._modules.get("vqguard", link.guard)
    if guard is not link.guard:
        raise SeamError(
            "model.vqguard was replaced by assignment; call unguard_model(model), then "
            "guard_model(model, new_guard)"
        )
    return link


@dataclass
class Call:
    """One call of a guarded model, in one thread or task.

    `checked`: its arguments passed the checks, and whoever made it answers for the cache.
    `generating`: it is made by the guarded `generate`, which judges before anything runs.
    `prepared`: what seams give in this call, judged already. `features`: encoder features that
    stand in for pixels, or codes that do in training. `seen` collects what was quantised.
    `arguments`: what the caller gave. `open`: it has not returned; tasks that were started inside
    may outlive it.
    """

    link: GuardLink
    checked: bool = False
    generating: bool = False
    prepared: dict[Seam, Quantised] = field(default_factory=dict)
    features: VisualFeatures | VisualCodes | None = None
    seen: list[tuple[Seam, Quantised]] = field(default_factory=list)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    open: bool = True


CALL: ContextVar[Call | None] = ContextVar("vqguard_call", default=None)


def current_call(link: GuardLink) -> Call | None:
    """The call that this model is serving, None outside of one and inside another model's."""
    call = CALL.get()
    return call if call is not None and call.open and call.link is link else None


@contextmanager
def serving(call: Call) -> Iterator[Call]:
    """Inside, `call` is the one that is being served.

    A generator that waits inside may be closed in another context, which serves another one.
    """
    outer = CALL.get()
    CALL.set(call)
    try:
        yield call
    finally:
        call.open = False
        if CALL.get() is call:
            CALL.set(outer)


@contextmanager
def encoder_features(model: nn.Module, features: VisualFeatures) -> Iterator[None]:
    """Inside, the guarded `model` takes these encoder features for the pixels of its next calls.

    For training on cached features: `features` come from
    `visual_features(model, site="encoder", ...)`; tokens (B, N, d_v) and semantic
    (B, S, d_v). They pass the projector and the guard as pixels do, with gradients; only the
    vision encoder is skipped. Calls need no `pixel_values`.

    The calls raise `SeamError` for families whose projector is more than a map of each token.
    """
    with serving(Call(link_of(model), features=features)):
        yield


_F = TypeVar("_F", bound=Callable[..., Any])


def untraced(function: _F) -> _F:
    """Bookkeeping that torch.compile must not trace; what it calls in eager mode stays eager."""
    disable: Any = torch.compiler.disable
    return cast(_F, disable(function))


def image_flags(
    link: GuardLink,
    model: nn.Module,
    call: Mapping[str, Any],
    seen: Sequence[tuple[Seam, Quantised]],
) -> Tensor | None:
    """(B,) rows of a `forward` call that show a flagged image; None where none was judged."""
    flags = torch.zeros(batch_size(link, call), dtype=torch.bool)
    for seam, result in seen:
        if result.guarded.flagged is None:
            return None
        flagged = result.guarded.flagged.tolist()
        if any(flagged):
            rows = link.adapter.rows(model, seam, call, result.counts)
            for image, row in enumerate(rows):
                flags[row] |= flagged[image]
    return flags


def batch_size(link: GuardLink, call: Mapping[str, Any]) -> int:
    """Rows of a call: of its prompt, else of its pixels."""
    ids = link.adapter.prompt_ids(call)
    if ids is not None:
        return len(ids)
    counts = (leading(seam, call) for seam in link.seams)
    count = next((number for number in counts if number), 0)
    if not count:
        raise InputError("expected input_ids (B, T) or pixels")
    return count
