"""A guarded model for lmms-eval, which finds it by the entry point `lmms_eval.models`.

    lmms-eval --model vqguard --model_args pretrained=runs/mine --tasks pope

Nothing of vqguard imports this folder, and lmms-eval is not among its dependencies.
"""
