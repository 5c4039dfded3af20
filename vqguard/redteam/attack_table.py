"""The table of attacks: what an evaluation runs and a report shows, by the names in records."""

from __future__ import annotations

from vqguard.redteam.attacks.adam import Adam
from vqguard.redteam.attacks.annealed import AnnealedSoftmax
from vqguard.redteam.attacks.apgd import APGD
from vqguard.redteam.attacks.code_match import MatchedCodes
from vqguard.redteam.attacks.code_search import SearchedCodes
from vqguard.redteam.attacks.corruptions import Corruptions
from vqguard.redteam.attacks.denial import (
    DenialDecisions,
    DenialNoise,
    DenialOfService,
    DenialSquare,
)
from vqguard.redteam.attacks.eot import EOT
from vqguard.redteam.attacks.evasion import (
    Evasion,
    EvasionDecisions,
    EvasionNoise,
    EvasionSquare,
)
from vqguard.redteam.attacks.features import FeaturePush
from vqguard.redteam.attacks.joint import Joint
from vqguard.redteam.attacks.messages.later_turn import LaterTurn
from vqguard.redteam.attacks.messages.several_pictures import OneAmongClean, SeveralPictures
from vqguard.redteam.attacks.messages.typographic import TypographicCaption, TypographicList
from vqguard.redteam.attacks.pgd import PGD
from vqguard.redteam.attacks.query import RandomSearch
from vqguard.redteam.attacks.shortcut import TrainedShortcut
from vqguard.redteam.attacks.square import Square
from vqguard.redteam.attacks.transfer import SurrogateTransfer, Transfer
from vqguard.redteam.attacks.transferred.universal import TransferableUniversal
from vqguard.redteam.attacks.universal_pgd import UniversalPGD
from vqguard.redteam.facts import MeasuredAttack
from vqguard.redteam.named_table import NamedTable

CLEAN = "none"
"""Condition `attack` of a record without an attack: the clean picture."""

BENIGN = "benign"
"""Condition `attack` where nobody attacks and the requests are harmless: over-refusal."""

UNION = "union"
"""Condition `attack` of a record that counts a request as broken where any attack broke it."""

ATTACKS: NamedTable[type[MeasuredAttack]] = NamedTable(
    "attack",
    PGD,
    UniversalPGD,
    APGD,
    Adam,
    EOT,
    FeaturePush,
    TrainedShortcut,
    AnnealedSoftmax,
    Joint,
    SearchedCodes,
    MatchedCodes,
    DenialOfService,
    DenialSquare,
    DenialDecisions,
    DenialNoise,
    Evasion,
    EvasionSquare,
    EvasionDecisions,
    EvasionNoise,
    Square,
    RandomSearch,
    Transfer,
    SurrogateTransfer,
    TransferableUniversal,
    SeveralPictures,
    OneAmongClean,
    LaterTurn,
    TypographicList,
    TypographicCaption,
    Corruptions,
    reserved=(CLEAN, BENIGN, UNION),
)
"""All attacks, in the order in which an evaluation runs them. An attack of a file of its own is
entered here, one of another package by `ATTACKS.register(cls)`."""
