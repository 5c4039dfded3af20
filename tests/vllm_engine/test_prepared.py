"""Pictures of several requests as one batch, and what their pixels are called: needs no vLLM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from vqguard.adapters.vllm_engine.prepared import (
    Prepared,
    contents_of,
    fit,
    joined,
    one_reading,
)


class Items:
    """What of vLLM's items is read."""

    def __init__(self, *pictures: Any) -> None:
        self.pictures = pictures

    def get_count(self) -> int:
        return len(self.pictures)

    def get(self, index: int) -> Any:
        return self.pictures[index]


def test_inputs_that_fit_are_one_after_the_other() -> None:
    first = {"pixel_values": torch.zeros(2, 3, 4, 4), "grid": torch.tensor([[1, 2], [3, 4]])}
    second = {"pixel_values": torch.ones(1, 3, 4, 4), "grid": torch.tensor([[5, 6]])}
    assert fit(first, second)
    together = joined([first, second])
    assert together["pixel_values"].flatten(1).mean(1).tolist() == [0, 0, 1]
    assert together["grid"].tolist() == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize(
    "other",
    [
        {"pixel_values": torch.ones(1, 3, 5, 4)},
        {"pixel_values": torch.ones(1, 3, 4, 4, dtype=torch.float64)},
        {"pixel_values": torch.ones(1, 3, 4, 4), "pixel_mask": torch.ones(1, 4, 4)},
        {"pixel_values": [torch.ones(3, 4, 4)]},
        {"image_patches": torch.ones(1, 3, 4, 4)},
    ],
)
def test_inputs_that_do_not_fit_are_left_apart(other: dict[str, Any]) -> None:
    own = {"pixel_values": torch.zeros(1, 3, 4, 4)}
    assert not fit(own, other)
    assert not fit(other, own)


def test_a_number_has_no_pictures_to_put_in_line() -> None:
    inputs = {"pixel_values": torch.zeros(1, 3), "scale": torch.tensor(2.0)}
    assert not fit(inputs, inputs)


def test_counts_are_no_input_and_no_pixels() -> None:
    data = {"pixel_values": torch.zeros(2, 3, 4, 4), "num_pixel_values": torch.tensor([1, 1])}
    prepared = Prepared(data, 2, None)
    assert list(prepared.inputs) == ["pixel_values"]
    assert prepared.values == 96
    assert not prepared.ragged
    assert Prepared({"pixel_values": [torch.zeros(3, 4, 4), torch.zeros(3, 5, 4)]}, 2, None).ragged


def test_a_picture_s_content_is_its_pixels_and_how_they_are_read() -> None:
    red, same = Image.new("RGB", (4, 2), "red"), Image.new("RGB", (4, 2), "red")
    turned, grey = Image.new("RGB", (2, 4), "red"), Image.new("L", (4, 2))
    contents = contents_of(Items(red, same, turned, grey))
    assert contents[0] == contents[1]
    assert len(set(contents)) == 3
    assert contents_of(None) == []


def test_a_picture_is_read_again_for_each_request() -> None:
    """Whoever draws on one between two requests shows another picture."""
    picture = Image.new("RGB", (4, 2), "red")
    with one_reading():
        first = contents_of(Items(picture))
        assert contents_of(Items(picture)) == first
    picture.putpixel((0, 0), (0, 0, 0))
    with one_reading():
        assert contents_of(Items(picture)) != first
