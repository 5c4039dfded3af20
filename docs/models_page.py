"""docs/models.md, from the registry and from the conformance results in docs/conformance.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent / "conformance.json"

INTRODUCTION = """\
Every family of transformers' image-text-to-text mapping, as `vqguard verify all --tiny` found it on
transformers {version}: tiny random models of the real classes, images and, where the family has
them, videos, at each of the family's sites. The results are in `docs/conformance.json`; a test runs
families again and compares.

*guarded*: every check passed. *no-bypass*: nothing gets past the guard, and a check of something
else failed. *refused*: `guard_model` does not take it. A type that is not listed is taken only on
proof (`guard_model(model, guard, processor)` and `load_guarded(path, processor=...)`, or inputs of
your own as `probe_inputs`).

An adapter of your own needs no change here: a package declares it as the entry point of its type
(group `vqguard.adapters`), or `--adapter-module mypackage.my_adapter` imports it on the command
line, which runs that module.

Of {seen} families that see pixels, {proved} pass the no-bypass checks in `forward` and `generate`,
{guarded} of them every check.

**From** is the oldest transformers on which the family was proven (`adapters/families/family.py`
says how);
on an older one it is taken only on proof.

**Sites**: *projected* is behind the projector, as in the paper, *encoder* before it. **Global
token**: what the semantic level judges. **Joins**: how features meet the text.

**Regions**: the check `regional` holds for every family: where `judge: regional` flags a region,
the rows that see its picture refuse and no others, and a picture's codes are the same alone and
in a batch. The regions are windows of the grid that the adapter knows. A family that mixes its
tokens (by a resampler or a Q-Former), or of which nothing says how many rows they make, has no
grid: each token is a region, the whole picture is one more, and a verdict names no place.

**Audio** is out of the guard's scope: an omni model's audio goes to its language model unquantised
and unjudged. It is no way round for pictures: precomputed features of any kind
(`mm_encoder_outputs`) are refused, and audio arguments pass through the audio encoder.

**Refused in every family**, in `forward` and in `generate`: {vectors}; a cache that the guard did
not fill; any other float tensor or cache under a name that `forward` does not have;
`custom_generate`, `trust_remote_code` and continuous batching; an assistant that takes images
([all ways round](threat-model.md#who-may-call-the-model)).
"""


NOTES = {
    "llama4": "transformers 5.24.0 cannot run its `forward` with a dictionary output, guarded or "
    "not: the checks give the tiny model's language model the missing field, a loaded one has none",
    "shieldgemma2": "so the unguarded model does not survive saving and loading either",
}
"""What a detail means where it does not say it itself."""


def models_page(note: str) -> str:
    """The whole page."""
    from vqguard.adapters.catalogue import list_models
    from vqguard.adapters.runtime.bypass import VECTORS

    table = json.loads(DATA.read_text(encoding="utf-8"))
    rows: dict[str, dict[str, Any]] = table["families"]
    seen = [row for row in rows.values() if row["status"] != "no pixels"]
    guarded = [row for row in seen if row["status"] == "guarded"]
    proved = [row for row in seen if row["status"] in ("guarded", "no-bypass")]
    names: dict[str, list[str]] = {}
    for entry in list_models():
        names.setdefault(entry.model_type, []).append(f"`{entry.name}`")
    parts = [
        "# Models\n",
        note,
        INTRODUCTION.format(
            version=table["transformers"],
            seen=len(seen),
            proved=len(proved),
            guarded=len(guarded),
            vectors=", ".join(f"`{name}`" for name in VECTORS),
        ),
        "| family | names | status | from | sites | global token | joins | video | also |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        + "".join(_row(kind, row, names.get(kind, [])) for kind, row in rows.items()),
    ]
    details = {kind: row["detail"] for kind, row in rows.items() if row["detail"]}
    parts.append(
        "## What falls short\n\n"
        + "".join(f"- `{kind}`: {detail}{_note(kind)}\n" for kind, detail in details.items())
    )
    return "\n".join(parts)


def _note(kind: str) -> str:
    return f". {NOTES[kind]}" if kind in NOTES else ""


def _row(kind: str, row: dict[str, Any], names: list[str]) -> str:
    from vqguard.adapters.registry import declared_family

    also = [
        text
        for text, there in (
            ("deep-stack codebooks", row.get("deep")),
            ("audio unguarded", row.get("audio")),
            (f"refuses {row.get('refuses')}", row.get("refuses")),
        )
        if there
    ]
    cells = [
        f"`{kind}`",
        ", ".join(names),
        row["status"],
        declared_family(kind).proven_from if row["status"] in ("guarded", "no-bypass") else "",
        ", ".join(row.get("sites", [])),
        row.get("global", ""),
        ", ".join(row.get("joins", [])),
        "yes" if row.get("video") else "",
        ", ".join(also),
    ]
    return "| " + " | ".join(cells) + " |\n"
