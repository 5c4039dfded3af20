"""WebDataset shards and mixtures: what is read, what is refused, in which proportions."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vqguard.errors import ConfigError, DataError
from vqguard.recipes.data.mixture import Mixture, read_data
from vqguard.recipes.data.records.data_set import LlavaData
from vqguard.recipes.data.samples import Sample
from vqguard.recipes.data.webdataset import PROMPT, read_shards

TURNS = [
    {"from": "human", "value": "<image>\nWhat colour?"},
    {"from": "gpt", "value": "Red."},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "Yes."},
]


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path: Path, files: dict[str, bytes | str | Any]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            raw = content if isinstance(content, bytes) else None
            if raw is None:
                raw = (content if isinstance(content, str) else json.dumps(content)).encode()
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return path


def good(path: Path) -> Path:
    return shard(
        path,
        {
            "a/1.png": png("red"),
            "a/1.json": {"conversations": TURNS, "image": "/elsewhere/x.jpg"},
            "a/2.png": png("blue"),
            "a/2.txt": "A blue field.\n",
            "a/2.cls": "7",
            "text.json": {
                "conversations": [
                    {"from": "human", "value": "Two plus two?"},
                    {"from": "gpt", "value": "Four."},
                ]
            },
        },
    )


def test_conversations_captions_and_text(tmp_path: Path) -> None:
    data = read_shards(good(tmp_path / "0.tar"))
    talk, caption, text = data.samples
    assert talk.id == "a/1"
    assert talk.turns == (("<image>\nWhat colour?", "Red."), ("Sure?", "Yes."))
    assert talk.image is not None
    assert talk.image().getpixel((0, 0)) == (255, 0, 0)
    assert caption.turns == ((f"<image>\n{PROMPT}", "A blue field."),)
    assert caption.image is not None
    assert caption.image().getpixel((0, 0)) == (0, 0, 255)
    assert text.image is None
    assert text.captions == ()
    assert len(data.captions(9)) == 2


def test_a_folder_of_shards_in_order(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar"):
        shard(tmp_path / name, {f"{name}.png": png(), f"{name}.txt": name})
    # everything behind the first dot is the ending, as in WebDataset
    with pytest.raises(DataError, match=r"sample a: 'a\.tar\.png' has a dot in its name"):
        read_shards(tmp_path)
    with pytest.raises(DataError, match="no usable record has an image"):
        read_data(tmp_path, None, skip_bad=True)
    for name in ("b", "a"):
        shard(tmp_path / f"{name}.tar", {f"{name}.png": png(), f"{name}.txt": name})
    assert [sample.id for sample in read_shards(tmp_path).samples] == ["a", "b"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"x.png": png()}, "neither .json nor .txt"),
        ({"x.png": png(), "x.jpg": png(), "x.txt": "a"}, "jpg and png"),
        ({"x.png": b"text", "x.txt": "a"}, "not an image that is accepted"),
        ({"x.png": png(), "x.txt": "  "}, "empty answer"),
        ({"x.png": png(), "x.txt": b"\xff"}, "not UTF-8"),
        ({"x.png": png(), "x.json": "[1]"}, "expected a JSON object"),
        ({"x.png": png(), "x.json": "{"}, "x"),
        ({"x.png": png(), "x.json": {"conversations": TURNS[2:]}}, "found 0 for 1"),
        ({"x.json": {"conversations": TURNS}}, "found 1 for 0"),
    ],
)
def test_a_bad_sample_is_named_or_skipped(
    files: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = shard(tmp_path / "0.tar", {"good.png": png(), "good.txt": "Fine.", **files})
    with pytest.raises(DataError, match=message) as refusal:
        read_shards(path)
    assert "sample x" in str(refusal.value)
    assert "--skip-bad" in str(refusal.value)
    data = read_shards(path, skip_bad=True)
    assert [sample.id for sample in data.samples] == ["good"]
    assert len(data.skipped) == 1


def numbered(name: str, count: int) -> LlavaData:
    return LlavaData([Sample(f"{name}{i}", (), (("q", "a"),)) for i in range(count)], seed=0)


@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.05, 20), min_size=4, max_size=4),
    count=st.integers(0, 200),
    seed=st.integers(0, 5),
)
def test_shares_hold_and_nothing_is_used_twice(
    sizes: list[int], weights: list[float], count: int, seed: int
) -> None:
    weights = weights[: len(sizes)]
    names = "abcd"[: len(sizes)]
    parts = [numbered(n, s) for n, s in zip(names, sizes, strict=True)]
    mixed = Mixture(list(zip(parts, weights, strict=True)), seed)
    found = [sample.id for sample in mixed.instructions(count)]
    assert len(set(found)) == len(found) <= count
    assert found == [sample.id for sample in mixed.instructions(count)]
    used = Counter(name[0] for name in found)
    for name, weight in zip(names, weights, strict=True):
        assert abs(used[name] - len(found) * weight / sum(weights)) < 1 + 1e-6
    # it ends because it may, or because a part is (all but one sample) used up
    largest = min(s * sum(weights) / w for s, w in zip(sizes, weights, strict=True))
    assert len(found) >= min(count, int(largest) - len(sizes))


def test_a_mixture_is_a_file(tmp_path: Path) -> None:
    good(tmp_path / "0.tar")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "p.png").write_bytes(png())
    entries = [{"id": f"e{i}", "image": "p.png", "conversations": TURNS} for i in range(8)]
    (tmp_path / "talk.json").write_text(json.dumps(entries))
    path = tmp_path / "mix.yaml"
    path.write_text(
        "parts:\n- {data: talk.json, images: photos, weight: 2}\n- {data: 0.tar, weight: 1}\n"
    )
    mixed = read_data(path, None)
    assert len(mixed.samples) == 11
    found = Counter(sample.id[0] == "e" for sample in mixed.instructions(9))
    assert found == {True: 6, False: 3}
    assert all(sample.image for sample in mixed.captions(9))
    with pytest.raises(DataError, match="Leave --images out"):
        read_data(path, tmp_path)
    with pytest.raises(DataError, match="Leave --images out"):
        read_data(tmp_path / "0.tar", tmp_path)
    for text, error, message in (
        ("parts: []", DataError, "names no data set"),
        ("parts: [{data: a.json, weight: 0}]", ConfigError, "more than 0"),
        ("parts: [{data: mix.yaml, weight: 1}]", DataError, "another one"),
        ("part: []", ConfigError, "parts"),
    ):
        path.write_text(text)
        with pytest.raises(error, match=message):
            read_data(path, None)
