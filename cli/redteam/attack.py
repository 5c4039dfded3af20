"""`vqguard attack`: run a suite of attacks on a run's models."""

from __future__ import annotations

from pathlib import Path

import click

from vqguard.cli.group import Session
from vqguard.cli.options import UserPath, adapter_module_option, debug_option, find_run
from vqguard.cli.output import say

FAILED = 1


@click.command(
    "attack",
    epilog="""\b
Examples:
  vqguard attack runs/llava-tiny --suite quick --output attacks/quick
  vqguard attack runs/mine --suite adaptive --benchmark my-tests --output attacks/mine \\
      --fail-above asr=0.05,attack=per_request,eps_255=16
""",
)
@click.argument("run", type=UserPath())
@click.option(
    "--suite",
    default="quick",
    show_default=True,
    metavar="NAME",
    help="quick, paper, adaptive, table, verbs, verdict, peers, benchmark or full; or a YAML "
    "file of yours.",
)
@click.option(
    "--output",
    type=UserPath(),
    required=True,
    metavar="DIR",
    help="Where attempts, pictures, records and the page go. What is there already is not done "
    "again, so that the same call goes on after it was stopped.",
)
@click.option(
    "--benchmark",
    type=UserPath(exists=True, file_okay=False),
    metavar="DIR",
    help="In place of the run's own requests or evaluation.held_out: a folder with attacks.json "
    "and its images, or a benchmark as its authors publish it (docs/public-benchmarks.md).",
)
@click.option(
    "--split",
    type=click.Choice(["own", "taught_verbs", "heldout_verbs"]),
    help="Which forbidden verbs the requests of the embedded world ask for, in place of the "
    "suite's choice: heldout_verbs are those that no sample of stage 2 had, where the run was made "
    "with stage2.held_out_verbs.",
)
@click.option(
    "--fail-above",
    "limits",
    multiple=True,
    metavar="METRIC=LIMIT,KEY=VALUE,...",
    help="Exit with 1 where a record exceeds the limit, as in "
    "asr=0.05,attack=per_request,eps_255=16. The subject is guarded unless subject=... names "
    "another. Repeatable.",
)
@click.option(
    "--judge",
    "judge_files",
    multiple=True,
    type=UserPath(exists=True, dir_okay=False),
    metavar="FILE",
    help="A YAML file that describes a model on this machine that judges too (docs/attacks.md). "
    "Repeatable.",
)
@click.option(
    "--surrogate",
    "surrogates",
    multiple=True,
    type=UserPath(),
    metavar="RUN",
    help="Another run, as of another seed, on whose guarded model pictures are made where an "
    "attack of the suite transfers. Repeatable.",
)
@adapter_module_option
@debug_option
@click.pass_obj
def command(
    session: Session,
    *,
    run: Path,
    suite: str,
    output: Path,
    benchmark: Path | None,
    split: str | None,
    limits: tuple[str, ...],
    judge_files: tuple[Path, ...],
    surrogates: tuple[Path, ...],
) -> int | None:
    """Attack the models of RUN, and write rates, alarms and pictures into a folder."""
    run = find_run(run)

    from vqguard.adapters.model_judges import JudgeSpec
    from vqguard.recipes.attacking.fail_above import Limit
    from vqguard.recipes.attacking.run_suite import RECORDS, REPORT, run_suite
    from vqguard.recipes.attacking.suite import load_suite
    from vqguard.recipes.processes import is_first

    wanted = [Limit.parse(text) for text in limits]
    chosen = load_suite(suite)
    result = run_suite(
        run,
        chosen if split is None else chosen.override([f"split={split}"]),
        output,
        command=session.command,
        benchmark=benchmark,
        judges=[JudgeSpec.from_yaml(path) for path in judge_files],
        surrogates=[find_run(path) for path in surrogates],
    )
    if not is_first():
        return None
    for record in result.records:
        if record.metric == "asr":
            about = record.condition
            say(
                "{}: {}, {}, eps {:g}/255, judge {}: {:.1%} (n {})",
                record.subject,
                about["attack"],
                about["gradient"],
                about["eps_255"],
                about["judge"],
                record.value,
                record.n,
            )
    for alarm in result.alarms:
        say(
            "Alarm on {}: {} ({}). Run next: {}",
            alarm.subject,
            alarm.sentence,
            alarm.where,
            alarm.next,
            err=True,
        )
    say("Report: {}", output / REPORT)
    say("Numbers: {}", output / RECORDS)
    over = [(limit, record) for limit in wanted for record in limit.broken(result.records)]
    for limit, record in over:
        say(
            "Above the limit: {} of {} is {:.1%}, at most {:.1%} is allowed ({})",
            record.metric,
            record.subject,
            record.value,
            limit.most,
            ", ".join(f"{key}={value}" for key, value in record.condition.items()),
            err=True,
        )
    return FAILED if over else None
