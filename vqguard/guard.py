"""The guard: quantise every visual token, judge every image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqguard import artefact
from vqguard.codebooks.guard_output import (
    PADDING,
    GuardOutput,
    Judged,
    encode_real,
    quantise_images,
)
from vqguard.codebooks.losses import GuardLosses
from vqguard.codebooks.quantizer import Quantized, VectorQuantizer
from vqguard.codebooks.unquantised import Unquantised
from vqguard.config import GuardConfig
from vqguard.errors import ArtefactError, ChecksumError, ConfigError, InputError
from vqguard.judge import Judge
from vqguard.regional.judge import RegionalJudge
from vqguard.regional.layout import Layout
from vqguard.scopes.context import Opened


class VQGuard(Judge):
    """Two quantisers and a safety map; one quantiser more for each deep-stack level.

    `patch` replaces the visual tokens, `semantic` quantises the global ones that are judged, `deep`
    replaces features that a family adds inside later layers (Qwen3-VL). With `judge="regional"` the
    verdict is read from `regional` instead: codes of regions of the visual tokens. With
    `levels="semantic"` it judges alone: `patch` and `deep` give the features back as they are.
    Casting the guard leaves its codebooks in float32.
    """

    def __init__(self, config: GuardConfig) -> None:
        """All codebooks start random (seeds `config.seed` and the next ones)."""
        super().__init__()
        self.config = config
        weight, search = config.commitment_weight, config.search
        self.patch = self._patch_level(config.seed)
        self.semantic = VectorQuantizer(
            config.semantic_codes, config.semantic_dim, weight, search, config.seed + 1
        )
        self.deep = nn.ModuleList(
            self._patch_level(config.seed + 2 + level) for level in range(config.deepstack_levels)
        )
        self.regional = (
            RegionalJudge(
                config.patch_dim,
                config.regional,
                search,
                config.seed + 2 + config.deepstack_levels,
            )
            if config.judge == "regional"
            else None
        )
        self._safety_map = None
        self._judged: list[Tensor] = []
        self._replicated: list[list[GuardOutput]] = []  # only in replicas of DataParallel

    def _patch_level(self, seed: int) -> VectorQuantizer:
        config = self.config
        if not self.quantises:
            return Unquantised(config.patch_dim)
        return VectorQuantizer(
            config.patch_codes, config.patch_dim, config.commitment_weight, config.search, seed
        )

    def forward(
        self,
        tokens: Tensor | Sequence[Tensor],
        semantic: Tensor,
        deep: Sequence[Tensor | Sequence[Tensor]] = (),
        semantic_mask: Tensor | None = None,
        layouts: Sequence[Layout | None] | None = None,
        smoothed: Judged | None = None,
    ) -> GuardOutput:
        """Quantise visual tokens and semantic tokens, and judge the images.

        `tokens` (B, N, d) or a sequence of B tensors (N_i, d), `semantic` (B, S, d_s); any float
        dtype. `deep`: for each deep-stack level what `tokens` is, or nothing at all.
        `semantic_mask` (B, S) bool: True for an image's own semantic tokens, where some images have
        fewer than others; the rest is neither quantised nor judged, counted or learnt from.
        `layouts`: where each image's visual tokens lie, for the regional judge; where that is not
        known it judges each token, and the whole.
        `smoothed`: what the verdict is read from where `config.smoothing` asks for noisy copies,
        which only those can make who have the pixels (`middle_of`).

        Outputs have the input's dtype: float32 and float64 carry the codewords bit for bit, half
        precision carries each rounded once.

        Raises:
            InputError: on shapes that do not fit.
            NonFiniteError: on NaN or infinity.
            ChecksumError: if the semantic codebook changed since the safety map was made.
        """
        images = self._count_images(tokens)
        semantic_mask = self._check_semantic(semantic, semantic_mask)
        if semantic.shape[0] != images:
            raise InputError(
                f"{images} images of visual tokens but {semantic.shape[0]} of semantic tokens;"
                " every image needs its own"
            )
        if deep and len(deep) != len(self.deep):
            raise InputError(
                f"{len(deep)} deep-stack levels but the guard has {len(self.deep)}; build it with"
                f" deepstack_levels={len(deep)}"
            )
        patch, out, codes = quantise_images(self.patch, tokens)
        layers = [
            quantise_images(quantizer, features)
            for quantizer, features in zip(self.deep, deep, strict=False)
        ]
        level = self._quantise_semantic(semantic, semantic_mask)
        judged, mask, features = level.indices, semantic_mask, semantic
        regions = None if self.regional is None else self.regional.regions(tokens, layouts)
        if regions is not None:
            features, mask = regions
            judged = encode_real(self.judging, features, mask, seen=True)
        flagged, distances, visual = self._verdicts(
            judged, mask, features, lambda: self.visual_distances(tokens, codes)
        )
        if flagged is not None and self.smooths:
            if smoothed is None:
                raise self._needs_pixels()
            flagged = self._smoothed_flags(smoothed)
        return self._record(
            GuardOutput(
                out,
                codes,
                level.output,
                level.indices,
                flagged,
                self._losses([patch, *(layer[0] for layer in layers)], level),
                tuple(layer[1] for layer in layers),
                semantic_mask,
                tuple(layer[2] for layer in layers),
                distances,
                None if regions is None else judged,
                None if regions is None else mask,
                None if layouts is None else tuple(layouts),
                smoothed,
                visual,
            )
        )

    def from_codes(
        self,
        codes: Sequence[Tensor],
        semantic_codes: Tensor,
        deep_codes: Sequence[Sequence[Tensor]] = (),
        semantic_mask: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> GuardOutput:
        """What `forward` gave for the features that these codes were made of; nothing is searched.

        For training on codes that were kept. They must be of these codebooks, which nothing here
        can tell; without a search nothing can be learnt either.

        Args:
            codes: one (N_i,) int64 an image.
            semantic_codes: (B, S) int64, -1 at padding.
            deep_codes: for each deep-stack level what `codes` is, or nothing at all.
            semantic_mask: (B, S) bool as in `forward`.
            dtype: the codewords'.

        Raises:
            InputError: codes that no codebook has, or levels that the guard does not have.
            ConfigError: while a codebook learns, and for a guard that quantises nothing.
            NonFiniteError: where a codeword does not fit the dtype.
        """
        if not self.quantises:
            raise ConfigError("this guard judges alone: its visual tokens have no codes")
        if any(level.learning for level in (self.patch, self.semantic, *self._deep_levels())):
            raise ConfigError(
                "codes are those of codebooks that stay as they are: freeze the guard"
            )
        if len(deep_codes) not in (0, len(self.deep)):
            raise InputError(
                f"codes of {len(deep_codes)} deep-stack levels, the guard has {len(self.deep)}"
            )
        own = semantic_codes if semantic_mask is None else semantic_codes[semantic_mask]
        words = self.semantic.codewords(own, dtype)
        if semantic_mask is not None:
            padded = words.new_zeros(*semantic_codes.shape, words.shape[-1])
            padded[semantic_mask.to(words.device)] = words
            words = padded
        semantic_codes = semantic_codes.to(words.device)
        levels = zip(self._deep_levels(), deep_codes, strict=False)
        return self._record(
            GuardOutput(
                _looked_up(self.patch, codes, dtype),
                list(codes),
                words,
                semantic_codes,
                # regions are not among the codes that are kept: nothing is judged by them
                self._verdicts(semantic_codes, semantic_mask)[0] if self.regional is None else None,
                None,
                tuple(_looked_up(quantizer, level, dtype) for quantizer, level in levels),
                semantic_mask,
                tuple(list(level) for level in deep_codes),
            )
        )

    def _deep_levels(self) -> list[VectorQuantizer]:
        return [level for level in self.deep if isinstance(level, VectorQuantizer)]

    def _record(self, output: GuardOutput) -> GuardOutput:
        for recorder in self._recorders():
            recorder.append(output)
        return output

    def _recorders(self) -> list[list[GuardOutput]]:
        """The lists that this context has `recording` fill with outputs of this guard."""
        here = [into for guard, into in _RECORDINGS.values() if guard is self]
        return here or self._replicated

    def _replicate_for_data_parallel(self) -> VQGuard:
        # replicas run in threads of their own, without the context of the call
        replicate: Any = super()._replicate_for_data_parallel
        replica: VQGuard = replicate()
        replica._replicated = self._recorders()
        return replica

    def _quantise_semantic(self, semantic: Tensor, mask: Tensor | None) -> Quantized:
        """What the semantic quantiser makes of (B, S, d_s); losses and counts of real tokens."""
        if mask is None:
            level: Quantized = self.semantic(semantic)
            return level
        level = self.semantic(semantic[mask])
        output = semantic.new_zeros(semantic.shape)
        output[mask] = level.output
        codes = level.indices.new_full(mask.shape, PADDING)
        codes[mask] = level.indices
        return level._replace(output=output, indices=codes)

    def _losses(self, patches: list[Quantized], semantic: Quantized) -> GuardLosses | None:
        """Deep-stack levels share the patch losses: a mean over levels, as over elements."""
        codebook = [
            quantized.codebook_loss for quantized in patches if quantized.codebook_loss is not None
        ]
        commitment = [
            quantized.commitment_loss
            for quantized in patches
            if quantized.commitment_loss is not None
        ]
        if (
            len(codebook) < len(patches)
            or semantic.codebook_loss is None
            or semantic.commitment_loss is None
        ):
            return None
        return GuardLosses(
            torch.stack(codebook).mean() if len(codebook) > 1 else codebook[0],
            torch.stack(commitment).mean() if len(commitment) > 1 else commitment[0],
            semantic.codebook_loss,
            semantic.commitment_loss,
            self.config.commitment_weight,
        )

    def checksum(self, level: artefact.Level | artefact.JudgeLevel) -> str:
        """SHA-256 of a level's codewords, the same on every device (see `Judge.checksum`)."""
        return self.patch.codebook.checksum() if level == "patch" else super().checksum(level)

    def freeze(self) -> VQGuard:
        """Turn off the codebooks' gradients (stage 2): nothing learns, in `train()` neither."""
        self.requires_grad_(False)
        return self

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, the codebooks have no gradient; what they had before comes back."""
        before = [parameter.requires_grad for parameter in self.parameters()]
        self.freeze()
        try:
            yield
        finally:
            for parameter, wanted in zip(self.parameters(), before, strict=True):
                parameter.requires_grad_(wanted)

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write `guard.json` and `guard.safetensors` (see `vqguard.artefact`)."""
        measured = {level: getattr(self, level).calibration for level in artefact.LEVELS}
        artefact.write_parts(
            artefact.GuardParts(
                self.config,
                self.state_dict(),
                {level: self.checksum(level) for level in artefact.levels(self.config)},
                self.safety_map,
                {level: known for level, known in measured.items() if known is not None},
            ),
            directory,
        )

    @classmethod
    def from_pretrained(cls, directory: str | PathLike[str]) -> VQGuard:
        """Read and check a guard from a local directory; it is in eval mode, on the CPU.

        Raises ArtefactError, ChecksumError among them, naming the file and what to do.
        """
        parts = artefact.read_parts(directory)
        path = Path(directory) / artefact.WEIGHTS_NAME
        guard = cls(parts.config)
        artefact.require_tensors(parts.tensors, guard.state_dict(), path)
        guard.load_state_dict(parts.tensors)
        for level, expected in parts.checksums.items():
            if guard.checksum(level) != expected:
                raise ChecksumError(
                    f"{path}: the {level} codebook does not match {artefact.JSON_NAME}"
                )
        try:
            guard.safety_map = parts.safety_map
        except ConfigError as error:
            raise ArtefactError(f"{path.with_name(artefact.JSON_NAME)}: {error}") from error
        for level, calibration in parts.calibrations.items():
            getattr(guard, level).calibration = calibration
        return guard.eval()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_judged": [], "_replicated": []}


def _looked_up(
    quantizer: VectorQuantizer, codes: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """The codewords (N_i, d) of codes (N_i,), for each image."""
    words = quantizer.codewords(torch.cat(list(codes)), dtype)
    return list(torch.split(words, [len(image) for image in codes]))


_RECORDINGS: Opened[tuple[VQGuard, list[GuardOutput]]] = Opened("vqguard_recordings")


@contextmanager
def recording(guard: VQGuard) -> Iterator[list[GuardOutput]]:
    """Inside, every output of `guard` is also appended to the list that this gives.

    For trainers, which need losses and codes, and for white-box tests. Contexts nest. Outputs of
    calls in other threads and tasks are not among them.
    """
    outputs: list[GuardOutput] = []
    with _RECORDINGS.put((guard, outputs)):
        yield outputs
