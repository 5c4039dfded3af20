from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vqguard.config import GuardConfig
from vqguard.encoder import GuardedEncoder, mean_token
from vqguard.errors import ConfigError, InputError
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
