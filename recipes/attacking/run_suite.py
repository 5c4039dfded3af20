"""Run a suite on a run's models: attempts, records, alarms and a page, in one folder.

`attempts.jsonl`  every attempt, one a line     `records.json`  rates and alarms
`images/`         adversarial pictures, PNG     `report.html`   the page
`suite.yaml`      the suite as it was run
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import islice, zip_longest
from pathlib import Path

from vqguard.adapters.code_target import CodeTarget
from vqguard.adapters.model_judges import JudgeSpec, ModelJudge
from vqguard.adapters.storage.folder_lock import only_writer
from vqguard.distributed import rank_and_world
from vqguard.errors import ConfigError, InputError
from vqguard.files import require_empty
from vqguard.names import printable
from vqguard.recipes.attacking.alarms import Alarm, alarms, primary_judge
from vqguard.recipes.attacking.attempts import Attempts, Ground
from vqguard.recipes.attacking.health import guard_health
from vqguard.recipes.attacking.journal import Attempt, Journal
from vqguard.recipes.attacking.plan import Planned, goal_of, planned
from vqguard.recipes.attacking.subjects import StandIn, Subject, Subjects
from vqguard.recipes.attacking.suite import Suite
from vqguard.recipes.attacking.summary import attack_records
from vqguard.recipes.benchmarks.benchmark import Tests, open_tests
from vqguard.recipes.data.chat import prompt_text
from vqguard.recipes.data.samples import AttackCase, Verbs
from vqguard.recipes.evaluation.jailbreak import pixels_seen
from vqguard.recipes.evaluation.machine import machine
from vqguard.recipes.processes import device, first_alone, is_first, launched, together, wait
from vqguard.recipes.report.attack_page import render_attack_report
from vqguard.recipes.sources import world_of
from vqguard.records import Record, write_records
from vqguard.redteam import ATTACKS, Goal, Judge, threat_models
from vqguard.redteam.attack_table import BENIGN
from vqguard.redteam.facts import MadeOn
from vqguard.safety_map import NEUTRAL

log = logging.getLogger(__name__)

RECORDS, REPORT, SUITE = "records.json", "report.html", "suite.yaml"


@dataclass(frozen=True)
class SuiteResult:
    """What a suite found, and where it is."""

    folder: Path
    records: list[Record]
    alarms: list[Alarm]
    attempts: list[Attempt]


def run_suite(
    run: Path,
    suite: Suite,
    output: Path,
    *,
    command: str,
    benchmark: Path | None = None,
    judges: Sequence[JudgeSpec] = (),
    surrogates: Sequence[Path] = (),
) -> SuiteResult:
    """Attack the models of a run. Attempts that `output` holds already are not made again.

    Under a launcher each process makes its share of the batches; the first writes the report.

    Args:
        run: a run's directory or a guarded model's folder.
        suite: what to do.
        output: a folder of this suite's own, which may hold part of it.
        command: what the records say makes them again.
        benchmark: a folder in place of the run's own world or tests: with `attacks.json`
            (`vqguard.recipes.data.held_out_set`), or a benchmark as its authors publish it
            (`vqguard.recipes.benchmarks`).
        judges: models that judge too.
        surrogates: other runs, whose guarded models pictures are made on where an attack transfers.

    Raises:
        ArtefactError: there is no guarded model.
        ConfigError: `output` holds another suite's attempts, or is being written by another
            process; or the model has no safety map.
        InputError: there are no requests.
    """
    with ExitStack() as held, together():
        first_alone(lambda: held.enter_context(only_writer(output)))
        first_alone(lambda: _require_own(output, suite))
        subjects = Subjects(run)
        tests = _tests(subjects, benchmark)
        split, cases = _cases(subjects, suite, tests)
        single = min(suite.requests, len(cases))
        journal = Journal(output, rank_and_world()[0])
        ground = Ground(
            suite=suite.name,
            split=split,
            cases=cases,
            single=single,
            universal=min(suite.universal_requests, max(0, len(cases) - single - 1)),
            processor=subjects.processor,
            folder=output,
            judges=_model_judges(judges, cases),
            benign=_benign(subjects, suite, tests),
            toxic=_toxic(subjects, suite, tests),
            stand_ins=_stand_ins(subjects, suite, surrogates),
        )
        if not (ground.cases or ground.benign or ground.toxic):
            raise InputError(
                f"{benchmark}: nothing to attack there: no request to refuse (attacks.json), none "
                "to answer, and no toxic pictures for a suite with evasion"
            )
        _require_same_judges(journal, ground)
        first_alone(lambda: suite.to_yaml(output / SUITE))  # what was refused leaves no trace
        _make(ground, suite, subjects, journal)
        wait()
        attempts = journal.read()
        if is_first():
            return write_result(
                output, attempts, command=command, title=printable(f"{run.name}: {suite.name}")
            )
        return SuiteResult(output, [], [], attempts)


def write_result(
    folder: Path, attempts: Sequence[Attempt], *, command: str, title: str
) -> SuiteResult:
    """Write `records.json` and `report.html` of attempts into a folder.

    Raises:
        InputError: no attempts.
        OSError: the folder cannot be written.
    """
    if not attempts:
        raise InputError(f"{folder}: expected attempts, found none; run `vqguard attack` first")
    records, raised = attack_records(attempts, command), alarms(attempts)
    threats = {record.threat_model for record in records}
    metadata = {
        "title": title,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": machine(),
        "models": {a.subject: a.model_sha256 for a in attempts},
        "maps": {a.subject: a.map_sha256 for a in attempts if a.map_sha256},
        "threat_models": {t.value: t.sentence for t in threat_models() if t.value in threats},
    }
    sections = {"alarms": [alarm.to_dict() for alarm in raised]}
    folder.mkdir(parents=True, exist_ok=True)
    write_records(folder / RECORDS, records, metadata, sections)
    render_attack_report(folder, attempts, records, raised, metadata)
    return SuiteResult(folder, records, raised, list(attempts))


def _require_own(output: Path, suite: Suite) -> None:
    """See that the folder is free, or holds this suite's attempts."""
    path = output / SUITE
    if not path.is_file():
        require_empty(output, f"It holds no {SUITE}; name another --output.")
    elif Suite.from_yaml(path) != suite:
        raise ConfigError(
            f"{output} holds attempts of another suite ({path}); name another --output, or go "
            "on with the suite that it was begun with"
        )


