"""The loop that trains llava-tiny and SmolLLaVA's projector goes on where it was stopped."""

from pathlib import Path

import pytest
import torch
from torch import nn

from vqguard.recipes.tiny.loop import Metrics, PhaseConfig, run_phase

CONFIG = PhaseConfig(steps=6, batch=1, learning_rate=0.1, checkpoint_every=2)


def trained(folder: Path, *, stop_at: int | None = None) -> torch.Tensor:
    torch.manual_seed(0)
    module = nn.Linear(3, 1)

    def loss_of(step: int) -> tuple[torch.Tensor, Metrics]:
        if step == stop_at:
            raise KeyboardInterrupt
        given = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        return module(given).square().mean(), {}

    folder.mkdir(exist_ok=True)
    run_phase("words", module, loss_of, CONFIG, folder, resume=True)
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_phase_that_was_stopped_ends_where_an_undisturbed_one_does(
    tmp_path: Path, stop_at: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", stop_at=stop_at)
    kept = sorted(path.name for path in (tmp_path / "stopped").iterdir())
    assert kept == (["words.jsonl"] if stop_at == 1 else ["words.jsonl", "words.pt"])
    torch.testing.assert_close(
        trained(tmp_path / "stopped"), trained(tmp_path / "whole"), rtol=0, atol=0
    )


def test_a_phase_that_is_done_is_not_trained_again(tmp_path: Path) -> None:
    first = trained(tmp_path / "run")
    torch.testing.assert_close(trained(tmp_path / "run", stop_at=0), first, rtol=0, atol=0)
