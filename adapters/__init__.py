"""Where the guard sits in a given model. Everything is imported on first use."""

from typing import TYPE_CHECKING

from vqguard.lazy import lazy_names

# For type checkers and editors, which take a name with an alias for public; nothing is imported.
# isort: off
if TYPE_CHECKING:
    from vqguard.adapters.base import Adapter as Adapter
    from vqguard.adapters.catalogue import (
        ModelEntry as ModelEntry,
        list_models as list_models,
        resolve_model as resolve_model,
    )
    from vqguard.adapters.classifier import as_classifier as as_classifier
    from vqguard.adapters.encoders.guard_encoder import guard_encoder as guard_encoder
    from vqguard.adapters.families.default import DefaultAdapter as DefaultAdapter
    from vqguard.adapters.families.family import (
        Family as Family,
        RandomModel as RandomModel,
    )
    from vqguard.adapters.families.registration import register_adapter as register_adapter
    from vqguard.adapters.features import VisualFeatures as VisualFeatures
    from vqguard.adapters.guarding import (
        guard_model as guard_model,
        load_guarded as load_guarded,
    )
    from vqguard.adapters.install import (
        build_guard as build_guard,
        unguard_model as unguard_model,
    )
    from vqguard.adapters.proof.probe import (
        ProbeResult as ProbeResult,
        one_codeword_probe as one_codeword_probe,
    )
    from vqguard.adapters.registry import get_adapter as get_adapter
    from vqguard.adapters.runtime.guard_link import encoder_features as encoder_features
    from vqguard.adapters.runtime.quantise import visual_features as visual_features
    from vqguard.adapters.storage.guard_only import save_guard_only as save_guard_only
    from vqguard.adapters.storage.trainer_checkpoints import (
        GuardedCheckpoints as GuardedCheckpoints,
    )
# isort: on

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "base": ("Adapter",),
        "catalogue": ("ModelEntry", "list_models", "resolve_model"),
        "classifier": ("as_classifier",),
        "encoders.guard_encoder": ("guard_encoder",),
        "families.default": ("DefaultAdapter",),
        "families.family": ("Family", "RandomModel"),
        "families.registration": ("register_adapter",),
        "features": ("VisualFeatures",),
        "guarding": ("guard_model", "load_guarded"),
        "install": ("build_guard", "unguard_model"),
        "proof.probe": ("ProbeResult", "one_codeword_probe"),
        "registry": ("get_adapter",),
        "runtime.guard_link": ("encoder_features",),
        "runtime.quantise": ("visual_features",),
        "storage.guard_only": ("save_guard_only",),
        "storage.trainer_checkpoints": ("GuardedCheckpoints",),
    },
)
