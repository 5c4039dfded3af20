"""Images with unlike numbers of semantic tokens, from calibration to the records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from vqguard import GuardConfig, VQGuard
from vqguard.adapters.features import VisualFeatures
from vqguard.errors import InputError
from vqguard.recipes import calibrate, image_batches
from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.recipes.training.stage1 import of_images

# Semantic codes of each image, which has as many tokens: no two batches of two are alike.
CODES = ([0], [1, 0], [1, 1, 2], [2], [3, 3], [3])
LABELS = ("gun", "gun", "neutral", "neutral", "neutral", "neutral")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in whose images have these codes, read two at a time."""
    guard = VQGuard(GuardConfig(3, 3, patch_codes=4, semantic_codes=4)).eval()
    units = iter([guard.semantic.lookup(torch.tensor(codes)) for codes in CODES])

    def features(model: Any, processor: Any, images: Sequence[Image.Image]) -> VisualFeatures:
        tokens = [torch.ones(2, 3)] * len(images)
        return VisualFeatures.of_units(tokens, [next(units) for _ in images])

    for module in (calibrate, image_batches):
        monkeypatch.setattr(module, "image_features", features)
    monkeypatch.setattr(image_batches, "IMAGES", 2)
    return SimpleNamespace(vqguard=guard, eval=lambda: None)


def _images() -> Iterator[Image.Image]:
    return (Image.new("RGB", (4, 4)) for _ in CODES)


def test_calibration_counts_each_token_once(model: Any) -> None:
    labelled = zip(LABELS, _images(), strict=True)
    result = calibrate.calibrate_model(model, None, labelled, tau=0.5, fpr=None, rule="any")
    assert result.map.counts.tolist() == [[2, 0], [1, 2], [0, 2], [0, 3]]
    assert (result.map.rule, result.map.tau) == ("any", 0.5)
    assert result.images == {"gun": 2, "neutral": 4}


def test_an_unknown_rule_is_refused_before_an_image_is_read(model: Any) -> None:
    images = zip(LABELS, _images(), strict=True)
    with pytest.raises(InputError, match="rule must be one of"):
        calibrate.calibrate_model(model, None, images, tau=0.5, fpr=None, rule="all")
    assert len(list(images)) == len(CODES)
    assert model.vqguard.safety_map is None


def test_codebooks_start_on_each_token_once(model: Any) -> None:
    _, semantic = image_batches.collect_features(model, None, _images())
    codes = model.vqguard.semantic.encode(semantic).tolist()
    assert codes == [code for image in CODES for code in image]


def test_the_semantic_loss_sees_the_mean_of_an_image_s_own_codewords() -> None:
    codewords = torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    filled = codewords.masked_fill(~mask[..., None], float("inf"))
    means = of_images(filled, mask)
    torch.testing.assert_close(means, torch.stack([codewords[0].mean(0), codewords[1, 0]]))
    assert torch.equal(of_images(codewords, None), codewords.mean(1))


def test_the_ledger_keeps_every_token(model: Any) -> None:
    labelled = zip(LABELS, _images(), strict=True)
    calibrate.calibrate_model(model, None, labelled, tau=0.5, fpr=None)
    codes = torch.tensor([[2, 0], [3, 0]])
    own = torch.tensor([[True, True], [True, False]])
    ledger = Ledger("test", 0)
    record = ledger.flagged("fpr", model.vqguard.judge_codes(codes, own), scenes="normal")
    assert (record.subject, record.value, record.n) == ("guarded", 0.5, 2)
    assert [(kept["codes"], kept["scores"], kept["token"]) for kept in ledger.verdicts] == [
        ([2, 0], [0.0, 1.0], 1),
        ([3], [0.0], 0),
    ]
    assert ledger.verdicts[0]["condition"] == {"scenes": "normal"}


def _features(lengths: Sequence[int]) -> list[Tensor]:
    return [torch.full((length, 2), float(length)) for length in lengths]


@pytest.mark.parametrize("lengths", [(1, 1), (2, 2), (1, 3, 2)])
def test_units_come_back_without_padding(lengths: Sequence[int]) -> None:
    features = VisualFeatures.of_units([torch.ones(1, 2)] * len(lengths), _features(lengths))
    assert (features.semantic_mask is None) == (len(set(lengths)) == 1)
    for unit, expected in zip(features.semantic_units, _features(lengths), strict=True):
        assert torch.equal(unit, expected)
