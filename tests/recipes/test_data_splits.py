"""Which files of a Hugging Face dataset are trained on: the hub's layouts, and what is refused."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from vqguard.errors import DataError
from vqguard.recipes.data.mixture import read_data
from vqguard.recipes.data.splits import files_of_split
from vqguard.recipes.data.tables import is_table
from vqguard.recipes.recipe import ColumnRecipe

datasets = pytest.importorskip("datasets")

_buffer = io.BytesIO()
Image.new("RGB", (2, 2)).save(_buffer, "PNG")
PIXEL = _buffer.getvalue()
HASHED = "-00000-of-00001-2a1d3c4b5e6f7089.parquet"
LAYOUTS = {
    "plain names": {
        "train": ["train.parquet"],
        "test": ["test.parquet"],
        "validation": ["validation.parquet"],
    },
    "hashed": {"train": [f"train{HASHED}"], "test": [f"test{HASHED}"]},
    "hashed in data": {"train": [f"data/train{HASHED}"], "test": [f"data/test{HASHED}"]},
    "converted by the hub": {
        "train": ["default/train/0000.parquet", "default/train/0001.parquet"],
        "test": ["default/test/0000.parquet"],
    },
    "folders": {"train": ["train/a.parquet"], "validation": ["val/a.parquet"]},
    "splits of one's own": {
        "train": ["train-00000-of-00001.parquet"],
        "easy": ["easy-00000-of-00001.parquet"],
    },
    "a configuration": {
        "train": [f"ai2d/train{HASHED}"],
        "test": [f"ai2d/test{HASHED}"],
    },
    "no split named": {"train": ["0000.parquet", "0001.parquet"]},
}


def laid_out(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("home", ["set", "odd [a] *? test-1"])
def test_the_hub_s_layouts(
    layout: str, home: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    splits = LAYOUTS[layout]
    folder = laid_out(tmp_path / home, [name for names in splits.values() for name in names])
    (folder / "README.md").write_text("# a test set")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "train.parquet").touch()
    assert is_table(folder)
    with caplog.at_level(logging.INFO):
        for split in (None, *splits):
            files = files_of_split(folder, split)
            names = [file.relative_to(folder).as_posix() for file in files]
            assert names == splits[split or "train"]
    first = caplog.messages[0]
    assert first.startswith(f"{folder}: reads the split train")
    if len(splits) > 1:
        assert set(first.rpartition("not read: ")[2].split(", ")) == splits.keys() - {"train"}
    with pytest.raises(DataError, match="expected one of the splits"):
        files_of_split(folder, "nowhere")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train.parquet", "more.parquet"], r"more\.parquet names no split"),
        (["train-test.parquet", "train.parquet"], "may be any of the splits train, test"),
        (["train/a.parquet", "test.parquet"], r"test\.parquet names no split"),
        (["a/train/0.parquet", "b/train/0.parquet"], "several data sets: a, b"),
        (["a/0.parquet", "b/0.parquet"], "several data sets: a, b"),
        (["test.parquet", "validation.parquet"], "splits validation, test, got 'train'"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(
    names: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        files_of_split(laid_out(tmp_path, names), None)


def test_test_rows_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "set"
    for split in ("train", "test", "validation"):
        talk = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": split}]
        made = datasets.Dataset.from_dict({"image": [PIXEL], "messages": [talk], "id": [split]})
        folder.mkdir(exist_ok=True)
        made.to_parquet(str(folder / f"{split}.parquet"))
    assert [sample.id for sample in read_data(folder, None).samples] == ["train"]
    chosen = read_data(folder, None, columns=ColumnRecipe(split="test"))
    assert [sample.id for sample in chosen.samples] == ["test"]
    with pytest.raises(DataError, match="is one file"):
        read_data(folder / "train.parquet", None, columns=ColumnRecipe(split="test"))


def test_shards_of_several_splits_are_told_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the hub's `pixparse/cc3m-wds` and others are laid out."""
    for name in ("cc3m-train-0000.tar", "cc3m-train-0001.tar", "cc3m-validation-0000.tar"):
        with tarfile.open(tmp_path / name, "w") as archive:
            for ending, content in (("png", PIXEL), ("txt", name.encode())):
                member = tarfile.TarInfo(f"{name[:-4]}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    (tmp_path / "_info.json").write_text("{}")
    with caplog.at_level(logging.INFO):
        data = read_data(tmp_path, None)
    assert [sample.id for sample in data.samples] == ["cc3m-train-0000", "cc3m-train-0001"]
    assert "reads the split train; not read: validation" in caplog.text
    assert "not read: .json beside the shards (1)" in caplog.text
    chosen = read_data(tmp_path, None, columns=ColumnRecipe(split="validation"))
    assert [sample.id for sample in chosen.samples] == ["cc3m-validation-0000"]
    with pytest.raises(DataError, match="expected one of the splits"):
        read_data(tmp_path, None, columns=ColumnRecipe(split="test"))
    with pytest.raises(DataError, match="is one file"):
        read_data(tmp_path / "cc3m-train-0000.tar", None, columns=ColumnRecipe(split="train"))


def test_img2dataset_s_folder_is_one_of_shards(tmp_path: Path) -> None:
    """It writes what it knows of a shard into parquet and JSON beside it."""
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        known = json.dumps({"key": "000000000", "caption": "A pixel"}).encode()
        for ending, content in (("png", PIXEL), ("txt", b"A pixel"), ("json", known)):
            member = tarfile.TarInfo(f"000000000.{ending}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (tmp_path / "00000_stats.json").write_text("{}")
    datasets.Dataset.from_dict({"url": ["https://a/b.png"]}).to_parquet(
        str(tmp_path / "00000.parquet")
    )
    (sample,) = read_data(tmp_path, None).samples
    assert sample.turns[0][1] == "A pixel"
    (tmp_path / "00000.parquet").rename(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"shards \(\.tar\) and train\.parquet"):
        read_data(tmp_path, None)
