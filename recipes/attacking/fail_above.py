"""A limit that a suite's records must keep: what makes a suite gate a CI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vqguard.errors import InputError
from vqguard.records import Record, Scalar


@dataclass(frozen=True)
class Limit:
    """A metric's highest allowed value, on one subject, under conditions."""

    metric: str
    most: float
    subject: str
    condition: dict[str, Scalar]

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Read `asr=0.05,attack=per_request,eps_255=16`: the limit first, then conditions.

        `subject` is `guarded` where it is not named.

        Raises:
            InputError: another form, or a limit that is no number in [0, 1].
        """
        parts = [part.partition("=") for part in text.split(",")]
        if not all(key.strip() and separator and value.strip() for key, separator, value in parts):
            raise InputError(
                f"expected METRIC=LIMIT,KEY=VALUE,... as in asr=0.05,attack=per_request,"
                f"eps_255=16, got {text!r}"
            )
        named = [(key.strip(), value.strip()) for key, _, value in parts]
        metric, limit = named[0]
        try:
            most = float(limit)
        except ValueError:
            most = -1.0
        if not 0.0 <= most <= 1.0:
            raise InputError(f"expected a limit in [0, 1] for {metric}, got {limit!r}")
        condition = {key: _scalar(value) for key, value in named[1:]}
        subject = str(condition.pop("subject", "guarded"))
        return cls(metric, most, subject, condition)

    def broken(self, records: Sequence[Record]) -> list[Record]:
        """The records that exceed it.

        Raises:
            InputError: none is about it, so that nothing would be checked.
        """
        about = [
            record
            for record in records
            if (record.metric, record.subject) == (self.metric, self.subject)
            and all(
                key in record.condition and record.condition[key] == value
                for key, value in self.condition.items()
            )
        ]
        if not about:
            raise InputError(
                f"no record of {self.metric} on {self.subject} has "
                f"{', '.join(f'{k}={v}' for k, v in self.condition.items()) or 'any condition'}: "
                "the suite does not measure what --fail-above asks for"
            )
        return [record for record in about if record.value > self.most]


def _scalar(text: str) -> Scalar:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text, text)
