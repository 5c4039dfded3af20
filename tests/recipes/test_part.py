"""What a part of an evaluation found, brought over from another process."""

from __future__ import annotations

from pathlib import Path

import torch

from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.recipes.evaluation.part import Part
from vqguard.recipes.evaluation.world import WorldParts
from vqguard.recipes.recipe import load_recipe
from vqguard.recipes.tiny.world import TinyWorld


def a_part(subject: str) -> Part:
    part = Part(Ledger("pytest", 3))
    part.ledger.rate("asr", subject, [True, False], threat_model="white box", eps_255=8)
    part.ledger.mean("naming_recall", subject, [0.25, 1 / 3])
    part.ledger.value("peak_memory_mb", subject, 12.5, 1)
    part.ledger.verdicts.append({"metric": "dsr", "flagged": True, "codes": [3]})
    part.findings.losses[f"PGD ({subject})"] = [1.5, 0.1]
    pictures = torch.rand(2, 3, 4, 4)
    part.findings.adversarial[f"{subject}, first"] = pictures[0]
    part.findings.adversarial[f"{subject}, second"] = pictures[1]
    part.findings.warn(subject, ["masked gradient"])
    return part


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    part = a_part("base")
    part.save(tmp_path / "part")
    back = Part(Ledger("pytest", 3)).load(tmp_path / "part")
    assert back.ledger.records == part.ledger.records
    assert back.ledger.verdicts == part.ledger.verdicts
    assert back.findings.losses == part.findings.losses
    assert back.findings.warnings == part.findings.warnings
    assert list(back.findings.adversarial) == list(part.findings.adversarial)
    for label, picture in part.findings.adversarial.items():
        assert torch.equal(back.findings.adversarial[label], picture)


def test_parts_follow_one_another() -> None:
    whole = Part(Ledger("pytest", 3))
    for subject in ("base", "guarded"):
        whole.add(a_part(subject))
    assert [r.subject for r in whole.ledger.records] == ["base"] * 3 + ["guarded"] * 3
    assert len(whole.ledger.verdicts) == 2
    assert list(whole.findings.losses) == ["PGD (base)", "PGD (guarded)"]
    assert whole.findings.notes == ["base; guarded: masked gradient"]


def test_the_longest_parts_are_taken_first_and_each_once(tmp_path: Path) -> None:
    given = load_recipe("llava-tiny"), TinyWorld(), None, "pytest", torch.float32, None
    parts = WorldParts(tmp_path, *given)
    first, second = parts._free(tmp_path), parts._free(tmp_path)
    taken = [next(first), next(second), *second, *first]
    assert taken[:3] == [f"attacks, guarded, straight_through, {n}" for n in range(3)]
    assert [name.startswith("attacks") for name in taken] == sorted(
        (name.startswith("attacks") for name in taken), reverse=True
    )
    assert sorted(taken) == sorted(name for name in parts._parts if name != "overhead")
