"""The table of attacks: what an evaluation runs and a report shows, by the names in records."""

from __future__ import annotations

from vqguard.redteam.facts import MeasuredAttack
from vqguard.redteam.named_table import NamedTable
from vqguard.redteam.attacks.pgd import PGD
from vqguard.redteam.attacks.universal_pgd import UniversalPGD

CLEAN = "none"
"""Condition `attack` of a record without an attack: the clean picture."""

ATTACKS: NamedTable[type[MeasuredAttack]] = NamedTable(
    "attack",
    PGD,
    UniversalPGD,
    reserved=(CLEAN,),
)
"""All attacks, in the order in which an evaluation runs them. An attack of a file of its own is
entered here, one of another package by `ATTACKS.register(cls)`."""
