"""`vqguard ask`: one question about one image."""

from __future__ import annotations

from pathlib import Path

import click

from vqguard.cli.options import UserPath, adapter_module_option, base_option, debug_option, find_run
from vqguard.cli.output import say, say_json, say_lines


@click.command(
    "ask", epilog='\b\nExample:\n  vqguard ask runs/llava-tiny photo.png "What is in the image?"'
)
@click.argument("model", type=UserPath())
@click.argument("image", type=UserPath())
@click.argument("question")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="The longest answer, in tokens.",
)
@click.option(
    "--video",
    is_flag=True,
    help="IMAGE is a video: the model is shown as many of its frames as in its training.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object: answer and verdict.")
@base_option
@adapter_module_option
@debug_option
def command(
    *,
    model: Path,
    image: Path,
    question: str,
    max_new_tokens: int,
    video: bool,
    as_json: bool,
    base: str | None,
) -> None:
    """Ask the guarded MODEL (a run directory, or the name of one in runs/) about IMAGE.

    With --video that is a video. If the image, or one of the frames, is flagged, the answer
    is the guard's refusal and the language model does not run; the verdict then stands on
    stderr.
    """
    run = find_run(model)

    from vqguard.images import open_image
    from vqguard.videos import open_video

    picture = open_video(image, frames=1) if video else open_image(image)  # before a model is read

    from vqguard.recipes.run import open_run

    opened = open_run(run, base=base)
    shown = opened.open_video(image) if video else picture
    answer = opened.ask(shown, question, max_new_tokens)
    verdict = answer.verdict
    if as_json:
        say_json({"answer": answer.text, "verdict": verdict.to_dict()})
        return
    say_lines(answer.text)
    if verdict.flagged:
        say(
            "Flagged: {} (probability {:.2f}, semantic code {}).",
            verdict.category,
            verdict.probability,
            verdict.semantic_code,
            err=True,
        )
    elif not verdict.quantised:
        say("Judged alone: the picture reached the language model unquantised.", err=True)
