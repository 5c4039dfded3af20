"""The audit log: one JSON line a picture that was judged. No pictures, no texts.

A picture is known by the SHA-256 of its file, a verdict by the version of the map and the checksum
of the model that gave it. The semantic codes are there, so that another map can be asked later what
it would have said (`vqguard map diff --log`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from vqguard.errors import ConfigError
from vqguard.judging.verdict import Verdict
from vqguard.safety_map import SafetyMap


class AuditLog:
    """Appends to a file, which may be moved away and opened anew while it is in use."""

    def __init__(self, path: Path, model: str) -> None:
        """`model`: the checksum that lines carry.

        Raises:
            ConfigError: the file cannot be written.
        """
        self.path = path
        self.model = model
        self._lock = threading.Lock()
        self._file = self._open()

    def write(
        self,
        request: str,
        hashes: Sequence[str],
        verdicts: Sequence[Verdict],
        safety_map: SafetyMap,
        *,
        shadow: bool,
    ) -> None:
        """The lines of one request's pictures, whole or not at all.

        Raises:
            OSError: they cannot be written; then the request must not be answered.
        """
        lines = []
        for number, verdict in enumerate(verdicts):
            reason = verdict.reason
            asked = "none"
            if reason is not None:
                judging = safety_map.judging
                asked = judging.policy(judging.acting(verdict)).action
            region = None if reason is None else reason.region
            line = {
                "time": round(time.time(), 3),
                "request": request,
                "picture": number,
                "sha256": hashes[number] if number < len(hashes) else None,
                "model": self.model,
                "map_version": safety_map.version,
                "shadow": shadow,
                "category": verdict.category,
                "action": asked,
                "score": None if reason is None else reason.score,
                "threshold": None if reason is None else reason.threshold,
                "region": None if region is None else dataclasses.asdict(region),
                "also": [] if reason is None else list(reason.also),
                "codes": list(verdict.codes),
            }
            lines.append(json.dumps(line) + "\n")
        content = "".join(lines).encode()
        with self._lock:
            written = os.write(self._file, content)
        if written != len(content):
            raise OSError(f"{self.path}: {written} of {len(content)} bytes were written")

    def reopen(self) -> None:
        """Write to the path anew: what stood there was moved away.

        Raises:
            ConfigError: the file cannot be written; the old one goes on.
        """
        fresh = self._open()
        with self._lock:
            old, self._file = self._file, fresh
        os.close(old)

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(f"the audit log {self.path} cannot be written ({error})") from error
