from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vqguard.config import GuardConfig
from vqguard.encoder import EncoderFeatures, GuardedEncoder, TokenEncoder, mean_token
from vqguard.errors import ChecksumError, ConfigError, InputError, NonFiniteError
from vqguard.guard import VQGuard


def _guard() -> VQGuard:
    return VQGuard(GuardConfig(6, 6, patch_codes=20, semantic_codes=5)).eval()


class Patches(nn.Module):
    """Ten tokens of width 6 from (B, 3, 4) inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 60)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.linear(pixels.flatten(1))
        return out.view(-1, 10, 6)


def test_cls_token_is_judged_and_not_a_visual_token() -> None:
    encoder, pixels = Patches(), torch.randn(3, 3, 4)
    guarded = GuardedEncoder(encoder, _guard(), global_token="cls").eval()
    out = guarded(pixels)
    tokens = encoder(pixels)
    assert torch.equal(out.codes, guarded.guard.patch.encode(tokens[:, 1:]))
    assert torch.equal(out.semantic_codes, guarded.guard.semantic.encode(tokens[:, :1]))
    assert any(name.startswith("encoder.") for name in guarded.state_dict())


def test_mean_and_callable_tokens() -> None:
    encoder, pixels = Patches(), torch.randn(3, 3, 4)
    tokens, semantic = GuardedEncoder(encoder, _guard(), global_token="mean").features(pixels)
    assert tokens.shape == (3, 10, 6)
    assert torch.allclose(semantic, tokens.mean(1, keepdim=True), atol=1e-6)
    semantic.sum().backward()
    assert encoder.linear.weight.grad is not None
    largest = GuardedEncoder(encoder, _guard(), global_token=lambda t: t.amax(1))
    assert torch.equal(largest.features(pixels)[1], encoder(pixels).amax(1, keepdim=True))


def test_mean_token_does_not_see_its_batch() -> None:
    tokens = torch.randn(5, 577, 24) * 10
    batch = mean_token(tokens)
    for row in range(5):
        assert torch.equal(mean_token(tokens[row : row + 1])[0], batch[row])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: (t, "more"),
        lambda t: {"last_hidden_state": t, "pooler_output": t[:, 0]},
    ],
    ids=["tuple", "mapping"],
)
def test_kinds_of_encoder_output(wrap: Any) -> None:
    tokens = torch.randn(2, 4, 6)
    guarded = GuardedEncoder(lambda: wrap(tokens), _guard(), global_token="cls")
    assert torch.equal(guarded.features()[0], tokens[:, 1:])


def test_split_reads_any_output() -> None:
    tokens, semantic = torch.randn(2, 4, 6), torch.randn(2, 3, 6)
    guarded = GuardedEncoder(
        lambda scale: SimpleNamespace(a=tokens * scale, b=semantic),
        _guard(),
        split=lambda out: (out.a, out.b),
    )
    assert guarded(scale=2.0).semantic_codes.shape == (2, 3)


def test_what_cannot_be_used_is_refused() -> None:
    guard = _guard()
    for choice in ({}, {"split": lambda out: out, "global_token": "cls"}):
        with pytest.raises(ConfigError, match="exactly one"):
            GuardedEncoder(Patches(), guard, **choice)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'first'"):
        GuardedEncoder(Patches(), guard, global_token="first")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected a VQGuard"):
        GuardedEncoder(Patches(), Patches(), global_token="cls")  # type: ignore[arg-type]
    for bad in (torch.randn(2, 6), {"x": 1}, (), None, torch.randn(2, 1, 6)):
        with pytest.raises(InputError):
            GuardedEncoder(lambda bad=bad: bad, guard, global_token="cls")()


class OwnTokens(TokenEncoder):
    """Batch norm, eight places of width 6, two prefix tokens; global features of width 3."""

    input_shape = (6, 2, 4)

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)

    def forward(self, pixels: Tensor) -> EncoderFeatures:
        tokens = self.norm(pixels).flatten(2).transpose(1, 2)
        return EncoderFeatures(tokens, tokens.mean(1, keepdim=True)[..., :3], tokens[:, :2] * 2)


def _judge() -> GuardedEncoder:
    config = GuardConfig(6, 3, patch_codes=12, semantic_codes=4)
    return GuardedEncoder(OwnTokens(), VQGuard(config))


def test_an_encoder_that_knows_its_tokens_needs_no_choice() -> None:
    pixels = torch.randn(5, 6, 2, 4)
    guarded = _judge().eval()
    found = guarded.encoder(pixels)
    tokens, semantic = guarded.features(pixels)
    assert torch.equal(tokens, found.tokens)
    assert torch.equal(semantic, found.semantic)
    guard = VQGuard(GuardConfig(6, 6, patch_codes=12, semantic_codes=4))
    cls = GuardedEncoder(guarded.encoder, guard, global_token="cls").features(pixels)
    assert torch.equal(cls[0], found.tokens)
    assert torch.equal(cls[1], found.prefix[:, :1])


def _blobs(n: int, seed: int = 0) -> tuple[Tensor, list[str]]:
    """Images around two points, far apart: "neutral" and "odd" by turns."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n, 6, 2, 4, generator=generator) * 0.1
    pixels[1::2] += 3.0
    return pixels, ["odd" if place % 2 else "neutral" for place in range(n)]


