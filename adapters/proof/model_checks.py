"""Checks that the guard leaves the model what it is: removal, storage, gradients, text."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from vqguard.adapters.features import Site
from vqguard.adapters.install import install_link
from vqguard.adapters.proof.guarded_subject import NEW_TOKENS, guarded, logits
from vqguard.adapters.proof.results import FailedCheckError, NotApplicableError
from vqguard.adapters.registry import get_adapter
from vqguard.adapters.runtime.guard_link import GuardLink
from vqguard.adapters.storage.reading import load_parts
from vqguard.codebooks.quantizer import straight_through
from vqguard.guard import recording


def removal(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """Taking the guard out restores logits, answers, classes and state dict bit for bit."""
    adapter = get_adapter(model)
    before, keys = logits(adapter, model, inputs), list(model.state_dict())
    answers = adapter.decode(model, inputs, NEW_TOKENS)[0]
    classes = [type(module) for module in model.modules()]
    with guarded(model, inputs, site):
        logits(adapter, model, inputs)
    if not torch.equal(logits(adapter, model, inputs), before):
        raise FailedCheckError("logits differ after the guard was taken out")
    if not torch.equal(adapter.decode(model, inputs, NEW_TOKENS)[0], answers):
        raise FailedCheckError("answers differ after the guard was taken out")
    if [type(module) for module in model.modules()] != classes or list(model.state_dict()) != keys:
        raise FailedCheckError("classes or parameters are not what they were")


def storage(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """What was saved and loaded answers bit for bit as what was saved."""
    adapter = get_adapter(model)
    with guarded(model, inputs, site), tempfile.TemporaryDirectory() as folder:
        expected = logits(adapter, model, inputs)
        verdicts = cast(Any, model).screen(**inputs)
        cast(Any, model).save_pretrained(Path(folder))
        _require_closed(folder, type(model))
        parts = load_parts(Path(folder), None, {})
        link = GuardLink(parts.guard, adapter, parts.refusal_ids, adapter.seams(parts.model))
        # The kit is the proof: a type that is taken on proof is not proven again here.
        again = install_link(parts.model, link).eval()
        if not torch.equal(logits(adapter, again, inputs), expected):
            raise FailedCheckError("logits differ after saving and loading" + _blame(folder, model))
        if again.screen(**inputs) != verdicts:
            raise FailedCheckError("verdicts differ after saving and loading")


def gradients(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """Stage 1 reaches the projector and every codebook, stage 2 the language model.

    Neither reaches the vision encoder, and they share nothing.
    """
    adapter = get_adapter(model)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    with guarded(model, inputs, site):
        guard = cast(Any, model).vqguard
        first = dict(adapter.stage1_trainable(model))
        second = dict(adapter.stage2_trainable(model))
        shared = first.keys() & second.keys()
        if shared:
            raise FailedCheckError(f"both stages train {sorted(shared)[:3]}")
        try:
            guard.train()
            _loosen(guard)
            for stage in (first, second):
                model.zero_grad()
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(name in stage)
                with recording(guard) as seen, straight_through(guard):
                    loss = adapter.logits(model, inputs).double().pow(2).mean()
                losses = [output.losses.total() for output in seen if output.losses is not None]
                if stage is first:
                    loss = loss + torch.stack(losses).sum()
                loss.backward()
                moved = {
                    n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()
                }
                if moved - stage.keys():
                    raise FailedCheckError(f"gradient in {sorted(moved - stage.keys())[:3]}")
                if stage is first:
                    _require(moved, {n for n in first if n.endswith("codebook.weight")})
                    if adapter.trains_projector and not any("vqguard" not in n for n in moved):
                        raise FailedCheckError("stage 1 reaches no parameter of the projector")
                elif not moved:
                    raise FailedCheckError("stage 2 reaches no parameter of the language model")
        finally:
            guard.eval()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(wanted.get(name, True))


def text(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """Text without a picture gives the same logits and answers, bit for bit."""
    adapter = get_adapter(model)
    words = adapter.text_only(model, inputs)
    if words is None:
        raise NotApplicableError("the family reads no text without a picture")
    before = logits(adapter, model, words)
    answers = adapter.decode(model, words, NEW_TOKENS)[0]
    with guarded(model, inputs, site):
        if not torch.equal(logits(adapter, model, words), before):
            raise FailedCheckError("logits of text alone differ")
        if not torch.equal(adapter.decode(model, words, NEW_TOKENS)[0], answers):
            raise FailedCheckError("answers to text alone differ")


def _require_closed(folder: str, guarded_class: Any) -> None:
    """Refuse a saved model that its own class of transformers opens, without the guard."""
    original = guarded_class.vqguard_original
    try:
        original.from_pretrained(folder)
    except (OSError, ValueError) as error:
        if "vqguard" in str(error):
            return
        raise FailedCheckError(f"{original.__name__} does not say what to use: {error}") from error
    raise FailedCheckError(f"{original.__name__}.from_pretrained opens it without its guard")


def _blame(folder: str, model: nn.Module) -> str:
    """Whether transformers alone brings the saved base model back."""
    kept = load_parts(Path(folder), None, {}).model.state_dict()
    saved = model.state_dict()
    lost = [key for key, one in kept.items() if not torch.equal(one, saved.get(key, one * 0 - 1))]
    return f": transformers loads other weights than it saved ({lost[0]}, ...)" if lost else ""


@torch.no_grad()
def _loosen(guard: nn.Module) -> None:
    """Move codewords off the features that they were taken from: there no loss has a gradient."""
    guard.__dict__["_safety_map"] = None
    generator = torch.Generator().manual_seed(0)
    for name, parameter in guard.named_parameters():
        if name.endswith("codebook.weight"):
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * (0.1 * parameter.std().clamp(min=1e-3)))


def _require(moved: set[str], names: set[str]) -> None:
    missing = sorted(names - moved)
    if missing:
        raise FailedCheckError(f"no gradient in {missing[:3]}")
