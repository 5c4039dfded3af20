"""The list of families: one file each, or one for relatives.

A new family is its file and a line here. The order is that in which names are listed.
"""

FAMILIES = (
    "llava",
    "llava_next",
    "qwen_vl",
    "qformer",
    "conventional.usual",
    "conventional.gemma",
    "conventional.idefics",
    "forward_seams",
    "conventional.glm",
    "encoder_decoder",
    "kosmos",
    "molmo",
    "granite",
    "discrete",
    "conventional.deepseek",
    "local_views",
    "conventional.minicpm",
    "conventional.patches",
    "conventional.perception_lm",
    "unguarded",
)
"""Modules in this folder, each read by `names.py` and imported at the first look-up."""
