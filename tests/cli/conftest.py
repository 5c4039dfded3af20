"""Stand-ins for the floor below, so that arguments and exit codes are tested without a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from vqguard.errors import ConfigError
from vqguard.videos import Clip, open_video

Install = Callable[..., None]


@dataclass(frozen=True)
class FakeVerdict:
    flagged: bool
    category: str
    probability: float = 0.75
    semantic_code: int = 5
    reason: Any = None
    quantised: bool = True

    def to_dict(self) -> dict[str, Any]:
        return {"flagged": self.flagged, "category": self.category}


@dataclass
class FakeRun:
    """Flags pictures whose first pixel is red; counts the batches it was given."""

    path: Path
    batches: list[int] = field(default_factory=list)
    converts_to_rgb: bool = True

    def screen_images(self, images: Sequence[Image.Image]) -> list[FakeVerdict]:
        self.batches.append(len(images))
        return [self._judge(image) for image in images]

    def ask(self, image: Image.Image | Clip, question: str, max_new_tokens: int) -> SimpleNamespace:
        text = f"{question} {max_new_tokens}"
        if isinstance(image, Clip):
            text = f"{len(image.frames)} frames: {text}"
            image = Image.fromarray(image.frames[-1])
        return SimpleNamespace(text=text, verdict=self._judge(image))

    def open_video(self, path: Path) -> Clip:
        return open_video(path, 3)

    @staticmethod
    def _judge(image: Image.Image) -> FakeVerdict:
        if image.getpixel((0, 0)) == (255, 0, 0):
            return FakeVerdict(True, "gun")
        return FakeVerdict(False, "neutral", 0.0)


@dataclass
class FakeRecipe:
    model: str = "llava-tiny"
    changes: tuple[str, ...] = ()

    def override(self, changes: list[str]) -> FakeRecipe:
        if any(change.startswith("unknown=") for change in changes):
            raise ConfigError("unknown: unknown key. Did you mean 'known'?")
        return FakeRecipe(self.model, (*self.changes, *changes))


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a module of the given names in the place of ``vqguard.<name>``."""

    def put(name: str, **members: Any) -> None:
        module = ModuleType(f"vqguard.{name}")
        for key, member in members.items():
            setattr(module, key, member)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return put


@pytest.fixture
def run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that holds ``runs/llava-tiny``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VQGUARD_RUN", raising=False)
    run = tmp_path / "runs" / "llava-tiny"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("model: llava-tiny\n")
    return run


@pytest.fixture
def opened(install: Install, run_directory: Path) -> list[FakeRun]:
    """Replaces ``open_run``; the list collects the runs that were opened."""
    runs: list[FakeRun] = []

    def open_run(path: Path, *, base: str | None = None) -> FakeRun:
        runs.append(FakeRun(path))
        return runs[-1]

    install("recipes.run", open_run=open_run)
    return runs


@pytest.fixture
def picture(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes a small picture of one colour."""

    def write(name: str, colour: str) -> Path:
        path = tmp_path / name
        Image.new("RGB", (8, 8), colour).save(path)
        return path

    return write
