"""How a stage is spread over processes. Names are imported when first used."""

from typing import TYPE_CHECKING

from vqguard.lazy import lazy_names

# For type checkers and editors, which take a name with an alias for public; nothing is imported.
# isort: off
if TYPE_CHECKING:
    from vqguard.recipes.training.engines.engine import (
        Engine as Engine,
        add_engine as add_engine,
    )
    from vqguard.recipes.training.engines.replicated import Replicated as Replicated
# isort: on

__getattr__, __dir__, __all__ = lazy_names(
    __name__, {"engine": ("Engine", "add_engine"), "replicated": ("Replicated",)}
)
