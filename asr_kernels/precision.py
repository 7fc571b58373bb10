"""IEEE float32 for float32 products: what allows shorter formats (autocast, TF32, bfloat16) is set aside for a while.

PyTorch 2.9 and newer have two interfaces for it. `fp32_precision` is set for each kind of operator of a backend; a
kind that is set to "none" inherits from the backend's "all", and that from "generic". The older flags are
`torch.backends.cudnn.allow_tf32`, `torch.backends.cuda.matmul.allow_tf32` and `torch.set_float32_matmul_precision`.
Where the two disagree, reading an older flag is a RuntimeError.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

KINDS = ("all", "matmul", "conv", "rnn")
# what inherits stands behind what it inherits from
SETTINGS = [("generic", "all"), *((backend, kind) for backend in ("cuda", "mkldnn") for kind in KINDS)]

_get = torch._C._get_fp32_precision_getter
_set = torch._C._set_fp32_precision_setter


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 tensors on `device` in IEEE float32, outside autocast, for code that sets neither itself.

    Where the settings allow it already, as they do by default on a CPU, they are not written.
    """
    backend = "cuda" if device.type == "cuda" else "mkldnn"
    available = torch.amp.is_autocast_available(device.type)
    found: list[tuple[str, str, str]] = []
    with torch.autocast(device.type, enabled=False) if available else nullcontext():
        try:
            if any(_get(backend, kind) in ("tf32", "bf16") for kind in ("matmul", "conv")):
                for setting in SETTINGS:
                    # with "ieee" to inherit, whatever else is read is the setting's own
                    if (own := _get(*setting)) != "ieee":
                        found.append((*setting, own))
                        _set(*setting, "ieee")
            yield
        finally:
            for backend, kind, own in reversed(found):
                _set(backend, kind, own)


@contextmanager
def full_precision_of_models() -> Iterator[None]:
    """Products of float32 tensors in IEEE float32 on every device, for models that may read or set either interface.

    Both interfaces agree meanwhile, and are then as they were found, whatever a model has set: where they disagreed,
    they disagree again. One thing cannot be put back: that `cudnn.conv` and `cudnn.rnn` were never set. In PyTorch 2.13
    they are "tf32" until something else is set above them; afterwards they are "tf32".
    """
    found: dict[tuple[str, str], str] = {}
    matmul: str | None = None
    cudnn: bool | None = None
    try:
        for backend, kind in SETTINGS:
            # with "none" to inherit, what is read is the setting's own
            found[backend, kind] = _get(backend, kind)
            _set(backend, kind, "none" if kind == "all" else "ieee")
        with _no_warnings():
            matmul = torch.get_float32_matmul_precision()
            try:
                cudnn = torch.backends.cudnn.allow_tf32
            except RuntimeError:  # it disagrees with the "ieee" above, so it is set
                cudnn = True
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False
        for setting in SETTINGS:
            _set(*setting, "ieee")
        yield
    finally:
        with _no_warnings():
            # an older flag also writes the newer settings
            if matmul is not None:
                torch.set_float32_matmul_precision(matmul)
            if cudnn is not None:
                torch.backends.cudnn.allow_tf32 = cudnn
        for setting, own in found.items():
            _set(*setting, own)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """PyTorch 2.9 warns once, of the older flags, whoever uses them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
