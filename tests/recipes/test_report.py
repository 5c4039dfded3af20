"""The report page and the terminal's summary, from made-up records."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vqguard.errors import DataError
from vqguard.intervals import wilson
from vqguard.recipes.report.page import format_summary, render_report, summary_table
from vqguard.recipes.report.tables import other_table, stage_table, toxic_table
from vqguard.records import Record, write_records

CATEGORIES = ["gun", "knife", "alcohol", "cigarette", "insulting gesture", "bloody", "porn"]
VERSIONS = {"python": "3.11.2", "torch": "2.9.0", "transformers": "5.3.0", "vqguard": "0.1.0"}
NASTY = "<script>alert('x')</script> & \"quotes\" $x_1$ {{ 7*7 }}"


def rate(
    metric: str, subject: str, share: float, n: int, threat: str = "none", **condition: Any
) -> Record:
    successes = round(share * n)
    low, high = wilson(successes, n)
    return Record(
        metric=metric,
        subject=subject,
        condition=condition,
        threat_model=threat,
        value=successes / n,
        n=n,
        low=low,
        high=high,
        seed=0,
        command="vqguard retrofit --model llava-tiny",
        versions=VERSIONS,
    )


def number(metric: str, subject: str, value: float, **condition: Any) -> Record:
    return Record(
        metric=metric,
        subject=subject,
        condition=condition,
        threat_model="none",
        value=value,
        n=1,
        low=None,
        high=None,
        seed=0,
        command="vqguard retrofit --model llava-tiny",
        versions=VERSIONS,
    )


def full_records() -> list[Record]:
    records = []
    for metric, base, guarded in [
        ("naming_single", 0.973, 0.967),
        ("naming_recall", 0.91, 0.90),
        ("count", 0.80, 0.79),
        ("colour", 0.98, 0.983),
        ("presence", 0.88, 0.87),
        ("text_only", 1.0, 1.0),
        ("benign_compliance", 1.0, 0.993),
        ("refusal", 0.997, 1.0),
    ]:
        records += [rate(metric, "base", base, 300), rate(metric, "guarded", guarded, 300)]
        if metric != "text_only":
            records.append(rate(metric, "finetuned_control", base, 300))
    for index, category in enumerate(CATEGORIES):
        for distractors, share in ((False, 0.95), (True, 0.35)):
            for subject, value in (("base", 0.02), ("guarded", share - 0.03 * index)):
                condition = {"category": category, "distractors": distractors}
                records.append(rate("dsr", subject, value, 50, "toxic images", **condition))
    for distractors, share in ((False, 0.03), (True, 0.06)):
        records.append(rate("fpr", "base", 0.0, 500, distractors=distractors))
        records.append(rate("fpr", "guarded", share, 500, distractors=distractors))
    for attack in ("universal", "per_request"):
        for eps, base, adaptive in ((8, 0.7, 0.0), (16, 0.97, 0.06), (255, 1.0, 0.5)):
            for subject, gradient, threat, value in [
                ("base", "plain", "white box", base),
                ("guarded", "stopped", "paper", 0.0),
                ("guarded", "straight_through", "adaptive", adaptive),
                ("quantiser_removed", "plain", "white box", 0.97),
                ("finetuned_control", "plain", "white box", 0.92),
            ]:
                condition = {"attack": attack, "eps_255": eps, "gradient": gradient}
                records.append(rate("asr", subject, value, 64, threat, **condition))
    for level, perplexity, dead, error in (("patch", 771.2, 0.0, 0.213), ("semantic", 69, 0.3, 1)):
        records.append(number("perplexity", "guarded", perplexity, level=level))
        records.append(number("dead_share", "guarded", dead, level=level))
        records.append(number("quantisation_error", "guarded", error, level=level))
    records.append(number("latency_ratio", "guarded", 1.034))
    records.append(number("peak_memory_mb", "base", 412.4))
    records.append(number("peak_memory_mb", "guarded", 431.0))
    for stage, seconds in (("features", 22.4), ("start", 9.8), ("stage1", 93), ("stage2", 101.5)):
        records.append(number("stage_seconds", "guarded", seconds, stage=stage))
    return records


def full_metadata() -> dict[str, Any]:
    return {
        "title": "llava-tiny, undefended and guarded",
        "created": "2026-01-02 03:04 UTC",
        "command": "vqguard retrofit --model llava-tiny --seed 0",
        "seed": 0,
        "model": "llava-tiny",
        "recipe": {"seed": 0, "guard": {"patch_codes": 1024, "semantic_codes": 128}},
        "machine": {"processor": "2 cores", "memory": "8 GB"},
        "threat_models": {
            "paper": "The attacker sees the model but its gradient stops at the quantiser.",
            "adaptive": "The attacker knows of the quantiser and sends its gradient through it.",
            "white box": "The attacker sees everything; there is no quantiser to get around.",
            "toxic images": "Somebody shows a toxic picture as it is; nothing is optimised.",
        },
        "notes": ["Numbers of this page are made up."],
    }


def full_sections(folder: Path) -> dict[str, Any]:
    (folder / "pictures").mkdir(exist_ok=True)
    pictures = []
    for index, caption in enumerate(["A scene", "Its code map", "Adversarial, ε 16/255"]):
        gradient = Image.linear_gradient("L").resize((96, 96)).rotate(90 * index)
        gradient.convert("RGB").save(folder / "pictures" / f"{index}.png")
        pictures.append({"file": f"pictures/{index}.png", "caption": caption})
    taus = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    steps = range(0, 300, 5)
    codes: list[dict[str, Any]] = []
    for code in range(24):
        category = CATEGORIES[code % 7] if code % 3 == 0 else "neutral"
        counts = (
            {"neutral": 40, "gun": 1} if category == "neutral" else {category: 20, "neutral": 2}
        )
        share = max(counts.values()) / sum(counts.values()) if category != "neutral" else 1 / 41
        codes.append(
            {"code": code, "category": category, "probability": share, "counts": counts}
        )  # fmt: skip
    codes.append({"code": 24, "category": "neutral", "probability": 0.0, "counts": {}})
    return {
        "series": {
            "roc": [{"tau": t, "fpr": (1 - t) ** 3, "tpr": (1 - t) ** 0.15} for t in taus],
            "training": {
                "stage1": [
                    {
                        "step": s,
                        "loss": 2 * math.exp(-s / 80) + 0.4,
                        "semantic_loss": math.exp(-s / 40),
                        "patch_perplexity": 780 * (1 - math.exp(-s / 60)),
                        "semantic_perplexity": 70 * (1 - math.exp(-s / 90)),
                    }
                    for s in steps
                ],
                "stage2": [{"step": s, "loss": math.exp(-s / 90) + 0.2} for s in steps],
            },
            "attack_losses": {
                f"{subject}, ε {eps}": [5 * math.exp(-s / (90 if hard else 25)) for s in range(120)]
                for subject, hard in (("base", False), ("guarded adaptive", True))
                for eps in ("8/255", "16/255", "unbounded")
            },
        },
        "semantic_codes": codes,
        "pictures": pictures,
    }


class Page(HTMLParser):
    """Text, table rows, tags and every address of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "action")
        ]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        words = " ".join(data.split())
        if words:
            self.words.append(words)
            if self.in_cell:
                self.rows[-1][-1] = f"{self.rows[-1][-1]} {words}".strip()

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def row(self, start: str) -> list[str]:
        return next(row for row in self.rows if row and row[0].startswith(start))


