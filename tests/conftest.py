"""What every test starts from: seeds, a transformers that is new enough, a worker."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

# The same examples in every run, and no limit on a machine that is shared.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


class Scheduler(LoadFileScheduling):  # type: ignore[misc]
    """A file stays on one worker, and all files with tests marked `alone` on the same one."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "alone" if _is_alone(self.config.rootpath / file) else file


@cache
def _is_alone(file: Path) -> bool:
    # The scheduler knows tests by their names only. pytest-xdist's own groups stand in these names,
    # which pytest no longer lets it change.
    return "pytest.mark.alone" in file.read_text(encoding="utf-8")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduler:
    return Scheduler(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    # Before the fixtures: tests run in any order, each after others than in the run before.
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    for mark in item.iter_markers("transformers_from"):
        (oldest,) = mark.args
        found = transformers.__version__.split(".")
        if tuple(map(int, found[:2])) < tuple(map(int, oldest.split("."))):
            pytest.skip(f"what is tested is in transformers from {oldest} on: {mark.kwargs['why']}")


@pytest.fixture
def write_video() -> Callable[..., Path]:
    """Writes a little video whose frame n is grey n * `step`; half white where it is turned."""

    def write(
        path: Path,
        *,
        frames: int = 12,
        size: tuple[int, int] = (64, 48),
        codec: str = "mpeg4",
        step: int = 20,
        gop: int = 12,
        sound: bool = False,
        turned: int = 0,
    ) -> Path:
        import av  # an extra that few tests need

        with av.open(str(path), "w") as container:
            video = container.add_stream(codec, rate=Fraction(4))
            video.width, video.height = size
            video.pix_fmt, video.gop_size = "yuv420p", gop
            if turned:
                video.set_display_rotation(turned)
            audio = container.add_stream("aac", rate=8000) if sound else None
            for number in range(frames):
                pixels = np.full((size[1], size[0], 3), number * step % 256, np.uint8)
                if turned:
                    pixels[:, : size[0] // 2] = 255
                container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
            container.mux(video.encode(None))
            if audio is not None:
                heard = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                heard.sample_rate = 8000
                container.mux(audio.encode(heard))
                container.mux(audio.encode(None))
        return path

    return write


@pytest.fixture
def open_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test enters in the tables of attacks and gradient modes is gone after it."""
    from vqguard.redteam import ATTACKS, GRADIENTS  # not every test needs torch

    for table in (ATTACKS, GRADIENTS):
        monkeypatch.setattr(table, "_entries", dict(table._entries))
