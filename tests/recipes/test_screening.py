"""Scans whose verdicts are files: every picture once, whatever it lies in and however often a scan
was begun."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vqguard.errors import ConfigError
from vqguard.recipes.judging.map_changes import MapEdit, edit_map
from vqguard.recipes.run import open_run, save_run_model
from vqguard.recipes.screening.ambiguity import REFUSE
from vqguard.recipes.screening.bulk import Job, judge_here, scan_units
from vqguard.recipes.screening.counts import Counts
from vqguard.recipes.screening.units import Unit, refuse_inside, units_of

from .conftest import MakeModel, calibrate_on, noisy_pictures

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

PICTURES = noisy_pictures(12)


@pytest.fixture
def run(small_guarded: MakeModel, tmp_path: Path) -> Path:
    model, processor = small_guarded()
    calibrate_on(model, processor, PICTURES)
    folder = tmp_path / "run"
    folder.mkdir()
    save_run_model(folder, model, processor)
    return folder


@pytest.fixture
def words(run: Path) -> list[str]:
    """What is said of each of `PICTURES`, judged together."""
    verdicts = open_run(run).screen_images(list(PICTURES))
    said = ["flagged" if verdict.flagged else "ok" for verdict in verdicts]
    assert {"flagged", "ok"} == set(said)
    return said


Scan = Callable[..., Counts]


@pytest.fixture
def scan(run: Path, tmp_path: Path) -> Scan:
    def start(*named: Path, ambiguous: str = REFUSE, **options: Any) -> Counts:
        job = Job.of_run(run, tmp_path / "verdicts", ambiguous=ambiguous)
        return scan_units(job, units_of(named, _nothing), **options)

    return start


def _nothing(path: Path, why: str) -> None:
    raise AssertionError(f"{path}: {why}")


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def rows(folder: Path) -> list[dict[str, Any]]:
    """All verdicts, as whoever reads the folder as one table sees them."""
    table: list[dict[str, Any]] = parquet.read_table(folder).to_pylist()
    return table


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """`PICTURES` in a folder, a shard and a table, four in each."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for number, picture in enumerate(PICTURES[:4]):
        picture.save(folder / "deep" / f"{number}.png")
    members = [(f"{n:03}.png", png(picture)) for n, picture in enumerate(PICTURES[4:8])]
    side = [(f"{n:03}.json", b"{}") for n in range(4)]
    write_tar(folder / "shard.tar", sorted([*members, *side]))
    cells = [{"bytes": png(picture), "path": None} for picture in PICTURES[8:]]
    parquet.write_table(pa.table({"id": range(4), "image": cells}), folder / "table.parquet")
    return folder


def names_of(folder: Path) -> list[str]:
    return [
        *(str(folder / "deep" / f"{n}.png") for n in range(4)),
        *(f"{folder / 'shard.tar'}: {n:03}.png" for n in range(4)),
        *(f"{folder / 'table.parquet'}: row {n}" for n in range(4)),
    ]


def test_folders_shards_and_tables(
    scan: Scan, pictures: Path, words: list[str], tmp_path: Path
) -> None:
    counts = scan(pictures)
    flagged = words.count("flagged")
    assert counts == Counts(judged=12, flagged=flagged)
    said = {row["image"]: row for row in rows(tmp_path / "verdicts")}
    assert sorted(said) == sorted(names_of(pictures))
    assert [said[name]["verdict"] for name in names_of(pictures)] == words
    row = next(row for row in said.values() if row["verdict"] == "flagged")
    assert row["category"] == "gun"
    assert row["reason"]["score"] >= row["reason"]["threshold"]
    assert row["quantised"] is True


def test_a_picture_that_is_named_twice_is_judged_once(
    scan: Scan, pictures: Path, tmp_path: Path
) -> None:
    assert scan(pictures, pictures / "deep", pictures / "shard.tar").judged == 12


@pytest.mark.parametrize("done", [0, 1, 2])
def test_what_was_stopped_goes_on(
    scan: Scan, pictures: Path, words: list[str], tmp_path: Path, done: int
) -> None:
    folder = tmp_path / "verdicts"

    def stopped(job: Job, units: Sequence[Unit]) -> Iterator[Unit]:
        yield from list(judge_here(job, units[:done]))
        (folder / ".vqguard-draft-0123").write_bytes(b"half a file")  # as a kill leaves it
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(pictures, distribute=stopped)
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert len(written) == done
    with pytest.raises(ConfigError, match="--resume"):
        scan(pictures)
    assert scan(pictures, resume=True).judged == 12
    assert all(path.stat().st_mtime_ns == at for path, at in written.items())
    said = rows(folder)
    assert sorted(row["image"] for row in said) == sorted(names_of(pictures))