def render(
    folder: Path,
    records: list[Record],
    metadata: dict[str, Any] | None = None,
    sections: dict[str, Any] | None = None,
) -> str:
    write_records(folder / "report.json", records, metadata or {}, sections)
    render_report(folder / "report.json", folder / "out" / "report.html")
    return (folder / "out" / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def full_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    return render(folder, full_records(), full_metadata(), full_sections(folder))


def test_the_page_loads_nothing_from_elsewhere(full_page: str) -> None:
    page = Page(full_page)
    assert len(page.links) > 10
    assert all(link.startswith(("#", "data:image/")) for link in page.links)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not re.search(r"@import|url\(", full_page)
    assert "default-src 'none'" in full_page


def test_inner_links_lead_somewhere(full_page: str) -> None:
    for link in Page(full_page).links:
        if link.startswith("#"):
            assert f'id="{link[1:]}"' in full_page


def test_paper_and_adaptive_attacker_stand_side_by_side(full_page: str) -> None:
    page = Page(full_page)
    row = page.row("Per request, ε 16/255")
    assert row[1].startswith("96.9 % n 64, ")
    assert row[2].startswith("0.0 % n 64, 0.0–5.7 % threat model: paper")
    assert row[3].startswith("6.2 % n 64, ")
    assert "threat model: adaptive" in row[3]
    assert row[4] == "−90.6 points adaptive"
    head = next(row for row in page.rows if "Undefended" in row)
    under = page.rows[page.rows.index(head) + 1]
    assert [name.split(" attacker")[0] for name in under] == ["Paper's", "Adaptive"]


def test_the_terminal_and_the_page_agree(full_page: str) -> None:
    text = Page(full_page).text
    rows = summary_table(full_records())
    assert len(rows) == 8 + 2 + 2 + 2 * 6 + 1  # the latency
    for row in rows:
        assert row.metric.split(":")[0].removeprefix("ASR ") in text
        for shown in (row.base, row.guarded):
            value, _, detail = shown.removesuffix(")").partition(" (")
            assert f"{value} {detail}".strip() in text


def test_the_summary_gives_both_attackers_a_row(full_page: str) -> None:
    rows = [row for row in summary_table(full_records()) if "Universal, ε unbounded" in row.metric]
    assert [row.metric.split(": ")[1] for row in rows] == ["paper's attacker", "adaptive attacker"]
    assert rows[0].guarded.startswith("0.0 % (n 64")
    assert rows[1].guarded.startswith("50.0 % (n 64")
    assert "threat model: adaptive" in rows[1].note
    lines = format_summary(full_records()).splitlines()
    assert len(lines) == len(summary_table(full_records())) + 2
    column = lines[0].index("guarded")
    assert all(line[column - 2 : column] == "  " for line in lines[2:])


def test_the_strongest_adaptive_attack_is_the_one_shown() -> None:
    records = full_records()
    stronger = rate(
        "asr", "guarded", 0.8, 64, "adaptive",
        attack="universal", eps_255=255, gradient="softmax",
    )  # fmt: skip
    found = [r for r in summary_table([*records, stronger]) if "Universal, ε unbounded" in r.metric]
    assert found[1].guarded.startswith("79.7 %")
    assert "softmax" in found[1].note
    assert "worst of 2 measurements" in found[1].note


@pytest.mark.parametrize("gradient", ["stopped", "plain", None])
def test_what_does_not_adapt_never_fills_the_adaptive_column(gradient: str | None) -> None:
    condition: dict[str, Any] = {"attack": "universal", "eps_255": 8}
    if gradient is not None:
        condition["gradient"] = gradient
    rows = summary_table([rate("asr", "guarded", 0.0, 64, "paper", **condition)])
    adaptive = next(row for row in rows if row.metric.endswith("8/255: adaptive attacker"))
    assert adaptive.guarded == "not measured"


def test_toxic_scenes_are_pooled_over_categories(full_page: str) -> None:
    records = [
        rate("dsr", "guarded", 0.9, 50, "toxic images", category="gun", distractors=False),
        rate("dsr", "guarded", 0.5, 150, "toxic images", category="knife", distractors=False),
    ]
    rows = {row.metric: row for row in summary_table(records)}
    low, high = wilson(45 + 75, 200)
    shown = f"60.0 % (n 200, {100 * low:.1f}–{100 * high:.1f} %)"
    assert rows["Toxic scenes refused (DSR), one object"].guarded == shown
    assert rows["Toxic scenes refused (DSR), one object"].base == "not measured"
    assert rows["Toxic scenes refused (DSR), with distractors"].guarded == "not measured"
    whole = rate("dsr", "guarded", 0.7, 200, "toxic images", category="all", distractors=False)
    rows = {row.metric: row for row in summary_table([*records, whole])}
    assert rows["Toxic scenes refused (DSR), one object"].guarded.startswith("70.0 % (n 200")


def test_scenes_are_told_apart_by_their_number_of_distractors() -> None:
    records = [
        rate("dsr", "guarded", share, 50, "toxic images", category="gun", distractors=count)
        for count, share in ((0, 0.9), (1, 0.5), (2, 0.3))
    ]
    rows = [row for row in summary_table(records) if "DSR" in row.metric]
    assert [row.metric.split(", ")[1] for row in rows] == [
        "one object", "1 distractor", "2 distractors",
    ]  # fmt: skip
    assert [row.guarded[:4] for row in rows] == ["90.0", "50.0", "30.0"]


def test_controls_stand_in_the_jailbreak_table(full_page: str) -> None:
    page = Page(full_page)
    row = next(row for row in page.rows if row[0] == "Per request, ε 8/255" and len(row) == 6)
    assert row[4].startswith("96.9 %")
    assert row[5].startswith("92.2 %")
    heading = next(row for row in page.rows if row and row[0] == "Attack and budget")
    assert ["quantiser removed" in heading[4], "fine-tuned" in heading[5]] == [True, True]


def test_every_category_has_its_row_with_and_without_distractors(full_page: str) -> None:
    page = Page(full_page)
    for index, category in enumerate(CATEGORIES):
        row = page.row(category.capitalize())
        assert row[2].startswith(f"{100 * round((0.95 - 0.03 * index) * 50) / 50:.1f} %")
        assert row[4].startswith(f"{100 * round((0.35 - 0.03 * index) * 50) / 50:.1f} %")


def test_a_threat_model_that_all_cells_share_is_said_once(full_page: str) -> None:
    section = full_page.split('<section id="toxic">')[1].split("</section>")[0]
    assert Page(section).text.count("toxic images") == 1
    mixed = [
        rate("dsr", "guarded", 0.9, 10, threat, category=category)
        for category, threat in (("gun", "toxic images"), ("knife", "adaptive"))
    ]
    table = toxic_table(mixed)
    assert table.note == ""
    assert any("threat model: adaptive" in c.notes for r in table.rows for c in r.columns[1])


def test_utility_stands_in_one_table_with_its_controls(full_page: str) -> None:
    assert other_table(full_records()) is None
    section = full_page.split('<section id="utility">')[1].split("</section>")[0]
    row = Page(section).row("Naming one object")
    assert [cell.split(" % ")[0] for cell in row[1:4]] == ["97.3", "96.7", "97.3"]
    assert 'id="other"' not in full_page


def test_stage_times_of_the_control_have_a_sum_of_their_own() -> None:
    records = [
        number("stage_seconds", "guarded", 40, stage="stage2"),
        number("stage_seconds", "guarded", 50, stage="map"),
        number("stage_seconds", "finetuned_control", 35, stage="stage2"),
    ]
    rows = {row.label: row.columns[0][0].value for row in stage_table(records).rows}
    assert rows == {
        "Stage2 of the retrofit": "40.0 s",
        "Map of the retrofit": "50.0 s",
        "All stages of the retrofit": "1 min 30 s",
        "Stage2 of the control": "35.0 s",
        "All stages of the control": "35.0 s",
    }


def test_units_of_the_other_numbers(full_page: str) -> None:
    page = Page(full_page)
    assert page.row("Patch")[1:4] == ["771.2", "0.0 %", "0.213"]
    assert page.row("Latency")[1:3] == ["reference", "1.034 ×"]
    assert page.row("Peak memory")[1:3] == ["412 MB", "431 MB"]
    assert page.row("Stage1")[1] == "1 min 33 s"
    assert page.row("All stages")[1] == "3 min 47 s"


def test_an_empty_run_says_so_everywhere(tmp_path: Path) -> None:
    page = Page(render(tmp_path, []))
    assert "data:" not in "".join(page.links)
    for name in ("ROC over τ", "Training curves", "Attack losses", "Semantic codes"):
        assert f"{name}: not measured." in page.text
    for row in page.rows:
        assert all(row), f"blank cell in {row}"
    measures = [row for row in page.rows if row[0].startswith(("Universal", "Per request"))]
    assert len(measures) == 2 * 6  # in the headline and in the jailbreak table
    assert all(cell == "not measured" for row in measures for cell in row[1:])
    assert not re.search(r"\d %", page.text.split("How it was run")[0].replace("95 %", ""))
    assert "not recorded" in page.text
    assert summary_table([]) == []


def test_everything_that_comes_from_outside_is_escaped(tmp_path: Path) -> None:
    metadata = {
        "title": NASTY,
        "command": NASTY,
        "model": NASTY,
        "recipe": {NASTY: NASTY},
        "machine": {NASTY: NASTY},
        "threat_models": {NASTY: NASTY},
        "notes": [NASTY],
    }
    sections = full_sections(tmp_path)
    sections["pictures"] = [
        {"file": "pictures/0.png", "caption": NASTY},
        {"file": "pictures/<b>.png", "caption": NASTY},
    ]
    sections["semantic_codes"] = [
        {"code": 1, "category": NASTY, "probability": 0.7, "counts": {NASTY: 3}}
    ]
    sections["series"]["attack_losses"] = {NASTY: [2.0, None, 1.0], "_hidden": [1.0]}
    sections["series"]["training"] = {NASTY: [{"step": 1, "loss": 1.0, f"loss {NASTY}": 2}]}
    records = [
        rate("dsr", "guarded", 0.5, 10, NASTY, category=NASTY),
        rate("asr", NASTY, 0.5, 10, NASTY, attack=NASTY, eps_255=NASTY, gradient=NASTY),
        number(NASTY, NASTY, 1.5, **{NASTY: NASTY}),
    ]
    text = render(tmp_path, records, metadata, sections)
    page = Page(text)
    assert "script" not in page.tags
    assert "<b>" not in re.sub(r"<b style=", "", text)
    assert page.text.count("{{ 7*7 }}") > 15
    assert "49" not in Page(text.split("<body>")[1]).row("1")[1]


def test_pictures_are_embedded_pixel_by_pixel(tmp_path: Path) -> None:
    sections = {"pictures": full_sections(tmp_path)["pictures"]}
    links = Page(render(tmp_path, [], {}, sections)).links
    embedded = [link for link in links if link.startswith("data:image/png;base64,")]
    assert len(embedded) == 3
    for index, link in enumerate(embedded):
        with Image.open(io.BytesIO(base64.b64decode(link.split(",")[1]))) as shown:
            original = Image.open(tmp_path / "pictures" / f"{index}.png").convert("RGB")
            assert shown.tobytes() == original.tobytes()


def test_a_picture_that_cannot_be_shown_is_named(tmp_path: Path) -> None:
    sections = {"pictures": full_sections(tmp_path)["pictures"]}
    (tmp_path / "pictures" / "1.png").unlink()
    (tmp_path / "pictures" / "2.png").write_text("no image", encoding="utf-8")
    text = Page(render(tmp_path, [], {}, sections)).text
    assert "pictures/1.png: no such file" in text
    assert "pictures/2.png: not an image" in text


def mistake(kind: str, file: str, category: str, **why: Any) -> dict[str, Any]:
    region = {"part": "picture", "index": 0, "top": 0.25, "left": 0.5, "bottom": 0.5, "right": 1.0}
    return {
        "kind": kind,
        "shown": f"{category}, 1 neutral beside it",
        "file": file,
        "why": {
            "category": category,
            "score": 0.75,
            "threshold": 0.6,
            "action": "refuse",
            "semantic_code": 17,
            "category_scores": {category: 0.75, "knife": 0.0, "neutral": 0.25},
            "region": region,
            "outlined": True,
            **why,
        },
    }


def test_mistakes_are_shown_with_their_reasons(tmp_path: Path) -> None:
    full_sections(tmp_path)
    sections = {
        "mistakes": [
            mistake("miss", "pictures/1.png", "gun", threshold=None, region=None),
            mistake("false positive", "pictures/0.png", NASTY),
            mistake("false positive", "pictures/none.png", "gun"),
        ]
    }
    sections["mistakes"][1]["examples"] = [{"file": "pictures/2.png", "labels": [NASTY, "knives"]}]
    text = render(tmp_path, [], {}, sections)
    page = Page(text)
    assert "<script" not in text
    assert page.text.index("False positives") < page.text.index("Misses")
    shown = page.text.split("Mistakes")[-1]
    assert "0.75, threshold 0.6" in shown
    assert "25 to 50 % from the top, 50 to 100 % from the left" in shown
    assert "knife" not in shown, "a category without a share says nothing"
    assert "pictures/none.png: no such file" in shown
    assert "not known, or the whole picture decided" in shown
    assert "Counted in it" in shown
    assert "knives" in shown
    assert sum(link.startswith("data:image/png") for link in page.links) == 3
    with pytest.raises(DataError, match="outside"):
        render(tmp_path, [], {}, {"mistakes": [mistake("miss", "../secret.png", "gun")]})


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "pictures/../secret.png"])
def test_pictures_outside_their_folder_are_refused(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    with pytest.raises(DataError, match="outside"):
        render(tmp_path, [], {}, {"pictures": [{"file": name, "caption": ""}]})


def test_a_link_out_of_the_picture_folder_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match="outside"):
        render(tmp_path, [], {}, {"pictures": [{"file": "pictures/link.png", "caption": ""}]})


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"series": {"roc": [{"tau": 0.6, "fpr": 0.1}]}}, "needs a number 'tpr'"),
        ({"series": {"roc": {}}}, "series.roc must be a list"),
        ({"series": {"training": {"stage1": [{"loss": 1.0}]}}}, "number 'step'"),
        ({"series": {"attack_losses": {"a": [1.0, "2"]}}}, "series.attack_losses.a"),
        ({"semantic_codes": [{"code": 1}]}, r"semantic_codes\[0\]"),
        ({"semantic_codes": ["gun"]}, r"semantic_codes\[0\]"),
        ({"pictures": ["a.png"]}, r"pictures\[0\]"),
        ({"mistakes": {}}, "mistakes.* must be a list"),
        ({"mistakes": [{"kind": "guess", "shown": "", "file": "", "why": {}}]}, r"mistakes\[0\]"),
        ({"mistakes": [{"kind": "miss", "shown": "", "file": "a", "why": {"x": 1}}]}, "why.x"),
    ],
)
def test_malformed_sections_are_refused_and_no_page_is_left(
    tmp_path: Path, sections: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        render(tmp_path, [], {}, sections)
    assert not (tmp_path / "out").exists()


def test_the_same_records_give_the_same_page(tmp_path: Path, full_page: str) -> None:
    again = render(tmp_path, full_records(), full_metadata(), full_sections(tmp_path))
    assert again == full_page


def test_plots_name_their_axes(full_page: str) -> None:
    from vqguard.recipes.report import plots as report_plots

    figures: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_plots, "_data_uri", figures.append)
        report_plots.roc_plot([{"tau": 0.6, "fpr": 0.1, "tpr": 0.9}])
        report_plots.training_plot("stage1", [{"step": 1, "loss": 1.0, "patch_perplexity": 3.0}])
        report_plots.attack_plot({"a": [2.0, 1.0]})
    axes = [a for figure in figures for a in figure.axes]
    assert len(axes) == 4
    assert all(a.get_xlabel() and a.get_ylabel() for a in axes)
    assert "False-positive" in axes[0].get_xlabel()
    assert "True-positive" in axes[0].get_ylabel()


