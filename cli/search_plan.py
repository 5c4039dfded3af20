"""``vqguard search-plan``: which search a run's codebooks get here, and why."""

from __future__ import annotations

from pathlib import Path

import click

from vqguard.cli.options import UserPath, adapter_module_option, debug_option, find_run
from vqguard.cli.output import say


@click.command("search-plan", epilog="\b\nExample:\n  vqguard search-plan runs/llava-tiny")
@click.argument("run", type=UserPath())
@adapter_module_option
@debug_option
def command(*, run: Path) -> None:
    """Show which search of the nearest codeword each codebook of RUN gets on this machine, and why.

    RUN is a run, the folder of a guarded model, or that of a guard. What was measured on another
    processor or number of threads is measured again. All searches give the same answers.
    """
    run = find_run(run)

    from vqguard.recipes.search_plan import search_plans
    from vqguard.search.tuning import machine

    say("This machine: {}", machine())
    for level, codes, dim, choice in search_plans(run):
        say("\n{}: {} codewords of width {}, by {}", level, codes, dim, choice.backend)
        say("  why: {}", choice.reason)
        if choice.measured is not None:
            for name, taken in choice.measured.times.items():
                say("  {:9.1f} us a token: {}", taken, name)
