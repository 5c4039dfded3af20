"""The configuration of a guard. The strict reading itself is in `vqguard.strict`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from vqguard.search.backend_table import backend_problem
from vqguard.strict import StrictConfig, raise_problems

__all__ = ["GuardConfig", "GuardSettings", "RegionalSettings", "SmoothingSettings", "StrictConfig"]

SCHEMA_VERSION = 1
_MOST_WINDOWS = 8


@dataclass(frozen=True)
class RegionalSettings(StrictConfig):
    """The sizes of a regional judge (docs/decisions, 0110)."""

    codes: int = 256
    """Entries of its semantic codebook."""
    width: int = 32
    """Width r of a semantic token: how many categories can be learnt."""
    hidden: int = 128
    """Width of the projection's hidden layers."""
    windows: tuple[int, ...] = (1, 2, 4)
    """Sides of the judged windows, in visual tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [
            f"{name}: expected a positive integer, got {getattr(self, name)}"
            for name in ("codes", "width", "hidden")
            if getattr(self, name) < 1
        ]
        sides = self.windows
        if (
            not sides
            or min(sides) < 1
            or len(set(sides)) < len(sides)
            or len(sides) > _MOST_WINDOWS
        ):
            problems.append(
                f"windows: expected 1 to {_MOST_WINDOWS} different sides of at least one token, got"
                f" {list(sides)}"
            )
        raise_problems(type(self), problems)


@dataclass(frozen=True)
class SmoothingSettings(StrictConfig):
    """A verdict by majority over changed copies of the picture (docs/decisions, 0118 and 0147)."""

    copies: int = 0
    """Odd number of copies, each of which costs a pass of the vision encoder; 0: the picture itself
    is judged."""
    noise: float = 0.25
    """Standard deviation of the noise, in the unit of the model's `pixel_values`: times the image
    processor's `image_std` it is a share of the range of brightness. 0: none, where copies are
    cropped."""
    crop: float = 0.0
    """Share of height and width that each copy loses, at a place that chance decides, before it is
    enlarged to its old size; 0: none. Only for families whose pixels are whole pictures."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if self.copies < 0 or (self.copies > 0 and self.copies % 2 == 0):
            problems.append(f"copies: expected 0 or an odd number, got {self.copies}")
        if not 0.0 <= self.crop < 1.0:
            problems.append(f"crop: expected a share in [0, 1), got {self.crop}")
        if self.noise < 0.0 or (self.noise == 0.0 and self.crop == 0.0):
            problems.append(f"noise: expected a positive number, got {self.noise}")
        raise_problems(type(self), problems)


@dataclass(frozen=True, kw_only=True)
class GuardSettings(StrictConfig):
    """What is chosen about a guard; the rest follows from the model. Defaults are the paper's."""

    patch_codes: int = 16000
    """Entries P of the patch codebook (paper: 16000)."""
    semantic_codes: int = 128
    """Entries K of the semantic codebook (paper: 128)."""
    site: Literal["projected", "encoder"] = "projected"
    """Where features are quantised: after the projector (the paper) or before it."""
    commitment_weight: float = 0.25
    """Weight of the commitment loss in L_vq = L_codebook + weight * L_commit (paper: 0.25)."""
    search: str = "auto"
    """Back end of the search: auto, torch, pruned, faiss, tensor-cores or faiss-gpu."""
    refusal_text: str = "Sorry, I can't help with this image."
    """Answer given for a flagged image."""
    judge: Literal["global", "regional"] = "global"
    """What a verdict is read from: `global`, one semantic code an image (the paper), or `regional`,
    semantic codes of regions at several scales."""
    regional: RegionalSettings = field(default_factory=RegionalSettings)
    """Sizes of the regional judge."""
    smoothing: SmoothingSettings = field(default_factory=SmoothingSettings)
    """Whether verdicts are a majority over noisy copies."""

    def __post_init__(self) -> None:
        super().__post_init__()
        raise_problems(type(self), self._range_problems())

    def _range_problems(self) -> list[str]:
        problems = [
            f"{name}: expected a positive integer, got {getattr(self, name)}"
            for name in ("patch_codes", "semantic_codes")
            if getattr(self, name) < 1
        ]
        if self.commitment_weight < 0:
            problems.append(f"commitment_weight: expected >= 0, got {self.commitment_weight}")
        if problem := backend_problem(self.search):
            problems.append(f"search: {problem}")
        if not self.refusal_text.strip():
            problems.append("refusal_text: expected a sentence, got an empty text")
        return problems

    def settings(self) -> dict[str, Any]:
        """These fields alone, by name: what a `GuardConfig` takes from a recipe."""
        return {known.name: getattr(self, known.name) for known in fields(GuardSettings)}


@dataclass(frozen=True)
class GuardConfig(GuardSettings):
    """Shape and rules of one guard. Defaults are the paper's (arXiv 2511.16229)."""

    patch_dim: int
    """Width d of a visual token at the guard's site."""
    semantic_dim: int
    """Width d_s of a global (semantic) token at the guard's site."""
    deepstack_levels: int = 0
    """Number of deep-stack levels, each with a codebook of P entries of its own."""
    levels: Literal["both", "semantic"] = "both"
    """`both`: visual tokens are quantised and images judged (the paper). `semantic`: a judge alone;
    images are judged, and visual tokens reach the language model as they are."""
    seed: int = 0
    """Seed of the codebooks' random start."""
    schema_version: int = 1
    """Version of this schema; files of another version are refused."""

    @property
    def patch_entries(self) -> int:
        """Entries of each patch codebook: `patch_codes`; of a judge alone one, the blank token."""
        return self.patch_codes if self.levels == "both" else 1

    def _range_problems(self) -> list[str]:
        problems = [
            f"{name}: expected a positive integer, got {getattr(self, name)}"
            for name in ("patch_dim", "semantic_dim")
            if getattr(self, name) < 1
        ]
        problems += super()._range_problems()
        problems += [
            f"{name}: expected >= 0, got {getattr(self, name)}"
            for name in ("deepstack_levels", "seed")
            if getattr(self, name) < 0
        ]
        if self.schema_version != SCHEMA_VERSION:
            problems.append(
                f"schema_version: expected {SCHEMA_VERSION}, got {self.schema_version};"
                " install the version of vqguard that wrote this configuration"
            )
        return problems
