"""What lmms-eval is told at start-up, when it asks every installed package for its models."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(
    model_id="vqguard",
    chat_class_path="vqguard.recipes.evaluation.lmms.model.GuardedModel",
)
