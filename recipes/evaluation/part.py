"""What one part of an evaluation found, and how it comes back from another process."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vqguard.errors import ArtefactError
from vqguard.recipes.evaluation.jailbreak import JailbreakFindings
from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.records import Record
from vqguard.text_files import read_json

_FOUND, _EXAMPLES = "found.json", "examples.safetensors"


@dataclass
class Part:
    """Records and findings of one part."""

    ledger: Ledger
    findings: JailbreakFindings = field(default_factory=JailbreakFindings)
    roc: list[dict[str, float]] = field(default_factory=list)
    """Of the toxic scenes, where they are in this part."""

    def add(self, other: Part) -> None:
        """Put another part's behind these."""
        self.ledger.records += other.ledger.records
        self.ledger.verdicts += other.ledger.verdicts
        self.roc += other.roc
        self.findings.losses |= other.findings.losses
        self.findings.adversarial |= other.findings.adversarial
        for text, labels in other.findings.warnings.items():
            for label in labels:
                self.findings.warn(label, [text])

    def save(self, folder: Path) -> None:
        """Write it into `folder`, which is made where it is missing."""
        folder.mkdir(exist_ok=True)
        found = {
            "records": [record.to_dict() for record in self.ledger.records],
            "verdicts": self.ledger.verdicts,
            "roc": self.roc,
            "losses": self.findings.losses,
            "warnings": self.findings.warnings,
            "examples": list(self.findings.adversarial),
        }
        (folder / _FOUND).write_text(json.dumps(found))
        examples = enumerate(self.findings.adversarial.values())
        # a picture may be a view of a batch
        save_file(
            {
                str(number): image.clone(memory_format=torch.contiguous_format)
                for number, image in examples
            },
            folder / _EXAMPLES,
        )

    def load(self, folder: Path) -> Part:
        """Add what `save` wrote; returns this part."""
        found = read_json(folder / _FOUND, ArtefactError, strict=False)
        tensors = load_file(folder / _EXAMPLES)
        self.ledger.records += [Record.from_dict(record) for record in found["records"]]
        self.ledger.verdicts += found["verdicts"]
        self.roc += found["roc"]
        self.findings.losses |= found["losses"]
        self.findings.warnings |= found["warnings"]
        for number, label in enumerate(found["examples"]):
            self.findings.adversarial[label] = tensors[str(number)]
        return self
