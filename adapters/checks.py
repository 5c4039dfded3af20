"""The checks of the conformance kit. Each takes an unguarded model in eval mode."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqguard.adapters.base import Adapter, Site, VisualFeatures
from vqguard.adapters.bypass import VECTORS
from vqguard.adapters.conformance import Check, FailedCheckError, NotApplicableError
from vqguard.adapters.install import build_guard, install_link, unguard_model
from vqguard.adapters.link import Call, GuardLink, serving
from vqguard.adapters.probe import find_leak, one_codeword_probe, redraw
from vqguard.adapters.registry import get_adapter
from vqguard.errors import BypassError

NEW_TOKENS = 3
REFUSAL = (7, 8, 9)
CODES = 24


def probe(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """Black box: with a codebook of one entry, redrawn pixels move nothing."""
    result = one_codeword_probe(model, inputs, site=site)
    if result.control_delta == 0:
        raise FailedCheckError("the inputs show the unguarded model nothing; give it a picture")
    if not result.passed:
        raise FailedCheckError(f"{result}: {find_leak(model, inputs, site=site)}")


def codewords(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """White box: every vector that enters the language model and depends on the picture is a
    codeword, at site "encoder" a function of codewords that is the same for the same codes.
    """
    adapter = get_adapter(model)
    plain = redraw(adapter, model, inputs, 0)
    with guarded(model, inputs, site):
        first, second = entering(adapter, model, inputs), entering(adapter, model, plain)
        allowed = _allowed(adapter, model, inputs, site)
    if len(first) != len(second):
        raise FailedCheckError("another picture made the language model run another way")
    moved = 0
    for (name, one), (_, other) in zip(first, second, strict=True):
        if one.shape != other.shape:
            continue
        visual = (one != other).flatten(0, -2).any(-1)
        moved += int(visual.sum())
        if allowed is None or not bool(visual.any()):
            continue
        rows = torch.cat([one.flatten(0, -2)[visual], other.flatten(0, -2)[visual]])
        if adapter.additive:
            # What the family adds to its codewords is the same for both pictures.
            rows = (one - other).flatten(0, -2)[visual]
        far = _distance(rows, allowed)
        if float(far.max()) > 1e-4:
            raise FailedCheckError(
                f"{int((far > 1e-4).sum())} of {len(far)} visual vectors in {name} are no codewords"
                f" (farthest: {float(far.max()):.3g})"
            )
    if moved == 0:
        raise FailedCheckError("no vector that enters the language model depends on the picture")


def rows(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """A flagged image refuses the rows whose answer depends on it, and no other; its neighbours
    answer as they did.
    """
    adapter = get_adapter(model)
    with guarded(model, inputs, site) as features:
        link: GuardLink = model.__dict__["_vqguard_link"]
        codes = link.guard.semantic.encode(features.semantic).flatten().tolist()
        usual = _answers(adapter, model, inputs)
        shown = [_rows_that_see(adapter, model, inputs, unit) for unit in range(len(codes))]
        if len(set(codes)) == 1 and len(usual) > 1 and shown[0] != set(range(len(usual))):
            raise NotApplicableError("all pictures fell into one cell: give it unlike pictures")
        for code in sorted(set(codes)):
            units = [unit for unit, other in enumerate(codes) if other == code]
            truth = set().union(*(shown[unit] for unit in units))
            flag(model, {code})
            found = _answers(adapter, model, inputs)
            refused = {row for row, answer in enumerate(found) if answer == list(REFUSAL)}
            if refused != truth:
                raise FailedCheckError(
                    f"images {units} are seen by rows {sorted(truth)}, their flag refused rows "
                    f"{sorted(refused)}"
                )
            others = [r for r in range(len(found)) if r not in truth and found[r] != usual[r]]
            if others:
                raise FailedCheckError(f"the flag of images {units} changed answers of {others}")


def all_refused(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """When every row is flagged the language model does not run."""
    adapter = get_adapter(model)
    with guarded(model, inputs, site) as features:
        flag(model, set(range(len(features.semantic))))
        runs: list[int] = []
        handles = [
            one.register_forward_hook(lambda *_: runs.append(1))
            for one in adapter.language_entries(model)
        ]
        try:
            answers = _answers(adapter, model, inputs)
        finally:
            for handle in handles:
                handle.remove()
    if runs:
        raise FailedCheckError("every row is flagged and the language model ran")
    if any(answer != list(REFUSAL) for answer in answers):
        raise FailedCheckError(f"every row is flagged, the answers are {answers}")


def batch(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """The same pictures have the same codes and verdicts in a batch twice as large."""
    adapter = get_adapter(model)
    with guarded(model, inputs, site):
        guard = cast(Any, model).vqguard
        alone = adapter.features(model, site, **inputs)
        try:
            twice = {k: torch.cat([v, v]) for k, v in inputs.items() if isinstance(v, Tensor)}
            together = adapter.features(model, site, **twice)
        except (RuntimeError, ValueError, IndexError) as error:
            raise NotApplicableError(f"its pixels are not laid out by picture ({error})") from error
        if len(together.semantic) != 2 * len(alone.semantic):
            raise NotApplicableError("its pixels are not laid out by picture")
        codes = [guard.semantic.encode(one.semantic) for one in (alone, together)]
        if not torch.equal(torch.cat([codes[0], codes[0]]), codes[1]):
            raise FailedCheckError("semantic codes differ in a larger batch")
        patches = [
            torch.cat([guard.patch.encode(t) for t in one.tokens]) for one in (alone, together)
        ]
        different = (torch.cat([patches[0], patches[0]]) != patches[1]).double().mean()
        if float(different) > 0:
            raise FailedCheckError(
                f"{float(different):.1%} of patch codes differ in a larger batch"
            )


def removal(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """Taking the guard out restores logits, answers, classes and state dict bit for bit."""
    adapter = get_adapter(model)
    before, keys = _logits(adapter, model, inputs), list(model.state_dict())
    answers = adapter.decode(model, inputs, NEW_TOKENS)[0]
    classes = [type(module) for module in model.modules()]
    with guarded(model, inputs, site):
        _logits(adapter, model, inputs)
    if not torch.equal(_logits(adapter, model, inputs), before):
        raise FailedCheckError("logits differ after the guard was taken out")
    if not torch.equal(adapter.decode(model, inputs, NEW_TOKENS)[0], answers):
        raise FailedCheckError("answers differ after the guard was taken out")
    if [type(module) for module in model.modules()] != classes or list(model.state_dict()) != keys:
        raise FailedCheckError("classes or parameters are not what they were")


def storage(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """What was saved and loaded answers bit for bit as what was saved."""
    from vqguard.adapters.storage import load_guarded

    adapter = get_adapter(model)
    with guarded(model, inputs, site), tempfile.TemporaryDirectory() as folder:
        expected = _logits(adapter, model, inputs)
        verdicts = cast(Any, model).screen(**inputs)
        cast(Any, model).save_pretrained(Path(folder))
        again = load_guarded(folder).eval()
        if not torch.equal(_logits(adapter, again, inputs), expected):
            raise FailedCheckError("logits differ after saving and loading" + _blame(folder, model))
        if again.screen(**inputs) != verdicts:
            raise FailedCheckError("verdicts differ after saving and loading")


def gradients(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """Stage 1 reaches the projector and every codebook, stage 2 the language model; neither reaches
    the vision encoder, and they share nothing.
    """
    from vqguard.guard import recording
    from vqguard.quantizer import straight_through

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
                losses = [one.losses.total() for one in seen if one.losses is not None]
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
    before = _logits(adapter, model, words)
    answers = adapter.decode(model, words, NEW_TOKENS)[0]
    with guarded(model, inputs, site):
        if not torch.equal(_logits(adapter, model, words), before):
            raise FailedCheckError("logits of text alone differ")
        if not torch.equal(adapter.decode(model, words, NEW_TOKENS)[0], answers):
            raise FailedCheckError("answers to text alone differ")


def arguments(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """Every argument of `forward` that could carry visual vectors is refused by name."""
    names = set(inspect.signature(model.forward).parameters) & set(VECTORS)
    vector = torch.zeros(1, 2, 32)
    with guarded(model, inputs, site):
        for name in sorted(names | {"mm_encoder_outputs", "something_else"}):
            value: Any = {"image": vector} if name == "mm_encoder_outputs" else vector
            for run in (model, cast(Any, model).generate):
                try:
                    run(**{**inputs, name: value})
                except BypassError:
                    continue
                raise FailedCheckError(f"{name} was not refused")


CHECKS: dict[str, Check] = {
    "probe": probe,
    "codewords": codewords,
    "rows": rows,
    "all refused": all_refused,
    "batch": batch,
    "removal": removal,
    "storage": storage,
    "gradients": gradients,
    "text": text,
    "arguments": arguments,
}


# -- what the checks share


@contextmanager
def guarded(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> Iterator[VisualFeatures]:
    """Inside, the model has a guard whose entries are features of these inputs and that flags
    nothing; every image has a semantic cell of its own where their features differ.
    """
    adapter = get_adapter(model)
    with torch.no_grad():
        features = adapter.features(model, site, **inputs)
        other = adapter.features(model, site, **redraw(adapter, model, inputs, 0))
    guard = build_guard(
        model, site=site, patch_codes=CODES, semantic_codes=len(features.semantic), search="torch"
    )
    both = [*features.tokens, *other.tokens]
    guard.patch.codebook.start_from(torch.cat(both), "sample")
    for level, one, two in zip(guard.deep, features.deep, other.deep, strict=False):
        cast(Any, level).codebook.start_from(torch.cat([*one, *two]), "sample")
    guard.semantic.codebook.start_from(features.semantic.flatten(0, 1), "sample")
    install_link(model, GuardLink(guard.eval(), adapter, REFUSAL, adapter.seams(model)))
    flag(model, set())
    try:
        yield features
    finally:
        unguard_model(model)


def flag(model: nn.Module, codes: set[int]) -> None:
    """Give the guarded model a map that flags these semantic codes."""
    from vqguard.safety_map import SafetyMap

    guard = cast(Any, model).vqguard
    counts = torch.zeros(guard.config.semantic_codes, 2, dtype=torch.int64)
    for code in range(len(counts)):
        counts[code, 0 if code in codes else 1] = 3
    guard.safety_map = SafetyMap(("flagged",), counts, codebook_checksum=guard.checksum("semantic"))


def entering(
    adapter: Adapter, model: nn.Module, inputs: Mapping[str, Any]
) -> list[tuple[str, Tensor]]:
    """Every float tensor (..., d) among what the language model is given in one `forward`."""
    seen: list[tuple[str, Tensor]] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        named = {**{str(i): one for i, one in enumerate(args)}, **kwargs}
        for name, value in named.items():
            parts = value.values() if isinstance(value, Mapping) else value
            for part in parts if isinstance(value, (list, tuple, Mapping)) else [value]:
                if isinstance(part, Tensor) and part.is_floating_point() and part.dim() >= 2:
                    seen.append((name, part.clone()))

    handles = [
        one.register_forward_pre_hook(keep, with_kwargs=True)
        for one in adapter.language_entries(model)
    ]
    try:
        _logits(adapter, model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _allowed(
    adapter: Adapter, model: nn.Module, inputs: Mapping[str, Any], site: Site
) -> Tensor | None:
    """(n, d) vectors that may enter; None where they are no function of single codewords."""
    guard = cast(Any, model).vqguard
    books = [guard.patch.codebook.weight, *(level.codebook.weight for level in guard.deep)]
    with torch.no_grad():
        if site == "projected" and not adapter.additive:
            return torch.cat(books)
        if site == "projected":
            differences: Tensor = (books[0][:, None] - books[0][None]).flatten(0, 1)
            return differences
        if all(seam.modality in adapter.pointwise for seam in adapter.given(model, inputs)):
            return cast(Tensor, adapter.projector(model)(books[0]))
    return None


def _distance(rows: Tensor, allowed: Tensor) -> Tensor:
    """(n,) largest coordinate by which a row misses its nearest allowed vector."""
    if rows.shape[-1] != allowed.shape[-1]:
        return torch.full((len(rows),), float("inf"))
    nearest = torch.cdist(rows.double(), allowed.double()).argmin(-1)
    return (rows.double() - allowed.double()[nearest]).abs().amax(-1)


def _rows_that_see(
    adapter: Adapter, model: nn.Module, inputs: Mapping[str, Any], unit: int
) -> set[int]:
    """Rows whose logits move when one image's features are others, by the model's own doing."""
    link: GuardLink = model.__dict__["_vqguard_link"]

    def run(other: bool) -> Tensor:
        call = Call(link, checked=True, arguments=inputs)
        with torch.no_grad():
            link.prepare(model, call, inner_only=False)
            seam, result = call.seen[0]
            value = seam.read(result.output)
            units = adapter.split(seam, value, result.arguments)
            if other:
                noise = torch.randn(units[unit].shape, generator=torch.Generator().manual_seed(1))
                units[unit] = units[unit] + noise.to(units[unit])
            result.output = seam.write(result.output, adapter.join(seam, value, units))
            with serving(call):
                return adapter.logits(model, inputs)

    # Experts that share their work over a batch move other rows in the last bits.
    moved = (run(True) - run(False)).abs().flatten(1).amax(-1)
    return set((moved > 1e-3 * moved.max()).nonzero().flatten().tolist())


def _answers(adapter: Adapter, model: nn.Module, inputs: Mapping[str, Any]) -> list[list[int]]:
    """The last `NEW_TOKENS` tokens of every row, greedily, the end token being kept away."""
    output = cast(Any, model).generate(
        **inputs, do_sample=False, num_beams=1, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
    )
    sequences = output if isinstance(output, Tensor) else output.sequences
    return cast(list[list[int]], sequences[:, -NEW_TOKENS:].tolist())


@torch.no_grad()
def _logits(adapter: Adapter, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    return adapter.logits(model, inputs)


def _blame(folder: str, model: nn.Module) -> str:
    """Whether transformers alone brings the saved base model back."""
    from transformers import AutoModelForImageTextToText

    load: Any = AutoModelForImageTextToText
    kept, saved = load.from_pretrained(folder).state_dict(), model.state_dict()
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
