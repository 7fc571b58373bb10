"""resuscitate: repair a collapsed pruned network from a few unlabelled images. No labels, no training.

report = resuscitate.repair(model, dense, calibration, method="asr")

The folders are levels, and an import only goes down: `workflows` has the public functions; `methods` the repair
methods; `engine` measures a network layer by layer; below are `statistics`, `data`, `network`, `runtime` and `utils`.
"""

from .data.images import ImageStream, load_images, load_labels
from .deploy.checkpoints import load_weights
from .deploy.export import Exported, export
from .deploy.fold import FoldReport, fold_batchnorm
from .deploy.semistructured import SemiStructured, to_semi_structured
from .engine.probes import Layer, Probe
from .engine.reference import DenseStatistics
from .errors import (
    CalibrationError,
    CheckpointError,
    DistributedError,
    JournalError,
    LayerError,
    MaskError,
    ModelMismatchError,
    NonFiniteError,
    ResuscitateError,
)
from .methods.base import DenseAccess, Method, register
from .methods.batchnorm import EMA, BatchNormOnly, Exact
from .methods.gains import ASR, ChannelWise, LayerWise
from .methods.mean_replacement import MeanReplacement
from .methods.refit import Refit
from .network.masks import Masks
from .network.mean_layers import densify, replace_by_means
from .network.updates import Gain, Unchanged, Weights
from .pruning.allocation import allocate
from .pruning.layer_scales import LayerScales
from .pruning.repairability import Repairability
from .pruning.sparsify import sparsify
from .pruning.structured import Shrinkage, shrink
from .reports.agreement import Agreement
from .reports.damage import LayerDamage
from .reports.recoverability import RecoverabilityMap
from .reports.repair import LayerReport, RepairReport
from .runtime.options import RunOptions
from .statistics.outputs import OutputCovariances, OutputMoments
from .statistics.patches import PatchCovariances
from .training.hyperspherical import PruningPenalty, to_hyperspherical, to_plain
from .version import __version__ as __version__
from .workflows.compress import CompressReport, compress
from .workflows.compress_to_agreement import TargetReport, Trial, compress_to_agreement
from .workflows.damage import damage
from .workflows.recoverability import Accuracy, recoverability
from .workflows.regrow import GrowthRound, RegrowthReport, regrow
from .workflows.repair import recalibrate_batchnorm, repair

# fmt: off
__all__ = [  # noqa: RUF022 - by topic
    "repair", "compress", "compress_to_agreement", "regrow", "recoverability", "damage", "recalibrate_batchnorm",
    "sparsify", "allocate", "shrink",
    "Refit", "ASR", "ChannelWise", "LayerWise", "MeanReplacement", "BatchNormOnly", "Exact", "EMA",
    "Method", "register", "DenseAccess", "Layer", "Probe", "OutputMoments", "OutputCovariances",
    "PatchCovariances", "Gain", "Weights", "Unchanged",
    "RunOptions",
    "DenseStatistics", "Repairability", "LayerScales", "Masks", "Accuracy", "ImageStream", "load_images", "load_labels",
    "load_weights",
    "RepairReport", "LayerReport", "Agreement", "CompressReport", "TargetReport", "Trial", "RegrowthReport",
    "GrowthRound", "RecoverabilityMap", "LayerDamage", "Shrinkage",
    "replace_by_means", "densify", "fold_batchnorm", "FoldReport", "export", "Exported", "to_semi_structured",
    "SemiStructured",
    "to_hyperspherical", "to_plain", "PruningPenalty",
    "ResuscitateError", "CalibrationError", "CheckpointError", "DistributedError", "JournalError", "LayerError",
    "MaskError",
    "ModelMismatchError", "NonFiniteError", "__version__",
]
# fmt: on
