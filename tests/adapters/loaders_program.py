"""Every loader that does not go through vqguard, tried on folders: what each gives, as JSON.

`python loaders_program.py without|before|after FOLDER...`: vqguard cannot be imported, is imported
before transformers, or after it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

ORDER, FOLDERS = sys.argv[1], sys.argv[2:]
if ORDER == "without":
    sys.modules["vqguard"] = None  # type: ignore[assignment]
if ORDER == "before":
    import vqguard

import transformers  # noqa: E402
from transformers import AutoConfig, pipeline  # noqa: E402

if ORDER == "after":
    import vqguard

    assert vqguard.__version__

AUTO = [
    name
    for name in dir(transformers)
    if name.startswith("AutoModel") and name != "AutoModelForMaskGeneration"
]
BY_NAME = [
    "LlavaForConditionalGeneration",
    "LlavaModel",
    "CLIPVisionModel",
    "SiglipVisionModel",
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
]


def _pipeline(task: Any, folder: str) -> Any:
    return pipeline(task, model=folder).model


def _peft(folder: str) -> Any:
    from peft import AutoPeftModel

    return AutoPeftModel.from_pretrained(folder)


def loaders() -> dict[str, Callable[[str], Any]]:
    classes = {name: getattr(transformers, name) for name in (*AUTO, *BY_NAME)}
    found: dict[str, Callable[[str], Any]] = {
        name: cls.from_pretrained for name, cls in classes.items()
    }
    found["AutoConfig"] = AutoConfig.from_pretrained
    for task in ("image-text-to-text", "text-generation", "any-to-any", "feature-extraction"):
        found[f"pipeline {task}"] = partial(_pipeline, task)
    found["AutoPeftModel"] = _peft
    return found


def tried(load: Callable[[str], Any], folder: str) -> str:
    try:
        made = load(folder)
    except Exception as error:  # whatever a loader raises
        return f"{type(error).__name__}: {error}"
    if getattr(made, "vqguard", None) is not None:
        return "guarded"
    return f"opened: {type(made).__name__}"


if __name__ == "__main__":
    print(json.dumps({f: {n: tried(load, f) for n, load in loaders().items()} for f in FOLDERS}))
