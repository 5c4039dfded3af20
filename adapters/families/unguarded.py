"""Types of transformers' image-text-to-text mapping that get no adapter, with the reason."""

from __future__ import annotations

from vqguard.adapters.families.family import Family
from vqguard.adapters.families.registration import leave_unguarded

leave_unguarded(
    Family(
        "inkling_mm_model",
        refused="its features come patch by patch, and nothing tells which patches are one "
        "picture, so that no picture has a verdict",
    ),
    Family("pi0", refused="it answers with robot actions, not with text that could refuse"),
    Family("evolla", blind="it reads proteins, no pixels"),
    Family("mistral4", blind="it reads text only"),
)
