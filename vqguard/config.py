"""The configuration of a guard. The strict reading itself is in `vqguard.strict`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vqguard.search.table import backend_problem
from vqguard.strict import StrictConfig, raise_problems

__all__ = ["GuardConfig", "StrictConfig"]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class GuardConfig(StrictConfig):
    """Shape and rules of one guard. Defaults are the paper's (arXiv 2511.16229)."""

    patch_dim: int
    """Width d of a visual token at the guard's site."""
    semantic_dim: int
    """Width d_s of a global (semantic) token at the guard's site."""
    patch_codes: int = 16000
    """Number of entries P of the patch codebook."""
    semantic_codes: int = 128
    """Number of entries K of the semantic codebook."""
    deepstack_levels: int = 0
    """Number of deep-stack levels, each with a codebook of P entries of its own."""
    site: Literal["projected", "encoder"] = "projected"
    """Where features are quantised: after the projector (the paper) or before it."""
    commitment_weight: float = 0.25
    """Weight of the commitment loss in L_vq = L_codebook + weight * L_commit."""
    search: str = "auto"
    """Back end of the nearest-codeword search: auto, torch, pruned, faiss or faiss-gpu."""
    refusal_text: str = "Sorry, I can't help with this image."
    """Answer given for a flagged image."""
    seed: int = 0
    """Seed of the codebooks' random start."""
    schema_version: int = 1
    """Version of this schema; files of another version are refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [
            f"{name}: expected a positive integer, got {getattr(self, name)}"
            for name in ("patch_dim", "semantic_dim", "patch_codes", "semantic_codes")
            if getattr(self, name) < 1
        ]
        if self.deepstack_levels < 0:
            problems.append(f"deepstack_levels: expected >= 0, got {self.deepstack_levels}")
        if self.commitment_weight < 0:
            problems.append(f"commitment_weight: expected >= 0, got {self.commitment_weight}")
        if problem := backend_problem(self.search):
            problems.append(f"search: {problem}")
        if not self.refusal_text.strip():
            problems.append("refusal_text: expected a sentence, got an empty text")
        if self.seed < 0:
            problems.append(f"seed: expected >= 0, got {self.seed}")
        if self.schema_version != SCHEMA_VERSION:
            problems.append(
                f"schema_version: expected {SCHEMA_VERSION}, got {self.schema_version};"
                " install the version of vqguard that wrote this configuration"
            )
        raise_problems(type(self), problems)
