"""Attacks on guarded and unguarded models: they exist to measure the defense."""

from vqguard.redteam.attack import Attack, AttackResult
from vqguard.redteam.gradients import GradientMode, GradientPath, SoftmaxEstimator, crossing
from vqguard.redteam.judges import Judge, StartsWith
from vqguard.redteam.pgd import PGD
from vqguard.redteam.pixels import to_8_bit
from vqguard.redteam.threat import ThreatModel, threat_of_gradient
from vqguard.redteam.trial import AttackTarget, Trial
from vqguard.redteam.universal import UniversalPGD, UniversalResult
from vqguard.redteam.verdict import verdict_hinge

__all__ = [
    "PGD",
    "Attack",
    "AttackResult",
    "AttackTarget",
    "GradientMode",
    "GradientPath",
    "Judge",
    "SoftmaxEstimator",
    "StartsWith",
    "ThreatModel",
    "Trial",
    "UniversalPGD",
    "UniversalResult",
    "crossing",
    "threat_of_gradient",
    "to_8_bit",
    "verdict_hinge",
]
