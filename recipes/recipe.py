"""A retrofit as data: every number that decides a run, strict, and written into its directory."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator

from vqguard.config import GuardSettings
from vqguard.errors import ConfigError, InputError
from vqguard.files import expanded
from vqguard.judging.rules import JudgeRules
from vqguard.names import nearest
from vqguard.paper import PAPER_TAU
from vqguard.regional.schedule import RegionalTraining
from vqguard.strict import StrictConfig, raise_problems
from vqguard.videos import FRAMES, MAX_SAMPLED

log = logging.getLogger(__name__)


UserPath = Annotated[Path, AfterValidator(expanded)]
"""A setting that is a path: `~` and environment variables in it are filled in when it is read."""


@dataclass(frozen=True)
class GuardRecipe(GuardSettings):
    """What the guard is made of."""

    start_samples: int = 2000
    """Training images whose features start the codebooks by k-means."""
    start_points: int = 64
    """Visual tokens of those images that k-means gets for each patch entry."""
    kmeans_iterations: int = 15
    """Lloyd iterations of the k-means start."""


@dataclass(frozen=True)
class ColumnRecipe(StrictConfig):
    """Which columns of a Hugging Face dataset are read."""

    images: str | None = None
    """A picture, or a list of them: `datasets.Image`, bytes or paths. None: `image` or `images`."""
    turns: str | None = None
    """The conversation. None: `conversations`, `messages` or `texts`."""
    caption: str | None = None
    """A text that describes the pictures, in place of a conversation; or a list of them, of which
    each epoch takes one, in a seeded order."""
    id: str | None = None
    """The samples' names. None: `id`, if there is one, else the number of the row."""
    split: str | None = None
    """Which of several splits. None: the only one, or `train`."""


@dataclass(frozen=True)
class StageRecipe(StrictConfig):
    """One training stage under transformers.Trainer: AdamW, cosine, linear warm-up."""

    samples: int
    """Training samples used; with a data set on disk, at most as many as it has."""
    epochs: float = 1.0
    """Passes over the samples."""
    batch: int = 64
    """Samples a step."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    warmup: float = 0.03
    """Share of the steps with a rising learning rate (LLaVA-1.5: 0.03)."""
    weight_decay: float = 0.0
    """AdamW weight decay (LLaVA-1.5: none)."""
    checkpoint_every: int = 25
    """Steps between checkpoints."""
    max_length: int = 2048
    """Longest sequence in tokens; longer samples are cut at the end."""
    micro_batch: int | None = None
    """Samples that a device holds at a time; gradients are accumulated until they make a batch.
    None: a device takes its share of the batch at once, and a processor in stage 2 a half of it."""
    bf16: bool = False
    """Frozen weights in bfloat16, trained ones in float32 under autocast; a result in bfloat16."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    nf4: bool = False
    """Hold the language model's linear layers in 4 bits while they are frozen (QLoRA, Dettmers et
    al. 2023, arXiv 2305.14314), by bitsandbytes. In stage 2 only with `lora`."""

    @property
    def steps(self) -> int:
        """Optimiser steps, where the data have as many samples."""
        return math.ceil(self.epochs * math.ceil(self.samples / self.batch))

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [
            f"{name}: expected more than 0, got {getattr(self, name)}"
            for name in ("samples", "epochs", "batch", "learning_rate", "checkpoint_every")
            if getattr(self, name) <= 0
        ]
        if self.micro_batch is not None and (self.micro_batch < 1 or self.batch % self.micro_batch):
            problems.append(
                f"micro_batch: expected a divisor of batch ({self.batch}), got {self.micro_batch}"
            )
        if not 0 <= self.warmup < 1:
            problems.append(f"warmup: expected a share in [0, 1), got {self.warmup}")
        raise_problems(type(self), problems)


