"""Which recipe a model's name, alias or id means."""

from __future__ import annotations

import click
import pytest

from vqguard.adapters.catalogue import ModelEntry, list_models
from vqguard.cli.retrofit import _recipe

FAMILIES = {"llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "instructblip"}


@pytest.mark.parametrize("entry", list_models(), ids=lambda entry: entry.name)
def test_every_name_and_id_finds_its_recipe(entry: ModelEntry) -> None:
    name, place = entry.name, entry.location
    kind, source = entry.model_type, entry.source
    for asked in [name, place, f"hub:{place}"] if source == "hub" else [name]:
        if kind not in FAMILIES:
            with pytest.raises(click.UsageError, match=r"for the model .* --config FILE"):
                _recipe(asked, None)
            continue
        assert _recipe(asked, None).stage1.samples > 0


def test_the_readme_s_id() -> None:
    assert _recipe("llava-hf/llava-1.5-7b-hf", None) == _recipe("llava-1.5", None)
    other = _recipe("instructblip-13b", None)
    assert other.model == "instructblip-13b"
    assert other.stage1 == _recipe("instructblip", None).stage1
