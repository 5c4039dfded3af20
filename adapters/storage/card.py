"""The model card of a guarded model: what the folder holds, how to load it, what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from vqguard.adapters.registry import adapter_types
from vqguard.adapters.storage.bound_files import GUARD
from vqguard.adapters.storage.manifest import (
    GuardOnlyManifest,
    Manifest,
    OldGuardOnlyManifest,
    RecordedBase,
    read_manifest,
)
from vqguard.bounded import read_text
from vqguard.errors import ArtefactError
from vqguard.names import printable
from vqguard.text_files import read_json

CARD = "README.md"
_LIBRARY = "vqguard"
_MOST = 2**24  # bytes of a card
_GUARD, _MEASURED, _LIMITS = "## Guard", "## Measured", "## Limits"
_BOTH = (
    "A discrete bottleneck (two-level vector quantisation, after Q-MLLM, NDSS 2026) stands "
    "between the vision encoder and the language model: every visual token that the language "
    "model sees is one of a fixed set of codewords, and images whose semantic code is mapped "
    "to a toxic category are refused before the language model runs. Made with vqguard."
)
_ALONE = (
    "A judge alone (the semantic level of Q-MLLM, NDSS 2026): images whose semantic code is mapped "
    "to a toxic category are refused before the language model runs. **Visual tokens are judged, "
    "not quantised**: what is not refused reaches the language model as it is. Made with vqguard."
)
_BOTH_LIMITS = (
    "Judge the guard by the adaptive attacker's figures, not by those of an attacker whose "
    "gradient stops at the quantiser. It does not stop words drawn in the image, requests in "
    "the text, images nudged across the border of a semantic cell, or categories it was not "
    "calibrated for. An adaptive attacker without a bound on the image gets through part of "
    "the time."
)
_ALONE_LIMITS = (
    "There is no bottleneck: an image that was optimised against the language model and is not "
    "flagged reaches it unchanged, as without a guard. Whoever knows the judge can also look for "
    "an image that it does not flag. It does not stop words drawn in the image, requests in the "
    "text, or categories it was not calibrated for. `vqguard retrofit` without `--levels semantic` "
    "trains a guard that quantises."
)
NO_FIGURES = (
    "No figures were given with this upload. A guard whose defense rates nobody measured on this "
    "model promises nothing: measure them with `vqguard evaluate`."
)
OTHER_MAP = (
    "The safety map was made anew after the last figures were measured: they are left out, since "
    "they are another map's. `vqguard evaluate` on a run measures again."
)


def model_card(
    folder: Path, *, title: str = "", base: str | None = None, results: str = NO_FIGURES
) -> str:
    """README.md for a folder that holds a guarded model: metadata for the hub, then Markdown.

    Args:
        folder: merged or guard-only.
        title: heading. Default: the model type, guarded.
        base: hub id of the base, for a merged model; a guard-only folder names its own.
        results: Markdown under "Measured"; every defense rate in it must name its threat model.

    Raises:
        ArtefactError: when the folder is no guarded model.
    """
    manifest = read_manifest(folder)
    guard = read_json(folder / GUARD, ArtefactError)
    described = (
        manifest.base if isinstance(manifest, GuardOnlyManifest | OldGuardOnlyManifest) else None
    )
    if described is not None and described.source == "hub":
        base = described.name
    data: dict[str, Any] = {"base_model": base} if base else {}
    if base:
        data["base_model_relation"] = "adapter" if described else "finetune"
    metadata = ModelCardData(
        library_name=_LIBRARY,
        pipeline_tag="image-text-to-text",
        tags=["vqguard", "safety", "vector-quantization"],
        **data,
    )
    title = title or f"{manifest.model_type}, guarded"
    alone = _judges_alone(guard)
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {title}",
        _ALONE if alone else _BOTH,
        "## Load",
        _loading(manifest.model_type, described),
        _GUARD,
        _guard_table(manifest, guard),
        _MEASURED,
        results,
        _LIMITS,
        _ALONE_LIMITS if alone else _BOTH_LIMITS,
    ]
    return "\n\n".join(parts) + "\n"


def renewed_card(folder: Path, manifest: Manifest, guard: Path) -> str | None:
    """README.md of `folder` after its safety map was replaced; None without a card of our making.

    What it says of the guard is written anew, the figures are left out, all else stays.

    Args:
        folder: holds the card.
        manifest: of the guarded model.
        guard: its new `guard.json`.

    Raises:
        ArtefactError: `guard` or the card cannot be read.
    """
    path = folder / CARD
    if not path.is_file():
        return None
    text = read_text(path, _MOST, ArtefactError)
    head, _, rest = text.partition(f"\n{_GUARD}\n")
    _, measured, rest = rest.partition(f"\n{_MEASURED}\n")
    _, limits, tail = rest.partition(f"\n{_LIMITS}\n")
    if not (measured and limits and f"library_name: {_LIBRARY}" in head):
        return None
    table = _guard_table(manifest, read_json(guard, ArtefactError))
    parts = [head, _GUARD, table, _MEASURED, OTHER_MAP, _LIMITS, tail]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _loading(model_type: str, base: RecordedBase | None) -> str:
    given = ['"FOLDER"']
    text = (
        "A whole model. Loaders that do not know vqguard give an error; with `import vqguard`, "
        "transformers' `AutoModelForImageTextToText` and `pipeline` give the guarded model."
    )
    if base is not None:
        revision = f" at revision `{base.revision}`" if base.revision else ""
        text = (
            f"The guard alone. Its base is `{base.name}`{revision}; a base whose weights have "
            f"another SHA-256 than `{base.weights_sha256}` is refused."
        )
        if base.source == "path":
            given.append("base=FOLDER_OF_THE_BASE")
    if model_type not in adapter_types():
        text += (
            f" No adapter names the type `{model_type}`: it is taken on proof, made on what its "
            "processor returns for an image and a prompt."
        )
        given.append("probe_inputs=INPUTS")
    call = f"load_guarded({', '.join(given)})"
    return f"{text}\n\n```python\nfrom vqguard import load_guarded\n\nmodel = {call}\n```"


def _judges_alone(guard: dict[str, Any]) -> bool:
    return bool(guard["config"].get("levels", "both") == "semantic")


def _guard_table(manifest: Manifest, guard: dict[str, Any]) -> str:
    config, safety_map = guard["config"], guard["safety_map"]
    alone = _judges_alone(guard)
    judged = ", ".join(safety_map["categories"]) if safety_map else "none: it refuses to screen"
    threshold = f"{safety_map['rule']}, above {safety_map['tau']:.4g}" if safety_map else "none"
    rows = {
        "judged at site" if alone else "quantised at site": manifest.site,
        "patch codewords": "none: visual tokens are not quantised"
        if alone
        else config["patch_codes"],
        "semantic codewords": config["semantic_codes"],
        "judge": config.get("judge", "global"),
        "categories of the safety map": judged,
        "verdict rule and threshold": threshold,
        "refusal": config["refusal_text"],
    }
    # Categories and the refusal are the user's words: they end no cell and no line.
    shown = {name: printable(str(value)).replace("|", "\\|") for name, value in rows.items()}
    lines = ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in shown.items())]
    return "\n".join(lines)