def _tests(subjects: Subjects, benchmark: Path | None) -> Tests | None:
    """The benchmark, else the tests that the run was evaluated with; None: its embedded world."""
    if benchmark is not None:
        return open_tests(benchmark)
    recipe = subjects.recipe
    if recipe is None or world_of(recipe) is not None or recipe.evaluation.held_out is None:
        return None
    return open_tests(recipe.evaluation.held_out, follow_links=recipe.follow_links)


def _cases(
    subjects: Subjects, suite: Suite, tests: Tests | None
) -> tuple[str, Sequence[AttackCase]]:
    """Where the requests come from, and so many of them."""
    if tests is not None and suite.split != "own":
        raise ConfigError(
            f"split {suite.split} is of the embedded world's requests, and these are of "
            f"{tests.name}: leave the split out"
        )
    world = None if subjects.recipe is None else world_of(subjects.recipe)
    if tests is not None:
        cases: Sequence[AttackCase] = tests.attack_cases(suite.cases)
        split = tests.name
    elif world is None or subjects.recipe is None:
        raise InputError(
            f"{subjects.run}: this model has no requests of its own to be attacked with; give "
            "a benchmark's folder, or one with attacks.json, by --benchmark, or name it as the "
            "recipe's evaluation.held_out"
        )
    elif suite.split == "own":
        cases, split = world.attack_cases(suite.cases), subjects.recipe.evaluation.split
    elif not subjects.recipe.stage2.held_out_verbs:
        raise ConfigError(
            f"split {suite.split}: stage 2 of {subjects.run} held no verbs out; retrofit with "
            "--set stage2.held_out_verbs=true"
        )
    else:
        verbs: Verbs = "taught" if suite.split == "taught_verbs" else "held_out"
        cases, split = world.attack_cases(suite.cases, verbs), suite.split
    if cases and len(cases) < suite.cases:
        log.warning("%d requests are there, the suite uses %d", len(cases), suite.cases)
    return split, cases


def _benign(subjects: Subjects, suite: Suite, tests: Tests | None) -> list[AttackCase]:
    """Harmless requests of the tests, else of the run's world; none where there are none."""
    if tests is not None:
        return tests.benign_cases(suite.requests)
    world = None if subjects.recipe is None else world_of(subjects.recipe)
    if world is None or "benign_compliance" not in world.tasks:
        return []
    asked = world.questions("benign_compliance", suite.requests)
    return [AttackCase(q.image, q.question, q.expected) for q in asked if q.image is not None]


