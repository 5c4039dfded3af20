"""The oldest transformers on which each family was proven; with an older one it is unknown.

Where a family's features enter its language model moves between versions of transformers. A seam
that is right today may be half of the truth in a release of last year, and a model that is guarded
by half is not guarded. So a family counts as known only from the version on which the conformance
kit proved it; below, `guard_model` asks for the proof that it asks of a type without an adapter.
"""

from __future__ import annotations

FLOOR = "5.6"
"""The oldest transformers that the package supports, as in pyproject.toml."""

_FIRST = {
    "5.12": "exaone4_5 glmga minicpmv4_6 pp_formulanet",
    "5.20": (
        "aya_vision cohere2_vision cosmos3_edge cosmos3_omni deepseek_ocr2 emu3 glm5_next "
        "granite4_vision hunyuan_vl hyperclovax_vision_v2 idefics2 llava_next_video "
        "llava_onevision minicpmv4_7 minimax_m3_vl molmo2 muse_glimmer muse_spark paddleocr_vl "
        "qwen2_5_vl qwen3_vl qwen3_vl_moe qwen4_exp step3p7 unlimited_ocr vision-encoder-decoder"
    ),
    "5.22": (
        "cohere_compass fuyu minicpm_ocr mistral_large4 qwen2_5_omni_thinker "
        "qwen3_omni_moe_thinker smolvlm video_llava"
    ),
    "5.23": "dots3_note gemma4 gemma4_unified granite_docling inkling2 lfm3_vl vipllava",
    "5.24": "apertus1p5 hy_v4_vl inkling2_loop kimi_k25 kosmos-2 kosmos-2.5 nemotron_h_omni",
}
PROVEN_FROM: dict[str, str] = {
    kind: version for version, kinds in _FIRST.items() for kind in kinds.split()
}
"""Families that were not proven on `FLOOR`, with the version from which they were.

Measured on 5.6.2, 5.12.1, 5.20.2, 5.22.2, 5.23.0 and 5.24.0. A family counts from the oldest of
these from which on all pass the probe, the white-box check and the checks of rows, refusals and
arguments, on tiny random models, images and videos, at each site. Many did not exist before. Beam
search of Qwen2.5-VL failed below 5.20, guarded or not.
"""


def proven_from(model_type: str) -> str:
    """The oldest transformers on which the family of an adapter was proven, as "5.6"."""
    return PROVEN_FROM.get(model_type, FLOOR)


def is_proven(model_type: str, version: str | None = None) -> bool:
    """Whether the family was proven on `version` of transformers, the installed one if None."""
    if version is None:
        import transformers

        version = str(transformers.__version__)
    return _release(version) >= _release(proven_from(model_type))


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
