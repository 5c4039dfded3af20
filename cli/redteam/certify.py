"""`vqguard certify`: certificates of the verdict, by randomised smoothing."""

from __future__ import annotations

from pathlib import Path

import click

from vqguard.cli.group import Session
from vqguard.cli.options import UserPath, adapter_module_option, debug_option, find_run
from vqguard.cli.output import say, say_lines


@click.command(
    "certify",
    epilog="""\b
Examples:
  vqguard certify runs/llava-tiny --output certificates
  vqguard certify runs/mine --images my-images --sigma 0.5 --samples 1000 --output certificates
""",
)
@click.argument("run", type=UserPath())
@click.option(
    "--output",
    type=UserPath(),
    required=True,
    metavar="DIR",
    help="Where records.json and certificates.jsonl go.",
)
@click.option(
    "--images",
    type=UserPath(exists=True, file_okay=False),
    metavar="DIR",
    help="One folder of images a category, 'neutral' among them; default: the run's own world.",
)
@click.option("--each", default=10, show_default=True, type=click.IntRange(1), help="Images each.")
@click.option(
    "--sigma",
    default=0.25,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Standard deviation of the noise, in pixels of [0, 1].",
)
@click.option(
    "--samples",
    default=500,
    show_default=True,
    type=click.IntRange(1),
    help="Noisy copies of each image; the radius that can be certified grows with them.",
)
@click.option(
    "--alpha",
    default=0.001,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Chance that a certificate is wrong.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the noise.")
@adapter_module_option
@debug_option
@click.pass_obj
def command(
    session: Session,
    *,
    run: Path,
    output: Path,
    images: Path | None,
    each: int,
    sigma: float,
    samples: int,
    alpha: float,
    seed: int,
) -> None:
    """Certify the verdicts of RUN's guard: in which L2 ball a majority over noise keeps them."""
    run = find_run(run)

    from vqguard.recipes.attacking.certify import NOT_CERTIFIED, RECORDS, certify_run
    from vqguard.redteam.smoothing import Smoothing

    records = certify_run(
        run,
        output,
        Smoothing(sigma=sigma, samples=samples, alpha=alpha),
        command=session.command,
        images=images,
        each=each,
        seed=seed,
    )
    for record in records:
        say(
            "{}: {:.1%} of {} at an L2 radius of {}, which holds an L-infinity ball of {:.2f}/255",
            record.metric.removesuffix("_rate").replace("_", " "),
            record.value,
            record.n,
            record.condition["radius_l2"],
            float(record.condition["linf_255"]),
        )
    say_lines(NOT_CERTIFIED)
    say("Numbers: {}", output / RECORDS)
