"""resuscitate: bring a collapsed pruned network back from a few unlabelled images. No labels, no gradients.

report = resuscitate.repair(model, dense, calibration, method="asr")
"""

from .deploy.export import Exported, export
from .deploy.fold import FoldReport, fold_batchnorm
from .deploy.semistructured import SemiStructured, to_semi_structured
from .engine.reference import DenseStatistics
from .methods.batchnorm import recalibrate_batchnorm
from .network.masks import Masks
from .network.mean_layers import densify, replace_by_means
from .pruning.allocation import allocate
from .pruning.repairability import Repairability
from .pruning.sparsify import sparsify
from .pruning.structured import Shrinkage, shrink
from .reports.recoverability import RecoverabilityMap
from .reports.repair import LayerReport, RepairReport
from .training.hyperspherical import PruningPenalty, to_hyperspherical, to_plain
from .workflows.compress import CompressReport, compress
from .workflows.damage import LayerDamage, damage
from .workflows.recoverability import Accuracy, recoverability
from .workflows.regrow import GrowthRound, Regrowth, regrow
from .workflows.repair import repair

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
