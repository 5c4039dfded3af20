"""Records are looked at once, before anything is trained; what was found is kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vqguard.errors import DataError
from vqguard.recipes import models
from vqguard.recipes import retrofit as retrofit_module
from vqguard.recipes.data import fitting
from vqguard.recipes.data.encoding import EncodedSamples
from vqguard.recipes.data.fitting import Fitting
from vqguard.recipes.data.llava_json import read_llava
from vqguard.recipes.data.mixture import read_data
from vqguard.recipes.data.records import json_entries
from vqguard.recipes.data.records.checked import Checks
from vqguard.recipes.data.records.data_set import LlavaData
from vqguard.recipes.data.records.json_entries import JsonEntries
from vqguard.recipes.data.samples import Sample
from vqguard.recipes.recipe import RetrofitRecipe, load_recipe
from vqguard.recipes.retrofit import retrofit
from vqguard.recipes.run import RECIPE
from vqguard.recipes.run_samples import CHECKED, RunSamples, checks_of
from vqguard.recipes.sources import source_of

LONG = "word " * 400
Entry = dict[str, Any]


def entry(name: str, question: str = "what is this ?", image: str | None = "a.png") -> Entry:
    mark = "<image>\n" if image else ""
    turns = [{"from": "human", "value": mark + question}, {"from": "gpt", "value": "a dog ."}]
    return {"id": name, **({"image": image} if image else {}), "conversations": turns}


def write(folder: Path, entries: list[Any]) -> Path:
    Image.new("RGB", (40, 32), "red").save(folder / "a.png")
    path = folder / "data.json"
    path.write_text(json.dumps(entries))
    return path


def recipe_of(data: Path, *changes: str) -> RetrofitRecipe:
    return load_recipe("llava-tiny").override(
        [f"data={data}", "stage1.max_length=128", "stage2.max_length=128", *changes]
    )


def test_what_no_stage_can_encode_is_refused_before_training_or_left_out(tmp_path: Path) -> None:
    entries = [entry("good"), entry("long", LONG), entry("text", image=None)]
    recipe = recipe_of(write(tmp_path, [*entries, entry("long too", LONG, None)]))
    with pytest.raises(DataError) as refused:
        RunSamples(recipe, skip_bad=False)
    assert "sample long:" in str(refused.value)
    assert "1 more do not fit (all others fit):\n  sample long too:" in str(refused.value)
    samples = RunSamples(recipe, skip_bad=True)
    assert [line.split(":")[0] for line in samples.skipped] == ["sample long", "sample long too"]
    assert len(samples.instructions) == 1  # the other one is held out
    RunSamples(recipe.override(["stage1.max_length=900", "stage2.max_length=900"]), skip_bad=False)


def test_bad_records_are_looked_for_up_to_a_number(tmp_path: Path) -> None:
    path = write(tmp_path, [{"id": n} for n in range(50)])
    with pytest.raises(DataError, match=r"entry 0 .*--skip-bad(.|\n)*19 more do not fit \(no more"):
        read_llava(path, None)


def test_a_refused_run_goes_on_with_another_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LoadedError(Exception):
        pass

    def load(recipe: RetrofitRecipe) -> None:
        raise LoadedError

    monkeypatch.setattr(retrofit_module, "base_model", load)
    recipe = recipe_of(write(tmp_path, [entry("good"), entry("long", LONG, None), entry("b")]))
    run = tmp_path / "run"
    with pytest.raises(DataError, match="Raise max_length"):
        retrofit(recipe, run, command="")
    assert not (run / RECIPE).exists()
    longer = recipe.override(["stage2.max_length=900"])
    with pytest.raises(LoadedError):
        retrofit(longer, run, resume=True, command="")
    assert (run / RECIPE).is_file()


def test_a_resumed_run_does_not_look_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(
        tmp_path, [*(entry(f"{n}", f"what is {n} ?") for n in range(40)), entry("x", LONG)]
    )
    recipe = recipe_of(data)
    first = RunSamples(recipe, skip_bad=True)
    first.keep_checks(tmp_path)
    looked: list[str] = []
    checked = Fitting.__call__

    def look(self: Fitting, sample: Sample) -> None:
        looked.append(sample.id)
        checked(self, sample)

    monkeypatch.setattr(Fitting, "__call__", look)
    again = RunSamples(recipe, skip_bad=True, run=tmp_path)
    assert looked == []
    for part in ("captions", "instructions", "starters"):
        found, before = getattr(again, part), getattr(first, part)
        assert [(s.id, s.turns) for s in found] == [(s.id, s.turns) for s in before]
    assert again.skipped == first.skipped
    for change in ("stage2.max_length=64", "seed=7"):
        looked.clear()
        RunSamples(recipe.override([change]), skip_bad=True, run=tmp_path)
        assert len(looked) == 41
    looked.clear()
    checks = checks_of(recipe, tmp_path)
    checks.finished = True
    source = source_of(recipe, skip_bad=False, checks=checks)
    assert (len(source.instructions(99)), looked) == (40, [])
    data.write_text(data.read_text() + "\n")
    looked.clear()
    RunSamples(recipe, skip_bad=True, run=tmp_path)
    assert len(looked) == 41
    (tmp_path / CHECKED).write_bytes(b"nothing of this kind")
    assert RunSamples(recipe, skip_bad=True, run=tmp_path).skipped == first.skipped


def test_no_picture_is_opened_where_bounds_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(write(tmp_path, [entry(f"{n}") for n in range(9)]))
    encoded: list[str] = []
    encode = EncodedSamples.example

    def counted(self: EncodedSamples, sample: Sample) -> Any:
        encoded.append(sample.id)
        return encode(self, sample)

    monkeypatch.setattr(EncodedSamples, "example", counted)
    RunSamples(recipe, skip_bad=False)
    assert encoded == []


@settings(max_examples=40, deadline=None, suppress_health_check=[*HealthCheck])
@given(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=60), min_size=2, max_size=6),
    st.integers(20, 120),
    st.booleans(),
)
def test_the_check_says_what_encoding_does(
    small_model: Callable[..., Any], texts: list[str], length: int, pictured: bool
) -> None:
    """Property: whatever passes can be encoded, and whatever does not cannot."""
    _, processor = small_model()
    clean = [text.replace("<image>", "").strip() or "a" for text in texts]
    turns = list(zip(clean[::2], clean[1::2], strict=False))
    images: tuple[Callable[[], Image.Image], ...] = ()
    if pictured:
        images = (lambda: Image.new("RGB", (40, 32)),)
        turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
    sample = Sample("s", images, tuple(turns), sizes=((40, 32),) * len(images))
    problems = []
    for check in (
        Fitting(processor, length, length),
        EncodedSamples([], processor, length).example,
    ):
        try:
            check(sample)
            problems.append("")
        except DataError as error:
            problems.append(str(error))
    assert problems[0] == problems[1]


@pytest.mark.parametrize("family", ["llava-1.5", "llava-next", "qwen2-vl"])
@settings(max_examples=40, deadline=None, suppress_health_check=[*HealthCheck])
@given(st.text(max_size=60))
def test_a_text_has_no_more_tokens_than_the_bound(
    family: str, family_processor: Callable[[str], Any], text: str
) -> None:
    ids = family_processor(family).tokenizer(text)["input_ids"]
    assert len(ids) <= fitting._most_tokens(text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[*HealthCheck])
@given(
    st.lists(st.dictionaries(st.text(max_size=6), VALUES, min_size=1, max_size=3), min_size=1),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.sampled_from([None, 1, "lines"]),
    st.integers(1, 40),
)
def test_entries_are_read_piece_by_piece(
    tmp_path_factory: pytest.TempPathFactory,
    entries: list[Entry],
    encoding: str,
    form: int | str | None,
    piece: int,
) -> None:
    """Property: the same values as of the whole text, and again from their places."""
    path = tmp_path_factory.mktemp("json") / "data.json"
    if form == "lines":
        text = "\r\n".join(json.dumps(value) for value in entries) + "\n\n"
    else:
        text = json.dumps(entries, ensure_ascii=bool(piece % 2), indent=form)
    path.write_bytes(text.encode(encoding, "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_entries, "_PIECE", piece)
        found = JsonEntries(path)
        read = list(found)
    assert [entry.value for entry in read] == entries
    assert [found.at(entry.start, entry.end) for entry in read] == entries


RECORDS = st.fixed_dictionaries(
    {},
    optional={
        "id": st.integers(0, 3) | st.text(max_size=3),
        "image": st.sampled_from(
            ["a.png", "none.png", "../a.png", ["a.png"], ["a.png"] * 2, 3, ""]
        ),
        "images": st.sampled_from([[], ["a.png"], None]),
        "video": st.sampled_from(["a.mp4", "", None]),
        "source": VALUES,
        "conversations": st.lists(
            st.fixed_dictionaries(
                {
                    "from": st.sampled_from(["human", "gpt", "system", "user", "other"]),
                    "value": st.sampled_from(
                        ["<image>\nwhat ?", "<video>\nwhat ?", "what ?", "a dog .", "", LONG]
                    ),
                }
            ),
            max_size=4,
        ),
    },
)


@settings(max_examples=80, deadline=None, suppress_health_check=[*HealthCheck])
@given(st.lists(RECORDS, max_size=8), st.booleans())
def test_every_record_is_used_or_listed(
    tmp_path_factory: pytest.TempPathFactory,
    write_video: Callable[..., Path],
    records: list[Entry],
    strict: bool,
) -> None:
    folder = tmp_path_factory.mktemp("records")
    write_video(folder / "a.mp4", frames=2)
    good = entry("good")
    path = write(folder, [*records, good])
    data = read_data(path, None, skip_bad=True)
    assert len(data.samples) + len(data.skipped) == len(records) + 1
    for sample in data.samples:
        assert all(opener().size == (40, 32) for opener in sample.images)
        marks = sum(question.count("<image>") for question, _ in sample.turns)
        if sample.videos:
            marks += sum(question.count("<video>") for question, _ in sample.turns)
        assert marks == len(sample.images) + len(sample.videos)
    shown = sum(len(sample.videos) for sample in data.samples)
    assert shown + len(data.skipped) >= len([r for r in records if r.get("video")])
    if data.skipped and strict:
        with pytest.raises(DataError, match="--skip-bad"):
            read_data(path, None)


def test_unmarked_pairs_of_the_cauldron() -> None:
    from vqguard.recipes.data.records.turns import read_turns

    pairs = [
        {"user": "What?", "assistant": "A.", "source": "x"},
        {"user": "And?", "assistant": "B.", "source": "x"},
    ]
    assert read_turns(pairs, "row", pictures=1) == (("<image>\nWhat?", "A."), ("And?", "B."))
    two = read_turns(pairs[:1], "row", pictures=2)
    assert two == (("<image>\n<image>\nWhat?", "A."),)


def test_coco_s_own_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, [])
    path.write_text(json.dumps({"images": [{"id": 1}], "annotations": [{"image_id": 1}]}))
    with pytest.raises(DataError, match="as COCO's files do"):
        read_llava(path, None)


def test_links_are_followed_when_asked(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    source = write(blobs, [entry("1", image="coco/a.png"), entry("2", image="b.png")])
    (snapshot / "data.json").symlink_to(source)
    (snapshot / "b.png").symlink_to(blobs / "a.png")
    (snapshot / "coco").symlink_to(blobs)
    with pytest.raises(DataError, match="by a symbolic link; --follow-links permits that"):
        read_data(snapshot / "data.json", None)
    data = read_data(snapshot / "data.json", None, follow_links=True)
    assert [sample.images[0]().size for sample in data.samples] == [(40, 32)] * 2
    for name in ("../../blobs/a.png", str(blobs / "a.png"), "coco/../../../blobs/a.png"):
        path = write(tmp_path, [entry("3", image=name)])
        with pytest.raises(DataError, match="leaves the image root"):
            read_data(path, snapshot, follow_links=True)
    (snapshot / "loop").symlink_to(snapshot / "loop")
    with pytest.raises(DataError, match="loop"):
        read_data(write(tmp_path, [entry("4", image="loop/a.png")]), snapshot, follow_links=True)


def test_parts_of_texts_alone_and_made_up_ids(tmp_path: Path) -> None:
    for name, image in (("a", "a.png"), ("b", None)):
        (tmp_path / name).mkdir()
        records = [entry("", f"what is {n} ?", image) for n in range(20)]
        for record in records:
            del record["id"]
        write(tmp_path / name, records)
    mix = tmp_path / "mix.yaml"
    parts = "{data: a/data.json, weight: 1}, {data: b/data.json, weight: 1}"
    mix.write_text(f"parts: [{parts}]")
    mixed = read_data(mix, None)
    assert len({sample.id for sample in mixed.samples}) == 40
    assert len(mixed.captions(99)) == 20
    assert len(mixed.instructions(99)) == 40
    mix.write_text("parts: [{data: b/data.json, weight: 1}]")
    with pytest.raises(DataError, match="no usable record has an image"):
        read_data(mix, None)


def test_a_log_has_no_bars(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vqguard.recipes.console import progress

    monkeypatch.setattr(progress, "EVERY", 0.0)
    with caplog.at_level(logging.INFO):
        read_llava(write(tmp_path, [entry("a"), entry("b")]), None)
    assert "checking data.json: 1" in caplog.text
    caplog.clear()
    monkeypatch.setattr(progress, "EVERY", 60.0)
    with caplog.at_level(logging.INFO):
        assert isinstance(read_llava(write(tmp_path, [entry("a")]), None), LlavaData)
    assert "checking" not in caplog.text


def test_processors_are_loaded_without_their_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("loads the weights")

    monkeypatch.setattr(models, "load_base", load)
    processor = models.base_processor(load_recipe("llava-tiny"))
    assert processor.tokenizer("a dog .")["input_ids"]
    assert Checks().known == {}
