"""The side of a guard that judges: which codes a verdict is read from, and by which safety map."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from vqguard.artefact import JudgeLevel, Level
from vqguard.codebooks.guard_output import (
    Judged,
    distances_of,
    encode_real,
    power_means,
)
from vqguard.codebooks.quantizer import VectorQuantizer
from vqguard.config import GuardConfig
from vqguard.errors import ConfigError, InputError
from vqguard.judging.binding import require_bound
from vqguard.judging.median import middle_copy
from vqguard.judging.policies import UNFAMILIAR
from vqguard.judging.verdict import DecidingRegion, Part
from vqguard.regional.judge import RegionalJudge
from vqguard.regional.layout import Layout, Region
from vqguard.safety_map import SafetyMap, Verdict
from vqguard.scopes.context import Opened
from vqguard.verdict_rules import require_mask


class Judge(nn.Module):
    """Verdicts on images, from the codes of the level that judges; the base of `VQGuard`.

    The modules are the guard's own: it makes them, in the order in which its weights are kept.
    """

    config: GuardConfig
    patch: VectorQuantizer
    semantic: VectorQuantizer
    regional: RegionalJudge | None
    _safety_map: SafetyMap | None
    _judged: list[Tensor]
    """The weights that the map's checksum was last compared with."""

    @property
    def quantises(self) -> bool:
        """Whether visual tokens become codewords; False: a judge alone, which passes them on."""
        return self.config.levels == "both"

    @property
    def safety_map(self) -> SafetyMap | None:
        """The map that judges; None: nothing is judged.

        Setting one that was made for another codebook raises ChecksumError, and one that this guard
        cannot follow ConfigError.
        """
        return self._safety_map

    @safety_map.setter
    def safety_map(self, value: SafetyMap | None) -> None:
        self._judged = []
        if value is not None:
            if value.cells != self.cells:
                raise ConfigError(
                    f"the safety map has {value.cells} cells, the {self.judge_level} codebook"
                    f" {self.cells} entries; calibrate this guard"
                )
            if value.judging.by_visual:
                self.require_patch_codewords()
            self._check_codebook(value)
        self._safety_map = value

    @property
    def judge_level(self) -> JudgeLevel:
        """The level whose codes a verdict is read from."""
        return "semantic" if self.regional is None else "regional"

    @property
    def judging(self) -> VectorQuantizer:
        """The quantiser of that level."""
        return self.quantizer_of(self.judge_level)

    def quantizer_of(self, level: JudgeLevel) -> VectorQuantizer:
        """The quantiser of a level that can judge.

        Raises:
            InputError: a level that this guard does not have.
        """
        if level == "semantic":
            return self.semantic
        if self.regional is None:
            raise InputError("this guard judges globally: it has no regional level")
        return self.regional.quantizer

    @property
    def cells(self) -> int:
        """How many codes a verdict may be read from: the cells of this guard's safety map."""
        return self.judging.codebook.codes

    @property
    def smooths(self) -> bool:
        """Whether verdicts are a majority over noisy copies of the picture."""
        return self.config.smoothing.copies > 0

    @property
    def judges_now(self) -> bool:
        """Whether `forward` judges: there is a map, nothing learns, and not inside `unjudged`."""
        learning = self.semantic.learning
        return self._safety_map is not None and not learning and not _UNJUDGED.values()

    def middle_of(self, copies: Sequence[Judged]) -> Judged:
        """What `smoothed` of `forward` is: of each image the copy in the middle by score.

        It is flagged exactly where most of the copies are. `copies`: an odd number of `judged`.

        Raises:
            ConfigError: without a safety map.
        """
        if self._safety_map is None:
            raise ConfigError("copies are compared by their scores: this guard has no safety map")
        return middle_copy(self._safety_map, copies)

    def require_patch_codewords(self) -> None:
        """Raise ConfigError for a judge alone: visual tokens are then far from no codeword."""
        if not self.quantises:
            raise ConfigError(
                "unfamiliar_by: visual compares visual tokens with their codewords in the patch "
                'codebook, and a judge alone (levels: "semantic") has none: use unfamiliar_by: '
                "judged, or a guard of both levels"
            )

    def visual_distances(
        self,
        tokens: Tensor | Sequence[Tensor],
        codes: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """How far an image's visual tokens are from their codewords, as one number: float64 (B,).

        A power mean of their distances (`vqguard.codebooks.guard_output.power_means`).
        `tokens` (B, N, d) or one (N_i, d) an image, as `forward` takes them. `codes`: their codes
        in the patch codebook where they are known, in the same form; else they are searched. The
        same for an image alone and in a batch, bit for bit.

        Raises:
            ConfigError: for a judge alone.
            InputError: on shapes that do not fit.
            NonFiniteError: on NaN or infinity.
        """
        self.require_patch_codewords()
        if self._count_images(tokens) == 0:
            return torch.empty(0, dtype=torch.float64)
        if codes is None:
            sizes = [len(image) for image in tokens]
            codes = self.patch.encode(torch.cat(list(tokens))).split(sizes)
        return power_means(self.patch, tokens, codes)

    @property
    def asks_for_visual(self) -> bool:
        """Whether the safety map calls images unfamiliar by the distance of their visual tokens."""
        return self._safety_map is not None and self._safety_map.judging.by_visual

    def _smoothed_flags(self, smoothed: Judged) -> Tensor | None:
        return None if self._safety_map is None else self._safety_map.flagged(*smoothed)

    def _needs_pixels(self) -> ConfigError:
        return ConfigError(
            f"verdicts of this guard are a majority over {self.config.smoothing.copies} noisy"
            " copies of the picture, and features have no pixels: ask the guarded model (screen,"
            " generate), or set smoothing.copies to 0"
        )

    def _verdicts(
        self,
        codes: Tensor,
        mask: Tensor | None,
        judged: Tensor | None = None,
        visual: Callable[[], Tensor] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(B,) verdicts on judged codes (B, S), and the distances that they were made with.

        Those are (B, S) of judged tokens or (B,) of visual ones, as the map asks; `visual` gives
        the latter. None where nothing is judged: without a map, while the codebook learns, and
        where the map asks for distances of tokens that are not there (`judged` or `visual` None).
        """
        safety_map = self._safety_map
        if safety_map is None or not self.judges_now:
            return None, None, None
        self._check_codebook(safety_map)
        if safety_map.judging.unfamiliar is None:
            return safety_map.flagged(codes, mask), None, None
        if self.asks_for_visual:
            if visual is None:
                return None, None, None
            far = visual()
            return safety_map.flagged(codes, mask, None, far), None, far
        if judged is None:
            return None, None, None
        distances = self.distances(judged, codes)
        return safety_map.flagged(codes, mask, distances), distances, None

    def _count_images(self, tokens: Tensor | Sequence[Tensor]) -> int:
        """Number of images; raises InputError unless `tokens` has one of the two forms."""
        width = self.config.patch_dim
        if isinstance(tokens, Tensor):
            if tokens.dim() != 3:
                raise InputError(
                    f"visual tokens: expected (images, tokens, {width}) or a list of (tokens,"
                    f" {width}), got {tuple(tokens.shape)}"
                )
            return tokens.shape[0]
        shapes = [tuple(image.shape) for image in tokens]
        if not shapes or any(len(shape) != 2 for shape in shapes):
            raise InputError(
                f"a list of visual tokens: expected one (tokens, {width}) an image, got {shapes}"
            )
        widths = sorted({shape[1] for shape in shapes})
        if widths != [width]:
            raise InputError(
                f"visual tokens have widths {widths}, the patch codebook has {width}; take them at"
                " the site that the guard was built for"
            )
        return len(shapes)

    def _check_semantic(self, semantic: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask where it leaves a token out, else None; raises InputError on other shapes."""
        if semantic.dim() != 3 or semantic.shape[1] < 1:
            raise InputError(
                f"semantic tokens: expected (images, tokens, {self.config.semantic_dim}), got"
                f" {tuple(semantic.shape)}"
            )
        if mask is None:
            return None
        require_mask(mask, tuple(semantic.shape[:2]))
        return None if bool(mask.all()) else mask.to(semantic.device)

    def encode_semantic(self, semantic: Tensor, mask: Tensor | None = None) -> Tensor:
        """Semantic codes (B, S) int64 of tokens (B, S, d_s), any float dtype; -1 at padding.

        `mask` as `semantic_mask` of `forward`. Nothing is counted, nothing learns. Raises as
        `forward` does.
        """
        return encode_real(self.semantic, semantic, self._check_semantic(semantic, mask))

    def judged(
        self,
        semantic: Tensor,
        mask: Tensor | None = None,
        tokens: Tensor | Sequence[Tensor] | None = None,
        layouts: Sequence[Layout | None] | None = None,
        level: JudgeLevel | None = None,
        *,
        visual: bool | None = None,
    ) -> Judged:
        """What verdicts on images are read from.

        Arguments as those of `forward`; `tokens` are needed where regions are judged, and for the
        distances of visual tokens, and play no part otherwise. `level`: "semantic" for what the
        global judge reads, whatever the guard's own is; None: its own. `visual`: whether to measure
        those distances, which takes a search of the patch codebook; None: where the safety map asks
        for them. Nothing is counted, nothing learns. Raises as `forward` does, and ConfigError
        where a judge alone is to measure them.
        """
        if visual is None:
            visual = self.asks_for_visual and level in (None, self.judge_level)
        level = self.judge_level if level is None else level
        if visual and tokens is None:
            raise InputError(
                "whether an image is unfamiliar is judged by its visual tokens too: give tokens="
            )
        if level == "semantic":
            features, own = semantic, self._check_semantic(semantic, mask)
        elif self.regional is None or tokens is None:
            wants = "a guard with judge: regional" if self.regional is None else "visual tokens"
            raise InputError(f"regions are judged: expected {wants}")
        elif self._count_images(tokens) != len(semantic):
            raise InputError(
                f"{len(tokens)} images of visual tokens but {len(semantic)} of semantic tokens"
            )
        else:
            features, own = self.regional.regions(tokens, layouts)
        quantizer = self.quantizer_of(level)
        codes = encode_real(quantizer, features, own)
        far = self.visual_distances(tokens) if visual and tokens is not None else None
        return Judged(codes, own, distances_of(quantizer, features, codes), far)

    def judge(
        self,
        semantic: Tensor,
        mask: Tensor | None = None,
        tokens: Tensor | Sequence[Tensor] | None = None,
        layouts: Sequence[Layout | None] | None = None,
    ) -> list[Verdict]:
        """One verdict an image from its features, as `judged` takes them; any float dtype.

        Raises as `forward` does, and ConfigError without a safety map.
        """
        if self.smooths:
            raise self._needs_pixels()
        verdicts = self.judge_codes(*self.judged(semantic, mask, tokens, layouts))
        return self.located(verdicts, layouts)

    def located(
        self,
        verdicts: Sequence[Verdict],
        layouts: Sequence[Layout | None] | None,
        parts: Sequence[Part] | None = None,
    ) -> list[Verdict]:
        """The verdicts with the deciding region in their reasons, where that is known.

        `layouts` and `parts` one an image: where its tokens lie, and what each of its grids shows;
        None: not known.

        Raises:
            InputError: for a layout that is not the image's.
        """
        known = [None] * len(verdicts) if layouts is None else layouts
        named: Sequence[Part] = ["grid"] * len(verdicts) if parts is None else parts
        placed = []
        for verdict, layout, part in zip(verdicts, known, named, strict=True):
            region = None if verdict.reason is None else self.region(layout, verdict)
            if region is not None and verdict.reason is not None:
                where = DecidingRegion(part, region.grid, *region.box)
                verdict = replace(verdict, reason=replace(verdict.reason, region=where))
            placed.append(verdict)
        return placed

    def region(self, layout: Layout | None, verdict: Verdict) -> Region | None:
        """The region of an image that decided its verdict: `Region.box` says where it is.

        None where the judge is global, where no grid of the image's tokens is known, and where all
        of the image is unfamiliar.

        Raises:
            InputError: for a layout that is not the image's.
        """
        if self.regional is None or layout is None:
            return None
        if verdict.category == UNFAMILIAR and self.asks_for_visual:
            return None
        return self.regional.projection.windows.region(layout, verdict.token)

    def distances(self, judged: Tensor, codes: Tensor) -> Tensor:
        """How far judged tokens (B, S, w) are from their codewords: float64 (B, S), Euclidean.

        `codes` (B, S) int64 of the level that judges; the distance is 0 at padding. The same for an
        image alone and in a batch, bit for bit.
        """
        return distances_of(self.judging, judged, codes)

    def judge_codes(
        self,
        codes: Tensor,
        mask: Tensor | None = None,
        distances: Tensor | None = None,
        visual: Tensor | None = None,
    ) -> list[Verdict]:
        """One verdict an image from codes (B, S) int64 and their mask, as in `judged`.

        `distances` (B, S), or `visual` (B,): needed where the safety map calls images unfamiliar,
        by judged or by visual tokens. The methods `distances` and `visual_distances` give them, and
        `GuardOutput.judged`.

        Raises as `judge` does, and InputError without distances that are needed.
        """
        if self._safety_map is None:
            raise ConfigError(
                "this guard has no safety map and cannot judge: calibrate it and set"
                " guard.safety_map"
            )
        self._check_codebook(self._safety_map)
        by_visual = self.asks_for_visual
        needed = visual if by_visual else distances
        if needed is None and self._safety_map.judging.unfamiliar is not None:
            how = (
                "visual=guard.visual_distances(tokens)"
                if by_visual
                else "distances=guard.distances(tokens, codes)"
            )
            raise InputError(
                "this safety map judges by distances too, whether an image is unfamiliar: give"
                f" {how}, or use guard.judge"
            )
        verdicts = self._safety_map.judge(codes, mask, distances, visual)
        if self.quantises:
            return verdicts
        return [replace(verdict, quantised=False) for verdict in verdicts]

    def _check_codebook(self, safety_map: SafetyMap) -> None:
        module = self.semantic if self.regional is None else self.regional
        read = [parameter.detach() for parameter in module.parameters()]
        read += [self.patch.codebook.weight.detach()] * safety_map.judging.by_visual
        known = self._judged
        if len(known) == len(read) and all(
            old.device == new.device and torch.equal(old, new)
            for old, new in zip(known, read, strict=True)
        ):
            return
        require_bound(
            safety_map.codebook_checksum,
            safety_map.judging.unfamiliar,
            self.judge_level,
            self.checksum,
        )
        self._judged = [parameter.clone() for parameter in read]

    def checksum(self, level: Level | JudgeLevel) -> str:
        """SHA-256 of a level's codewords, the same on every device.

        That of "regional" covers its projection too: codes follow from both.

        Raises:
            InputError: a level that this guard does not have.
        """
        if level == "regional" and self.regional is not None:
            return self.regional.checksum()
        if level != "semantic":
            known = "'patch' or 'semantic'" if self.regional is None else "a level of this guard"
            raise InputError(f"level must be {known}, got {level!r}")
        return self.semantic.codebook.checksum()


_UNJUDGED: Opened[None] = Opened("vqguard_unjudged")


@contextmanager
def unjudged() -> Iterator[None]:
    """Inside, in this thread or task, guards quantise and judge nothing: `flagged` is None.

    For features that no verdict may depend on, such as those of an encoder in training mode.
    """
    with _UNJUDGED.put(None):
        yield
