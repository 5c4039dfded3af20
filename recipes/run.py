"""A run's directory, and the guarded model in it as users meet it: screen and ask.

`recipe.yaml`  the resolved recipe          `stage1/ stage2/`  checkpoints, `metrics.jsonl`
`model/`       the guarded model            `report.html`, `report.json`, `pictures/`
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vqguard.adapters import load_guarded
from vqguard.adapters.encoders.stored import (
    holds_encoder,
    load_encoder,
    read_encoder_manifest,
)
from vqguard.adapters.sizes.pictures import open_processor
from vqguard.adapters.storage.manifest import holds_manifest, read_manifest
from vqguard.errors import ArtefactError, InputError, first_line
from vqguard.files import text_sha256
from vqguard.images import check_plain
from vqguard.recipes.data.chat import prompt_text
from vqguard.recipes.data.media.video_inputs import require_videos, video_inputs
from vqguard.recipes.image_batches import screen_images
from vqguard.recipes.placement import loading, place
from vqguard.recipes.recipe import RetrofitRecipe
from vqguard.safety_map import Verdict
from vqguard.videos import FRAMES, Clip, open_video

RECIPE = "recipe.yaml"
JUDGE = "judge.yaml"
"""In place of a recipe: the run has a judge alone (`vqguard.recipes.judging.recipe`)."""
MODEL = "model"
TIMES = "stage_seconds.json"
log = logging.getLogger(__name__)
_TRIED = 64  # pixels of a side


@dataclass(frozen=True)
class Answer:
    """What a guarded model says about an image, with the guard's verdict on the image."""

    text: str
    verdict: Verdict


@dataclass(frozen=True)
class LoadedRun:
    """A run's guarded model with its processor."""

    model: Any
    processor: Any
    """None behind a vision encoder, which prepares pictures itself."""
    video_frames: int = FRAMES
    """Frames of a video that the model is shown, as in its training."""

    @property
    def image_processor(self) -> Any:
        """What prepares pictures for the model; None behind a vision encoder."""
        return None if self.processor is None else self.processor.image_processor

    @property
    def converts_to_rgb(self) -> bool:
        """Whether the image processor makes an RGB picture of whatever it is given."""
        return bool(getattr(self.image_processor, "do_convert_rgb", False))

    def require_language_model(self) -> None:
        """Raise InputError where there is nobody to ask: behind a vision encoder."""
        if self.processor is None:
            raise InputError(
                "the run judges behind a vision encoder: there is nobody to ask. Use `vqguard scan`"
            )

    def screen_images(self, images: list[Image.Image]) -> list[Verdict]:
        """One verdict an image; the language model does not run.

        The verdict is about the very pictures that are given: give the model the same ones. Files
        are opened with `vqguard.images.open_image`, or with `open_readings` where another program
        will open them again.

        Raises:
            InputError: a picture that can be read in more than one way (`check_plain`).
        """
        return screen_images(self.model, self.processor, images)

    def open_video(self, path: Path | str) -> Clip:
        """The frames of a video that the model is shown, chosen as in its training.

        Raises:
            VideoError, ConfigError: as `vqguard.videos.open_video`.
        """
        return open_video(path, self.video_frames)

    @torch.no_grad()
    def ask(self, shown: Image.Image | Clip, question: str, max_new_tokens: int = 64) -> Answer:
        """The answer to a question about an image: the refusal if the image is flagged.

        A video (`open_video`) is flagged if one of its frames is.

        Raises:
            InputError: an empty question, a picture that can be read in more than one way
                (`vqguard.images.check_plain`), a video for a model that takes none, or a run
                without a language model.
        """
        self.require_language_model()
        if not question.strip():
            raise InputError("expected a question, got an empty text")
        if isinstance(shown, Clip):
            require_videos(self.processor, "the question")
            text = prompt_text(self.processor, question, video=True)
            inputs = self.processor(text=[text], return_tensors="pt", **video_inputs([shown]))
        else:
            check_plain(shown)
            text = prompt_text(self.processor, question, picture=True)
            inputs = self.processor(images=[shown], text=[text], return_tensors="pt")
        inputs = inputs.to(self.model.device)
        output = self.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True
        )
        new = output.sequences[0, inputs["input_ids"].shape[1] :]
        said = self.processor.tokenizer.decode(new, skip_special_tokens=True)
        return Answer(said, output.verdicts[0])


