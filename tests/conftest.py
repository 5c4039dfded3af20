"""What every test starts from: seeds, a transformers that is new enough, a worker."""

from __future__ import annotations

import random
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
def open_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test enters in the tables of attacks and gradient modes is gone after it."""
    from vqguard.redteam import ATTACKS, GRADIENTS  # not every test needs torch

    for table in (ATTACKS, GRADIENTS):
        monkeypatch.setattr(table, "_entries", dict(table._entries))
