"""The exceptions of the project.

Every one derives from `VQGuardError`. A message says what was expected, what came and what to do.
"""


class VQGuardError(Exception):
    """Base of every error that the project raises on purpose."""


class ConfigError(VQGuardError, ValueError):
    """A configuration has unknown, missing, mistyped or contradicting values.

    `problems` lists them one by one where they were collected.
    """

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


class InputError(VQGuardError, ValueError):
    """An argument or an input file cannot be used."""


class ImageError(InputError):
    """An image is missing, broken, too large or of a kind that is refused."""


class VideoError(InputError):
    """A video is missing, broken, too large or of a kind that is refused."""


class DataError(InputError):
    """A data file or one of its samples does not follow its format."""


class NonFiniteError(InputError):
    """NaN or infinity where only finite numbers are allowed."""


class ArtefactError(VQGuardError):
    """Saved files are missing, truncated, tampered with or of an unknown schema."""


class ChecksumError(ArtefactError):
    """Two parts that belong together do not: their checksums differ."""


class SeamError(VQGuardError):
    """A model has a visual path that the guard cannot cover; nothing was installed."""


class BypassError(VQGuardError):
    """At run time, visual features tried to reach the language model around the guard."""


class FlaggedImageError(VQGuardError):
    """An image of a category whose policy is to raise; `reasons` says why, one an image.

    Each is a `vqguard.judging.verdict.Reason`.
    """

    def __init__(self, message: str, reasons: tuple[object, ...] = ()) -> None:
        super().__init__(message)
        self.reasons = reasons


class TrainingError(VQGuardError):
    """A training run was stopped because going on would give a wrong result."""


class FrozenTensorMovedError(TrainingError):
    """A tensor that the stage keeps frozen has changed."""


class CodebookCollapseError(TrainingError):
    """Too few codebook entries are in use."""


def first_line(error: Exception) -> str:
    """Another library's error in one line: its class and the first line of its text."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
