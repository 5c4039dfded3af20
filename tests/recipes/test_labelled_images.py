"""Labelled images for calibration, and everything that can be wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from vqguard.errors import DataError, InputError
from vqguard.recipes.data.labelled_images import (
    LabelledFile,
    files_of_folders,
    files_of_list,
    merged,
    open_files,
)


def picture(path: Path, shade: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(path)
    return path


def listed(folder: Path, name: str, text: str) -> list[LabelledFile]:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return files_of_list(path, folder / "images")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("a.png", "b.png", "c, d.png")):
        picture(tmp_path / "images" / name, number)
    return tmp_path


def test_csv_and_jsonl_name_several_labels_an_image(folder: Path) -> None:
    csv = listed(folder, "l.csv", 'a.png,gun,knife\n\nb.png, neutral\n"c, d.png",neutral\n')
    json = listed(
        folder,
        "l.jsonl",
        '{"image": "a.png", "labels": ["gun", "knife"]}\n'
        '{"labels": ["neutral"], "image": "b.png"}\n{"image": "c, d.png", "labels": ["neutral"]}\n',
    )
    assert csv == json
    assert csv[0] == LabelledFile(folder.resolve() / "images" / "a.png", ("gun", "knife"))
    opened = list(open_files(csv, skip_bad=False, skipped=[]))
    assert [labels for labels, _ in opened] == [("gun", "knife"), ("neutral",), ("neutral",)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "a.png,gun\n../x.png,neutral\n", r"line 2: '\.\./x\.png' leaves"),
        ("l.csv", "a.png,gun\n/etc/passwd,neutral\n", "line 2: '/etc/passwd' leaves"),
        ("l.csv", "a.png,gun\nnone.png,neutral\n", "there is no image 'none.png'"),
        ("l.csv", "a.png\nb.png,neutral\n", r"line 1: expected 1 to 32 different labels, got \[\]"),
        ("l.csv", "a.png,gun,gun\nb.png,neutral\n", "different labels"),
        ("l.csv", "a.png,\nb.png,neutral\n", "printable characters, got ''"),
        ("l.csv", "a.png,gun\tx\nb.png,neutral\n", "printable characters"),
        ("l.csv", "a.png,gun,neutral\nb.png,neutral\n", "'neutral' stands alone"),
        ("l.csv", 'a.png,"gun\nb.png,neutral\n', "not a line of CSV"),
        ("l.csv", "a.png,gun\n", "expected images labelled 'neutral'"),
        ("l.csv", "a.png,neutral\n", "at least one toxic"),
        ("l.csv", "\n", "names no image"),
        ("l.csv", f"a.png,{'g' * 9000}\n", "longer than 8,192"),
        ("l.csv", f"a.png,{'g' * 101}\nb.png,neutral\n", "1 to 100 printable"),
        ("l.txt", "a.png,gun\n", r"\.csv or \.jsonl"),
        ("l.jsonl", "[1]\n", "line 1: expected"),
        ("l.jsonl", '{"image": "a.png", "labels": ["gun"], "x": 1}\n', "line 1: expected"),
        ("l.jsonl", '{"image": "a.png", "labels": "gun"}\n', "list of texts"),
        ("l.jsonl", '{"image": "a.png", "image": "b.png", "labels": []}\n', "given twice"),
        ("l.jsonl", '{"image": "a.png", "labels": [NaN]}\n', "NaN"),
        ("l.jsonl", '{"image": "a\\u0000.png", "labels": ["gun"]}\n', "no path|no image"),
    ],
)
def test_a_line_that_does_not_fit_is_named(
    folder: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        listed(folder, name, text)


def test_an_image_that_is_neutral_and_toxic_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "gun" / "1.png", 9)
    picture(tmp_path / "neutral" / "2.png", 9)
    files = files_of_folders(tmp_path, [])
    with pytest.raises(InputError, match=r"2\.png \(neutral\) and .*1\.png \(gun\) are the same"):
        merged(files, [])


def test_copies_count_once_under_all_their_labels(tmp_path: Path) -> None:
    for category, shades in (("gun", (1, 1)), ("knife", (1, 2, 3)), ("neutral", (7, 8))):
        for number, shade in enumerate(shades):
            picture(tmp_path / category / f"{number}.png", shade)
    warnings: list[str] = []
    kept = merged(files_of_folders(tmp_path, []), warnings)
    assert [file.labels for file in kept] == [
        ("gun", "knife"),
        ("knife",),
        ("knife",),
        ("neutral",),
        ("neutral",),
    ]
    assert "gun/1.png is a copy of" in warnings[0].replace("\\", "/")
    assert warnings[1].startswith("gun has one image"), "two copies are one image"
    assert len(warnings) == 2


def test_a_category_of_one_image_is_warned_about(tmp_path: Path) -> None:
    picture(tmp_path / "gun" / "0.png", 1)
    for number in range(3):
        picture(tmp_path / "neutral" / f"{number}.png", 10 + number)
    warnings: list[str] = []
    merged(files_of_folders(tmp_path, []), warnings)
    assert warnings == [
        "gun has one image, and one picture does not say what is like it: give at least 20"
    ]


def test_no_neutral_images_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "gun" / "0.png", 1)
    with pytest.raises(InputError, match="one of them called 'neutral'"):
        files_of_folders(tmp_path, [])
