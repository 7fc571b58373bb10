"""resuscitate: bring a collapsed pruned network back from a few unlabelled images. No labels, no gradients.

report = resuscitate.repair(model, dense, calibration, method="asr")
"""

from .batchnorm import fold_batchnorm, recalibrate_batchnorm
from .compress import CompressReport, compress
from .damage import LayerDamage, damage
from .maps import RecoverabilityMap
from .masks import Masks
from .recoverability import Accuracy, recoverability
from .regrow import GrowthRound, Regrowth, regrow
from .repair import repair
from .report import LayerReport, RepairReport
from .sparsify import Repairability, Shrinkage, allocate, shrink, sparsify
from .targets import DenseStatistics

__version__ = "0.1.0"
__all__ = [
    "Accuracy",
    "CompressReport",
    "DenseStatistics",
    "GrowthRound",
    "LayerDamage",
    "LayerReport",
    "Masks",
    "RecoverabilityMap",
    "Regrowth",
    "RepairReport",
    "Repairability",
    "Shrinkage",
    "allocate",
    "compress",
    "damage",
    "fold_batchnorm",
    "recalibrate_batchnorm",
    "recoverability",
    "regrow",
    "repair",
    "shrink",
    "sparsify",
]
