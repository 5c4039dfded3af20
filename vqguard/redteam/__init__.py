"""Attacks on guarded and unguarded models: they exist to measure the defense."""

from vqguard.redteam.attack import Attack, AttackResult
from vqguard.redteam.attack_table import ATTACKS
from vqguard.redteam.attacks.pgd import PGD
from vqguard.redteam.attacks.universal_pgd import UniversalPGD
from vqguard.redteam.facts import Budget, Goal, MeasuredAttack, Scope
from vqguard.redteam.gradients import (
    GRADIENTS,
    GradientPath,
    crossing,
    measured_modes,
    threat_models,
    threat_of_gradient,
)
from vqguard.redteam.judges import Judge, NoRefusal, StartsWith
from vqguard.redteam.modes import GradientMode
from vqguard.redteam.pixels import to_8_bit
from vqguard.redteam.softmax import SoftmaxEstimator
from vqguard.redteam.threat import ThreatModel
from vqguard.redteam.trial import AttackTarget, Trial
from vqguard.redteam.universal import UniversalAttack, UniversalResult
from vqguard.redteam.universal_trial import UniversalTrial
from vqguard.redteam.verdict import verdict_hinge

__all__ = [
    "ATTACKS",
    "GRADIENTS",
    "PGD",
    "Attack",
    "AttackResult",
    "AttackTarget",
    "Budget",
    "Goal",
    "GradientMode",
    "GradientPath",
    "Judge",
    "MeasuredAttack",
    "NoRefusal",
    "Scope",
    "SoftmaxEstimator",
    "StartsWith",
    "ThreatModel",
    "Trial",
    "UniversalAttack",
    "UniversalPGD",
    "UniversalResult",
    "UniversalTrial",
    "crossing",
    "measured_modes",
    "threat_models",
    "threat_of_gradient",
    "to_8_bit",
    "verdict_hinge",
]
