"""Tiny random models of every family, and inputs for them: what the adapters are proved on.

Their weights are random, their classes are the installed transformers' own: they show whether the
guard covers a family's code, not what any checkpoint says.
"""

from __future__ import annotations

from vqguard.adapters.proof.random_models.build import build_tiny
from vqguard.adapters.proof.random_models.inputs import make_inputs

__all__ = ["build_tiny", "make_inputs"]
