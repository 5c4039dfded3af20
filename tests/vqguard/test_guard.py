from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from vqguard.codebooks.quantizer import straight_through
from vqguard.config import GuardConfig
from vqguard.errors import ChecksumError, ConfigError, InputError, NonFiniteError
from vqguard.guard import VQGuard, recording
from vqguard.safety_map import SafetyMap


def _guard(**changes: Any) -> VQGuard:
    sizes: dict[str, Any] = {"patch_codes": 40, "semantic_codes": 8, **changes}
    return VQGuard(GuardConfig(patch_dim=6, semantic_dim=5, **sizes))


def _images(count: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(count, 7, 6, generator=g), torch.randn(count, 2, 5, generator=g)


def _map(guard: VQGuard) -> SafetyMap:
    counts = torch.tensor([[9, 1]] * 2 + [[1, 9]] * 6)
    return SafetyMap(("gun",), counts, codebook_checksum=guard.checksum("semantic"))


def test_shape_of_the_output_is_always_the_same() -> None:
    guard = _guard().eval()
    tokens, semantic = _images()
    out = guard(tokens, semantic)
    assert out.flagged is None
    assert out.losses is None
    assert torch.equal(out.tokens, guard.patch.lookup(out.codes))
    assert torch.equal(out.semantic_tokens, guard.semantic.lookup(out.semantic_codes))
    guard.safety_map = _map(guard)
    judged = guard(tokens, semantic)
    assert judged._fields == out._fields
    assert judged.flagged.tolist() == [v.flagged for v in guard.judge(semantic)]
    assert judged.flagged.tolist() == (judged.semantic_codes < 2).any(1).tolist()
    assert guard.judge_codes(judged.semantic_codes) == guard.judge(semantic)


def test_lists_of_images_give_lists_with_the_same_codes() -> None:
    guard = _guard().eval()
    tokens, semantic = _images()
    whole = guard(tokens, semantic)
    ragged = [tokens[0], tokens[1, :3], tokens[2, :0], tokens[3]]
    out = guard(ragged, semantic)
    assert [len(one) for one in out.codes] == [7, 3, 0, 7]
    assert torch.equal(out.codes[1], whole.codes[1, :3])
    assert torch.equal(out.tokens[3], whole.tokens[3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_image_one_verdict(dtype: torch.dtype) -> None:
    guard = _guard().eval()
    guard.safety_map = _map(guard)
    tokens, semantic = (one.to(torch.bfloat16).to(dtype) for one in _images(6))
    batch = guard(tokens, semantic)
    assert batch.tokens.dtype == dtype
    reference = guard(tokens.float(), semantic.float())
    assert torch.equal(batch.codes, reference.codes)
    for row in range(6):
        alone = guard(tokens[row : row + 1], semantic[row : row + 1])
        assert torch.equal(alone.codes[0], batch.codes[row])
        assert torch.equal(alone.tokens[0], batch.tokens[row])
        assert bool(alone.flagged[0]) == bool(batch.flagged[row])


def test_four_losses_while_learning() -> None:
    guard = _guard(commitment_weight=0.5).train()
    tokens, semantic = (one.requires_grad_() for one in _images())
    out = guard(tokens, semantic)
    losses = out.losses
    assert losses is not None
    by_hand = float(
        (tokens.detach().double() - guard.patch.lookup(out.codes).double()).square().mean()
    )
    assert float(losses.patch_codebook.detach()) == pytest.approx(by_hand, rel=1e-6)
    assert float(losses.vq_patch.detach()) == pytest.approx(1.5 * by_hand, rel=1e-6)
    total = losses.total().detach()
    assert torch.equal(total, (losses.vq_patch + losses.vq_semantic).detach())
    assert float(losses.total(0.0).detach()) == pytest.approx(
        float((losses.patch_codebook + losses.semantic_codebook).detach())
    )
    losses.total().backward()
    for one in (tokens, semantic, guard.patch.codebook.weight, guard.semantic.codebook.weight):
        assert one.grad is not None
        assert bool(one.grad.any())


def test_gradients_cross_only_in_the_context() -> None:
    guard = _guard().eval()
    tokens, semantic = (one.requires_grad_() for one in _images())
    assert not guard(tokens, semantic).tokens.requires_grad
    with straight_through(guard):
        out = guard(tokens, semantic)
    (out.tokens.sum() + out.semantic_tokens.sum()).backward()
    for one in (tokens, semantic):
        assert one.grad is not None
        assert torch.equal(one.grad, torch.ones_like(one))


def test_a_map_for_another_codebook_is_refused() -> None:
    guard, other = _guard(), _guard(seed=5)
    with pytest.raises(ChecksumError, match="calibrate again"):
        guard.safety_map = _map(other)
    with pytest.raises(ChecksumError, match="does not name its codebook"):
        guard.safety_map = SafetyMap(("gun",), torch.ones(8, 2, dtype=torch.int64))
    with pytest.raises(ConfigError, match="has 3 cells, the semantic codebook 8"):
        guard.safety_map = SafetyMap(("gun",), torch.ones(3, 2, dtype=torch.int64))
    assert guard.safety_map is None


@pytest.mark.parametrize("through_data", [False, True])
def test_a_codebook_that_moved_since_calibration_stops_the_verdict(through_data: bool) -> None:
    guard = _guard().eval()
    guard.safety_map = _map(guard)
    tokens, semantic = _images()
    guard(tokens, semantic)
    if through_data:
        guard.semantic.codebook.weight.data[3, 0] += 1.0
    else:
        with torch.no_grad():
            guard.semantic.codebook.weight[3, 0] += 1.0
    with pytest.raises(ChecksumError):
        guard(tokens, semantic)
    with pytest.raises(ChecksumError):
        guard.judge(semantic)


def test_a_learning_guard_gives_no_verdict() -> None:
    guard = _guard()
    guard.safety_map = _map(guard)
    tokens, semantic = _images()
    assert guard.train()(tokens, semantic).flagged is None
    assert guard.freeze()(tokens, semantic).flagged is not None
    assert guard(tokens, semantic).losses is None


def test_frozen_gives_back_what_was() -> None:
    guard = _guard()
    guard.patch.requires_grad_(False)
    with guard.frozen():
        assert not any(p.requires_grad for p in guard.parameters())
    assert not guard.patch.codebook.weight.requires_grad
    assert guard.semantic.codebook.weight.requires_grad


def test_judging_without_a_map_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no safety map"):
        _guard().judge(_images()[1])


@pytest.mark.parametrize("which", ["tokens", "semantic"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_an_error(which: str, bad: float) -> None:
    tokens, semantic = _images()
    (tokens if which == "tokens" else semantic)[1, 1, 2] = bad
    with pytest.raises(NonFiniteError):
        _guard().eval()(tokens, semantic)


def test_shapes_are_checked_with_both_numbers() -> None:
    guard = _guard().eval()
    tokens, semantic = _images()
    with pytest.raises(InputError, match=r"width 4 .* codebook has 6"):
        guard(tokens[..., :4], semantic)
    with pytest.raises(InputError, match=r"widths \[4\].* has 6"):
        guard([tokens[0, :, :4]] * 4, semantic)
    with pytest.raises(InputError, match=r"width 3 .* codebook has 5"):
        guard(tokens, semantic[..., :3])
    with pytest.raises(InputError, match="4 images of visual tokens but 3"):
        guard(tokens, semantic[:3])
    with pytest.raises(InputError, match="expected"):
        guard(tokens[0], semantic)
    with pytest.raises(InputError, match="expected"):
        guard(tokens, semantic[:, 0])
    with pytest.raises(InputError, match="expected"):
        guard([], semantic[:0])


def test_recording_nests_and_is_not_copied() -> None:
    guard = _guard().eval()
    tokens, semantic = _images()
    with recording(guard) as outer:
        guard(tokens, semantic)
        with recording(guard) as inner:
            guard(tokens, semantic)
            twin = copy.deepcopy(guard)
            twin(tokens, semantic)
    guard(tokens, semantic)
    assert (len(outer), len(inner)) == (2, 1)


def test_casting_a_guard_changes_no_code() -> None:
    guard = _guard().eval()
    guard.safety_map = _map(guard)
    tokens, semantic = _images()
    before = guard(tokens, semantic)
    after = guard.to(torch.bfloat16)(tokens, semantic)
    assert torch.equal(before.codes, after.codes)
    assert torch.equal(before.flagged, after.flagged)


def test_the_two_codebooks_start_apart_and_from_the_seed() -> None:
    one, two, three = _guard(), _guard(), _guard(seed=1)
    assert one.checksum("patch") == two.checksum("patch")
    assert one.checksum("patch") != three.checksum("patch")
    same = VQGuard(GuardConfig(4, 4, patch_codes=3, semantic_codes=3))
    assert same.checksum("patch") != same.checksum("semantic")
