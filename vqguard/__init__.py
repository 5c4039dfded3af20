"""A discrete bottleneck for multimodal language models.

Every visual token becomes a codeword before a language model sees it, and a semantic code is judged
by a safety map. Attributes are loaded when first used, so that `import vqguard` is fast.
"""

from typing import TYPE_CHECKING

from vqguard.lazy import import_after, lazy_names

# For type checkers and editors, which take a name with an alias for public; nothing is imported.
# isort: off
if TYPE_CHECKING:
    from vqguard.adapters import (
        build_guard as build_guard,
        get_adapter as get_adapter,
        guard_encoder as guard_encoder,
        guard_model as guard_model,
        load_guarded as load_guarded,
        save_guard_only as save_guard_only,
        unguard_model as unguard_model,
    )
    from vqguard.codebooks.codebook import Codebook as Codebook
    from vqguard.config import (
        GuardConfig as GuardConfig,
        StrictConfig as StrictConfig,
    )
    from vqguard.encoder import (
        EncoderFeatures as EncoderFeatures,
        GuardedEncoder as GuardedEncoder,
        TokenEncoder as TokenEncoder,
    )
    from vqguard.errors import (
        ArtefactError as ArtefactError,
        BypassError as BypassError,
        ChecksumError as ChecksumError,
        ConfigError as ConfigError,
        FlaggedImageError as FlaggedImageError,
        InputError as InputError,
        NonFiniteError as NonFiniteError,
        SeamError as SeamError,
        TrainingError as TrainingError,
        VQGuardError as VQGuardError,
    )
    from vqguard.guard import (
        VQGuard as VQGuard,
        recording as recording,
    )
    from vqguard.codebooks.guard_output import GuardOutput as GuardOutput
    from vqguard.codebooks.losses import GuardLosses as GuardLosses
    from vqguard.codebooks.quantizer import (
        Quantized as Quantized,
        VectorQuantizer as VectorQuantizer,
        straight_through as straight_through,
        use_estimator as use_estimator,
    )
    from vqguard.judging.policies import Policy as Policy
    from vqguard.judging.settings import JudgeSettings as JudgeSettings
    from vqguard.safety_map import (
        SafetyMap as SafetyMap,
        Verdict as Verdict,
    )
    from vqguard.search import make_search as make_search
    from vqguard.verdict_rules import (
        VerdictRule as VerdictRule,
        register_verdict_rule as register_verdict_rule,
    )
    from vqguard.version import __version__ as __version__
# isort: on

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "adapters": (
            "build_guard",
            "get_adapter",
            "guard_encoder",
            "guard_model",
            "load_guarded",
            "save_guard_only",
            "unguard_model",
        ),
        "codebooks.codebook": ("Codebook",),
        "config": ("GuardConfig", "StrictConfig"),
        "encoder": ("EncoderFeatures", "GuardedEncoder", "TokenEncoder"),
        "errors": (
            "ArtefactError",
            "BypassError",
            "ChecksumError",
            "ConfigError",
            "FlaggedImageError",
            "InputError",
            "NonFiniteError",
            "SeamError",
            "TrainingError",
            "VQGuardError",
        ),
        "guard": ("VQGuard", "recording"),
        "codebooks.guard_output": ("GuardOutput",),
        "codebooks.losses": ("GuardLosses",),
        "codebooks.quantizer": (
            "Quantized",
            "VectorQuantizer",
            "straight_through",
            "use_estimator",
        ),
        "judging.policies": ("Policy",),
        "judging.settings": ("JudgeSettings",),
        "safety_map": ("SafetyMap", "Verdict"),
        "search": ("make_search",),
        "verdict_rules": ("VerdictRule", "register_verdict_rule"),
        "version": ("__version__",),
    },
)

# transformers' Auto classes open guarded models where vqguard is imported, before or after them.
import_after("transformers.models.auto.configuration_auto", "vqguard.adapters.auto_classes")
