"""The main line, from the shipped base to a report, cut to seconds; then what users do with it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from torch import Tensor

from vqguard.adapters import guarding
from vqguard.adapters.families import registration
from vqguard.adapters.registry import declared_family
from vqguard.cli.main import main
from vqguard.errors import ArtefactError, ConfigError, DataError, InputError
from vqguard.recipes import control
from vqguard.recipes import retrofit as retrofit_module
from vqguard.recipes.calibrate import calibrate_run
from vqguard.recipes.data.labelled_images import labelled_files
from vqguard.recipes.evaluate import evaluate_run
from vqguard.recipes.evaluation.result import RetrofitResult
from vqguard.recipes.recipe import RetrofitRecipe, load_recipe
from vqguard.recipes.report.headline import format_summary
from vqguard.recipes.report.markdown import headline_markdown, tables_markdown
from vqguard.recipes.retrofit import retrofit
from vqguard.recipes.run import open_run
from vqguard.recipes.tiny.world import TinyWorld
from vqguard.records import Record, read_record_file, read_records
from vqguard.redteam import ATTACKS, GRADIENTS, Attack, GradientMode, ThreatModel, Trial

pytestmark = pytest.mark.alone
SHORT = [
    "guard.start_samples=160",
    "guard.patch_codes=64",
    "guard.semantic_codes=16",
    "guard.judge=global",
    "stage1.samples=64",
    "stage1.batch=16",
    "stage2.samples=32",
    "stage2.batch=16",
    "evaluation.utility=12",
    "evaluation.toxic_per_category=2",
    "evaluation.neutral=8",
    "evaluation.latency_rounds=3",
    "evaluation.attack.eps_255=[16]",
    "evaluation.attack.requests=2",
    "evaluation.attack.steps=3",
    "evaluation.attack.adaptive_steps=3",
    "evaluation.attack.universal_requests=2",
    "evaluation.attack.universal_held_out=2",
    "evaluation.attack.universal_steps=3",
]
RULES = [
    "rules.language=en",
    "rules.hierarchy={weapon: [gun, knife]}",
    "rules.policies={weapon: {action: refuse, refusal: {en: i will not talk about it .}}}",
]


def short_recipe() -> RetrofitRecipe:
    return load_recipe("llava-tiny").override([*SHORT, *RULES])


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> RetrofitResult:
    folder = tmp_path_factory.mktemp("runs") / "short"
    return retrofit(short_recipe(), folder, command="pytest")


@pytest.mark.slow
def test_a_type_that_needs_a_proof_is_proven_wherever_its_guard_is_put_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pictures that its processor makes: a retrofit and what follows name no inputs."""
    newer = replace(declared_family("llava"), proven_from="5.999")
    monkeypatch.setitem(registration._FAMILIES, "llava", newer)
    proofs: list[Any] = []
    prove = guarding._prove

    def recorded(model: Any, guard: Any, inputs: Any) -> None:
        proofs.append(inputs)
        prove(model, guard, inputs)

    monkeypatch.setattr(guarding, "_prove", recorded)
    recipe = short_recipe().override(["evaluation.finetuned_control=false"])
    run = retrofit(recipe, tmp_path / "run", command="pytest").report_json.parent
    assert len(open_run(run).screen_images([Image.new("RGB", (64, 64))])) == 1
    assert len(proofs) > 2
    assert all(given is not None for given in proofs)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(result: RetrofitResult) -> None:
    """Each with one thread. Latency, memory and time are other figures every time."""

    def measured(threads: int) -> list[Record]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            records = evaluate_run(result.run, command="pytest").records
        finally:
            torch.set_num_threads(before)
        return [r for r in records if r.metric not in ("latency_ratio", "peak_memory_mb")]

    one, two = measured(1), measured(2)
    assert one == two


def test_one_recipe_gives_the_finished_map(result: RetrofitResult) -> None:
    judging = open_run(result.run).model.vqguard.safety_map.judging
    assert judging.hierarchy == {"weapon": ("gun", "knife")}
    assert judging.policy("knife").refusal == {"en": "i will not talk about it ."}
    assert judging.policy("porn").refusal == {}


