"""Any vision encoder with a guard behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from vqguard.codebooks.guard_output import GuardOutput, Judged
from vqguard.codebooks.row_sample import RowSample
from vqguard.errors import ConfigError, InputError
from vqguard.guard import VQGuard
from vqguard.judging.evidence import NEUTRAL, Labels
from vqguard.judging.settings import UnfamiliarBy
from vqguard.regional.layout import Layout, grid_of
from vqguard.safety_map import SafetyMap, Verdict
from vqguard.scopes.modes import evaluating
from vqguard.search.settle import tree_sum

Split = Callable[[Any], tuple[Tensor, Tensor]]
"""Encoder output -> (visual tokens (B, N, d), semantic tokens (B, S, d_s))."""
GlobalToken = Literal["cls", "mean"] | Callable[[Tensor], Tensor]
"""Which token is judged; a callable is given the visual tokens (B, N, d)."""

_POINTS_A_CODE = 256  # what k-means itself looks at


class EncoderFeatures(NamedTuple):
    """What a `TokenEncoder` returns: not quantised, with gradient."""

    tokens: Tensor
    """(B, N, d) visual tokens, one for each place of the image."""
    semantic: Tensor
    """(B, S, d_s) the encoder's own global features."""
    prefix: Tensor
    """(B, p, d) class and register tokens that stood before the visual ones; p may be 0."""


class TokenEncoder(nn.Module):
    """An encoder that knows which part of its output is what: `forward` gives `EncoderFeatures`.

    `preprocess` turns one image into pixels (C, H, W); None where that is the caller's business.
    `input_shape` is the (C, H, W) that the encoder was made for, None where it does not say.
    `shares_text`: its global features lie in a space that it shares with texts, as CLIP's do.
    """

    shares_text: bool = False

    preprocess: Callable[[Any], Tensor] | None = None
    input_shape: tuple[int, ...] | None = None


