"""resuscitate: bring a collapsed pruned network back from a few unlabelled images. No labels, no gradients.

report = resuscitate.repair(model, dense, calibration, method="asr")
"""

from .batchnorm import recalibrate_batchnorm
from .compress import CompressReport, compress
from .damage import LayerDamage, damage
from .export import Exported, export
from .fold import FoldReport, fold_batchnorm
from .hyperspherical import PruningPenalty, to_hyperspherical, to_plain
from .maps import RecoverabilityMap
from .masks import Masks
from .means import densify, replace_by_means
from .recoverability import Accuracy, recoverability
from .regrow import GrowthRound, Regrowth, regrow
from .repair import repair
from .report import LayerReport, RepairReport
from .semistructured import SemiStructured, to_semi_structured
from .sparsify import Repairability, Shrinkage, allocate, shrink, sparsify
from .targets import DenseStatistics

__version__ = "0.1.0"
__all__ = [
    "Accuracy",
    "CompressReport",
    "DenseStatistics",
    "Exported",
    "FoldReport",
    "GrowthRound",
    "LayerDamage",
    "LayerReport",
    "Masks",
    "PruningPenalty",
    "RecoverabilityMap",
    "Regrowth",
    "RepairReport",
    "Repairability",
    "SemiStructured",
    "Shrinkage",
    "allocate",
    "compress",
    "damage",
    "densify",
    "export",
    "fold_batchnorm",
    "recalibrate_batchnorm",
    "recoverability",
    "regrow",
    "repair",
    "replace_by_means",
    "shrink",
    "sparsify",
    "to_hyperspherical",
    "to_plain",
    "to_semi_structured",
]
