"""Re-estimation of BatchNorm statistics, exact or by momentum, and the method that does nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..engine.probes import Layer, Probe
from ..errors import called
from ..network.runner import Network
from ..network.updates import BatchNormStatistics, Unchanged
from ..reports.repair import RepairReport
from ..runtime.options import check_choice
from ..statistics.outputs import OutputMoments
from .base import DenseAccess, Method, Recalibration, check_number, register


@register
@dataclass(frozen=True, kw_only=True)
class BatchNormOnly(Method):
    """Change no layer: only the BatchNorm statistics are re-estimated, see `recalibrate`."""

    name = "bn"
    dense = DenseAccess.NONE
    changes_layers = False
    measures_layers = False

    def probe(self, layer: Layer) -> None:
        return

    def solve(self, layer: Layer, found: Any) -> Unchanged:
        return Unchanged("only BatchNorm is re-estimated")


@dataclass(frozen=True, kw_only=True)
class Exact(Recalibration):
    """The mean and unbiased variance, pooled over all images, of the inputs of each BatchNorm.

    Each is measured when all earlier modules are final, in the same walk. samples: use so many images, the first ones,
    less those that a refit holds out; None: all, also those.
    """

    samples: int | None = None

    name = "exact"
    in_walk = True

    def __post_init__(self) -> None:
        check_choice("frozen", self.frozen, ("keep", "recalibrate"))
        if self.samples is not None:
            check_number("samples", self.samples, 1, whole=True)

    @property
    def images(self) -> int | None:
        return self.samples

    def probe(self) -> Probe:
        """What to measure at a BatchNorm."""
        return Probe(OutputMoments, pruned="input", dense=None)

    def solve(self, layer: Layer, found: OutputMoments) -> BatchNormStatistics:
        """The statistics of the BatchNorm: the moments of its inputs. As `Method.solve`."""
        return BatchNormStatistics(found.pruned)


@dataclass(frozen=True, kw_only=True)
class EMA(Recalibration):
    """The published protocol (arXiv 2605.21426): reset, then training-mode batches, after all layers are corrected.

    batches: the number of batches, exactly. batch_size: of images in each. momentum: of the running averages. A share
    (1 - momentum)^batches of the initial mean 0 and variance 1 remains.
    """

    batches: int = 20
    batch_size: int = 128
    momentum: float = 0.1

    name = "ema"
    in_walk = False

    def __post_init__(self) -> None:
        check_choice("frozen", self.frozen, ("keep", "recalibrate"))
        check_number("batches", self.batches, 1, whole=True)
        check_number("batch_size", self.batch_size, 1, whole=True)
        check_number("momentum", self.momentum, 0, most=1, above=True)

    @property
    def images(self) -> int:
        return self.batches * self.batch_size

    def estimate(self, net: Network, batchnorms: Mapping[str, _BatchNorm], batches: Iterable[Tensor]) -> None:
        """Reset the BatchNorms and run the batches with these alone in training mode, as PyTorch updates them."""
        with ExitStack() as stack:
            for batchnorm in batchnorms.values():
                stack.callback(batchnorm.eval)
                stack.callback(setattr, batchnorm, "momentum", batchnorm.momentum)
                batchnorm.reset_running_stats()
                batchnorm.momentum = self.momentum
                batchnorm.train()
            for batch in batches:
                net.run(batch)


RECALIBRATIONS: dict[str, type[Exact] | type[EMA]] = {"exact": Exact, "ema": EMA}


def make_recalibration(given: Exact | EMA | str | None, method: Method) -> Exact | EMA | None:
    """The recalibration: given, or by name. "auto" is `Exact` for a method that changes no layer, else None.

    Raises ValueError for an unknown name, and for None where nothing would be done.
    """
    if given == "auto":
        given = None if method.changes_layers else "exact"
    if isinstance(given, str):
        check_choice("recalibrate", given, ("auto", *RECALIBRATIONS, None))
        return RECALIBRATIONS[given]()
    if given is not None and not isinstance(given, Recalibration):
        raise TypeError(f"recalibrate must be Exact(...), EMA(...), a name or None, not {type(given).__name__}")
    if given is None and not method.changes_layers:
        raise ValueError(f"method {method.name!r} with recalibrate=None does nothing; choose 'exact' or 'ema'")
    return given


def batchnorms_to_estimate(model: nn.Module, how: Recalibration, report: RepairReport) -> dict[str, _BatchNorm]:
    """The BatchNorms to re-estimate, by name; the report notes which ones are kept, and why."""
    chosen = {}
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        if module.running_mean is None:
            report.notes.append(f"{called(name, 'BatchNorm')} keeps no running statistics: nothing to re-estimate")
        elif how.frozen == "keep" and model.training and not module.training:
            why = "is frozen (in eval mode while the model trains): kept, unless frozen='recalibrate'"
            report.notes.append(f"{called(name, 'BatchNorm')} {why}")
        else:
            chosen[name] = module
    return chosen