def test_the_report_shows_its_mistakes_with_what_was_counted(result: RetrofitResult) -> None:
    mistakes = read_record_file(result.report_json).sections["mistakes"]
    assert {entry["kind"] for entry in mistakes} >= {"miss"}
    assert any(entry["examples"] for entry in mistakes)
    page = result.report_html.read_text()
    for entry in mistakes:
        assert (result.run / entry["file"]).is_file()
        assert entry["shown"] in page
    assert "Counted in it" in page


def test_the_report_has_every_metric_for_both_subjects(result: RetrofitResult) -> None:
    records = read_records(result.report_json)
    found = Counter((r.metric, r.subject) for r in records)
    tasks = ("naming_single", "naming_recall", "count", "colour", "presence", "text_only")
    for metric in (*tasks, "refusal", "benign_compliance", "dsr", "fpr", "asr", "peak_memory_mb"):
        assert found[metric, "base"], metric
        assert found[metric, "guarded"], metric
    for metric in ("perplexity", "dead_share", "quantisation_error"):
        assert found[metric, "guarded"] == 2
    assert found["latency_ratio", "guarded"] == 2
    attacks = {
        (r.subject, r.condition["attack"], r.condition["gradient"])
        for r in records
        if r.metric == "asr"
    }
    assert attacks == {
        (subject, attack, gradient)
        for subject, gradient, kinds in (
            ("base", "plain", ("none", "universal", "per_request")),
            ("guarded", "stopped", ("none", "universal", "per_request")),
            ("guarded", "straight_through", ("none", "universal", "per_request")),
            ("quantiser_removed", "plain", ("none", "per_request")),
            ("finetuned_control", "plain", ("none", "per_request")),
        )
        for attack in kinds
    }
    assert {r.condition["stage"] for r in records if r.metric == "stage_seconds"} >= {
        "features",
        "kmeans",
        "stage1",
        "stage2",
        "calibration",
    }
    control = [
        r.condition["stage"]
        for r in records
        if (r.metric, r.subject) == ("stage_seconds", "finetuned_control")
    ]
    assert control == ["projector", "stage2"]
    page = result.report_html.read_text()
    assert "straight" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_run_directory_says_what_was_done(result: RetrofitResult) -> None:
    assert RetrofitRecipe.from_yaml(result.run / "recipe.yaml") == short_recipe()
    for stage, steps in (("stage1", 4), ("stage2", 2)):
        lines = (result.run / stage / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))


def test_every_verdict_behind_the_rates_is_kept(result: RetrofitResult) -> None:
    kept = [json.loads(line) for line in (result.run / "verdicts.jsonl").read_text().splitlines()]
    rates = [
        record
        for record in result.records
        if (record.metric, record.subject) in {("dsr", "guarded"), ("fpr", "guarded")}
        and record.condition.get("category") != "all"
        and record.threat_model in {"toxic_image", "none"}
    ]
    assert len(kept) == sum(record.n for record in rates) > 0
    for record in rates:
        of_this = [v for v in kept if v["condition"] == record.condition]
        assert sum(v["flagged"] for v in of_this) == round(record.value * record.n)
    assert all(v["codes"][v["token"]] == v["semantic_code"] for v in kept)
    assert all(len(v["scores"]) == len(v["codes"]) == 1 for v in kept)  # the CLS token


def test_an_existing_output_is_refused_and_another_recipe_is_not_resumed(
    result: RetrofitResult,
) -> None:
    with pytest.raises(ConfigError, match="--resume"):
        retrofit(short_recipe(), result.run, command="pytest")
    other = short_recipe().override(["seed=9"])
    with pytest.raises(ConfigError, match="another recipe"):
        retrofit(other, result.run, resume=True, command="pytest")


