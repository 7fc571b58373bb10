"""What outputs should be like: those of a dense model, of one measured earlier, or as BatchNorm remembers them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import asr_kernels as ak

from ..data.batches import count_images, read_share
from ..errors import CalibrationError, CheckpointError
from ..network.layers import find_batchnorms, find_layers, unwrap
from ..network.runner import Network, as_dtype
from ..network.snapshot import moved_to, undisturbed
from ..network.wiring import Wiring
from ..reports.repair import RepairReport
from ..runtime.distributed import Ranks
from ..utils.arguments import IMAGES, NETWORK, Kind, check_places
from ..utils.digest import MODULUS, digest_images, digest_model, fingerprint
from ..utils.files import write_safetensors
from ..utils.progress import Bar
from .measure import measure
from .probes import Calls, Visit

log = logging.getLogger("resuscitate")

FORMAT = "resuscitate dense statistics 1"


@dataclass
class DenseStatistics:
    """The moments of a dense model's layers over some images: enough to repair its pruned copies by a gain.

    `layers`: by name, one set of moments (float64, (C,)) for each call in a forward pass. `batchnorms`: running mean
    and variance by name. `images` and `digest` tell which images; `model` is the digest of the dense model.
    """

    layers: dict[str, Calls]
    batchnorms: dict[str, tuple[Tensor, Tensor]]
    images: int
    digest: str
    model: str
    path: str = field(default="dense statistics", compare=False)

    @classmethod
    def measure(
        cls,
        dense: nn.Module,
        calibration: Any,
        *,
        max_samples: int | None = None,
        max_batches: int | None = None,
        batch_size: int = 128,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        group: Any = None,
        seed: int = 0,
        progress: bool | None = None,
    ) -> DenseStatistics:
        """Measure every layer of `dense` in one pass over the images, which are not kept; options as in `repair`.

        Give it the images that the repairs will have, and as many. Raises CalibrationError, LayerError, NonFiniteError,
        DistributedError.
        """
        call = "DenseStatistics.measure(dense, images)"
        check_places(call, dense=(dense, NETWORK), calibration=(calibration, IMAGES))
        dense, ranks, seen = unwrap(dense), Ranks(group), [0, 0]
        show = progress if ranks.rank == 0 else False
        with ExitStack() as stack:
            stack.enter_context(ranks.together())
            stack.enter_context(moved_to(device, [dense]))
            stack.enter_context(undisturbed([dense], seed))
            bar = stack.enter_context(Bar("dense statistics", ["all layers"], max_samples or 0, show))
            net = Network(dense, forward_fn, as_dtype(dtype))
            reading: dict[str, Any] = {"max_samples": max_samples, "max_batches": max_batches}
            reading |= {"batch_size": batch_size, "raw": forward_fn is not None}
            source = read_share(calibration, ranks, **reading)

            def counted(batches: Iterable[Any]) -> Iterator[Any]:
                for batch in batches:
                    yield batch
                    seen[0] += count_images(batch)
                    seen[1] += digest_images([batch])
                    bar.advance("all layers", count_images(batch))

            found = measure(net, counted(source), find_layers(dense))
            layers = {name: ranks.merge(Visit(name, calls), net.device).calls for name, calls in found.items()}
            images, digest = ranks.total(seen[0], seen[1] % MODULUS)
            if not images:
                raise CalibrationError("no rank has any images")
            batchnorms = {}
            for name, module in find_batchnorms(dense).items():
                assert module.running_mean is not None
                assert module.running_var is not None
                batchnorms[name] = module.running_mean.cpu().clone(), module.running_var.cpu().clone()
            return cls(layers, batchnorms, images, f"{digest % MODULUS:x}", digest_model(dense))

    def save(self, path: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Write as .safetensors, whole or not at all. Raises OSError; ValueError for another ending."""
        tensors: dict[str, Tensor] = {}
        counts: dict[str, list[int]] = {}
        for name, calls in self.layers.items():
            counts[name] = [moments.count for moments in calls]
            for turn, moments in enumerate(calls):
                tensors |= {f"{name}:{turn}:mean": moments.mean.cpu(), f"{name}:{turn}:m2": moments.m2.cpu()}
        for name, (mean, var) in self.batchnorms.items():
            tensors |= {f"{name}:running_mean": mean.cpu(), f"{name}:running_var": var.cpu()}
        metadata = {"format": FORMAT, "counts": json.dumps(counts), "images": str(self.images)}
        metadata |= {"digest": self.digest, "model": self.model}
        copies = {key: value.clone() for key, value in tensors.items()}
        write_safetensors(path, copies, metadata | dict(provenance or {}))

    @classmethod
    def load(cls, path: str | Path) -> DenseStatistics:
        """Read what `save` wrote. Raises OSError, or CheckpointError for a file of another kind."""
        try:
            with safe_open(str(path), "pt") as file:
                metadata, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path}: holds no dense statistics; make some with: resuscitate stats")
        try:
            layers = {
                name: [
                    ak.ChannelMoments(count, tensors[f"{name}:{turn}:mean"], tensors[f"{name}:{turn}:m2"])
                    for turn, count in enumerate(counts)
                ]
                for name, counts in json.loads(metadata["counts"]).items()
            }
            names = [key.removesuffix(":running_mean") for key in tensors if key.endswith(":running_mean")]
            batchnorms = {name: (tensors[f"{name}:running_mean"], tensors[f"{name}:running_var"]) for name in names}
            digest, model = metadata["digest"], metadata["model"]
            return cls(layers, batchnorms, int(metadata["images"]), digest, model, str(path))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: its statistics are damaged ({type(error).__name__}: {error})") from error


