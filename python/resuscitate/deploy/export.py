"""Out into the world: weights with their provenance, a torch.export program, ONNX; each read again and compared."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import ResuscitateError
from ..network.copies import difference, tensors_of
from ..network.layers import find_batchnorms, unwrap
from ..network.masks import Masks
from ..network.mean_layers import densify
from ..network.runner import Network
from ..utils.files import atomic, check_writable
from .checkpoints import write_state_dict
from .fold import fold_batchnorm, plain_copy


@dataclass(frozen=True)
class Exported:
    """A file that was written, read again and run: the largest difference, relative to the largest output.

    `sparsity` is the share of zeros among the weights that were written, `folded` counts the BatchNorms folded away.
    """

    path: Path
    format: str
    error: float
    sparsity: float
    folded: int = 0


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
    """Write the model for others to run; the file is read again and compared before it takes its place.

    path: what to write, by its ending. ".safetensors": the weights with `provenance` as metadata, for the same code.
        ".pt2": a `torch.export` program, which needs no code; ".onnx": for other runtimes (the `onnx` extra). The batch
        size stays free in both. Means of pruned weights become plain weights in these two.
    example: a batch (N, ...), N at least 2, that the model runs on. tolerance: the largest difference to accept,
        relative to the largest output.
    fold: fold each BatchNorm into the layer that it alone reads first (`fold_batchnorm`).

    The model is not changed. Raises ValueError for another ending, ResuscitateError where the model cannot be exported,
    the extra is missing, or what comes back computes something else; OSError where it cannot be written.
    """
    path = check_target(path)
    if not isinstance(example, Tensor) or len(example) < 2:
        raise ValueError("example must be a batch of two images at least, so that the batch size can be left free")
    ready = plain_copy(unwrap(model))
    batch = Network(ready).place(example)
    expected = tensors_of(ready(batch))
    before = len(find_batchnorms(ready))
    ready = fold_batchnorm(ready, batch) if fold else ready
    if path.suffix != ".safetensors":
        densify(ready)
    with atomic(path) as temporary:
        try:
            again = WRITERS[path.suffix](ready, temporary, batch, provenance or {})
            pairs = ((expected, again(batch)), ([y[:1] for y in expected], again(batch[:1])))
            error = max(difference(*pair) for pair in pairs)
        except (ResuscitateError, OSError):
            raise
        except Exception as cause:  # an exporter may raise anything, and says most of it in its first line
            line = str(cause).strip().partition("\n")[0]
            raise ResuscitateError(f"{path}: cannot be exported; {type(cause).__name__}: {line}") from cause
        if not error <= tolerance:
            raise ResuscitateError(
                f"{path}: what was written computes something else, by {error:.3g} of the largest output, more than "
                f"tolerance={tolerance:g}; no file is left"
            )
    sparsity = Masks.from_zeros(ready).sparsity
    return Exported(path, path.suffix[1:], error, sparsity, before - len(find_batchnorms(ready)))


def check_target(path: str | Path) -> Path:
    """The path, if that is something to write. Raises ValueError for another ending, OSError where it cannot be."""
    path = Path(path)
    if path.suffix not in WRITERS:
        raise ValueError(f"{path}: write one of {', '.join(WRITERS)}, not {path.suffix or 'a file without an ending'}")
    check_writable(path)
    return path


Again = Callable[[Tensor], list[Tensor]]


def _write_weights(model: nn.Module, path: Path, batch: Tensor, provenance: Mapping[str, Any]) -> Again:
    target = path.with_suffix(".safetensors")
    twin = copy.deepcopy(model)
    for tensor in [*twin.parameters(), *twin.buffers()]:
        tensor.zero_()
    try:
        write_state_dict(target, model.state_dict(), provenance)
        twin.load_state_dict(load_file(target))
        target.replace(path)
    finally:
        target.unlink(missing_ok=True)
    return lambda x: tensors_of(twin(x))


def _write_program(model: nn.Module, path: Path, batch: Tensor, provenance: Mapping[str, Any]) -> Again:
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (batch,), dynamic_shapes=dynamic)
    content = io.BytesIO()  # for torch ends the whole process where a disk is full
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())
    with open(path, "rb") as file:
        run = torch.export.load(file).module()
    return lambda x: tensors_of(run(x))


def _write_onnx(model: nn.Module, path: Path, batch: Tensor, provenance: Mapping[str, Any]) -> Again:
    try:
        import onnxruntime  # type: ignore[import-untyped]
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise ResuscitateError(f"{error}; ONNX needs more: pip install 'resuscitate[onnx]'") from error
    talk = logging.getLogger("torch.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself, as in its log
        level = talk.level
        talk.setLevel(logging.ERROR)
        dynamic = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(
            model, (batch.cpu(),), path, dynamo=True, dynamic_shapes=dynamic, external_data=False, verbose=False
        )
        talk.setLevel(level)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: [torch.from_numpy(y).to(x.device) for y in session.run(None, {name: x.cpu().numpy()})]


WRITERS: dict[str, Callable[[nn.Module, Path, Tensor, Mapping[str, Any]], Again]] = {
    ".safetensors": _write_weights,
    ".pt2": _write_program,
    ".onnx": _write_onnx,
}
