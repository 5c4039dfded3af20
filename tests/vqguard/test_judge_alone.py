"""A guard that judges alone passes visual tokens on, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vqguard import GuardConfig, VQGuard
from vqguard.codebooks.guard_output import PADDING
from vqguard.errors import ConfigError, InputError, NonFiniteError
from vqguard.guard import recording
from vqguard.safety_map import SafetyMap

COUNTS = torch.tensor([[3, 0], [0, 3], [0, 3]])


def guard(levels: str = "semantic", **options: object) -> VQGuard:
    sizes = {"patch_dim": 6, "semantic_dim": 5, "semantic_codes": 3, "patch_codes": 4}
    made = VQGuard(GuardConfig.from_dict({**sizes, "levels": levels, **options}))
    checksum = made.checksum("semantic")
    made.safety_map = SafetyMap(("gun",), COUNTS, codebook_checksum=checksum)
    return made.eval()


def test_visual_tokens_pass_bit_for_bit_and_with_their_gradient() -> None:
    made = guard(deepstack_levels=1)
    tokens = torch.randn(2, 7, 6, requires_grad=True)
    deep = torch.randn(2, 7, 6)
    output = made(tokens, torch.randn(2, 1, 5), [deep])
    assert torch.equal(torch.as_tensor(output.tokens), tokens)
    assert torch.equal(torch.as_tensor(output.deep[0]), deep)
    assert (torch.as_tensor(output.codes) == PADDING).all()
    torch.as_tensor(output.tokens).sum().backward()
    assert tokens.grad is not None
    assert bool((tokens.grad == 1).all())
    assert not guard("both")(tokens, torch.randn(2, 1, 5)).tokens.requires_grad


def test_it_judges_as_a_whole_guard_of_the_same_codebook_does() -> None:
    alone, both = guard(), guard("both")
    both.semantic.codebook.weight.data.copy_(alone.semantic.codebook.weight)
    both.safety_map = SafetyMap(("gun",), COUNTS, codebook_checksum=both.checksum("semantic"))
    semantic = torch.randn(9, 1, 5)
    for mine, other in zip(alone.judge(semantic), both.judge(semantic), strict=True):
        assert mine.flagged == other.flagged
        assert not mine.quantised
        assert other.quantised
        assert mine.to_dict()["quantised"] is False
    assert any(verdict.flagged for verdict in alone.judge(semantic))


def test_what_is_not_finite_or_of_another_width_does_not_pass() -> None:
    made = guard()
    tokens = torch.randn(1, 3, 6)
    tokens[0, 1, 2] = float("nan")
    with pytest.raises(NonFiniteError):
        made(tokens, torch.randn(1, 1, 5))
    with pytest.raises(InputError, match="width"):
        made(torch.randn(1, 3, 4), torch.randn(1, 1, 5))


def test_nothing_of_it_learns_and_nothing_is_looked_up() -> None:
    made = guard().train()
    made.requires_grad_(True)
    made.safety_map = None
    with recording(made) as outputs:
        made(torch.randn(1, 3, 6), torch.randn(1, 1, 5))
    assert outputs[0].losses is None
    with pytest.raises(ConfigError, match="no codes"):
        guard().from_codes([torch.zeros(3, dtype=torch.int64)], torch.zeros(1, 1).long())


def test_it_comes_back_from_disk_and_is_small(tmp_path: Path) -> None:
    made = guard(patch_codes=16000)
    made.save_pretrained(tmp_path)
    assert (tmp_path / "guard.safetensors").stat().st_size < 2000
    again = VQGuard.from_pretrained(tmp_path)
    assert not again.quantises
    tokens, semantic = torch.randn(2, 3, 6), torch.randn(2, 1, 5)
    assert torch.equal(torch.as_tensor(again(tokens, semantic).tokens), tokens)
    assert again.judge(semantic) == made.judge(semantic)
