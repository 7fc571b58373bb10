"""resuscitate: bring a collapsed pruned network back from a few unlabelled images. No labels, no gradients.

report = resuscitate.repair(model, dense, calibration, method="asr")
"""

from .batchnorm import fold_batchnorm, recalibrate_batchnorm
from .masks import Masks
from .repair import repair
from .report import LayerReport, RepairReport
from .sparsify import Repairability, allocate, sparsify
from .targets import DenseStatistics

__version__ = "0.1.0"
__all__ = [
    "DenseStatistics",
    "LayerReport",
    "Masks",
    "RepairReport",
    "Repairability",
    "allocate",
    "fold_batchnorm",
    "recalibrate_batchnorm",
    "repair",
    "sparsify",
]