@dataclass(frozen=True)
class Stage1Recipe(StageRecipe):
    """Quantiser pre-training: projector and codebooks learn, all else is frozen."""

    vq_weight: float = 0.5
    """lambda_1, weight of both levels' VQ losses (paper: 0.5)."""
    semantic_weight: float = 0.1
    """lambda_2, weight of the semantic loss (paper: 0.1)."""
    codebook_learning_rate: float = 1e-3
    """Peak learning rate of the two codebooks."""
    revive_every: int = 10
    """Steps between revivals of dead entries; 0 turns revival off."""
    revive_until: float = 0.7
    """Share of the steps after which no entry is revived, so that the last ones settle."""


@dataclass(frozen=True)
class FeatureRecipe(StrictConfig):
    """Whether the vision encoder runs once a picture instead of once a step."""

    cache: bool = False
    """Keep its outputs on disk for both stages: (1 + N) x d_v numbers a picture."""
    folder: UserPath | None = None
    """Where; it is kept and used again. None: inside the run, removed when the run is done."""


@dataclass(frozen=True)
class LoraRecipe(StrictConfig):
    """Low-rank adapters in place of a full language model (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = 128
    """Rank r of an update (LLaVA-1.5's LoRA script: 128)."""
    alpha: int = 256
    """The update is scaled by alpha / rank (LLaVA-1.5's LoRA script: 256)."""
    dropout: float = 0.05
    """Dropout before an update (LLaVA-1.5's LoRA script: 0.05)."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get one, as in q_proj; none: all of the language model but
    its head."""
    keep: bool = True
    """Whether the adapters are also written by themselves (`stage2/lora`, in PEFT's format). The
    guarded model has them merged into its weights either way."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [
            f"{name}: expected more than 0, got {getattr(self, name)}"
            for name in ("rank", "alpha")
            if getattr(self, name) <= 0
        ]
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout: expected a share in [0, 1), got {self.dropout}")
        raise_problems(type(self), problems)


@dataclass(frozen=True)
class SafetyRecipe(StrictConfig):
    """Refusals beside pictures among stage 2's samples (Zong et al. 2024, arXiv 2402.02207).

    The control without a quantiser is trained on them too.
    """

    share: float = 0.0
    """Share of stage 2's samples that they are; 0: none."""
    data: UserPath | None = None
    """JSON in VLGuard's form: image, safe, pairs of an instruction and a response. None: the
    embedded world's own."""
    images: UserPath | None = None
    """Root of the image paths in `data`; None: the file's folder."""
    pictures: int | None = None
    """Most pictures of a message of the embedded world's own: each shows 1 to so many. None: 3."""

    @property
    def most_pictures(self) -> int:
        """Of a message of the embedded world's own refusals."""
        return 3 if self.pictures is None else self.pictures

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if not 0 <= self.share < 1:
            problems.append(f"share: expected a share in [0, 1), got {self.share}")
        if self.share == 0 and self.data is not None:
            problems.append("data: is named and share is 0, so nothing is used; set safety.share")
        if self.data is None and self.images is not None:
            problems.append("images: is named without data")
        if self.pictures is not None:
            if self.pictures < 1:
                problems.append(f"pictures: expected at least 1, got {self.pictures}")
            elif self.data is not None:
                problems.append(
                    "pictures: is for the embedded world's own refusals; drop it, a file's entries"
                    " say what each shows"
                )
            elif self.share == 0:
                problems.append(
                    "pictures: is set and share is 0, so nothing is used; set safety.share"
                )
        raise_problems(type(self), problems)


@dataclass(frozen=True)
class Stage2Recipe(StageRecipe):
    """Language-model adaptation: the language model and its head learn, all else is frozen."""

    lora: LoraRecipe | None = None
    """Train low-rank adapters instead of all weights; None: all weights."""
    from_codes: bool | Literal["auto"] = "auto"
    """Train on the pictures' codes, made once after stage 1, with the vision encoder out of memory:
    `true`; on pixels (or kept features): `false`; `auto`: on codes unless something speaks against
    it, which the log then says."""
    safety: SafetyRecipe = field(default_factory=SafetyRecipe)
    """Refusals beside pictures."""
    held_out_verbs: bool = False
    """Embedded world alone: no sample asks for some of the forbidden verbs, so that an attack may
    ask for what stage 2 did not refuse (`vqguard attack --split heldout_verbs`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nf4 and self.lora is None:
            raise_problems(type(self), ["nf4: would freeze the language model; set lora as well"])


@dataclass(frozen=True)
class CalibrationRecipe(StrictConfig):
    """The safety map's images and its threshold; exactly one of `tau` and `fpr` is set."""

    per_category: int = 50
    """Images a toxic category (paper: 50)."""
    neutral: int = 500
    """Neutral images (paper: 500)."""
    tau: float | None = PAPER_TAU
    """An image is refused if its score under the rule is above tau."""
    fpr: float | None = None
    """False-positive budget from which tau is chosen on neutral images held out for it."""
    rule: str = "category"
    """What is compared with tau: `category` (the probability of the cell's most probable toxic
    category, as in the paper), `any` (of all of them together), or a registered rule of yours."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.tau is None) == (self.fpr is None):
            raise_problems(
                type(self),
                [
                    "tau, fpr: expected exactly one; set the other to null, for example"
                    " --set calibration.tau=null --set calibration.fpr=0.01"
                ],
            )


@dataclass(frozen=True)
class RegionalRecipe(RegionalTraining):
    """The regional judge: its images, its training, and the threshold of its safety map.

    The projection learns from some images, others are counted, and the threshold is chosen on
    neutral ones that were neither.
    """

    per_category: int = 1600
    """Images a toxic category, where the embedded world makes them."""
    neutral: int = 16000
    """Neutral images, where the embedded world makes them."""
    trained: float = 0.5
    """Share of the neutral images that the projection learns from."""
    counted: float = 0.2
    """Share of them that is counted; those that are left choose the threshold. Toxic images are
    learnt from or counted, in this proportion."""
    fpr: float | None = 0.0045
    """False-positive budget of the threshold; exactly one of `fpr` and `tau` is set."""
    tau: float | None = None
    """The threshold, for categories that have none of their own. Without a budget no neutral images
    are held out: those that would choose the threshold are counted too."""
    smoothing: float = 3.0
    """As how many counted images that stands which the projection has learnt about a code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [
            f"{name}: expected a share in (0, 1), got {getattr(self, name)}"
            for name in ("trained", "counted", "fpr")
            if getattr(self, name) is not None and not 0 < getattr(self, name) < 1
        ]
        if self.tau is not None and not 0 <= self.tau < 1:
            problems.append(f"tau: expected a number in [0, 1), got {self.tau}")
        if (self.tau is None) == (self.fpr is None):
            problems.append(
                "tau, fpr: expected exactly one; set the other to null, for example"
                " --set regional.fpr=null --set regional.tau=0.6"
            )
        problems += [
            f"{name}: expected more than 0, got {getattr(self, name)}"
            for name in ("per_category", "neutral")
            if getattr(self, name) <= 0
        ]
        if self.smoothing < 0:
            problems.append(f"smoothing: expected >= 0, got {self.smoothing}")
        if self.trained + self.counted >= 1:
            problems.append("trained, counted: no images are left to choose the threshold on")
        raise_problems(type(self), problems)


@dataclass(frozen=True)
class AttackRecipe(StrictConfig):
    """How the image attacks of the evaluation are run. Budgets are L-infinity, in 1/255."""

    eps_255: tuple[int, ...] = (8, 16, 255)
    """Budgets; 255 is unbounded."""
    requests: int = 20
    """Requests of the per-request attack, one image each: n of its attack success rate."""
    steps: int = 60
    """Gradient steps a restart."""
    restarts: int = 1
    """Restarts of the undefended model's attack and of the controls'."""
    adaptive_steps: int = 60
    """Gradient steps a restart of the straight-through attack, per request and universal."""
    adaptive_restarts: int = 2
    """Restarts of the straight-through attack on the guarded model."""
    universal_requests: int = 16
    """Requests that the universal image is optimised over; 0 leaves that attack out."""
    universal_held_out: int = 40
    """Other requests that it is judged on: n of its attack success rate."""
    universal_steps: int = 80
    """Gradient steps of the universal attack."""


@dataclass(frozen=True)
class EvaluationRecipe(StrictConfig):
    """What the report measures, and on how many cases."""

    split: Literal["test", "validation"] = "test"
    """Part of the embedded world that is measured; choose settings on `validation`."""
    utility: int = 300
    """Questions a task on held-out scenes."""
    toxic_per_category: int = 40
    """Toxic test images a category and number of distractors."""
    neutral: int = 400
    """Neutral test images for the false-positive rate, and as many crowded ones."""
    hard_sets: bool = False
    """Whether to screen scenes of the embedded world that the judge was not taught as well: other
    sizes, turned, covered, another style, photographs… Needs the extra `hard`."""
    finetuned_control: bool = True
    """Whether to train the control: the same base, as long, without a quantiser."""
    latency_rounds: int = 15
    """Alternated pairs behind the latency ratio."""
    held_out: UserPath | None = None
    """Tests for a run on your own data: a folder with questions, images to screen, attacks and a
    text, each optional (`vqguard.recipes.data.held_out_set` has the layout), or a benchmark as its
    authors publish it (docs/public-benchmarks.md)."""
    attack: AttackRecipe = field(default_factory=AttackRecipe)
    """The image attacks."""


@dataclass(frozen=True)
class RetrofitRecipe(StrictConfig):
    """A whole retrofit: model, data, guard, two stages, calibration, evaluation."""

    model: str
    """A name from `vqguard models`, a local path or `hub:owner/name`."""
    stage1: Stage1Recipe
    """Quantiser pre-training."""
    stage2: Stage2Recipe
    """Language-model adaptation."""
    data: UserPath | None = None
    """LLaVA-format JSON, shards, a Hugging Face dataset or a mixture; None is the embedded world
    (llava-tiny only)."""
    images: UserPath | None = None
    """Root of the image paths in `data`."""
    follow_links: bool = False
    """Take files outside the images' folders too, where symbolic links in them lead there."""
    columns: ColumnRecipe = field(default_factory=ColumnRecipe)
    """Columns of `data`, if it is a Hugging Face dataset."""
    video_frames: int = FRAMES
    """Frames of a video that the model is shown, in training and by `vqguard ask --video`: evenly
    spread, the first and the last among them."""
    calibration_images: UserPath | None = None
    """One folder a category, one of them `neutral`; None is the embedded world, if it is used."""
    calibration_labels: UserPath | None = None
    """A list of the labels of `calibration_images` (.csv or .jsonl) in place of folders."""
    rules: JudgeRules = field(default_factory=JudgeRules)
    """The rules of the guard's own judge, written out here: what `vqguard calibrate --rules` reads
    from a file. The regional judge counts in a way of its own: it takes no `smoothing`, `prior` and
    `count`."""
    keep_examples: bool = False
    """Keep small copies of the calibration images nearest to each code in the run's directory, so
    that explanations and the report can show them."""
    guard: GuardRecipe = field(default_factory=GuardRecipe)
    """The guard's sizes."""
    features: FeatureRecipe = field(default_factory=FeatureRecipe)
    """The vision encoder's outputs on disk."""
    calibration: CalibrationRecipe = field(default_factory=CalibrationRecipe)
    """The safety map of the global judge."""
    regional: RegionalRecipe = field(default_factory=RegionalRecipe)
    """The regional judge, where `guard.judge` asks for it."""
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    """The report's measurements."""
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    """Spread the layers over all GPUs of one process, as Accelerate's `device_map` of this name
    does; None: on one."""
    seed: int = 0
    """Seed of the data, the codebooks, the training and the attacks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if not 1 <= self.video_frames <= MAX_SAMPLED:
            problems.append(f"video_frames: expected 1 to {MAX_SAMPLED}, got {self.video_frames}")
        if self.calibration_labels is not None and self.calibration_images is None:
            problems.append(
                "calibration_labels: the paths in it start from calibration_images; set that too"
            )
        regional = self.guard.judge == "regional"
        if regional:
            plain = JudgeRules()
            problems += [
                f"rules.{name}: the regional judge counts in a way of its own; leave it out"
                f"{', and set regional.smoothing' if name == 'smoothing' else ''}"
                for name in ("smoothing", "prior", "count")
                if getattr(self.rules, name) != getattr(plain, name)
            ]
        section = "regional" if regional else "calibration"
        try:
            self.rules.require_budget(getattr(self, section).fpr)
        except InputError as error:
            problems.append(f"rules, {section}.fpr: {error}")
        problems += self._stage2_problems()
        raise_problems(type(self), problems)

    def override(self, assignments: Iterable[str]) -> RetrofitRecipe:
        """As `StrictConfig.override`; `data` leaves out refusals that the embedded world alone has.

        Where the recipe mixes the world's own refusals into stage 2 and the assignments name `data`
        and nothing of `stage2.safety`, its share becomes 0 and the log says so.
        """
        given = list(assignments)
        keys = [assignment.partition("=")[0].strip() for assignment in given]
        safety = self.stage2.safety
        worlds_own = self.data is None and safety.share and safety.data is None
        if worlds_own and "data" in keys and not any(k.startswith("stage2.safety") for k in keys):
            log.warning(
                "stage 2 is trained without refusals beside pictures: those of this recipe are the"
                " embedded world's. Name a file of your own as stage2.safety.data, with a"
                " stage2.safety.share."
            )
            given += ["stage2.safety.share=0", "stage2.safety.pictures=null"]
        return super().override(given)

    def _stage2_problems(self) -> list[str]:
        """What the embedded world alone can give to stage 2."""
        if self.data is None:
            return []
        problems, stage2 = [], self.stage2
        if stage2.held_out_verbs:
            problems.append("stage2.held_out_verbs: is for the embedded world alone; drop `data`")
        if stage2.safety.share and stage2.safety.data is None:
            problems.append(
                "stage2.safety.share: your own data bring no refusals; name a file in VLGuard's "
                "form as stage2.safety.data"
            )
        return problems


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    names = [entry.name for entry in files("vqguard.recipes").iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_recipe(name_or_path: str | Path) -> RetrofitRecipe:
    """A recipe by name, or from a YAML file, whose relative paths start from its own folder.

    A path that is there only from the working directory is taken from there, as it was up to
    version 0.1, and the log says so.

    Raises:
        ConfigError: no such recipe (with the nearest name), or a file that does not fit.
    """
    path = Path(name_or_path)
    if path.suffix.lower() in (".yaml", ".yml"):
        return _anchored(RetrofitRecipe.from_yaml(path), path)
    names = recipe_names()
    if str(name_or_path) not in names:
        raise ConfigError(
            f"no recipe is called {str(name_or_path)!r}.{nearest(str(name_or_path), names)} "
            "A file of your own is named by its path and ends in .yaml."
        )
    return RetrofitRecipe.from_yaml(Path(str(files("vqguard.recipes") / f"{name_or_path}.yaml")))


def _anchored(recipe: RetrofitRecipe, file: Path) -> RetrofitRecipe:
    def anchor(path: Path | None) -> Path | None:
        if path is None:
            return None
        anchored = file.parent / path
        if anchored.exists() or not path.exists():
            return anchored
        log.warning(
            "%s: %s is not beside this file, so %s in the working directory is taken. Paths in a "
            "recipe start from its own folder.",
            file,
            path,
            path.absolute(),
        )
        return path

    safety = recipe.stage2.safety
    return replace(
        recipe,
        data=anchor(recipe.data),
        images=anchor(recipe.images),
        calibration_images=anchor(recipe.calibration_images),
        calibration_labels=anchor(recipe.calibration_labels),
        features=replace(recipe.features, folder=anchor(recipe.features.folder)),
        stage2=replace(
            recipe.stage2,
            safety=replace(safety, data=anchor(safety.data), images=anchor(safety.images)),
        ),
        evaluation=replace(recipe.evaluation, held_out=anchor(recipe.evaluation.held_out)),
    )
