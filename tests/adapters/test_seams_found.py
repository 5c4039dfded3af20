"""Seams that were found stay known until a module of the model changes, and no longer."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from vqguard.adapters import seams
from vqguard.adapters.seams import Seam, find_seams
from vqguard.errors import SeamError


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    def get_image_features(self, pixel_values: Any) -> Any:
        return self.tower(pixel_values)


class Other(Inner):
    def get_image_features(self, image_patches: Any) -> Any:
        return self.tower(image_patches)


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.model: Any = inner

    def get_image_features(self, pixel_values: Any) -> Any:
        return self.model.get_image_features(pixel_values)


class Plain(nn.Module):
    pass


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were looked through."""
    models: list[nn.Module] = []
    look = seams._look_for_seams

    def looking(model: nn.Module) -> tuple[Seam, ...]:
        models.append(model)
        return look(model)

    monkeypatch.setattr(seams, "_look_for_seams", looking)
    return models


def test_a_model_that_stays_is_looked_through_once(looked: list[nn.Module]) -> None:
    model = Outer(Inner())
    assert find_seams(model) == find_seams(model) == find_seams(model)
    assert looked == [model]


def _replace(model: Any) -> None:
    model.model = Other()


def _replace_beneath(model: Any) -> None:
    model.model.tower[1] = Inner()


def _add(model: Any) -> None:
    model.model.tower.append(Inner())


def _move(model: Any) -> None:
    model.second = model.model
    del model.model


def _another_class(model: Any) -> None:
    model.model.__class__ = Other


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_replace, [("model", ("image_patches",))]),
        (_replace_beneath, [("model.tower.1", ("pixel_values",))]),
        (_add, [("model.tower.2", ("pixel_values",))]),
        (_move, [("second", ("pixel_values",))]),
        (_another_class, [("model", ("image_patches",))]),
    ],
)
def test_a_model_that_changed_is_looked_through_again(
    change: Callable[[Any], None], expected: list[tuple[str, tuple[str, ...]]]
) -> None:
    model = Outer(Inner())
    assert [(seam.path, seam.pixels) for seam in find_seams(model)] == [
        ("model", ("pixel_values",))
    ]
    change(model)
    assert [(seam.path, seam.pixels) for seam in find_seams(model)] == expected


def test_a_model_that_lost_its_seam_is_refused() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Inner()

    model: Any = Alone()
    assert find_seams(model)[0].path == "model"
    model.model = Plain()
    with pytest.raises(SeamError, match="no get_image_features"):
        find_seams(model)


def test_a_class_s_method_may_change_and_an_instance_may_have_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = Inner()
    assert find_seams(model)[0].pixels == ("pixel_values",)
    monkeypatch.setattr(Inner, "get_image_features", lambda self, image_patches: image_patches)
    assert find_seams(model)[0].pixels == ("image_patches",)
    model.get_image_features = lambda flattened_patches: flattened_patches
    assert find_seams(model)[0].pixels == ("flattened_patches",)
    model.get_image_features = lambda pixel_values: pixel_values
    assert find_seams(model)[0].pixels == ("pixel_values",)


def test_what_is_known_keeps_no_model_alive() -> None:
    model = Outer(Inner())
    find_seams(model)
    gone = weakref.ref(model), weakref.ref(model.model.tower)
    del model
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
