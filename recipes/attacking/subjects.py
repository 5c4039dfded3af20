"""The models that a suite attacks, made one after another."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vqguard.adapters import guard_model, unguard_model
from vqguard.config import SmoothingSettings
from vqguard.errors import ConfigError
from vqguard.files import checksums, text_sha256
from vqguard.guard import VQGuard
from vqguard.recipes.judging.both import read_global_map
from vqguard.recipes.models import base_model, control_model, has_control
from vqguard.recipes.placement import place
from vqguard.recipes.recipe import RetrofitRecipe
from vqguard.recipes.run import RECIPE, open_run
from vqguard.redteam.defenses import DEFENSES, Defense
from vqguard.safety_map import SafetyMap

log = logging.getLogger(__name__)


BASE = "base"
SMOOTHED = SmoothingSettings(copies=5)
"""Of `guarded_smoothed`."""


@dataclass(frozen=True)
class Subject:
    """A model under attack."""

    name: str
    model: Any
    model_sha256: str
    """Over the names and bytes of its weights."""
    map_sha256: str | None
    """Of its safety map as JSON; None without one."""
    health: Mapping[str, int] = field(default_factory=dict)
    """`guard_health`; empty without a guard."""
    refusal_data: float = 0.0
    """Share of refusals beside pictures among the samples of its stage 2; 0 without one."""

    @classmethod
    def of(cls, name: str, model: Any, refusal_data: float = 0.0) -> Subject:
        """With its hashes."""
        guard = getattr(model, "vqguard", None)
        safety_map = None if guard is None else guard.safety_map
        hashes = model_sha256(model), map_sha256(safety_map)
        return cls(name, model.eval(), *hashes, refusal_data=refusal_data)

    @property
    def defense(self) -> Defense | None:
        """What stands in front of the model, if it is a peer."""
        return DEFENSES.get(self.name)

    @property
    def guarded(self) -> bool:
        """Whether a gradient has a quantiser to cross."""
        return getattr(self.model, "vqguard", None) is not None


@dataclass(frozen=True)
class StandIn:
    """A model that pictures are made on, to be shown to another."""

    model: Any
    processor: Any
    sha256: str
    """`model_sha256`."""

    @classmethod
    def of(cls, model: Any, processor: Any) -> StandIn:
        """With its hash."""
        return cls(model.eval(), processor, model_sha256(model))

    @classmethod
    def of_run(cls, run: Path) -> StandIn:
        """The guarded model of a run.

        Raises:
            ArtefactError: no guarded model there.
            InputError: it judges behind a vision encoder.
        """
        loaded = open_run(run)
        loaded.require_language_model()
        return cls.of(loaded.model, loaded.processor)


def model_sha256(model: Any) -> str:
    """SHA-256 over the names and bytes of a model's weights."""
    each = checksums(model.state_dict())
    return hashlib.sha256(json.dumps(sorted(each.items())).encode()).hexdigest()


def map_sha256(safety_map: SafetyMap | None) -> str | None:
    """SHA-256 of a safety map as JSON."""
    if safety_map is None:
        return None
    return text_sha256(json.dumps(safety_map.to_dict(), sort_keys=True))


class Subjects:
    """The subjects of a run's directory, or of a guarded model's folder.

    Args:
        run: as `open_run` takes it. A folder without a recipe has no undefended model and no
            control.

    Raises:
        ArtefactError: no guarded model there.
        ConfigError: it has no safety map: nothing would be judged.
        InputError: it judges behind a vision encoder.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        loaded = open_run(run)
        loaded.require_language_model()
        self.guarded, self.processor = loaded.model, loaded.processor
        if self.guarded.vqguard.safety_map is None:
            raise ConfigError(
                f"{run}: the guard has no safety map, so it judges nothing and answers nothing; "
                "give it one with `vqguard calibrate` before it is attacked"
            )
        path = run / RECIPE
        self.recipe = RetrofitRecipe.from_yaml(path) if path.is_file() else None

    def base(self) -> Any:
        """The undefended model with numbers of the guarded one's kind; None where it is unknown."""
        if self.recipe is None:
            return None
        return place(base_model(self.recipe, self.guarded.dtype)[0]).eval()

    def each(self, names: list[str]) -> Iterator[Subject]:
        """Those of these names that there are, one at a time: each is gone when the next comes."""
        for name in names:
            model = self.base() if name in DEFENSES else getattr(self, f"_{name}")()
            if model is None:
                log.warning("%s is left out: %s has none", name.replace("_", " "), self.run)
                continue
            yield Subject.of(name, model, self._refusal_data(name))

    def _refusal_data(self, name: str) -> float:
        """How much of it a subject's language model was adapted on."""
        if self.recipe is None or name in (BASE, *DEFENSES):
            return 0.0
        return self.recipe.stage2.safety.share

    def _base(self) -> Any:
        return self.base()

    def _guarded(self) -> Any:
        return self.guarded

    def _guarded_global(self) -> Any:
        guard: VQGuard = self.guarded.vqguard
        if guard.judge_level == "semantic":
            return None
        safety_map = read_global_map(self.run, guard)
        if safety_map is None:
            return None
        return self._with_guard(same_guard(guard, safety_map, judge="global"))

    def _guarded_smoothed(self) -> Any:
        guard: VQGuard = self.guarded.vqguard
        if guard.smooths:
            return None
        return self._with_guard(same_guard(guard, guard.safety_map, smoothing=SMOOTHED))

    def _quantiser_removed(self) -> Any:
        model = copy.deepcopy(self.guarded)
        unguard_model(model)
        return model

    def _finetuned_control(self) -> Any:
        return place(control_model(self.run)) if has_control(self.run) else None

    def _with_guard(self, guard: VQGuard) -> Any:
        model = copy.deepcopy(self.guarded)
        unguard_model(model)
        guard_model(model, guard, self.processor)
        return place(model)


def same_guard(guard: VQGuard, safety_map: SafetyMap | None, **changes: Any) -> VQGuard:
    """The same codebooks under another configuration, with a map of the level that then judges."""
    made = VQGuard(replace(guard.config, **changes))
    own = made.state_dict()
    made.load_state_dict({name: value for name, value in guard.state_dict().items() if name in own})
    made.to(next(guard.parameters()).device)
    made.safety_map = safety_map
    return made.eval()
