"""The program `vqguard`: its commands and its exit codes.

Exit codes: 0 done (for `scan`: every image was judged and none is flagged), 1 `scan` flagged an
image, a check of `verify` failed or `attack` found a rate above its limit, 2 usage or input error
(for `scan`: something was not judged), 3 a bug in this program, 130 interrupted, 141 the reader of
the output went away (what a shell reports of a program that SIGPIPE ends). Anything that is not 0
from `scan` means that an image must not be let through.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import click

from vqguard.cli.group import Entry, LazyGroup, Session
from vqguard.cli.options import debug_option, is_first_process
from vqguard.cli.output import (
    OutputClosedError,
    abandon_stdout,
    escape_logs_and_warnings,
    say,
    say_traceback,
    say_usage_error,
)
from vqguard.errors import DataError, InputError, VQGuardError
from vqguard.recipes.console.libraries import end_bars, quiet_libraries

OK, FLAGGED, USAGE, BUG, INTERRUPTED, OUTPUT_CLOSED = 0, 1, 2, 3, 130, 141

# The system's words for ENOSPC and EDQUOT, whichever library passes them on.
DISK_IS_FULL = ("No space left on device", "Disk quota exceeded")

COMMANDS = {
    "retrofit": Entry("vqguard.cli.retrofit", "Put a guard into a model, train it, measure it."),
    "pretrain-tiny": Entry("vqguard.cli.pretrain_tiny", "Train the base model of llava-tiny."),
    "scan": Entry("vqguard.cli.scan", "Judge images without running a language model."),
    "serve": Entry("vqguard.cli.serving.serve", "Serve a guarded model over HTTP."),
    "gateway": Entry("vqguard.cli.serving.gateway", "Judge the pictures of an engine's requests."),
    "ask": Entry("vqguard.cli.ask", "Ask a guarded model about an image."),
    "evaluate": Entry("vqguard.cli.evaluate", "Measure a run again and rewrite its report."),
    "attack": Entry("vqguard.cli.redteam.attack", "Attack a run's models by a suite of attacks."),
    "certify": Entry(
        "vqguard.cli.redteam.certify", "Certify the verdicts of a run's guard on images."
    ),
    "report": Entry("vqguard.cli.redteam.report", "Merge results of attacks into one page."),
    "calibrate": Entry("vqguard.cli.calibrate", "Fit a run's safety map to images of your own."),
    "map": Entry("vqguard.cli.safety_map", "Show, compare and edit a run's safety map."),
    "export": Entry("vqguard.cli.export", "Write a guarded model and its card, to share."),
    "search-plan": Entry(
        "vqguard.cli.search_plan", "Show how a run's codebooks are searched here."
    ),
    "verify": Entry("vqguard.cli.verify", "Prove that nothing gets past the guard in a model."),
    "models": Entry("vqguard.cli.models", "List the models that can be guarded."),
}


@click.group(
    cls=LazyGroup,
    entries=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nExample:\n  vqguard retrofit --model llava-tiny",
)
@click.version_option(package_name="vqguard")
@debug_option
def program() -> None:
    """Guard multimodal language models with a discrete visual bottleneck."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the program on `args` (default: `sys.argv`) and return its exit code."""
    session = Session()
    escape_logs_and_warnings()
    quiet_libraries()
    logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr, level=logging.WARNING)
    # The parts of a long job and the search that was chosen are worth a line each.
    for name in ("vqguard.recipes", "vqguard.search"):
        logging.getLogger(name).setLevel(logging.INFO if is_first_process() else logging.WARNING)
    try:
        return _run(args, session)
    except OutputClosedError:
        abandon_stdout()
        return OUTPUT_CLOSED


def _run(args: Sequence[str] | None, session: Session) -> int:
    try:
        result = program.main(args, prog_name="vqguard", obj=session, standalone_mode=False)
    except click.exceptions.Abort:
        end_bars()
        say("Interrupted.", err=True)
        return INTERRUPTED
    except click.ClickException as error:
        say_usage_error(error)
        return USAGE
    except (VQGuardError, OSError) as error:
        if session.debug:
            say_traceback(error)
        _say_error(error)
        return USAGE
    except OutputClosedError:
        raise
    except Exception as error:
        if _space(error):  # safetensors reports a full disk as an error of its own
            if session.debug:
                say_traceback(error)
            _say_error(error)
            return USAGE
        say_traceback(error)
        say("This is a bug in vqguard: please report it with the lines above.", err=True)
        return BUG
    return result if isinstance(result, int) else OK


def _say_error(error: Exception) -> None:
    """Print an error in one line.

    Further lines of a message that lists things are indented: none passes for a line of its own.
    """
    end_bars()
    text = f"{str(error) or type(error).__name__}{_space(error)}"
    lists = not isinstance(error, InputError) or isinstance(error, DataError)
    first, *rest = text.splitlines() if lists else [text]
    say("{}: {}", _error(), first, err=True)
    for line in rest:
        say("  {}", line.removeprefix("  "), err=True)


def _error() -> str:
    """The word "Error", with which process of a launched run has it."""
    processes = os.environ.get("WORLD_SIZE", "1")
    return "Error" if processes == "1" else f"Error in process {os.environ.get('RANK', '0')}"


def _space(error: Exception) -> str:
    """What to do about an error that says that the disk is full; empty for any other."""
    if isinstance(error, VQGuardError) or not any(text in str(error) for text in DISK_IS_FULL):
        return ""
    return ". Free some space and run it again; a run that was started goes on with --resume."
