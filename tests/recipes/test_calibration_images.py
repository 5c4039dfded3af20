"""What a retrofit's maps are made of: refused before the training where no map could be made."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from PIL import Image

from vqguard.errors import ConfigError, DataError, InputError
from vqguard.recipes.data.labelled_images import LeftOutImages
from vqguard.recipes.judging.calibration_images import CalibrationImages
from vqguard.recipes.recipe import RetrofitRecipe, load_recipe
from vqguard.recipes.tiny.world import TinyWorld

CATEGORIES = ("gun", "knife")


def picture(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 12), (shade % 256, shade // 256, 90)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for column, category in enumerate((*CATEGORIES, "neutral")):
        for number in range(40 if category == "neutral" else 4):
            picture(tmp_path / "images" / category / f"{number:02d}.png", 100 * column + number)
    return tmp_path / "images"


def recipe(folder: Path | None, *changes: str) -> RetrofitRecipe:
    data = [] if folder is None else ["data=samples.json", f"calibration_images={folder}"]
    return load_recipe("llava-tiny").override([*data, *changes])


def images(
    folder: Path | None, *changes: str, skipped: list[str] | None = None
) -> CalibrationImages:
    world = TinyWorld() if folder is None else None
    return CalibrationImages(
        recipe(folder, *changes),
        world,
        skip_bad=False,
        skipped=[] if skipped is None else skipped,
    )


REGIONAL = ("guard.judge=regional", "regional.fpr=0.1")
GLOBAL = ("guard.judge=global",)


def test_images_that_will_do_are_given_without_those_that_are_measured(folder: Path) -> None:
    given = images(folder, *REGIONAL)
    given.check()
    neutral = [labels for labels, _ in given.taught() if labels == ("neutral",)]
    left = list(LeftOutImages(folder).images("neutral"))
    assert (len(neutral), len(left)) == (32, 8)
    images(None).check()  # the embedded world's


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # 32 neutral images are not left out; 10 of them choose the threshold
        (("guard.judge=regional",), r"regional\.fpr: 10 held-out .* use at least 222 of them"),
        ((*REGIONAL, "regional.fpr=0.05"), r"regional\.fpr: 10 held-out .* at least 19 of them"),
        ((*REGIONAL, "rules.budget=category"), r"regional\.fpr: .*shared by 2 thresholds"),
        (
            (*REGIONAL, "calibration.tau=null", "calibration.fpr=0.01"),
            r"calibration\.fpr: 16 held-out .* at least 99",
        ),
        ((*REGIONAL, "rules.unfamiliar=0.01"), r"rules\.unfamiliar: .* use at least 99 of them"),
        (
            (*REGIONAL, "rules.unfamiliar=0.01", "rules.unfamiliar_by=visual"),
            r"rules\.unfamiliar: \d+ neutral calibration images .* use at least 99 of them",
        ),
        (
            (*GLOBAL, "rules.unfamiliar=0.01", "rules.unfamiliar_by=visual"),
            r"rules\.unfamiliar: 32 neutral calibration images",
        ),
        ((*REGIONAL, "guard.regional.width=1"), r"2 categories do not fit guard\.regional\.width"),
        ((*GLOBAL, "rules.unfamiliar=0.01"), r"rules\.unfamiliar: 40 calibration images"),
        ((*GLOBAL, "rules.thresholds={gum: 0.3}"), "'gum'.*Did you mean 'gun'"),
        ((*GLOBAL, "rules.hierarchy={weapon: [gum]}"), "'gum'"),
        ((*GLOBAL, "rules.policies={knive: {action: report}}"), "Did you mean 'knife'"),
    ],
)
def test_what_no_map_can_be_made_of_is_refused_before_the_training(
    folder: Path, changes: tuple[str, ...], message: str
) -> None:
    with pytest.raises((InputError, ConfigError), match=message):
        images(folder, *changes).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("rules.smoothing=4",), r"rules\.smoothing: the regional judge .*regional\.smoothing"),
        (("rules.prior=balanced", "rules.count=images"), r"rules\.prior.*\n.*rules\.count"),
        (("rules.thresholds={gun: 0.3}",), r"regional\.fpr: the rules fix thresholds"),
        ((*GLOBAL, "rules.budget=category"), r"calibration\.fpr: the rules ask for budget"),
        (("calibration_labels=l.csv",), "set that too"),
        (("regional.fpr=null",), "expected exactly one"),
        (("regional.tau=0.5",), "expected exactly one"),
        (("regional.fpr=null", "regional.tau=1"), r"tau: expected a number in \[0, 1\)"),
        (("rules.policies={gun: {action: warn}}",), "warning: expected a sentence"),
        (("rules.polices={}",), "Did you mean 'policies'|rules.policies"),
    ],
)
def test_rules_that_do_not_fit_the_recipe_are_refused(
    changes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(None, *changes)


def test_rules_are_read_written_and_kept(tmp_path: Path) -> None:
    own = recipe(
        None,
        "rules.unfamiliar=0.02",
        "rules.budget=parent",
        "rules.hierarchy={weapon: [gun, knife]}",
        "rules.policies={weapon: {action: warn, warning: Mind the picture.}}",
    )
    own.to_yaml(tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == own
    with pytest.raises(InputError, match=r"rules\.unfamiliar"):
        images(None, "rules.unfamiliar=0.00001").check()


def test_rules_without_images_have_nothing_to_rule() -> None:
    own = load_recipe("llava-tiny").override(["data=samples.json", "rules.language=en"])
    given = CalibrationImages(own, None, skip_bad=False, skipped=[])
    with pytest.raises(ConfigError, match="set calibration_images too"):
        given.check()


def test_a_threshold_that_is_given_needs_no_images_of_its_own(folder: Path) -> None:
    fixed = (*REGIONAL, "regional.fpr=null", "regional.tau=0.6", "rules.thresholds={gun: 0.3}")
    images(folder, *fixed).check()


def test_labels_from_a_list_serve_a_retrofit_too(folder: Path) -> None:
    lines = [f"gun/{n:02d}.png,gun,knife" for n in range(4)]
    lines += [f"neutral/{n:02d}.png,neutral" for n in range(40)]
    labels = folder.parent / "labels.csv"
    labels.write_text("\n".join(lines))
    given = images(folder, *REGIONAL, f"calibration_labels={labels}")
    given.check()
    assert [names for names, _ in given.taught()].count(("gun", "knife")) == 4
    left = LeftOutImages(folder, labels)
    assert left.categories == ("neutral",)
    labels.write_text("gun/00.png,gun\n")
    with pytest.raises(DataError, match="'neutral'"):
        images(folder, *REGIONAL, f"calibration_labels={labels}").check()


def test_copies_are_told_and_contradictions_refused(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picture(folder / "gun" / "copy.png", 0)  # of gun/00.png
    skipped: list[str] = []
    (folder / "gun" / "notes.txt").write_text("none")
    given = images(folder, *REGIONAL, skipped=skipped)
    with caplog.at_level(logging.WARNING):
        given.check()
    assert "is a copy of" in caplog.text
    assert len(list(given.taught())) == 4 + 4 + 32
    assert len(skipped) == 1, "files are looked at once"
    picture(folder / "neutral" / "same.png", 0)
    with pytest.raises(InputError, match="cannot be neutral and toxic"):
        images(folder, *REGIONAL).check()


def test_one_picture_does_not_make_a_category(folder: Path) -> None:
    for path in sorted((folder / "gun").iterdir())[1:]:
        path.unlink()
    with pytest.raises(InputError, match="'gun' has one image"):
        images(folder, *REGIONAL).check()
    picture(folder / "gun" / "twin.png", 0)
    with pytest.raises(InputError, match="'gun' has one image"):
        images(folder, *REGIONAL).check()
