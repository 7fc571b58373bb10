"""The reference of a repair: a dense network, its statistics measured earlier, or BatchNorm's running statistics."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Unpack

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import asr_kernels as ak

from ..errors import CalibrationError, CheckpointError
from ..network.layers import find_layers, running_statistics, unwrap
from ..network.runner import Network
from ..network.wiring import Wiring
from ..runtime.distributed import fails_on_all
from ..runtime.options import RunOptions, run_options
from ..statistics.outputs import Calls, OutputMoments
from ..utils.arguments import IMAGES, NETWORK, Kind, check_places
from ..utils.digest import MODULUS, digest_images, digest_model, fingerprint
from ..utils.files import write_safetensors
from ..utils.nested import count_images
from ..utils.progress import Bar
from .probes import Measurement
from .session import Session

FORMAT = "resuscitate dense statistics 1"


@dataclass
class DenseStatistics:
    """The output moments of a dense network's layers over some images, with which its pruned copies are repaired.

    `layers`: by name, one set of moments (float64, (C,)) for each call in a forward pass. `batchnorms`: running mean
    and variance by name. `images` and `digest` identify the images; `model` is the digest of the dense network.
    """

    layers: dict[str, Calls]
    batchnorms: dict[str, tuple[Tensor, Tensor]]
    images: int
    digest: str
    model: str
    path: str = field(default="dense statistics", compare=False)

    @classmethod
    @fails_on_all
    def measure(cls, dense: nn.Module, calibration: Any, **options: Unpack[RunOptions]) -> DenseStatistics:
        """Measure every layer of `dense` in one pass over the images, which are not kept. See `RunOptions`.

        Give the same images that the repairs get. Raises CalibrationError, LayerError, NonFiniteError,
        DistributedError.
        """
        call = "DenseStatistics.measure(dense, images)"
        check_places(call, dense=(dense, NETWORK), calibration=(calibration, IMAGES))
        run = run_options("DenseStatistics.measure()", options)
        images = digest = 0
        with Session([unwrap(dense)], run) as session:
            bar = Bar("dense statistics", ["all layers"], run["max_samples"] or 0, session.show)
            session.stack.enter_context(bar)
            net = session.net

            def counted() -> Iterator[Any]:
                nonlocal images, digest
                for batch in session.stream(calibration):
                    yield batch
                    images += count_images(batch)
                    digest += digest_images([batch])
                    bar.advance("all layers", count_images(batch))

            found = session.measure_all(find_layers(net.model), counted())
            layers = {name: statistic.calls for name, statistic in found.items()}
            images, digest = session.ranks.total(images, digest % MODULUS)
            if not images:
                raise CalibrationError("no rank has any images")
            running = running_statistics(net.model).items()
            batchnorms = {name: (mean.cpu().clone(), var.cpu().clone()) for name, (mean, var) in running}
            return cls(layers, batchnorms, images, f"{digest % MODULUS:x}", digest_model(net.model))

    def save(self, path: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Write as .safetensors, whole or not at all. Raises OSError; ValueError for another ending."""
        tensors: dict[str, Tensor] = {}
        for name, calls in self.layers.items():
            for turn, moments in enumerate(calls):
                tensors |= {f"{name}:{turn}:mean": moments.mean, f"{name}:{turn}:m2": moments.m2}
        for name, (mean, var) in self.batchnorms.items():
            tensors |= {f"{name}:running_mean": mean, f"{name}:running_var": var}
        counts = {name: [moments.count for moments in calls] for name, calls in self.layers.items()}
        about = {"format": FORMAT, "counts": counts, "images": self.images, "digest": self.digest, "model": self.model}
        copies = {key: value.cpu().clone() for key, value in tensors.items()}
        write_safetensors(path, copies, {**about, **(provenance or {})})

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
            return cls(layers, batchnorms, int(metadata["images"]), metadata["digest"], metadata["model"], str(path))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: its statistics are damaged ({type(error).__name__}: {error})") from error


Dense = nn.Module | DenseStatistics | str | Path
Target = nn.Module | DenseStatistics | Literal["running"] | None
TARGET: Kind = (lambda value: isinstance(value, Dense | None), "a module, a statistics file or 'running'")


def as_target(dense: Any) -> Target:
    """The `dense` argument of `repair`, without wrappers and with files read. Raises OSError, CheckpointError."""
    if isinstance(dense, nn.Module):
        return unwrap(dense)
    return DenseStatistics.load(dense) if isinstance(dense, str | Path) and dense != "running" else dense


def identify(target: Target) -> str:
    """A digest of the contents of a target."""
    if isinstance(target, nn.Module):
        return digest_model(target)
    if not isinstance(target, DenseStatistics):
        return str(target)
    moments = [[(m.count, m.mean, m.m2) for m in calls] for calls in target.layers.values()]
    return f"{target.model} on {target.digest}, {fingerprint([list(target.layers), moments, target.batchnorms])}"


def fill_reference(measurement: Measurement, target: Target, net: Network, wiring: Wiring) -> None:
    """Give a measurement the dense moments of a reference that is no network: a statistics file, or a BatchNorm."""
    found, name = measurement.found, measurement.name
    if not isinstance(found, OutputMoments):
        return
    if isinstance(target, DenseStatistics):
        found.dense_calls = [moments.to(net.device) for moments in target.layers[name]]
    elif target == "running" and found.calls:
        behind, count = net.modules[wiring.batchnorm_of[name]], found.calls[0].count
        mean, var = (behind.get_buffer(each).double() for each in ("running_mean", "running_var"))
        # running_var is an unbiased variance
        found.dense_calls = [ak.ChannelMoments(count, mean.clone(), var * max(count - 1, 0))]
