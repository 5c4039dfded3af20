"""What is printed of a scan's files, and the exit code that comes of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vqguard.cli.output import field as shown
from vqguard.cli.output import say, say_json
from vqguard.errors import ImageError, InputError
from vqguard.recipes.screening.counts import Counts

if TYPE_CHECKING:
    from vqguard.recipes.screening.judging import Judged

CLEAN, FLAGGED, NOT_ALL = 0, 1, 2


@dataclass
class Tally:
    """Prints what came of each file, and counts."""

    as_json: bool
    counts: Counts = field(default_factory=Counts)

    def file(self, path: Path, result: Judged | ImageError) -> None:
        """Print what is known of a picture."""
        if isinstance(result, ImageError):
            self.counts.bad += 1
            self._without_verdict(path, "unreadable", str(result))
            say("Skipped: {}", result, err=True)
            return
        self.counts.judged += 1
        self.counts.flagged += result.flagged
        self.counts.ambiguous += bool(result.ambiguous)
        if self.as_json:
            say_json({"image": str(path), **result.to_row()})
        else:
            _say_verdict(path, result)

    def unknown_file(self, path: Path, reason: str) -> None:
        """Print that a file is no picture."""
        self.counts.unknown += 1
        self._without_verdict(path, "unknown", reason)
        say("Skipped: {}: {}", path, reason, err=True)

    def exit_code(self, *, skip_bad: bool, skip_unknown: bool) -> int:
        """Print the closing lines.

        Raises:
            InputError: nothing was judged.
        """
        counts = self.counts
        not_judged = []
        if counts.bad and not skip_bad:
            not_judged.append(f"{counts.bad} unusable (--skip-bad goes on without them)")
        if counts.unknown and not skip_unknown:
            not_judged.append(f"{counts.unknown} no images (--skip-unknown lets them be)")
        if not_judged:
            say("Not everything was judged: {}.", ", ".join(not_judged), err=True)
        self.close()
        if counts.judged == 0:
            raise InputError(f"None of the {counts.bad} images could be read: nothing was judged.")
        if not_judged:
            return NOT_ALL
        return FLAGGED if counts.flagged else CLEAN

    def close(self) -> None:
        """Print the line that counts."""
        counts = {
            "judged": self.counts.judged,
            "flagged": self.counts.flagged,
            "ambiguous": self.counts.ambiguous,
            "skipped": self.counts.bad + self.counts.unknown,
            "unreadable": self.counts.bad,
            "unknown": self.counts.unknown,
        }
        if self.as_json:
            say_json(counts, err=True)
            return
        say(
            "{} judged, {} flagged ({} ambiguous), {} skipped ({} unusable, {} no images)",
            *counts.values(),
            err=True,
        )

    def _without_verdict(self, path: Path, word: str, error: str) -> None:
        if self.as_json:
            say_json({"image": str(path), "verdict": word, "error": error})


def _say_verdict(path: Path, result: Judged) -> None:
    verdict = result.verdict
    if verdict is None:
        say("{}: ambiguous ({})", shown(path), result.ambiguous)
        return
    also = () if verdict.reason is None else verdict.reason.also
    say(
        "{}: {} ({}, probability {:.2f}, semantic code {}){}",
        shown(path),
        result.word,
        shown(", also ".join((verdict.category, *also))),
        verdict.probability,
        verdict.semantic_code,
        f"; {result.ambiguous}" if result.ambiguous else "",
    )
