"""The side of a guard that judges: which codes a verdict is read from, and by which safety map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from vqguard.artefact import JudgeLevel, Level
from vqguard.codebooks.guard_output import Judged, distances_of, encode_real
from vqguard.codebooks.quantizer import VectorQuantizer
from vqguard.config import GuardConfig
from vqguard.errors import ChecksumError, ConfigError, InputError
from vqguard.judging.median import middle_copy
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

        Setting one that was made for another codebook raises ChecksumError.
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

    def _smoothed_flags(self, smoothed: Judged) -> Tensor | None:
        return None if self._safety_map is None else self._safety_map.flagged(*smoothed)

    def _needs_pixels(self) -> ConfigError:
        return ConfigError(
            f"verdicts of this guard are a majority over {self.config.smoothing.copies} noisy"
            " copies of the picture, and features have no pixels: ask the guarded model (screen,"
            " generate), or set smoothing.copies to 0"
        )

    def _verdicts(
        self, codes: Tensor, mask: Tensor | None, judged: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(B,) verdicts on judged codes (B, S) and the distances that they were made with.

        None where nothing is judged: without a map, while the codebook learns, and where the map
        asks for distances of tokens that are not there (`judged` None).
        """
        safety_map = self._safety_map
        if safety_map is None or not self.judges_now:
            return None, None
        self._check_codebook(safety_map)
        if safety_map.judging.unfamiliar is None:
            return safety_map.flagged(codes, mask), None
        if judged is None:
            return None, None
        distances = self.distances(judged, codes)
        return safety_map.flagged(codes, mask, distances), distances

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
    ) -> Judged:
        """What verdicts on images are read from.

        Arguments as those of `forward`; `tokens` are needed where regions are judged, and play no
        part otherwise. `level`: "semantic" for what the global judge reads, whatever the guard's
        own is; None: its own. Nothing is counted, nothing learns. Raises as `forward` does.
        """
        level = self.judge_level if level is None else level
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
        return Judged(codes, own, distances_of(quantizer, features, codes))

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

        None where the judge is global, and where no grid of the image's tokens is known.

        Raises:
            InputError: for a layout that is not the image's.
        """
        if self.regional is None or layout is None:
            return None
        return self.regional.projection.windows.region(layout, verdict.token)

    def distances(self, judged: Tensor, codes: Tensor) -> Tensor:
        """How far judged tokens (B, S, w) are from their codewords: float64 (B, S), Euclidean.

        `codes` (B, S) int64 of the level that judges; the distance is 0 at padding. The same for an
        image alone and in a batch, bit for bit.
        """
        return distances_of(self.judging, judged, codes)

    def judge_codes(
        self, codes: Tensor, mask: Tensor | None = None, distances: Tensor | None = None
    ) -> list[Verdict]:
        """One verdict an image from codes (B, S) int64 and their mask, as in `judged`.

        `distances` (B, S): needed where the safety map calls images unfamiliar; `distances` and
        `GuardOutput.judged_distances` give them.

        Raises as `judge` does, and InputError without distances that are needed.
        """
        if self._safety_map is None:
            raise ConfigError(
                "this guard has no safety map and cannot judge: calibrate it and set"
                " guard.safety_map"
            )
        self._check_codebook(self._safety_map)
        if distances is None and self._safety_map.judging.unfamiliar is not None:
            raise InputError(
                "this safety map judges by distances too, whether an image is unfamiliar: give"
                " distances=guard.distances(tokens, codes), or use guard.judge"
            )
        verdicts = self._safety_map.judge(codes, mask, distances)
        if self.quantises:
            return verdicts
        return [replace(verdict, quantised=False) for verdict in verdicts]

    def _check_codebook(self, safety_map: SafetyMap) -> None:
        module = self.semantic if self.regional is None else self.regional
        read = [parameter.detach() for parameter in module.parameters()]
        known = self._judged
        if known and all(
            old.device == new.device and torch.equal(old, new)
            for old, new in zip(known, read, strict=True)
        ):
            return
        level = self.judge_level
        if not safety_map.codebook_checksum:
            raise ChecksumError(
                "the safety map does not name its codebook; calibrate with"
                f" codebook_checksum=guard.checksum({level!r})"
            )
        checksum = self.checksum(level)
        made_for = safety_map.codebook_checksum
        if made_for != checksum:
            whose = ""
            if level == "regional" and made_for == self.checksum("semantic"):
                whose = " (that of the global judge, and this guard judges regions)"
            raise ChecksumError(
                f"the safety map was made for {level} codebook {made_for[:12]}{whose}, this guard"
                f" has {checksum[:12]}; calibrate again, or set guard.safety_map = None to judge"
                " nothing"
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