def _toxic(subjects: Subjects, suite: Suite, tests: Tests | None) -> list[AttackCase]:
    """Toxic pictures, the categories in turn; none where the run's world or the tests have none."""
    if not any(goal_of(entry) is Goal.EVASION for entry in suite.attacks):
        return []
    world = None if subjects.recipe is None else world_of(subjects.recipe)
    if tests is not None:
        categories = [name for name in tests.categories if not name.startswith(NEUTRAL)]
        sources = [tests.images(category) for category in categories]
    elif world is not None:
        each = -(-suite.requests // len(world.categories))
        sources = [iter(world.toxic_images(name, 0, each)) for name in world.categories]
    else:
        return []
    # a request stands beside the picture because the model's processor wants one
    turns = (picture for turn in zip_longest(*sources) for picture in turn if picture is not None)
    return [AttackCase(p, "what do you see ?", "sure") for p in islice(turns, suite.requests)]


def _examined(ground: Ground, subject: Subject) -> Subject:
    """The subject with what there is to see of its guard."""
    if not subject.guarded:
        return subject
    cases = ground.cases[: ground.single] or ground.benign or ground.toxic
    prompt = prompt_text(ground.processor, cases[0].request, picture=True)
    target = CodeTarget(subject.model, ground.processor, [prompt], [cases[0].opening])
    pixels = pixels_seen(ground.processor, cases, target.image_size)
    return replace(subject, health=guard_health(target, pixels.to(subject.model.device)))


def _require_same_judges(journal: Journal, ground: Ground) -> None:
    """Refuse to go on with other judges: half of the attempts would not be judged by them."""
    expected = {"target_prefix", "refusal_phrases", *ground.judges}
    for attempt in journal.read():
        if attempt.attack != BENIGN and set(attempt.judges) != expected:
            raise ConfigError(
                f"{journal.folder} holds attempts judged by {', '.join(attempt.judges)}; go on "
                "with these judges, or name another --output"
            )


def _model_judges(specs: Sequence[JudgeSpec], cases: Sequence[AttackCase]) -> dict[str, Judge]:
    taken = {"target_prefix", "refusal_phrases"}
    for spec in specs:
        if spec.name in taken:
            raise ConfigError(f"the judge {spec.name!r} is there already; give another name")
        taken.add(spec.name)
    requests = [case.request for case in cases]
    return {spec.name: ModelJudge(spec, requests, device()) for spec in specs}


def _stand_ins(
    subjects: Subjects, suite: Suite, surrogates: Sequence[Path]
) -> dict[MadeOn, list[StandIn]]:
    """Those that the suite's attacks make pictures on."""
    kinds = [ATTACKS.named(e.attack) for e in suite.attacks if e.attack in ATTACKS]
    wanted = {made_on for kind in kinds for made_on in kind.made_on}
    base = subjects.base() if MadeOn.UNDEFENDED in wanted else None
    others = surrogates if MadeOn.OTHER_RUNS in wanted else ()
    return {
        MadeOn.UNDEFENDED: [] if base is None else [StandIn.of(base, subjects.processor)],
        MadeOn.OTHER_RUNS: [StandIn.of_run(run) for run in others],
    }


def _make(ground: Ground, suite: Suite, subjects: Subjects, journal: Journal) -> None:
    done: dict[str, set[int]] = {}
    for attempt in journal.read():
        done.setdefault(attempt.cell, set()).add(attempt.request)
    names = list(dict.fromkeys(name for entry in suite.attacks for name in entry.subjects))
    number = 0
    for found in subjects.each(names):
        subject = _examined(ground, found)
        for plan in planned(suite, subject):
            if plan.entry.attack == BENIGN and not ground.benign:
                log.warning("over-refusal is left out: there are no harmless requests")
                continue
            if plan.goal is Goal.EVASION and not ground.toxic:
                log.warning("%s is left out: there are no toxic pictures", plan.entry.attack)
                continue
            needs_cases = plan.entry.attack != BENIGN and plan.goal is not Goal.EVASION
            if needs_cases and not ground.cases:
                log.warning("%s is left out: there are no requests to refuse", plan.entry.attack)
                continue
            if plan.universal and not ground.universal:
                log.warning("%s is left out: too few requests", plan.entry.attack)
                continue
            if plan.kind is not None and plan.kind.made_on and not ground.surrogates(plan):
                wanted = " or ".join(made_on.value for made_on in plan.kind.made_on)
                log.warning(
                    "%s is left out: it makes its pictures on %s models, and none is known "
                    "(--surrogate names other runs)",
                    plan.entry.attack,
                    wanted.replace("_", " "),
                )
                continue
            attempts = Attempts(ground, plan, done.get(plan_cell(ground, plan), set()))
            for batch in attempts.batches(suite.batch):
                number += 1
                if number % launched() != rank_and_world()[0]:
                    continue
                made = batch()
                journal.append(made)
                log.info(
                    "%s: %d of %d broken, %.0f s",
                    made[0].cell,
                    sum(attempt.judges[primary_judge(made)] for attempt in made),
                    len(made),
                    sum(attempt.seconds for attempt in made),
                )


def plan_cell(ground: Ground, plan: Planned) -> str:
    """The cell that a plan's attempts will have."""
    return Attempts(ground, plan, set()).cell
