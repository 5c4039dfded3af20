"""The texts of a safety map's policies, in the tokens of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vqguard.errors import ConfigError
from vqguard.judging.policies import UNFAMILIAR, UNSEEN, Policy
from vqguard.safety_map import SafetyMap


@dataclass(frozen=True)
class PolicyTexts:
    """What is answered about a flagged image, by text; texts that are not here have no tokens."""

    ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The tokens of each text."""

    def refusal(self, safety_map: SafetyMap, category: str) -> tuple[int, ...] | None:
        """The category's own refusal in the map's language; None: the guard's own is said."""
        judging = safety_map.judging
        return self.ids.get(judging.policy(category).refusal.get(judging.language, ""))

    def warning(self, safety_map: SafetyMap, category: str) -> tuple[int, ...] | None:
        """The category's warning; None where it has no tokens here: then the image is refused."""
        return self.ids.get(safety_map.judging.policy(category).warning)


def texts_of(safety_map: SafetyMap | None) -> list[str]:
    """The texts that the policies of a map say, in its language."""
    if safety_map is None:
        return []
    judging = safety_map.judging
    policies: list[Policy] = [
        judging.policy(name) for name in (*safety_map.categories, UNSEEN, UNFAMILIAR)
    ]
    said = [policy.refusal.get(judging.language, "") for policy in policies]
    said += [policy.warning for policy in policies if policy.action == "warn"]
    return list(dict.fromkeys(text for text in said if text))


def policy_texts(safety_map: SafetyMap | None, processor: Any) -> PolicyTexts:
    """The texts of a map's policies in the tokens of `processor`, or of a tokenizer.

    Raises:
        ConfigError: where there are texts and no processor, or one has no tokens.
    """
    texts = texts_of(safety_map)
    if not texts:
        return PolicyTexts()
    if processor is None:
        raise ConfigError(
            f"the policies of the safety map say texts such as {texts[0][:60]!r}, and without the"
            " model's processor they have no tokens: call guard_model(model, guard, processor) or"
            " load_guarded(path, processor=...), or take the texts out with `vqguard map edit`"
        )
    return PolicyTexts({text: text_ids(processor, text) for text in texts})


def text_ids(processor: Any, text: str) -> tuple[int, ...]:
    """The tokens of a text, without special ones.

    Raises:
        ConfigError: where there are none.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = ids.flatten().tolist() if isinstance(ids, Tensor) else list(ids)
    if not ids:
        raise ConfigError(f"the tokenizer turns {text[:60]!r} into no tokens; choose another text")
    return tuple(int(token) for token in ids)
