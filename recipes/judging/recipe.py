"""A judge alone as data: the model, the images, and how its codes are made of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from vqguard.config import GuardSettings
from vqguard.recipes.recipe import RegionalRecipe, UserPath, load_recipe, recipe_names
from vqguard.strict import StrictConfig, raise_problems


@dataclass(frozen=True)
class JudgeRecipe(StrictConfig):
    """A judge alone: no language model is trained, and no visual token quantised."""

    model: str
    """A name from `vqguard models`, a local path, `hub:owner/name`; or a vision encoder:
    `timm:NAME`, `open_clip:NAME`, `transformers:FOLDER`."""
    images: UserPath | None = None
    """One folder a category, one of them `neutral`; None is the embedded world (llava-tiny only).
    """
    labels: UserPath | None = None
    """A list of the images' labels (.csv or .jsonl) in place of folders."""
    weights: str | None = None
    """Of a vision encoder: a file, or OpenCLIP's tag. None: the library's own."""
    rules: UserPath | None = None
    """Thresholds, hierarchy, policies and refusal texts (`vqguard.judging.rules`)."""
    keep_examples: bool = False
    """Keep small copies of the images nearest to each code in the run's directory, for
    explanations."""
    guard: GuardSettings = field(default_factory=lambda: GuardSettings(judge="regional"))
    """The guard's sizes; those of the patch codebook play no part."""
    regional: RegionalRecipe = field(
        default_factory=lambda: RegionalRecipe(
            per_category=100, neutral=1000, fpr=0.01, steps=150, whitening=0.9
        )
    )
    """Training, shares and false-positive budget. The threshold's share grows where the budget
    needs it."""
    held_out: float = 0.2
    """Share of each category's images that the report is measured on, and nothing else."""
    seed: int = 0
    """Seed of the shares, the codebooks and the training."""

    @classmethod
    def of_model(cls, model: str) -> JudgeRecipe:
        """The recipe for a model, with the guard's sizes of its retrofit where there is one."""
        if model not in recipe_names():
            return cls(model=model)
        guard = load_recipe(model).guard
        return cls(model=model, guard=replace(GuardSettings(**guard.settings()), judge="regional"))

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if not 0 < self.held_out < 1:
            problems.append(f"held_out: expected a share in (0, 1), got {self.held_out}")
        if self.labels is not None and self.images is None:
            problems.append("labels: the paths in it start from images; set images too")
        raise_problems(type(self), problems)
