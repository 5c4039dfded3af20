"""What a run that writes a report gives back, and the names of its files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vqguard.records import Record

REPORT_JSON, REPORT_HTML = "report.json", "report.html"
VERDICTS = "verdicts.jsonl"
"""One JSON object an image of the toxic and the neutral sets: `Ledger.verdicts`."""


@dataclass(frozen=True)
class RetrofitResult:
    """Where a run's report is, and what is in it."""

    run: Path
    report_html: Path
    report_json: Path
    records: list[Record] = field(default_factory=list)
