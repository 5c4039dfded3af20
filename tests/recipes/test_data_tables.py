"""Hugging Face datasets on disk: what is read, lazily, and what is refused."""

from __future__ import annotations

import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vqguard import images
from vqguard.errors import ConfigError, DataError
from vqguard.recipes.data import tables as data_tables
from vqguard.recipes.data.mixture import read_data
from vqguard.recipes.data.records.data_set import LlavaData
from vqguard.recipes.recipe import ColumnRecipe, load_recipe
from vqguard.recipes.sources import source_of

datasets = pytest.importorskip("datasets")

COLOURS = ("red", "lime", "blue", "white")
PIXELS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "white": (255,) * 3}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


def talk(colour: str) -> list[dict[str, str]]:
    return [
        {"from": "human", "value": "<image>\nWhat colour?"},
        {"from": "gpt", "value": f"It is {colour}."},
    ]


def table(**columns: Any) -> Any:
    return datasets.Dataset.from_dict(columns)


def with_images(colours: tuple[str, ...] = COLOURS) -> Any:
    made = table(
        image=[{"bytes": png(colour), "path": None} for colour in colours],
        conversations=[talk(colour) for colour in colours],
        id=[f"row-{colour}" for colour in colours],
    )
    return made.cast_column("image", datasets.Image())


def saved(made: Any, folder: Path) -> Path:
    made.save_to_disk(str(folder))
    return folder


def read(
    path: Path, root: Path | None = None, *, skip_bad: bool = False, **columns: str
) -> LlavaData:
    found = read_data(path, root, columns=ColumnRecipe(**columns), skip_bad=skip_bad)
    assert isinstance(found, LlavaData)
    return found


def colours_of(data: LlavaData) -> list[list[Any]]:
    return [[opener().getpixel((0, 0)) for opener in sample.images] for sample in data.samples]


def as_parquet(made: Any, path: Path) -> Path:
    made.to_parquet(str(path))
    return path