Dense = nn.Module | DenseStatistics | str | Path
TARGET: Kind = (lambda value: isinstance(value, Dense | None), "a module, a statistics file or 'running'")


def as_target(dense: Any) -> nn.Module | DenseStatistics | Literal["running"] | None:
    """What `repair` takes as `dense`, wrappers taken off and files read. Raises OSError, CheckpointError."""
    if isinstance(dense, nn.Module):
        return unwrap(dense)
    return DenseStatistics.load(dense) if isinstance(dense, str | Path) and dense != "running" else dense


def identify(target: nn.Module | DenseStatistics | str | None) -> str:
    """A name for the contents of a target, to know it by later."""
    if isinstance(target, nn.Module):
        return digest_model(target)
    if not isinstance(target, DenseStatistics):
        return str(target)
    moments = [[(m.count, m.mean, m.m2) for m in calls] for calls in target.layers.values()]
    return f"{target.model} on {target.digest}, {fingerprint([list(target.layers), moments, target.batchnorms])}"


def wanted_by(
    target: nn.Module | DenseStatistics | str | None, net: Network, wiring: Wiring
) -> Callable[[Visit], Calls]:
    """For a visit at a layer, the moments that its outputs should have, one for each call."""

    def from_file(visit: Visit) -> Calls:
        assert isinstance(target, DenseStatistics)
        return [
            ak.ChannelMoments(found.count, found.mean.to(net.device), found.m2.to(net.device))
            for found in target.layers[visit.name]
        ]

    def from_batchnorm(visit: Visit) -> Calls:
        behind = net.modules[wiring.batchnorm_of[visit.name]]
        assert isinstance(behind, _BatchNorm)
        return [remembered(behind, visit.calls[0].count)] if visit.calls else []

    if isinstance(target, DenseStatistics):
        return from_file
    return from_batchnorm if target == "running" else lambda visit: visit.dense


def remembered(batchnorm: _BatchNorm, count: int) -> ak.ChannelMoments:
    """The running statistics as moments of `count` values: running_var is an unbiased variance, as torch's own."""
    assert batchnorm.running_mean is not None
    assert batchnorm.running_var is not None
    mean, var = batchnorm.running_mean.double(), batchnorm.running_var.double()
    return ak.ChannelMoments(count, mean.clone(), var * max(count - 1, 0))


def describe(target: nn.Module | DenseStatistics | str | None) -> str:
    """What the report says of the target."""
    if isinstance(target, nn.Module):
        return "dense model"
    return f"dense statistics ({target.path})" if isinstance(target, DenseStatistics) else "running statistics"


def compare_images(statistics: DenseStatistics, report: RepairReport, digest: str) -> None:
    """Note in the report where the statistics come from other images."""
    if (statistics.images, statistics.digest) != (report.images, digest):
        report.notes.append(
            f"the dense statistics come from {statistics.images} images, and not from the {report.images} used here: "
            "the same images match better"
        )
        log.warning(report.notes[-1])
