"""The safety map that judges, which may be changed while requests wait."""

from __future__ import annotations

from typing import Any

from vqguard.adapters.runtime.guard_link import link_of
from vqguard.adapters.runtime.policy_texts import policy_texts
from vqguard.errors import ArtefactError
from vqguard.judging.policies import REPORT, UNFAMILIAR, UNSEEN
from vqguard.safety_map import SafetyMap


class ServedMap:
    """A guarded model's map, as it is or in the shadow: judged by, and not acted upon."""

    def __init__(self, model: Any, processor: Any, *, shadow: bool = False) -> None:
        """Raises ArtefactError where the model has no map."""
        self.model = model
        self.processor = processor
        self.shadow = shadow
        own: SafetyMap | None = model.vqguard.safety_map
        if own is None:
            raise ArtefactError("the guard has no safety map: fit one with `vqguard calibrate`")
        self.current = own
        """The map whose version verdicts carry, with its own policies."""
        if shadow:
            self.use(own)

    def use(self, safety_map: SafetyMap) -> None:
        """Judge by this map from now on. Not while the model judges.

        Raises:
            ChecksumError: it was made for other codewords.
            ConfigError: one of its texts has no tokens.
        """
        texts = policy_texts(safety_map, self.processor)
        self.model.vqguard.safety_map = reporting(safety_map) if self.shadow else safety_map
        link_of(self.model).texts = texts
        self.current = safety_map


def reporting(safety_map: SafetyMap) -> SafetyMap:
    """The same map with every policy `report`."""
    names = {*safety_map.categories, UNSEEN, UNFAMILIAR, *safety_map.judging.policies}
    return safety_map.with_judging(policies=dict.fromkeys(sorted(names), REPORT))
