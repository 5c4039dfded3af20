"""Idefics 2 and 3, and SmolVLM: pictures by row of the batch."""

from __future__ import annotations

from vqguard.adapters.families.by_row import ByRowAdapter
from vqguard.adapters.families.family import Family, RandomModel
from vqguard.adapters.families.registration import register_adapter
from vqguard.adapters.random_inputs.pixels import by_sample


@register_adapter(
    Family(
        "idefics2",
        checkpoints={"idefics2": "HuggingFaceM4/idefics2-8b"},
        proven_from="5.20",
        random_model=RandomModel(pixels_by_row=by_sample),
    ),
    Family(
        "idefics3",
        checkpoints={"idefics3": "HuggingFaceM4/Idefics3-8B-Llama3"},
        random_model=RandomModel(pixels_by_row=by_sample),
    ),
    Family(
        "smolvlm",
        checkpoints={"smolvlm2": "HuggingFaceTB/SmolVLM2-2.2B-Instruct"},
        proven_from="5.22",
        random_model=RandomModel(pixels_by_row=by_sample),
    ),
)
class IdeficsTilesAdapter(ByRowAdapter):
    """Its tiles, where the processor cuts a picture, are pictures of the row like the others."""
