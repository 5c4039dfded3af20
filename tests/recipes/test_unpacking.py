"""Datasets whose headers ask for more than their files hold: refused, in a process of its own."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from vqguard.errors import DataError
from vqguard.recipes.data import unpacking
from vqguard.recipes.data.tables import read_table
from vqguard.recipes.recipe import ColumnRecipe

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

pytestmark = pytest.mark.alone


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def refused(path: Path, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match=message) as caught:
        read_table(path, None, ColumnRecipe())
    assert str(path) in str(caught.value)
    assert time.monotonic() - start < 120  # on a busy machine


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_repeated_word_of_a_dictionary(tmp_path: Path, own_cache: Path) -> None:
    """One text of a megabyte, and 300 000 times its number: 300 GB in a few kilobytes."""
    indices = pa.array([0] * 300_000, pa.int32())
    column = pa.DictionaryArray.from_arrays(indices, pa.array(["x" * 2**20]))
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"caption": column}), path, row_group_size=100, compression="zstd")
    assert path.stat().st_size < 2**21
    refused(path, r"unpacks to more than 100 times its size|needs more than 4\.0 GB")
    assert on_disk(own_cache) < 2**30


def test_a_row_group_that_does_not_fit_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "MAX_MEMORY", 2**30)
    indices = pa.array([0] * 4096, pa.int32())
    column = pa.DictionaryArray.from_arrays(indices, pa.array(["x" * 2**20]))
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"caption": column}), path, compression="zstd")
    refused(path, r"needs more than 1\.0 GB of memory|ended with -")


def test_a_saved_folder_of_compressed_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "MAX_MEMORY", 2**30)
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"caption": ["x"]}).save_to_disk(str(folder))
    arrow = next(folder.glob("*.arrow"))
    with pa.ipc.open_stream(str(arrow)) as stream:
        schema = stream.schema
    batch = pa.record_batch([pa.array(["x" * 2**26])], schema=schema)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(str(arrow), schema, options=options) as writer:
        for _ in range(32):
            writer.write_batch(batch)
    assert arrow.stat().st_size < 2**22
    refused(folder, r"needs more than 1\.0 GB of memory|ended with -")


def test_what_crashes_the_process_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "MAX_MEMORY", 2**20)  # not even Python's own modules fit
    path = tmp_path / "any.parquet"
    pq.write_table(pa.table({"caption": ["x"]}), path)
    refused(path, "cannot be read as a Hugging Face dataset")


def test_modules_of_the_working_directory_are_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("datasets", "json", "runpy", "pyarrow", "vqguard", "resource"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').close()\nraise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "cut.parquet"
    path.write_bytes(b"PAR1")
    refused(path, "cannot be read as a Hugging Face dataset")
    assert not (tmp_path / "ran").exists()


def test_a_device_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "device.parquet"
    path.symlink_to("/dev/zero")
    refused(path, "not a regular file")
