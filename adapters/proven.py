"""The oldest transformers on which each family was proven; with an older one it is unknown.

Where a family's features enter its language model moves between versions of transformers. A seam
that is right today may be half of the truth in a release of last year, and a model that is guarded
by half is not guarded. So a family counts as known only from the version on which the conformance
kit proved it; below, `guard_model` asks for the proof that it asks of a type without an adapter.
"""

from __future__ import annotations

FLOOR = "5.6"
"""The oldest transformers that the package supports, as in pyproject.toml."""

PROVEN_FROM: dict[str, str] = {}
"""Families that were not proven on `FLOOR`, with the version from which they were."""


def proven_from(model_type: str) -> str:
    """The oldest transformers on which the family of an adapter was proven, as "5.6"."""
    return PROVEN_FROM.get(model_type, FLOOR)


def is_proven(model_type: str, version: str | None = None) -> bool:
    """Whether the family was proven on `version` of transformers, the installed one if None."""
    if version is None:
        import transformers

        version = str(transformers.__version__)
    return _release(version) >= _release(proven_from(model_type))


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