def as_hub_folder(made: Any, folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    for number in range(2):
        part = made.shard(2, number)
        part.to_parquet(str(folder / "data" / f"train-0000{number}-of-00002.parquet"))
    with_images(("white",)).to_parquet(str(folder / "data" / "test-00000-of-00001.parquet"))
    return folder


def as_splits(made: Any, folder: Path) -> Path:
    return saved(datasets.DatasetDict(train=made, test=with_images(("white",))), folder)


FORMS = {"saved": saved, "parquet": as_parquet, "hub folder": as_hub_folder, "splits": as_splits}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_samples_in_every_form(form: str, tmp_path: Path) -> None:
    name = "set.parquet" if form == "parquet" else "set"
    data = read(FORMS[form](with_images(), tmp_path / name))
    assert [sample.id for sample in data.samples] == [f"row-{colour}" for colour in COLOURS]
    assert data.samples[0].turns == (("<image>\nWhat colour?", "It is red."),)
    assert colours_of(data) == [[PIXELS[colour]] for colour in COLOURS]
    assert len(data.captions(9)) == 4


@pytest.mark.parametrize("form", ["hub folder", "splits"])
def test_a_split_is_chosen(form: str, tmp_path: Path) -> None:
    path = FORMS[form](with_images(), tmp_path / "set")
    assert [sample.id for sample in read(path, split="test").samples] == ["row-white"]
    with pytest.raises(DataError, match=r"splits train, test|splits test, train"):
        read(path, split="validation")


def test_images_are_bytes_paths_or_lists_of_them(tmp_path: Path) -> None:
    turns = [talk("red")]
    as_bytes = saved(table(image=[png("red")], messages=turns), tmp_path / "bytes")
    assert colours_of(read(as_bytes)) == [[PIXELS["red"]]]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(png("blue"))
    by_path = saved(table(image=["a.png"], messages=turns), tmp_path / "paths")
    assert colours_of(read(by_path, tmp_path / "photos")) == [[PIXELS["blue"]]]
    with pytest.raises(DataError, match=r"row 0, image 1: .*missing"):
        read(by_path)
    outside = saved(table(image=["../photos/a.png"], messages=turns), tmp_path / "outside")
    with pytest.raises(DataError, match="leaves the image root"):
        read(outside)


def test_messages_with_parts_and_several_images(tmp_path: Path) -> None:
    def user(*parts: str) -> dict[str, Any]:
        content = [
            {"type": "image", "text": None} if part == "#" else {"type": "text", "text": part}
            for part in parts
        ]
        return {"role": "user", "content": content}

    def assistant(text: str) -> dict[str, Any]:
        return {"role": "assistant", "content": [{"type": "text", "text": text}]}

    messages = [
        [user("#", "And ", "#", "?"), assistant("Two."), user("#", "That?"), assistant("Three.")],
        [user("No picture?"), assistant("None.")],
    ]
    made = table(images=[[png("red"), png("lime"), png("blue")], []], messages=messages)
    made = made.cast_column("images", datasets.List(datasets.Image()))
    data = read(saved(made, tmp_path / "set"))
    first, second = data.samples
    assert first.turns == (("<image>And <image>?", "Two."), ("<image>\nThat?", "Three."))
    assert colours_of(data) == [[PIXELS[c] for c in ("red", "lime", "blue")], []]
    assert (second.id, second.images) == ("1", ())


def test_columns_by_name(tmp_path: Path) -> None:
    made = table(photo=[png("red")], alt=["A red field."], key=[7], image=["not this one"])
    path = saved(made, tmp_path / "set")
    with pytest.raises(DataError, match=r"expected a column conversations or messages.*photo, alt"):
        read(path)
    with pytest.raises(DataError, match=r"no column 'photos'.*'photo'"):
        read(path, images="photos", caption="alt")
    (sample,) = read(path, images="photo", caption="alt", id="key").samples
    assert (sample.id, sample.captions) == ("7", ((1, "A red field."),))
    recipe = load_recipe("llava-tiny").override(
        [f"data={path}", "columns.images=photo", "columns.caption=alt"]
    )
    assert len(source_of(recipe).captions(9)) == 1
    (tmp_path / "mix.yaml").write_text(
        "parts:\n- {data: set, weight: 1, columns: {images: photo, caption: alt}}\n"
    )
    assert len(read_data(tmp_path / "mix.yaml", None).samples) == 1
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(DataError, match="no columns to choose"):
        read(tmp_path / "x.json", caption="alt")


def test_nothing_is_decoded_before_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(with_images(), tmp_path / "set")
    decoded: list[str] = []
    real = images.decode_image

    def counting(stream: Any, name: Any) -> Image.Image:
        decoded.append(str(name))
        return real(stream, name)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("datasets must not decode pictures")

    monkeypatch.setattr(data_tables, "decode_image", counting)
    monkeypatch.setattr(datasets.Image, "decode_example", never)
    data = read(path)
    assert decoded == []
    opener = data.samples[2].images[0]
    assert opener().getpixel((0, 0)) == PIXELS["blue"]
    assert decoded == [f"{path}, row 2, image 1"]
    read(path, skip_bad=True)
    assert len(decoded) == 1 + len(COLOURS)


def test_samples_travel_to_worker_processes(tmp_path: Path) -> None:
    data = read(saved(with_images(), tmp_path / "set"))
    held = pickle.dumps(data.samples[1])
    assert png("lime") not in held  # the path of the memory map, not what it holds
    assert pickle.loads(held).image().getpixel((0, 0)) == PIXELS["lime"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": b"no image"}, "not an image that is accepted"),
        ({"image": None}, "found 1 for 0"),
        ({"image": png("red")[:-30]}, "truncated"),
        ({"conversations": talk("red")[:1]}, "in pairs"),
        ({"conversations": [*talk("x"), {"from": "system", "value": "x"}]}, "from 'system'"),
        ({"conversations": [talk("red")[0], {"from": "gpt", "value": " "}]}, "empty answer"),
        ({"conversations": None}, "non-empty list"),
    ],
)
def test_a_bad_row_is_named_or_skipped(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    good = {"image": png("red"), "conversations": talk("red")}
    rows = [good, {**good, **change}, good]
    made = table(**{name: [row[name] for row in rows] for name in good})
    path = saved(made, tmp_path / "set")
    if message != "truncated":  # a broken body shows when it is decoded
        with pytest.raises(DataError, match=rf"row 1\b.*{message}") as refusal:
            read(path)
        assert "--skip-bad" in str(refusal.value)
    data = read(path, skip_bad=True)
    assert [sample.id for sample in data.samples] == ["0", "2"]
    assert len(data.skipped) == 1
    assert "row 1" in data.skipped[0]
    assert message in data.skipped[0]


def test_odd_columns_and_damaged_folders_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = datasets.Features(
        {"image": datasets.Value("binary"), "messages": datasets.Array2D((1, 1), "int32")}
    )
    odd = datasets.Dataset.from_dict({"image": [png("red")], "messages": [[[1]]]}, features)
    with pytest.raises(DataError, match="column 'messages' holds Array2D"):
        read(saved(odd, tmp_path / "odd"))
    path = saved(with_images(), tmp_path / "set")
    with pytest.raises(DataError, match="has no splits"):
        read(path, split="train")
    (path / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as a Hugging Face dataset"):
        read(path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"x\.parquet: cannot be read"):
        read(tmp_path / "x.parquet")
    empty = saved(table(image=[None], messages=[talk("x")]), tmp_path / "empty")
    with pytest.raises(DataError, match="no usable record"):
        read(empty, skip_bad=True)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"vqguard\[datasets\]"):
        read(tmp_path / "empty")


def test_a_dataset_s_script_is_not_run(tmp_path: Path) -> None:
    path = saved(with_images(), tmp_path / "set")
    marker = tmp_path / "ran"
    (path / "set.py").write_text(f"open({str(marker)!r}, 'w')\n")
    info = json.loads((path / "dataset_info.json").read_text())
    (path / "dataset_info.json").write_text(json.dumps({**info, "builder_name": "set"}))
    assert len(read(path).samples) == len(COLOURS)
    assert not marker.exists()


def test_the_cauldron_and_a_snapshot_of_the_hub(tmp_path: Path) -> None:
    """Pairs without marks; every file of a snapshot is a link into the hub's store."""
    pairs = [{"user": "What colour?", "assistant": "It is red.", "source": "made"}]
    made = table(images=[[png("red"), png("white")], [png("red")]], texts=[pairs, pairs * 2])
    store = tmp_path / "blobs"
    store.mkdir()
    made.to_parquet(str(store / "1f2e"))
    snapshot = tmp_path / "snapshots" / "main" / "ai2d"
    snapshot.mkdir(parents=True)
    (snapshot / "train-00000-of-00001-2ce3.parquet").symlink_to(store / "1f2e")
    two, one = read(snapshot.parent).samples
    assert two.turns == (("<image>\n<image>\nWhat colour?", "It is red."),)
    assert one.turns[0] == ("<image>\nWhat colour?", "It is red.")
    assert [len(two.images), len(one.images)] == [2, 1]


def test_flickr_s_captions_name_their_option(tmp_path: Path) -> None:
    made = table(image=[png("red")], caption=[["A red field.", "Red."]], sentids=[[1, 2]])
    path = as_parquet(made, tmp_path / "flickr.parquet")
    with pytest.raises(DataError, match=r"--set columns\.caption=NAME"):
        read(path)
    (sample,) = read(path, caption="caption").samples
    assert len(sample.wordings) == 2
