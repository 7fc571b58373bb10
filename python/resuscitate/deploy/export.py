"""Export: weights with their provenance, a torch.export program, or ONNX; each file is read again and compared."""

from __future__ import annotations

import copy
import io
import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import ResuscitateError
from ..network.comparison import describe_error, output_tensors, relative_difference
from ..network.copies import plain_copy
from ..network.layers import find_batchnorms, unwrap
from ..network.masks import Masks
from ..network.mean_layers import densify
from ..network.runner import Network
from ..reports.base import Report
from ..utils.files import atomic, check_writable
from .checkpoints import write_state_dict
from .fold import fold_batchnorm


@dataclass(frozen=True)
class Exported(Report):
    """The file that `export` wrote.

    `error` is the largest difference of its outputs from the model's, relative to the largest output, `sparsity` the
    fraction of zeros in the written weights, and `folded` the number of folded BatchNorms.
    """

    columns: ClassVar[Sequence[str]] = ("path", "format", "error", "sparsity", "folded")

    path: Path
    format: str
    error: float
    sparsity: float
    folded: int = 0

    def rows(self) -> list[dict[str, Any]]:
        """One row, for the file."""
        return [self.to_dict()]


@torch.no_grad()
def export(
    model: nn.Module,
    path: str | Path,
    example: Tensor,
    *,
    fold: bool = False,
    tolerance: float = 1e-4,
    provenance: Mapping[str, Any] | None = None,
) -> Exported:
    """Write the model to a file. The file is read again, and its outputs compared, before it appears at `path`.

    path: its ending is the format. ".safetensors": the weights with `provenance` as metadata; needs the model's code.
        ".pt2": a `torch.export` program, which needs no code. ".onnx": for other runtimes (needs the `onnx` extra). The
        last two take any batch size, and store mean layers as plain layers.
    example: an input batch (N, ...) with N at least 2. tolerance: the largest accepted difference, relative to the
        largest output.
    fold: first fold each BatchNorm into the layer that it alone reads (`fold_batchnorm`).

    The model is unchanged. Raises ValueError for another ending, ResuscitateError where the model cannot be exported,
    the extra is missing, or the outputs of the file differ; OSError where the file cannot be written.
    """
    path = check_target(path)
    if not isinstance(example, Tensor) or len(example) < 2:
        raise ValueError("example must be a batch of at least two images, so that the batch size can stay variable")
    ready = plain_copy(unwrap(model))
    batch = Network(ready).place(example)
    batches = batch, batch[:1]
    expected = [output_tensors(ready(each.clone())) for each in batches]  # a network may write to its input
    before = len(find_batchnorms(ready))
    ready = fold_batchnorm(ready, batch) if fold else ready
    if path.suffix != ".safetensors":
        densify(ready)
    with atomic(path) as temporary:
        try:
            read_back = WRITERS[path.suffix](ready, temporary, batch.clone(), provenance or {})
            found = [read_back(each.clone()) for each in batches]
            error = max(map(relative_difference, expected, found))
        except (ResuscitateError, OSError):
            raise
        except Exception as cause:  # an exporter may raise anything
            raise ResuscitateError(f"{path}: cannot be exported; {_innermost(cause)}") from cause
        if not error <= tolerance:
            differ = f"differ from the model's by {error:.3g} of the largest output, more than tolerance={tolerance:g}"
            raise ResuscitateError(f"{path}: its outputs {differ}; no file was written")
    sparsity = Masks.from_zeros(ready).sparsity
    return Exported(path, path.suffix[1:], error, sparsity, before - len(find_batchnorms(ready)))


def check_target(path: str | Path) -> Path:
    """`path` as a Path. Raises ValueError for an unknown ending, OSError where it cannot be written."""
    path = Path(path)
    if path.suffix not in WRITERS:
        raise ValueError(f"{path}: write one of {', '.join(WRITERS)}, not {path.suffix or 'a file without an ending'}")
    check_writable(path)
    return path


def _innermost(error: Exception) -> str:
    """The error that the others of an exporter were raised from, in plain text."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return re.sub(r"\x1b\[[0-9;]*m", "", describe_error(error))


ReadBack = Callable[[Tensor], list[Tensor]]  # the outputs of a written file for a batch


def _write_weights(model: nn.Module, path: Path, batch: Tensor, provenance: Mapping[str, Any]) -> ReadBack:
    target, loaded = path.with_suffix(".safetensors"), copy.deepcopy(model)
    for tensor in [*loaded.parameters(), *loaded.buffers()]:
        tensor.zero_()
    try:
        write_state_dict(target, model.state_dict(), provenance)
        loaded.load_state_dict(load_file(target))
        target.replace(path)
    finally:
        target.unlink(missing_ok=True)
    return lambda x: output_tensors(loaded(x))


def _write_program(model: nn.Module, path: Path, batch: Tensor, provenance: Mapping[str, Any]) -> ReadBack:
    program = torch.export.export(model, (batch,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    content = io.BytesIO()  # torch.save to a file on a full disk ends the process
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())
    with open(path, "rb") as file:
        run = torch.export.load(file).module()
    return lambda x: output_tensors(run(x))


def _write_onnx(model: nn.Module, path: Path, batch: Tensor, provenance: Mapping[str, Any]) -> ReadBack:
    try:
        import onnxruntime  # type: ignore[import-untyped]
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise ResuscitateError(f"{error}; ONNX files need the extra: pip install 'resuscitate[onnx]'") from error
    exporter_log = logging.getLogger("torch.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's warnings and log concern the exporter itself
        level = exporter_log.level
        exporter_log.setLevel(logging.ERROR)
        options: dict[str, Any] = {"dynamo": True, "external_data": False, "verbose": False}
        try:
            torch.onnx.export(model, (batch.cpu(),), path, dynamic_shapes=({0: torch.export.Dim("batch")},), **options)
        finally:
            exporter_log.setLevel(level)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: [torch.from_numpy(y).to(x.device) for y in session.run(None, {name: x.cpu().numpy()})]


WRITERS: dict[str, Callable[[nn.Module, Path, Tensor, Mapping[str, Any]], ReadBack]]
WRITERS = {".safetensors": _write_weights, ".pt2": _write_program, ".onnx": _write_onnx}
