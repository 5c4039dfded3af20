"""What the guarded modules of one model share, and what one call passes between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy, deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast
from uuid import uuid4

import torch
from torch import Tensor, nn

from vqguard.adapters.base import Adapter, VisualFeatures, submodule
from vqguard.adapters.table import ProjectedCodewords
from vqguard.errors import BypassError, InputError, SeamError

if TYPE_CHECKING:
    from vqguard.guard import GuardOutput, VQGuard


@dataclass
class Quantised:
    """One batch of images after the guard.

    `output`: the family's own object, holding codewords. `guarded`: the guard's output at its
    site. `counts`: visual tokens of each image.
    """

    output: Any
    guarded: GuardOutput
    counts: list[int]


class GuardLink:
    """The guard as its owner reaches it.

    Not a Module: the guard is registered once, at the top of the model, and appears once in the
    state dict. `copy.deepcopy` of the model copies the link with it, so that the copy's owner
    reaches the copy's guard.
    """

    def __init__(self, guard: VQGuard, adapter: Adapter, refusal_ids: tuple[int, ...]) -> None:
        self.guard = guard
        self.adapter = adapter
        self.refusal_ids = refusal_ids
        self.identity = uuid4().hex
        self.projected = ProjectedCodewords()

    def __deepcopy__(self, memo: dict[int, Any]) -> GuardLink:
        # A copy has an identity of its own: the two guards may be trained apart.
        twin = GuardLink(deepcopy(self.guard, memo), self.adapter, self.refusal_ids)
        memo[id(self)] = twin
        return twin

    @property
    def codewords(self) -> Tensor:
        """(P, d) the patch codebook."""
        return self.guard.patch.codebook.weight

    def quantise(
        self,
        owner: nn.Module,
        arguments: Mapping[str, Any],
        features: VisualFeatures | None = None,
    ) -> Quantised:
        """Run the encoder (unless its `features` are given), the guard and what follows it.

        Raises `NonFiniteError` for NaN or infinite features.
        """
        site = self.guard.config.site
        if features is None:
            features, output = self.adapter.encode(owner, arguments, site)
        else:
            from transformers.modeling_outputs import BaseModelOutputWithPooling

            output = BaseModelOutputWithPooling()
            if site == "projected":
                features = self.adapter.project(owner, features)
        guarded = self.guard(features.tokens, features.semantic)
        tokens = self._project(owner, list(guarded.tokens), list(guarded.codes))
        return Quantised(self.adapter.pack(output, tokens), guarded, features.counts)

    def _project(self, owner: nn.Module, tokens: list[Tensor], codes: list[Tensor]) -> list[Tensor]:
        """At site "encoder" the codewords still have to pass the projector."""
        if self.guard.config.site == "projected":
            return tokens
        projector = submodule(owner, self.adapter.projector_path, "projector")
        sizes = [len(image) for image in tokens]
        flat, flat_codes = torch.cat(tokens), torch.cat(codes)
        found = self.projected.lookup(flat, flat_codes, self.codewords, projector)
        if found is None:
            found = cast(Tensor, projector(flat))
        return list(torch.split(found, sizes))

    def repeat(self, result: Quantised, images: int) -> Quantised:
        """The same features for `images` pixel tensors: beams repeat each image.

        Older versions of transformers repeat the pixels, newer ones what this returns.
        """
        times = images // len(result.counts)
        if times > 1:
            tokens = self.adapter.split(result.output)
            repeated = [image for image in tokens for _ in range(times)]
            result.output = self.adapter.pack(copy(result.output), repeated)
            result.counts = [count for count in result.counts for _ in range(times)]
        return result

    def blank(self, owner: nn.Module, result: Quantised, images: Sequence[int]) -> None:
        """Replace every visual token of these images by codeword 0, in place of the output."""
        if not images:
            return
        tokens = self.adapter.split(result.output)
        zero = torch.zeros(1, dtype=torch.int64, device=self.codewords.device)
        one = self._project(owner, [self.guard.patch.lookup(zero, tokens[0].dtype)], [zero])[0]
        blanked = [
            one.to(image).expand_as(image).clone() if index in images else image
            for index, image in enumerate(tokens)
        ]
        self.adapter.pack(result.output, blanked)


def link_of(module: nn.Module) -> GuardLink:
    """The link of a guarded module; `SeamError` for any other."""
    link = module.__dict__.get("_vqguard_link")
    if not isinstance(link, GuardLink):
        raise SeamError(
            f"expected a guarded model, got {type(module).__name__} without a guard; "
            "call guard_model(model, guard)"
        )
    guard = module._modules.get("vqguard", link.guard)
    if guard is not link.guard:
        raise SeamError(
            "model.vqguard was replaced by assignment; call unguard_model(model), then "
            "guard_model(model, new_guard)"
        )
    return link


@dataclass
class Call:
    """One call of a guarded model, in this thread.

    `generating`: the call is made by the guarded `generate`, which has already judged the images;
    `prepared` is what it got. `features`: encoder features that stand in for pixels. `seen`
    collects what the owner quantised.
    """

    owner: nn.Module
    generating: bool = False
    prepared: Quantised | None = None
    features: VisualFeatures | None = None
    seen: list[Quantised] = field(default_factory=list)


CALL: ContextVar[Call | None] = ContextVar("vqguard_call", default=None)


def current_call(owner: nn.Module) -> Call | None:
    """The call that `owner` is serving, None outside of one and inside another model's."""
    call = CALL.get()
    return call if call is not None and call.owner is owner else None