def test_what_has_changed_is_judged_again(
    scan: Scan, pictures: Path, words: list[str], tmp_path: Path
) -> None:
    scan(pictures)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "verdicts").glob("*.parquet")}
    (pictures / "deep" / "0.png").unlink()
    picture = PICTURES[words.index("flagged")]
    for number in (1, 2, 3):
        picture.save(pictures / "deep" / f"{number}.png")
    assert scan(pictures, resume=True).judged == 11
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "verdicts").glob("*.parquet")}
    assert len(before.items() & after.items()) == 2
    said = {row["image"]: row["verdict"] for row in rows(tmp_path / "verdicts")}
    assert [said[str(pictures / "deep" / f"{n}.png")] for n in (1, 2, 3)] == ["flagged"] * 3


def test_verdicts_of_two_maps_are_not_mixed(
    scan: Scan, pictures: Path, run: Path, tmp_path: Path
) -> None:
    def changed(job: Job, units: Sequence[Unit]) -> Iterator[Unit]:
        edit_map(run, MapEdit(tau=0.99))
        yield from judge_here(job, units)

    with pytest.raises(ConfigError, match="was changed while"):
        scan(pictures, distribute=changed)
    with pytest.raises(ConfigError, match="another map"):
        scan(pictures, resume=True)
    with pytest.raises(ConfigError, match="another map"):
        scan(pictures, resume=True, ambiguous="report")


def test_every_file_without_a_verdict_has_a_row(scan: Scan, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "notes.txt").write_text("none")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(16))
    (folder / "cut.tar").write_bytes(b"no tar at all" * 100)
    (folder / "cut.parquet").write_bytes(b"PAR1 and no more")
    content = png(PICTURES[0])
    members = [
        ("a.bin", content),
        ("a.json", b"{}"),
        ("b.txt", content),  # begins like an image, whatever it is called
        ("c.bin", b"no picture"),
        ("d.png", b"broken"),
        ("twice.png", content),
        ("twice.png", content),
        ("../up.png", content),
    ]
    write_tar(folder / "shard.tar", members)
    cells = [content, None, b"broken"]
    parquet.write_table(pa.table({"image": cells}), folder / "plain.parquet")
    parquet.write_table(pa.table({"photo": cells}), folder / "other.parquet")
    counts = scan(folder)
    said = rows(tmp_path / "verdicts")
    short = {row["image"].removeprefix(f"{folder}/"): row for row in said}
    assert len(short) == len(said)
    judged = {"shard.tar: a.bin", "shard.tar: b.txt", "plain.parquet: row 0"}
    assert {name for name, row in short.items() if row["category"]} == judged
    unknown = {"notes.txt", "shard.tar: c.bin"}
    assert {name for name, row in short.items() if row["verdict"] == "unknown"} == unknown
    unreadable = {
        *("broken.png", "photo.heic", "cut.tar", "cut.parquet", "other.parquet"),
        *("shard.tar: d.png", "shard.tar: twice.png", "shard.tar: ../up.png"),
        *("plain.parquet: row 1", "plain.parquet: row 2"),
    }
    assert {name for name, row in short.items() if row["verdict"] == "unreadable"} == unreadable
    assert all(short[name]["error"] for name in unknown | unreadable)
    assert "--image-column" in short["other.parquet"]["error"]
    assert (counts.judged, counts.bad, counts.unknown) == (3, 10, 2)


def test_a_name_that_is_no_text(scan: Scan, tmp_path: Path) -> None:
    folder = tmp_path / "names"
    folder.mkdir()
    PICTURES[0].save(os.fsdecode(os.fsencode(folder) + b"/\xff.png"), "PNG")
    assert scan(folder).judged == 1
    assert rows(tmp_path / "verdicts")[0]["image"].endswith("\\udcff.png")


def test_ambiguous_files(scan: Scan, tmp_path: Path) -> None:
    folder = tmp_path / "clear"
    folder.mkdir()
    see_through = PICTURES[0].convert("RGBA")
    see_through.putalpha(128)
    see_through.save(folder / "clear.png")
    write_tar(folder / "shard.tar", [("clear.png", png(see_through))])
    assert scan(folder) == Counts(judged=2, flagged=2, ambiguous=2)
    assert {row["verdict"] for row in rows(tmp_path / "verdicts")} == {"ambiguous"}


def test_an_output_among_the_pictures_is_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="outside"):
        refuse_inside(pictures / "deep" / "verdicts", [pictures])
    refuse_inside(tmp_path / "verdicts", [pictures])


def test_units_do_not_depend_on_how_folders_are_listed(pictures: Path, tmp_path: Path) -> None:
    units = units_of([pictures], _nothing)
    assert [unit.kind for unit in units] == ["webdataset", "parquet", "files"]
    assert units == units_of([pictures], _nothing)
    assert len({unit.digest for unit in units}) == 3
    assert json.loads(json.dumps([unit.digest for unit in units]))