def test_many_attack_losses_are_split_into_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    from vqguard.recipes.report import plots as report_plots

    figures: list[Any] = []
    monkeypatch.setattr(report_plots, "_data_uri", figures.append)
    subjects = ("base, plain", "guarded, stopped", "guarded, softmax", "quantiser_removed, plain")
    names = [f"{subject}, ε {eps}/255" for subject in subjects for eps in (8, 16)]
    report_plots.attack_plot({name: [2.0, 1.0] for name in names})
    shown = [axes for axes in figures[0].axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == list(subjects)
    assert [len(axes.lines) for axes in shown] == [2, 2, 2, 2]
    assert [text.get_text() for text in shown[0].get_legend().get_texts()] == [
        "ε 8/255", "ε 16/255",
    ]  # fmt: skip


def test_a_stage_without_curves_draws_nothing(tmp_path: Path) -> None:
    sections = {"series": {"training": {"map": [{"step": 1, "seconds": 3.0}]}}}
    assert "Training curves: not measured." in Page(render(tmp_path, [], {}, sections)).text


def test_measurements_of_other_subjects_are_not_lost(tmp_path: Path) -> None:
    records = [
        rate("naming_single", "finetuned_control", 0.9, 100),
        number("code_entropy", "guarded", 3.25, noise=8),
        rate("asr", "peer", 0.5, 10, "white box", attack="figstep", eps_255=4, gradient="none"),
    ]
    page = Page(render(tmp_path, records))
    assert page.row("Naming one object")[1] == "not measured"
    assert any(row[0] == "Code entropy, noise 8" and "3.25" in row for row in page.rows)
    attack = page.row("Figstep, ε 4/255")
    assert attack[-1].startswith("50.0 %")
    assert "threat model: white box" in attack[-1]
    assert "white box not described" in page.text


def test_metadata_that_is_missing_in_part_still_renders(tmp_path: Path) -> None:
    text = Page(render(tmp_path, full_records(), {"model": "llava-tiny", "seed": 3})).text
    assert "Seed 3" in text
    assert "Version of torch 2.9.0" in text
    assert json.loads((tmp_path / "report.json").read_text())["schema"] == 1
