"""At site "encoder" inference looks projections up, and the table is never stale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vqguard.adapters import visual_features
from vqguard.codebooks.quantizer import straight_through, use_estimator

Make = Callable[..., Any]


def features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    return torch.stack(list(model.get_image_features(pixels).pooler_output))


def expected(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The codewords through the projector, with no table."""

    raw = visual_features(model, "encoder", pixel_values=pixels).tokens
    assert isinstance(raw, torch.Tensor)
    guard = model.vqguard
    nearest = torch.cdist(raw.double(), guard.patch.codebook.weight.double()).argmin(-1)
    found: torch.Tensor = model.model.multi_modal_projector(guard.patch.codebook.weight[nearest])
    return found


@torch.no_grad()
def test_projector_is_skipped_in_inference(
    make_guarded: Make, make_inputs: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pixels = make_guarded(site="encoder"), make_inputs((2,))["pixel_values"]
    projector = model.model.multi_modal_projector
    runs: list[tuple[int, ...]] = []
    cls = type(projector).vqguard_original
    original = cls.forward

    def forward(self: Any, x: torch.Tensor) -> Any:
        runs.append(tuple(x.shape))
        return original(self, x)

    monkeypatch.setattr(cls, "forward", forward)
    first = features(model, pixels)
    assert runs == [(24, 32)]  # the codebook, once
    assert torch.equal(features(model, pixels), first)
    assert len(runs) == 1
    assert torch.allclose(first, expected(model, pixels), atol=1e-5)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "codebook in place": lambda m: m.vqguard.patch.codebook.weight.mul_(1.5),
    "one codeword": lambda m: m.vqguard.patch.codebook.weight.select(0, 3).add_(9),
    "projector in place": lambda m: m.model.multi_modal_projector.linear_1.weight.mul_(1.5),
    "projector through .data": lambda m: m.model.multi_modal_projector.linear_2.weight.data.add_(1),
    "projector bias": lambda m: m.model.multi_modal_projector.linear_2.bias.data.add_(1),
    "projector replaced": lambda m: setattr(
        m.model.multi_modal_projector, "linear_2", torch.nn.Linear(32, 32)
    ),
    "state dict": lambda m: m.load_state_dict(
        {k: v * 1.5 if "patch.codebook.weight" in k else v for k, v in m.state_dict().items()}
    ),
    "dtype": lambda m: m.double(),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_table_follows_every_change(make_guarded: Make, make_inputs: Make, change: str) -> None:
    model, pixels = make_guarded(site="encoder"), make_inputs((3,))["pixel_values"]
    before = features(model, pixels)
    CHANGES[change](model)
    if change == "dtype":
        pixels = pixels.double()
        assert features(model, pixels).dtype == torch.float64
        return
    after = features(model, pixels)
    assert torch.allclose(after, expected(model, pixels), atol=1e-4)
    if change != "one codeword":
        assert not torch.allclose(after, before)


@torch.no_grad()
def test_codebook_change_through_data(make_guarded: Make, make_inputs: Make) -> None:
    model, pixels = make_guarded(site="encoder"), make_inputs((3,))["pixel_values"]
    features(model, pixels)
    model.vqguard.patch.codebook.weight.data.mul_(1.5)
    model.vqguard.patch.refresh()
    assert torch.allclose(features(model, pixels), expected(model, pixels), atol=1e-4)


def test_projector_runs_where_gradients_or_relaxed_tokens_need_it(
    make_guarded: Make, make_inputs: Make
) -> None:
    model, pixels = make_guarded(site="encoder"), make_inputs((2,))["pixel_values"]
    with torch.no_grad():
        features(model, pixels)
    # An attack in eval mode: gradient to the pixels through the projector.
    model.requires_grad_(False)
    with straight_through(model.vqguard):
        wanted = pixels.clone().requires_grad_()
        torch.autograd.backward(features(model, wanted).sum())
    assert wanted.grad is not None
    assert wanted.grad.abs().sum() > 0
    # An estimator whose forward value is no codeword, even without gradient.
    with torch.no_grad(), use_estimator(model.vqguard, lambda x, weight, codes: x):
        relaxed = features(model, pixels)
    with torch.no_grad():
        assert not torch.allclose(relaxed, features(model, pixels))
    # Training the projector.
    model.requires_grad_(True)
    torch.autograd.backward(features(model, pixels).sum())
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_lora_on_the_projector_is_never_looked_up(make_guarded: Make, make_inputs: Make) -> None:
    from peft import LoraConfig, get_peft_model

    model, pixels = make_guarded(site="encoder"), make_inputs((2,))["pixel_values"]
    before = features(model, pixels)
    config = LoraConfig(target_modules=["linear_1"], r=2, init_lora_weights=False)
    wrapped = get_peft_model(model, config).eval()
    with_lora = features(model, pixels)
    assert not torch.allclose(with_lora, before)
    with wrapped.disable_adapter():
        assert torch.allclose(features(model, pixels), before, atol=1e-5)
    merged = wrapped.merge_and_unload()
    assert torch.allclose(features(merged, pixels), with_lora, atol=1e-4)
