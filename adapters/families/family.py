"""What a family of models says of itself beside its adapter: names, versions, its random model.

Data only, imported without torch. The facts of one `config.model_type` stand in one `Family`, in
the file that has its adapter:

    @register_adapter(
        Family(
            "my_type",
            checkpoints={"my-model-7b": "me/my-model-7b"},
            proven_from="5.24",
            random_model=RandomModel(config={"vision_config.window_size": 2}),
        )
    )
    class MyAdapter(DefaultAdapter): ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from vqguard.adapters.random_inputs.prompts import Layout

    Pixels = dict[str, Any]
    PixelMaker = Callable[[Any, int, torch.Generator], Pixels]
    RowPixelMaker = Callable[[Any, Sequence[int], torch.Generator], Pixels]
    PromptMaker = Callable[[Layout], dict[str, Any]]

OLDEST = "5.6"
"""The oldest transformers that the package supports, as in pyproject.toml."""


@dataclass(frozen=True)
class RandomModel:
    """What a family's tiny random model needs beyond smaller sizes.

    And what its inputs need beyond what the encoder's arguments tell.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    """Values at dotted paths of its config."""
    pixels: Mapping[str, PixelMaker] = field(default_factory=dict)
    """By modality: (model, pictures or videos, generator) -> the encoder's arguments."""
    pixels_by_row: RowPixelMaker | None = None
    """(model, pictures of each row, generator) -> the same, laid out by row of the batch."""
    prompt: PromptMaker | None = None
    """The text's arguments; None: placeholders for every picture and a few words."""
    one_a_row: bool = False
    """Whether the family takes one picture a row."""
    stamped_frames: bool = False
    """Whether the family writes a time stamp in front of every frame of a video."""
    make_config: Callable[[Any], Any] | None = None
    """Config class -> config, for a family whose config is no record of sizes."""
    prepare: Callable[[Any], None] | None = None
    """Changes the model that was built, in place."""


@dataclass(frozen=True)
class Family:
    """The facts of one `config.model_type`."""

    model_type: str
    checkpoints: Mapping[str, str] = field(default_factory=dict)
    """Short name -> id on the hub; of several names of a checkpoint the first leads. In the
    project's own files a literal: names are listed without running the file (`names.py`)."""
    proven_from: str = OLDEST
    """The oldest transformers on which the family passed the conformance kit.

    Where features enter the language model moves between versions of transformers. A seam that is
    right today may be half of the truth in a release of last year, and a model that is guarded by
    half is not guarded. On an older version `guard_model` asks for the proof that it asks of a type
    without an adapter.

    The project's own are measured on 5.6.2, 5.12.1, 5.20.2, 5.22.2, 5.23.0 and 5.24.0. A family
    counts from the oldest of these from which on all pass the probe, the white-box check and the
    checks of rows, refusals and arguments, on tiny random models, images and videos, at each site.
    Many did not exist before.
    """
    random_model: RandomModel = field(default_factory=RandomModel)
    refused: str = ""
    """Why models of this type are never guarded, though they see pixels."""
    blind: str = ""
    """Why the type sees no pixels, for those of transformers' image-text-to-text mapping."""

    def is_proven(self, version: str | None = None) -> bool:
        """Whether `version` of transformers, the installed one if None, is new enough."""
        if version is None:
            import transformers  # heavy, and names are listed without it

            version = str(transformers.__version__)
        return _release(version) >= _release(self.proven_from)


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