def test_a_finished_run_resumes_without_training_again(
    result: RetrofitResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    for module, name in (
        (retrofit_module, "Stage1Trainer"),
        (retrofit_module, "Stage2Trainer"),
        (control, "ProjectorTrainer"),
        (control, "Stage2Trainer"),
    ):
        monkeypatch.setattr(module, name, never)
    monkeypatch.setattr(retrofit_module, "measure_run", lambda run, command: result)
    before = open_run(result.run).model.vqguard.checksum("patch")
    retrofit(short_recipe(), result.run, resume=True, command="pytest")
    assert open_run(result.run).model.vqguard.checksum("patch") == before


def test_scan_and_ask_work_on_a_run(
    result: RetrofitResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = TinyWorld(3)
    paths = []
    for number, image in enumerate(world.neutral_images((1, 2), 3)):
        paths.append(str(tmp_path / f"{number}.png"))
        image.save(paths[-1])
    code = main(["scan", *paths, "--run", str(result.run), "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    verdicts = open_run(result.run).screen_images([Image.open(path) for path in paths])
    assert [line["semantic_code"] for line in lines] == [v.semantic_code for v in verdicts]
    assert code == int(any(v.flagged for v in verdicts))
    assert main(["scan", "gone.png", "--run", str(result.run)]) == 2
    assert "gone.png" in capsys.readouterr().err
    main(["ask", str(result.run), paths[0], "What is this?"])
    assert capsys.readouterr().out.strip()


def test_a_new_map_from_folders_replaces_the_old(result: RetrofitResult, tmp_path: Path) -> None:
    world = TinyWorld(4)
    for category, count in (("gun", 6), ("neutral", 12)):
        (tmp_path / category).mkdir()
        images = (
            world.toxic_images("gun", 0, count)
            if category == "gun"
            else world.neutral_images((1, 3), count)
        )
        for number, image in enumerate(images):
            image.save(tmp_path / category / f"{number}.png")
    (tmp_path / "gun" / "broken.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"broken\.png"):
        calibrate_run(result.run, tmp_path, fpr=None, tau=0.5)
    done = calibrate_run(result.run, tmp_path, fpr=None, tau=0.5, rule="any", skip_bad=True)
    assert done.images == {"gun": 6, "neutral": 12}
    assert len(done.skipped) == 1
    kept = open_run(result.run).model.vqguard.safety_map
    assert kept.categories == ("gun",)
    assert (kept.tau, kept.rule) == (0.5, "any")


def test_calibration_folders_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        labelled_files(tmp_path / "none", None, [], [])
    (tmp_path / "gun").mkdir()
    with pytest.raises(InputError, match="'neutral'"):
        labelled_files(tmp_path, None, [], [])


@pytest.mark.slow
def test_an_attack_and_a_gradient_from_outside_stand_in_the_report(
    result: RetrofitResult, tmp_path: Path, open_tables: None
) -> None:
    """One class, one object, and a line each: no file of the project knows of them."""

    @ATTACKS.register
    @dataclass(frozen=True, kw_only=True)
    class SingleStep(Attack):
        """FGSM (Goodfellow et al. 2015, arXiv 1412.6572)."""

        name: ClassVar[str] = "fgsm"
        label: ClassVar[str] = "FGSM"
        sentence: ClassVar[str] = "One sign step as long as the budget."

        def run(self, trial: Trial, start: Tensor) -> None:
            trial.close(trial.project(start - self.eps_255 / 255 * trial.gradient(start).sign()))

    def half(features: Tensor, codewords: Tensor, indices: Tensor) -> Tensor:
        part = 0.5 * features
        return part + (codewords[indices] - part).detach()

    attacker = ThreatModel("adaptive_half", "The attacker goes half of the way.", adaptive=True)
    GRADIENTS.register(GradientMode("half", "half-way (adaptive)", attacker, half))

    run = tmp_path / "run"
    shutil.copytree(result.run, run)
    done = evaluate_run(run, command="pytest", overrides=("evaluation.utility=1",))

    file = read_record_file(done.report_json)
    attacks = [r for r in file.records if r.metric == "asr"]
    fgsm = {(r.subject, r.condition["gradient"]): r for r in attacks if "fgsm" in str(r.condition)}
    assert list(fgsm) == [
        ("base", "plain"),
        ("guarded", "stopped"),
        ("guarded", "straight_through"),
        ("guarded", "half"),
        ("quantiser_removed", "plain"),
        ("finetuned_control", "plain"),
    ]
    record = fgsm["guarded", "half"]
    assert (record.n, record.threat_model) == (2, "adaptive_half")
    assert dict(record.condition) == {
        "attack": "fgsm",
        "restarts": 2,
        "gradient": "half",
        "eps_255": 16,
        "steps": 3,
    }
    halved = [r.condition["attack"] for r in attacks if r.condition["gradient"] == "half"]
    assert halved == ["none", "per_request", "universal", "fgsm"]
    assert file.metadata["threat_models"]["adaptive_half"] == attacker.sentence
    assert "fgsm: guarded, half, ε 16/255" in file.sections["series"]["attack_losses"]
    assert "fgsm: guarded, half, ε 16/255" in {p["caption"] for p in file.sections["pictures"]}

    page = done.report_html.read_text()
    assert '<th scope="row">FGSM, ε 16/255</th>' in page
    assert '<th scope="col">Guarded · half-way (adaptive)</th>' in page
    assert attacker.sentence in page
    tables = "\n".join(tables_markdown(file.records, {}))
    assert "Guarded · half-way (adaptive)" in tables
    assert "| FGSM, ε 16/255 |" in tables
    assert "| FGSM, ε 16/255 |" in headline_markdown(file.records)
    # the worst of two adaptive attackers opens the report
    (row,) = (
        line
        for line in format_summary(file.records).splitlines()
        if line.startswith("ASR FGSM, ε 16/255: adaptive attacker")
    )
    assert "worst of 2 measurements" in row


def test_only_the_evaluation_can_be_changed_afterwards(result: RetrofitResult) -> None:
    with pytest.raises(ConfigError, match="seed=3"):
        evaluate_run(result.run, command="pytest", overrides=("seed=3",))


def test_a_folder_without_a_model_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="vqguard retrofit"):
        open_run(tmp_path)
    short_recipe().to_yaml(tmp_path / "recipe.yaml")
    with pytest.raises(ArtefactError, match="--resume"):
        open_run(tmp_path)


def test_a_rule_that_nobody_registered_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    recipe = short_recipe().override(["calibration.rule=alll"])
    with pytest.raises(InputError, match="rule must be one of"):
        retrofit(recipe, tmp_path / "run", command="pytest")
    assert not (tmp_path / "run").exists()


def test_a_model_without_embedded_data_asks_for_some(tmp_path: Path) -> None:
    recipe = short_recipe().override(["model=llava-1.5"])
    with pytest.raises(ConfigError, match="--data"):
        retrofit(recipe, tmp_path / "run", command="pytest")


def test_data_of_the_user_s_own_replaces_the_world(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    entries = []
    for number, sample in enumerate(TinyWorld(5).captions(24)):
        assert sample.image is not None
        sample.image().save(images / f"{number}.png")
        (question, answer), *_ = sample.turns
        turns = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": answer},
        ]
        entries.append({"id": sample.id, "image": f"{number}.png", "conversations": turns})
    entries.append({"id": "bad", "image": "gone.png", "conversations": entries[0]["conversations"]})
    data = tmp_path / "data.json"
    data.write_text(json.dumps(entries))
    sizes = ["guard.patch_codes=16", "guard.semantic_codes=4"]
    ruled = short_recipe().override([f"data={data}", f"images={images}", *sizes])
    with pytest.raises(ConfigError, match="set calibration_images too"):
        retrofit(ruled, tmp_path / "ruled", skip_bad=True, command="pytest")
    recipe = ruled.override(["rules={}"])
    with pytest.raises(DataError, match="gone"):
        retrofit(recipe, tmp_path / "strict", command="pytest")
    done = retrofit(recipe, tmp_path / "run", skip_bad=True, command="pytest")
    assert {r.metric for r in done.records} >= {"answer_token_rate", "perplexity"}
    assert "gone.png" in (tmp_path / "run" / "skipped.txt").read_text()
