"""Reading and opening a data set takes a picture's memory, not the set's, whatever the reader."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vqguard.recipes.data.mixture import Mixture, read_data
from vqguard.recipes.data.records.data_set import LlavaData

pytestmark = pytest.mark.alone
COUNT, SIDE = 24, 640
TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of noise, which no format makes smaller: 1.2 MB each."""
    root = tmp_path_factory.mktemp("noise")
    generator = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number:03d}.png", compress_level=0)
    return root


def _json(folder: Path, home: Path, images: Path) -> tuple[Path, Path | None]:
    entries = [{"id": p.name, "image": p.name, "conversations": TALK} for p in files(folder)]
    (home / "data.json").write_text(json.dumps(entries))
    return home / "data.json", images


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


def in_folder(folder: Path, home: Path) -> tuple[Path, Path | None]:
    return _json(folder, home, folder)


def in_zip(folder: Path, home: Path) -> tuple[Path, Path | None]:
    with zipfile.ZipFile(home / "images.zip", "w") as archive:
        for path in files(folder):
            archive.write(path, path.name)
    return _json(folder, home, home / "images.zip")


def in_tar(folder: Path, home: Path) -> tuple[Path, Path | None]:
    with tarfile.open(home / "images.tar", "w") as archive:
        for path in files(folder):
            archive.add(path, path.name)
    return _json(folder, home, home / "images.tar")


def in_shards(folder: Path, home: Path) -> tuple[Path, Path | None]:
    shards = home / "shards"
    shards.mkdir()
    for shard in range(2):
        with tarfile.open(shards / f"{shard}.tar", "w") as archive:
            for path in files(folder)[shard::2]:
                archive.add(path, path.name)
                text = json.dumps({"conversations": TALK}).encode()
                member = tarfile.TarInfo(path.with_suffix(".json").name)
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text))
    return shards, None


def in_table(folder: Path, home: Path) -> tuple[Path, Path | None]:
    datasets = pytest.importorskip("datasets")

    def rows() -> Iterator[dict[str, Any]]:
        for path in files(folder):
            yield {"image": path.read_bytes(), "conversations": TALK}

    made = datasets.Dataset.from_generator(rows, cache_dir=str(home / "cache"))
    made.save_to_disk(str(home / "set"))
    return home / "set", None


READERS = [in_folder, in_zip, in_tar, in_shards, in_table]


def anonymous() -> int:
    """Bytes of this process that no file stands behind; memory maps of files are not among them."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    line = next(x for x in status.read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("place", READERS)
def test_a_set_is_never_in_memory(
    place: Callable[[Path, Path], tuple[Path, Path | None]],
    skip_bad: bool,
    folder: Path,
    tmp_path: Path,
) -> None:
    whole = sum(path.stat().st_size for path in files(folder))
    each = whole // COUNT
    data, images = place(folder, tmp_path)
    read_data(data, images).captions(1)[0].images[0]()  # libraries are loaded by now
    before, tracing = anonymous(), tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        found: LlavaData | Mixture = read_data(data, images, skip_bad=skip_bad)
        held = [anonymous()]
        for sample in found.captions(COUNT):
            assert sample.images[0]().size == (SIDE, SIDE)
            held.append(anonymous())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        if not tracing:
            tracemalloc.stop()
    assert len(held) == COUNT + 1
    assert peak < 4 * each, "bytes of several pictures were held at once"
    assert max(held) - before < whole / 3
