"""The pages that show why pictures were flagged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from vqguard.errors import ConfigError
from vqguard.judging.verdict import DecidingRegion, Reason
from vqguard.recipes.report.explain import Explanations, outlined, region_in_picture
from vqguard.safety_map import SafetyMap, Verdict

MAP = SafetyMap(("<gun>", "knife"), torch.tensor([[3, 0, 1], [0, 0, 4]]))
REGION = DecidingRegion("picture", 0, 0.25, 0.5, 0.5, 0.75)
REASON = Reason("<gun>", 0.75, 0.6, 3, 0, "refuse", MAP.version, REGION)
FLAGGED = Verdict(True, "<gun>", 0.75, 0, 3, reason=REASON)
YELLOW = (255, 214, 0)


def processor(**settings: Any) -> Any:
    return SimpleNamespace(**settings)


def test_a_page_and_numbers_of_what_was_judged(tmp_path: Path) -> None:
    pages = Explanations(tmp_path / "why", MAP, processor())
    picture = Image.new("RGB", (96, 96), "blue")
    pages.add(Path("../../a<script>b.png"), "flagged", FLAGGED, picture)
    pages.add(Path("b\udcff\n.png"), "ok", Verdict(False, "neutral", 0.0, 1), picture)
    pages.add(Path("c.png"), "ambiguous", None, picture, "shows <b>another</b> picture")
    page = pages.close().read_text()
    assert "<script" not in page
    assert "<b>another" not in page
    assert "a&lt;script&gt;b.png" in page
    assert "&lt;gun&gt; 0.750" in page
    assert "keeps no calibration images" in page
    document = json.loads((tmp_path / "why" / "explain.json").read_text())
    assert document["map_version"] == MAP.version
    first, second, third = document["pictures"]
    assert first["image"] == "../../a<script>b.png"
    assert (first["score"], first["threshold"], first["semantic_code"]) == (0.75, 0.6, 0)
    assert first["category_scores"] == {"<gun>": 0.75, "knife": 0.0, "neutral": 0.25}
    assert first["region"] == {
        "part": "picture",
        "index": 0,
        "top": 0.25,
        "left": 0.5,
        "bottom": 0.5,
        "right": 0.75,
    }
    assert (second["verdict"], second["region"], second["threshold"]) == ("ok", None, None)
    assert (third["verdict"], third["category"]) == ("ambiguous", None)
    assert sorted(path.name for path in (tmp_path / "why").iterdir()) == [
        "explain.json",
        "index.html",
        "pictures",
    ]
    for row in (first, second, third):
        assert f'src="{row["picture"]}"' in page
    drawn = Image.open(tmp_path / "why" / first["picture"])
    assert drawn.size == (192, 192)
    frame = [drawn.getpixel(place) for place in ((96, 48), (143, 48), (96, 95), (143, 95))]
    assert frame == [YELLOW] * 4
    assert drawn.getpixel((20, 20)) == (0, 0, 255)
    plain = Image.open(tmp_path / "why" / second["picture"])
    assert plain.getcolors() == [(192 * 192, (0, 0, 255))]


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not an empty directory"):
        Explanations(tmp_path, MAP, processor())
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_what_is_drawn_carries_no_metadata(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4000, 20))
    picture.info.update(icc_profile=b"profile", comment="secret", exif=b"Exif\x00\x00")
    outlined(picture, None).save(tmp_path / "a.png")
    read = Image.open(tmp_path / "a.png")
    assert read.size == (1024, 5)
    assert not read.info


@pytest.mark.parametrize(
    ("settings", "box"),
    [
        ({}, (150.0, 25.0, 225.0, 50.0)),
        ({"do_center_crop": False}, (150.0, 25.0, 225.0, 50.0)),
        # the middle 100 x 100 pixels are all that the encoder sees
        (
            {
                "do_center_crop": True,
                "size": {"shortest_edge": 50},
                "crop_size": {"height": 50, "width": 50},
            },
            (150.0, 25.0, 175.0, 50.0),
        ),
        (
            {
                "do_center_crop": True,
                "size": {"height": 60, "width": 60},
                "crop_size": {"height": 30, "width": 30},
            },
            (150.0, 37.5, 187.5, 50.0),
        ),
        ({"do_center_crop": True, "size": {"longest_edge": 9}, "crop_size": {"height": 3}}, None),
        ({"do_pad": True}, None),
        # 300 x 300 pixels with 100 rows of padding above and below: cut off at the picture
        ({"do_pad": True, "pad_to_square": len}, (150.0, 0.0, 225.0, 50.0)),
        ({"do_pad": True, "image_grid_pinpoints": [[1, 2]]}, (150.0, 25.0, 225.0, 50.0)),
    ],
)
def test_a_region_is_drawn_where_the_encoder_saw_it_or_not_at_all(
    settings: dict[str, Any], box: tuple[float, ...] | None
) -> None:
    found = region_in_picture(REGION, (300, 100), processor(**settings))
    assert found == (None if box is None else pytest.approx(box))
    tile = replace(REGION, part="tile", index=2)
    assert region_in_picture(tile, (300, 100), processor(**settings)) is None