def open_judge(run: Path, *, base: str | None = None) -> LoadedRun:
    """The guarded model of a run for its verdicts alone, as `open_run` finds it.

    Its language model is not loaded, where pictures can be judged without it.

    Raises as `open_run` does.
    """
    loaded = open_run(run, base=base, language=False)
    grey = Image.new("RGB", (_TRIED, _TRIED), "grey")
    try:
        loaded.screen_images([grey])
    except Exception as error:  # what a family asks its language model for is its own affair
        log.warning("the whole model is loaded: it does not judge without (%s)", first_line(error))
        del loaded
        return open_run(run, base=base)
    return loaded


def open_run(run: Path, *, base: str | None = None, language: bool = True) -> LoadedRun:
    """The guarded model of a run's directory, or of a folder written by `save_pretrained`.

    A judge behind a vision encoder has that encoder in the model's place.

    It is where this process computes: a GPU if there is one, all of them if the run's recipe has a
    device map.

    Args:
        run: a run's directory or a guarded model's folder.
        base: for a guard without its base, where that is: a folder, a registered name or
            `hub:owner/name`. None: what the guard has recorded.
        language: as for `load_guarded`; what it leaves out is on no device.

    Raises:
        ArtefactError: there is none, or its base is not found, with what to do.
        ConfigError: a `base` that a whole model does not need.
    """
    folder = model_folder(run)
    if holds_encoder(folder):
        return LoadedRun(place(load_encoder(folder, base)), None)
    if not holds_manifest(folder):
        unfinished = (run / RECIPE).is_file() or (run / JUDGE).is_file()
        remedy = (
            "The retrofit has not finished: go on with `vqguard retrofit … --resume`."
            if unfinished
            else "Make one with `vqguard retrofit --model llava-tiny`, or name another."
        )
        raise ArtefactError(f"{run}: no guarded model here. {remedy}")
    processor = open_processor(folder)
    recipe = RetrofitRecipe.from_yaml(run / RECIPE) if (run / RECIPE).is_file() else None
    spread = loading(recipe.device_map) if language and recipe is not None else {}
    model = load_guarded(folder, base=base, processor=processor, language=language, **spread)
    frames = FRAMES if recipe is None else recipe.video_frames
    return LoadedRun(place(model), processor, frames)


def model_folder(run: Path) -> Path:
    """Where the guarded model of `run` is: in a run's directory its `model/`, else `run` itself.

    What an earlier version left of a save that was interrupted is put back into place.

    Raises:
        ArtefactError: there are two, or what was left cannot be put back.
    """
    _put_back(run)
    if not holds_manifest(run):
        return run / MODEL if (run / MODEL).is_dir() else run
    if holds_manifest(run / MODEL):
        raise ArtefactError(
            f"{run} and {run / MODEL} are both guarded models, as `vqguard calibrate` of an earlier"
            " version left them: the second has the newer safety map, and the first is what "
            "load_guarded reads. Move one of them elsewhere"
        )
    return run


def model_checksum(run: Path) -> str:
    """SHA-256 of what the manifest of a run's model says of its files, but for the guard's map.

    A map that is calibrated anew leaves it as it is.

    Raises:
        ArtefactError: there is no guarded model.
    """
    folder = model_folder(run)
    manifest = read_encoder_manifest if holds_encoder(folder) else read_manifest
    values: dict[str, Any] = manifest(folder).to_dict()
    bound = {name: v for name, v in values.items() if name not in ("guard_sha256", "files")}
    return text_sha256(json.dumps(bound, sort_keys=True))


def save_run_model(run: Path, model: Any, processor: Any) -> None:
    """Write the guarded model and its processor; the old ones stay until the new are whole.

    Raises:
        ArtefactError: the folder is somebody else's, see `save_pretrained`.
    """
    _put_back(run)
    model.save_pretrained(run / MODEL, processor=processor)
    for leftover in _leftovers(run):
        shutil.rmtree(leftover, ignore_errors=True)


def _leftovers(run: Path) -> tuple[Path, Path]:
    """What versions before 0.2 renamed a run's model from and to, the new model first."""
    return run / f"{MODEL}.new", run / f"{MODEL}.old"


def _put_back(run: Path) -> None:
    target, (new, old) = run / MODEL, _leftovers(run)
    # The old model was renamed when the new one was whole. Without an old one nothing is known of
    # the new one: then the run is unfinished and `--resume` writes it.
    if target.exists() or not holds_manifest(old):
        return
    whole = new if holds_manifest(new) else old
    try:
        whole.rename(target)
    except OSError as error:
        raise ArtefactError(
            f"saving {target} was interrupted, and what is whole cannot be put back ({error}): "
            f"rename {whole} to {target.name}"
        ) from error