def test_codebooks_map_and_verdicts() -> None:
    guarded = _judge()
    guarded.train()
    pixels, labels = _blobs(40)
    guarded.start_codebooks(pixels, batch=7)
    entries = guarded.guard.semantic.codebook.weight.detach()
    assert bool(((entries.mean(1) - 0).abs() < 1).any())
    assert bool(((entries.mean(1) - 3).abs() < 1).any())
    with pytest.raises(ConfigError, match="no safety map"):
        guarded.screen(pixels)
    made = guarded.calibrate(pixels, labels, tau=0.6)
    assert guarded.guard.safety_map is made
    fresh, wanted = _blobs(30, seed=1)
    verdicts = guarded.screen(fresh, batch=4)
    assert [verdict.category for verdict in verdicts] == wanted
    assert guarded.training
    assert all(module.training for module in guarded.modules())
    # batch norm in training mode would have moved, and judged an image by its neighbours
    encoder: Any = guarded.encoder
    assert torch.equal(encoder.norm.running_mean, torch.zeros(6))
    assert guarded.screen(fresh[3:4]) == verdicts[3:4]
    guarded.eval()
    assert guarded(fresh).flagged.tolist() == [verdict.flagged for verdict in verdicts]
    guarded.start_codebooks(fresh)
    with pytest.raises(ChecksumError, match="calibrate"):
        guarded.screen(fresh)


def test_images_are_read_once_in_batches() -> None:
    guarded = _judge()
    pixels, _ = _blobs(10)
    seen: list[int] = []

    def stream() -> Any:
        for place in range(10):
            seen.append(place)
            yield place

    guarded.preprocess = lambda place: pixels[place]
    codes = guarded.semantic_codes(stream(), batch=4)
    assert seen == list(range(10))
    assert torch.equal(codes, guarded.semantic_codes(pixels))
    assert guarded.semantic_codes([]).shape == (0, 1)
    guarded.preprocess = None  # a list of pixels needs none
    assert torch.equal(codes, guarded.semantic_codes(list(pixels)))


def test_images_that_cannot_be_screened() -> None:
    guarded = _judge()
    for images, message in (
        (torch.zeros(6, 2, 4), "images, channels, height, width"),
        ("photo.png", "put a single image into a list"),
        (3, "put a single image into a list"),
        (["photo.png"], "preprocess="),
        ([torch.zeros(2, 4)], r"got \(2, 4\)"),
        ([torch.zeros(6, 2, 4), torch.zeros(6, 4, 2)], "different shapes"),
    ):
        with pytest.raises(InputError, match=message):
            guarded.semantic_codes(images)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError):
        guarded.semantic_codes(torch.full((2, 6, 2, 4), float("nan")))
    with pytest.raises(InputError, match="at least one image"):
        guarded.start_codebooks([])


def test_pixels_go_to_the_encoders_dtype() -> None:
    guarded = _judge().to(torch.float64)
    pixels, _ = _blobs(4)
    assert guarded.semantic_codes(pixels).shape == (4, 1)
