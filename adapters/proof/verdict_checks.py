"""Checks that each verdict reaches the rows of its picture, and is the same in any batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqguard.adapters.base import Adapter
from vqguard.adapters.features import Site, VisualFeatures
from vqguard.adapters.proof.guarded_subject import NEW_TOKENS, REFUSAL, flag, guarded
from vqguard.adapters.proof.results import FailedCheckError, NotApplicableError
from vqguard.adapters.registry import get_adapter
from vqguard.adapters.runtime.guard_link import Call, GuardLink, serving
from vqguard.adapters.runtime.quantise import is_passing, visual_features
from vqguard.guard import recording


def rows(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """A flagged image refuses the rows whose answer depends on it, and no other.

    Its neighbours answer as they did.
    """
    adapter = get_adapter(model)
    with guarded(model, inputs, site) as features:
        link: GuardLink = model.__dict__["_vqguard_link"]
        encode = link.guard.semantic.encode
        codes = [encode(tokens).tolist() for tokens in features.semantic_units]
        usual = answers(adapter, model, inputs)
        shown = [_rows_that_see(adapter, model, inputs, unit) for unit in range(len(codes))]
        cells = sorted({code for some in codes for code in some})
        if len(cells) == 1 and len(usual) > 1 and shown[0] != set(range(len(usual))):
            raise NotApplicableError("all pictures fell into one cell: give it unlike pictures")
        for code in cells:
            units = [unit for unit, some in enumerate(codes) if code in some]
            truth = set().union(*(shown[unit] for unit in units))
            flag(model, {code})
            given = answers(adapter, model, inputs)
            refused = {row for row, answer in enumerate(given) if answer == list(REFUSAL)}
            if refused != truth:
                raise FailedCheckError(
                    f"images {units} are seen by rows {sorted(truth)}, their flag refused rows "
                    f"{sorted(refused)}"
                )
            others = [r for r in range(len(given)) if r not in truth and given[r] != usual[r]]
            if others:
                raise FailedCheckError(f"the flag of images {units} changed answers of {others}")


def regional(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """The regional judge's flag of an image refuses the rows that see it, and no other.

    Its codes are the same for an image alone and in a batch, and `screen` says what `generate`
    does.
    """
    adapter = get_adapter(model)
    with guarded(model, inputs, site, regional=True) as features:
        guard = cast(Any, model).vqguard
        together = _own_codes(guard, features, slice(None))
        for unit, codes in enumerate(together):
            alone = _own_codes(guard, features, slice(unit, unit + 1))
            if alone != [codes]:
                raise FailedCheckError(f"image {unit} has other regional codes in a batch")
        cells = [set(codes) for codes in together]
        shown = [_rows_that_see(adapter, model, inputs, unit) for unit in range(len(cells))]
        told_apart = 0
        for unit, mine in enumerate(cells):
            others = set().union(*(codes for other, codes in enumerate(cells) if other != unit))
            if not mine - others or not shown[unit]:  # no row sees what fills up another
                continue
            told_apart += 1
            flag(model, {min(mine - others)})
            given = answers(adapter, model, inputs)
            refused = {row for row, answer in enumerate(given) if answer == list(REFUSAL)}
            if refused != shown[unit]:
                raise FailedCheckError(
                    f"image {unit} is seen by rows {sorted(shown[unit])}, the flag of its region"
                    f" refused rows {sorted(refused)} (layout {features.unit_layouts[unit]})"
                )
            screened = [verdict.flagged for verdict in cast(Any, model).screen(**inputs)]
            if screened != [other == unit for other in range(len(cells))]:
                raise FailedCheckError(f"screen flags {screened} for a region of image {unit}")
        if not told_apart:
            raise NotApplicableError("no region has a code of its own: give it unlike pictures")


def all_refused(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """When every row is flagged the language model does not run."""
    adapter = get_adapter(model)
    with guarded(model, inputs, site) as features:
        flag(model, set(range(len(torch.cat(features.semantic_units)))))
        runs: list[int] = []
        handles = [
            entry.register_forward_hook(lambda *_: runs.append(1))
            for entry in adapter.language_entries(model)
        ]
        try:
            given = answers(adapter, model, inputs)
        finally:
            for handle in handles:
                handle.remove()
    if runs:
        raise FailedCheckError("every row is flagged and the language model ran")
    if any(answer != list(REFUSAL) for answer in given):
        raise FailedCheckError(f"every row is flagged, the answers are {given}")


def batch(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """The same pictures have the same codes and verdicts in a batch twice as large."""
    with guarded(model, inputs, site):
        guard = cast(Any, model).vqguard
        alone = visual_features(model, site, **inputs)
        try:
            twice = {
                k: torch.cat([v, v]) if isinstance(v, Tensor) else [*v, *v]
                for k, v in inputs.items()
                if isinstance(v, (Tensor, list))
            }
            together = visual_features(model, site, **twice)
        except (RuntimeError, ValueError, IndexError) as error:
            raise NotApplicableError(f"its pixels are not laid out by picture ({error})") from error
        if len(together.semantic) != 2 * len(alone.semantic):
            raise NotApplicableError("its pixels are not laid out by picture")
        codes = [
            guard.encode_semantic(part.semantic, part.semantic_mask) for part in (alone, together)
        ]
        if not torch.equal(torch.cat([codes[0], codes[0]]), codes[1]):
            raise FailedCheckError("semantic codes differ in a larger batch")
        patches = [
            torch.cat([guard.patch.encode(t) for t in features.tokens])
            for features in (alone, together)
        ]
        different = (torch.cat([patches[0], patches[0]]) != patches[1]).double().mean()
        if float(different) > 0:
            raise FailedCheckError(
                f"{float(different):.1%} of patch codes differ in a larger batch"
            )


def modes(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """In training mode verdicts are those of eval mode, and each module's mode comes back.

    Asking for a verdict counts no use of a codeword.
    """
    adapter = get_adapter(model)
    before = {module: module.training for module in model.modules()}
    trained: set[str] = set()

    def watch(module: nn.Module, *_: Any) -> None:
        if module.training and is_passing(model):
            trained.add(type(module).__name__)

    def ask(name: str, call: Callable[[], list[bool]]) -> None:
        given = [module.training for module in model.modules()]
        verdicts = call()
        if verdicts != expected:
            raise FailedCheckError(
                f"verdicts of {name} are {verdicts} in training mode: {expected}"
            )
        if [module.training for module in model.modules()] != given:
            raise FailedCheckError(f"{name} left modules in another mode")

    with guarded(model, inputs, site), ExitStack() as undo:
        subject = cast(Any, model)
        guard = subject.vqguard
        flag(model, set(range(0, guard.cells, 2)))
        expected = [verdict.flagged for verdict in subject.screen(**inputs)]
        for module in before:  # all but the guard, whose codebooks may be learning
            undo.callback(module.register_forward_pre_hook(watch).remove)
        for module, mode in before.items():
            undo.callback(setattr, module, "training", mode)
        counts = [buffer.clone() for buffer in guard.buffers()]
        model.train()
        adapter.vision_modules(model)[0].eval()  # unlike its parents and its children
        ask("screen", lambda: [verdict.flagged for verdict in subject.screen(**inputs)])
        # A language model in training mode asks for more arguments in some families.
        model.eval()
        for module in (*adapter.vision_modules(model), *adapter.projectors(model), guard):
            module.train()

        def generate() -> list[bool]:
            answers(adapter, model, inputs)
            return [verdict.flagged for verdict in subject.last_verdicts]

        @torch.no_grad()
        def forward() -> list[bool]:
            with recording(guard) as outputs:
                adapter.logits(model, inputs)
            flags = [output.flagged for output in outputs if output.flagged is not None]
            return [flagged for some in flags for flagged in some.tolist()]

        ask("generate", generate)
        if not all(map(torch.equal, counts, guard.buffers())):
            raise FailedCheckError("screen or generate counted uses of codewords")
        guard.freeze()
        ask("forward", forward)
    if trained:
        raise FailedCheckError(f"judged with {sorted(trained)[:3]} in training mode")


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


def _own_codes(guard: Any, features: VisualFeatures, units: slice) -> list[list[int]]:
    """The codes that the verdict on each of these units is read from."""
    mask = None if features.semantic_mask is None else features.semantic_mask[units]
    codes, *_ = guard.judged(
        features.semantic[units],
        mask,
        list(features.tokens)[units],
        features.unit_layouts[units],
    )
    return [[code for code in row if code >= 0] for row in codes.tolist()]


def answers(adapter: Adapter, model: nn.Module, inputs: Mapping[str, Any]) -> list[list[int]]:
    """The last `NEW_TOKENS` tokens of every row, greedily, the end token being kept away."""
    output = cast(Any, model).generate(
        **inputs, do_sample=False, num_beams=1, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
    )
    sequences = output if isinstance(output, Tensor) else output.sequences
    return cast(list[list[int]], sequences[:, -NEW_TOKENS:].tolist())