class GuardedEncoder(nn.Module):
    """`encoder`, then the guard: a call returns a `GuardOutput`.

    `encoder` is a `TokenEncoder`, or any callable that returns tokens (B, N, d), a mapping with
    `last_hidden_state` (transformers' outputs are such), or a tuple that begins with the tokens.

    `global_token` says which token is judged: "cls": token 0, which is then not a visual token;
    "mean": the mean of the tokens; or a callable tokens (B, N, d) -> (B, d_s) or (B, S, d_s). Only
    a `TokenEncoder` goes without: then its own global features are judged.
    `split` replaces all of this: encoder output -> (tokens, semantic).

    A call refuses nobody: the caller reads `flagged` of the output, or asks `screen`.
    """

    def __init__(
        self,
        encoder: Callable[..., Any],
        guard: VQGuard,
        split: Split | None = None,
        global_token: GlobalToken | None = None,
        preprocess: Callable[[Any], Tensor] | None = None,
    ) -> None:
        """Give exactly one of `split` and `global_token`, else ConfigError.

        `preprocess`: one image -> pixels (C, H, W), used where images are given instead of pixels;
        a `TokenEncoder`'s own if None.
        """
        super().__init__()
        if not isinstance(guard, VQGuard):
            raise ConfigError(f"expected a VQGuard, got {type(guard).__name__}")
        check_choice(encoder, split, global_token)
        self.encoder = encoder
        self.guard = guard
        self.split = split
        self.global_token = global_token
        own = encoder.preprocess if isinstance(encoder, TokenEncoder) else None
        self.preprocess = own if preprocess is None else preprocess

    def forward(self, *args: Any, **kwargs: Any) -> GuardOutput:
        """Arguments go to the encoder.

        Raises:
            InputError, NonFiniteError: as `VQGuard` does.
        """
        tokens, semantic = self.features(*args, **kwargs)
        layouts = self._layouts(args[0] if args else None, tokens)
        output: GuardOutput = self.guard(tokens, semantic, layouts=layouts)
        return output

    def features(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Visual tokens (B, N, d) and semantic tokens (B, S, d_s), not quantised, with gradient."""
        return read_features(self.encoder(*args, **kwargs), self.split, self.global_token)

    @property
    def vqguard(self) -> VQGuard:
        """The guard, by the name that a guarded model has it by."""
        return self.guard

    def image_features(
        self, images: Sequence[Any]
    ) -> tuple[Tensor, Tensor, list[Layout | None] | None]:
        """Visual and semantic tokens of a batch of images as in `screen`, and their layouts.

        In eval mode and without gradient. Raises as `screen`.
        """
        with self._judging():
            [pixels] = self._batches(images, max(1, len(images)))
            tokens, semantic = self.features(pixels)
            return tokens, semantic, self._layouts(pixels, tokens)

    def start_codebooks(
        self, images: Tensor | Iterable[Any], seed: int = 0, batch: int = 32, iterations: int = 20
    ) -> None:
        """Set the codebooks by k-means on the features of `images` (as in `screen`).

        Images are read once and in batches; a uniform seeded sample of their tokens is kept, 256 a
        code. A safety map that was made for the old codebook no longer fits: calibrate after this.

        Raises:
            InputError: without images, and as `screen`.
        """
        levels = [self.guard.patch.codebook, self.guard.semantic.codebook]
        levels = levels if self.guard.quantises else levels[1:]
        samples = [RowSample(level.codes * _POINTS_A_CODE, seed) for level in levels]
        with self._judging():
            for pixels in self._batches(images, batch):
                read = self.features(pixels)[-len(levels) :]
                for sample, features in zip(samples, read, strict=True):
                    sample.add(features.flatten(0, -2).float().cpu())
        for level, sample in zip(levels, samples, strict=True):
            level.start_from(sample.rows(), seed=seed, iterations=iterations)

    def semantic_codes(self, images: Tensor | Iterable[Any], batch: int = 32) -> Tensor:
        """Semantic codes (B, S) int64 on the CPU, of `images` as in `screen`.

        Those of their regions where the guard's judge is regional.
        """
        return self._codes(images, batch)[0]

    def _codes(
        self, images: Tensor | Iterable[Any], batch: int = 32, *, visual: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Semantic codes (B, S) int64 and their distances (B, S) float64, on the CPU.

        `visual`: in place of those the distance (B,) of each image's visual tokens.
        """
        codes = [torch.empty(0, 1, dtype=torch.int64)]
        distances = [torch.empty(0) if visual else torch.empty(0, 1)]
        with self._judging():
            for pixels in self._batches(images, batch):
                judged = self._judged(pixels, visual=visual)
                codes.append(judged.codes.cpu())
                far = judged.visual if visual else judged.distances
                distances.append(cast(Tensor, far).cpu())
        some = slice(1, None) if len(codes) > 1 else slice(None)
        return torch.cat(codes[some]), torch.cat(distances[some]).double()

    def calibrate(
        self,
        images: Tensor | Iterable[Any],
        labels: Labels,
        *,
        tau: float | None = None,
        fpr: float | None = None,
        unfamiliar: float | None = None,
        unfamiliar_by: UnfamiliarBy = "judged",
        unfamiliar_first: bool = False,
        **rule: Any,
    ) -> SafetyMap:
        """Make the guard's safety map from labelled images, and return it.

        `labels`: one category an image, "neutral" among them, or several. `unfamiliar`: the budget
        of `SafetyMap.with_unfamiliar`, on all the images; `unfamiliar_by="visual"`: by visual
        tokens, on the neutral ones; `unfamiliar_first`: `first` there. The rest as
        `SafetyMap.calibrate`, which also says what is raised, beside ConfigError for visual tokens
        of a judge alone; the old map is kept then.
        """
        visual = unfamiliar_by == "visual"
        if visual:
            self.guard.require_patch_codewords()
        codes, distances = self._codes(images, visual=visual)
        made = SafetyMap.calibrate(
            codes,
            labels,
            semantic_codes=self.guard.cells,
            tau=tau,
            fpr=fpr,
            codebook_checksum=self.guard.checksum(self.guard.judge_level),
            **rule,
        )
        if unfamiliar is not None:
            neutral = [label in (NEUTRAL, [NEUTRAL], (NEUTRAL,)) for label in labels]
            made = made.with_unfamiliar(
                unfamiliar,
                distances[torch.tensor(neutral)] if visual else distances,
                first=unfamiliar_first,
                patch_checksum=self.guard.checksum("patch") if visual else "",
            )
        self.guard.safety_map = made
        return made

    def screen(self, images: Tensor | Iterable[Any], batch: int = 32) -> list[Verdict]:
        """One verdict an image, in eval mode and without gradient.

        `images`: pixels (B, C, H, W) as the encoder takes them, or any iterable of images, which
        `preprocess` makes into pixels.

        Raises:
            InputError: where an image cannot be used.
            NonFiniteError: for features with NaN or infinity.
            ConfigError: without a safety map.
        """
        verdicts: list[Verdict] = []
        with self._judging():
            for pixels in self._batches(images, batch):
                tokens, semantic = self.features(pixels)
                layouts = self._layouts(pixels, tokens)
                verdicts += self.guard.judge(semantic, None, tokens, layouts)
        return verdicts

    def _judged(self, pixels: Tensor, *, visual: bool = False) -> Judged:
        tokens, semantic = self.features(pixels)
        layouts = self._layouts(pixels, tokens)
        return self.guard.judged(semantic, None, tokens, layouts, visual=visual)

    def _layouts(self, pixels: Any, tokens: Tensor) -> list[Layout | None] | None:
        """Where the visual tokens lie: row by row, where there is a grid of the image's shape."""
        if not isinstance(pixels, Tensor) or pixels.dim() != 4:
            return None
        grid = grid_of(tokens.shape[1], *pixels.shape[-2:])
        return [None if grid is None else (grid,)] * len(tokens)

    def _batches(self, images: Tensor | Iterable[Any], batch: int) -> Iterator[Tensor]:
        if isinstance(images, Tensor):
            if images.dim() != 4:
                raise InputError(
                    f"expected pixels (images, channels, height, width), got {tuple(images.shape)}"
                )
            yield from (self._placed(part) for part in images.split(batch) if len(part))
            return
        if isinstance(images, str | bytes) or not isinstance(images, Iterable):
            raise InputError(
                f"expected pixels or a list of images, got {type(images).__name__}; put a single "
                "image into a list"
            )
        rest = iter(images)
        while chosen := list(islice(rest, batch)):
            pixels = [self._pixels(image) for image in chosen]
            shapes = sorted({tuple(image.shape) for image in pixels})
            if len(shapes) > 1:
                raise InputError(
                    f"preprocess gave pixels of different shapes {shapes}; they cannot share a "
                    "batch: resize to one size, or use batch=1"
                )
            yield self._placed(torch.stack(pixels))

    def _pixels(self, image: Any) -> Tensor:
        if self.preprocess is not None:
            image = self.preprocess(image)
        if not isinstance(image, Tensor) or image.dim() != 3:
            shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise InputError(
                f"expected pixels (channels, height, width) of an image, got {shape}; give "
                "preprocess=, a callable that makes one image into such a tensor"
            )
        return image

    def _placed(self, pixels: Tensor) -> Tensor:
        """On the encoder's device and, for floats, in its dtype."""
        module = self.encoder
        weight = next(module.parameters(), None) if isinstance(module, nn.Module) else None
        if weight is None:
            return pixels.to(self.guard.semantic.codebook.weight.device)
        if pixels.is_floating_point() and weight.is_floating_point():
            return pixels.to(weight.device, weight.dtype)
        return pixels.to(weight.device)

    @contextmanager
    def _judging(self) -> Iterator[None]:
        # eval: with batch norm in training mode an image's verdict would depend on its batch
        with evaluating(self.modules()), torch.no_grad():
            yield


def check_choice(
    encoder: Callable[..., Any], split: Split | None, global_token: GlobalToken | None
) -> None:
    """Raise ConfigError unless it is clear where `encoder`'s global token is taken."""
    named = global_token is not None and not callable(global_token)
    if named and global_token not in ("cls", "mean"):
        raise ConfigError(f"global_token must be 'cls', 'mean' or a callable, got {global_token!r}")
    if split is not None and global_token is not None:
        raise ConfigError("give exactly one of split and global_token, not both")
    if split is None and global_token is None and not isinstance(encoder, TokenEncoder):
        raise ConfigError(
            "give exactly one of split and global_token: whether token 0 is a class token"
            " cannot be seen from outside (global_token='cls' or 'mean')"
        )


def read_features(
    output: Any, split: Split | None = None, global_token: GlobalToken | None = None
) -> tuple[Tensor, Tensor]:
    """(visual tokens (B, N, d), semantic tokens (B, S, d_s)) from what an encoder returned.

    Raises:
        InputError: where they are not there.
    """
    if split is not None:
        return split(output)
    own = isinstance(output, EncoderFeatures)
    tokens = output.tokens if own else _tokens(output)
    if global_token is None and own:
        return tokens, output.semantic
    if global_token == "cls":
        if own:
            if output.prefix.shape[1] < 1:
                raise InputError("this encoder has no class token; choose another global_token")
            return tokens, output.prefix[:, :1]
        if tokens.shape[1] < 2:
            raise InputError(
                f"global_token='cls' needs a class token and others, got {tuple(tokens.shape)}"
            )
        return tokens[:, 1:], tokens[:, :1]
    if callable(global_token):
        semantic = global_token(tokens)
        return tokens, semantic[:, None] if semantic.dim() == 2 else semantic
    return tokens, mean_token(tokens)


def mean_token(tokens: Tensor) -> Tensor:
    """Mean of tokens (B, N, d) over N as (B, 1, d), in float64 and a fixed order.

    An image's mean is the same alone and in a batch, bit for bit.
    """
    if tokens.dim() != 3 or tokens.shape[1] < 1:
        raise InputError(f"expected tokens (images, tokens, width), got {tuple(tokens.shape)}")
    total = tree_sum(tokens.double().transpose(1, 2).clone())
    return (total / tokens.shape[1]).to(tokens.dtype)[:, None]


def _tokens(output: Any) -> Tensor:
    if isinstance(output, Mapping):
        if "last_hidden_state" not in output:
            raise InputError(
                f"the encoder returned {sorted(map(str, output))} without last_hidden_state; give"
                " split=..."
            )
        output = output["last_hidden_state"]
    elif isinstance(output, tuple | list):
        output = output[0] if output else None
    if not isinstance(output, Tensor) or output.dim() != 3:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(
            f"the encoder returned {shape}, expected tokens (images, tokens, width); give split=..."
        )
    return output