@contextmanager
def serving(call: Call) -> Iterator[Call]:
    token = CALL.set(call)
    try:
        yield call
    finally:
        CALL.reset(token)


@contextmanager
def encoder_features(model: nn.Module, features: VisualFeatures) -> Iterator[None]:
    """Inside, the guarded `model` takes these encoder features for the pixels of its next calls.

    For training on cached features: `features` come from
    `get_adapter(model).features(model, site="encoder", ...)`; tokens (B, N, d_v) and semantic
    (B, S, d_v). They pass the projector and the guard as pixels do, with gradients; only the
    vision encoder is skipped. Calls need no `pixel_values`.
    """
    owner = link_of(model).adapter.owner(model)
    with serving(Call(owner, features=features)):
        yield


_F = TypeVar("_F", bound=Callable[..., Any])


def untraced(function: _F) -> _F:
    """Bookkeeping that torch.compile must not trace; what it calls in eager mode stays eager."""
    disable: Any = torch.compiler.disable
    return cast(_F, disable(function))


# -- caches


@dataclass
class CacheTag:
    """Written on every cache that a guarded model filled.

    `length`: tokens it held then. `flagged` (B,) bool on the CPU: rows that saw a flagged image;
    None when an image was not judged because the guard has no safety map.
    """

    identity: str
    length: int
    flagged: Tensor | None


def cache_length(cache: Any) -> int:
    """Tokens in a cache, 0 for None. Raises `BypassError` for what is not a cache."""
    if cache is None:
        return 0
    length = getattr(cache, "get_seq_length", None)
    if length is None:
        raise BypassError(
            f"expected past_key_values to be a transformers Cache, got {type(cache).__name__}: "
            "what filled it cannot be told; pass a Cache made by this guarded model, or none"
        )
    return int(length())


def read_tag(link: GuardLink, cache: Any) -> CacheTag | None:
    """The tag of a filled cache, None for an empty one.

    Raises `BypassError` for a cache that this guarded model did not fill, or that was filled
    further since: it may hold unquantised images.
    """
    length = cache_length(cache)
    if length == 0:
        return None
    tag = getattr(cache, "_vqguard_tag", None)
    if not isinstance(tag, CacheTag) or tag.identity != link.identity or length > tag.length:
        raise BypassError(
            f"past_key_values holds {length} tokens that this guarded model did not put there: "
            "they may carry unquantised images; pass an empty cache, or one that a call of this "
            "model returned"
        )
    return tag


def write_tag(link: GuardLink, cache: Any, before: CacheTag | None, flagged: Tensor | None) -> None:
    """Tag a cache after a guarded call; flags of earlier calls stay."""
    length = cache_length(cache)
    if length == 0:
        return
    if before is not None:
        flagged = merge_flags(before.flagged, flagged)
    cache._vqguard_tag = CacheTag(link.identity, length, flagged)


def merge_flags(before: Tensor | None, now: Tensor | None) -> Tensor | None:
    """Rows flagged in either; None (not judged) wins.

    A cache whose rows were repeated or picked since has another batch size: then one flagged row
    before flags every row now.
    """
    if before is None or now is None:
        return None
    if before.shape == now.shape:
        return before | now
    return now | before.any()


def image_flags(
    link: GuardLink, owner: nn.Module, call: Mapping[str, Any], seen: Sequence[Quantised]
) -> Tensor | None:
    """(B,) rows of a `forward` call that show a flagged image; None where none was judged."""
    ids = link.adapter.prompt_ids(call)
    if ids is None:
        raise InputError("expected input_ids (B, T)")
    flags = torch.zeros(len(ids), dtype=torch.bool)
    for result in seen:
        if result.guarded.flagged is None:
            return None
        flagged = result.guarded.flagged.tolist()
        if any(flagged):
            rows = link.adapter.image_rows(owner, ids, result.counts)
            for image, row in enumerate(rows):
                flags[row] |= flagged[image]
    return flags
