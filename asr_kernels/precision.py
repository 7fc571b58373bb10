"""IEEE float32 for float32 products: contexts that switch off autocast, TF32 and bfloat16, and restore them.

PyTorch 2.9 and newer have two interfaces for these settings. The newer interface, `fp32_precision`, has one setting for
each kind of operator of a backend. The value "none" inherits from the backend's "all", and "all" from "generic". The
older flags are `torch.backends.cudnn.allow_tf32`, `torch.backends.cuda.matmul.allow_tf32` and
`torch.set_float32_matmul_precision`. Where the two interfaces disagree, reading an older flag raises RuntimeError.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

KINDS = ("all", "matmul", "conv", "rnn")
# each setting comes after those that it inherits from
SETTINGS = [("generic", "all"), *((backend, kind) for backend in ("cuda", "mkldnn") for kind in KINDS)]

_get = torch._C._get_fp32_precision_getter
_set = torch._C._set_fp32_precision_setter


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Multiply float32 tensors on `device` in IEEE float32, without autocast, in code that sets neither itself.

    Settings that give IEEE float32 already, as the defaults on a CPU do, are not written.
    """
    backend = "cuda" if device.type == "cuda" else "mkldnn"
    available = torch.amp.is_autocast_available(device.type)
    found: list[tuple[str, str, str]] = []
    with torch.autocast(device.type, enabled=False) if available else nullcontext():
        try:
            if any(_get(backend, kind) in ("tf32", "bf16") for kind in ("matmul", "conv")):
                for setting in SETTINGS:
                    # inherited values are "ieee" by now, so any other value is the setting's own
                    if (own := _get(*setting)) != "ieee":
                        found.append((*setting, own))
                        _set(*setting, "ieee")
            yield
        finally:
            for backend, kind, own in reversed(found):
                _set(backend, kind, own)


@contextmanager
def tensor_cores(device: torch.device) -> Iterator[None]:
    """Within `full_precision`: multiply float32 matrices on a GPU as TF32, on its tensor cores."""
    if device.type != "cuda":
        yield
        return
    found: dict[tuple[str, str], str] = {}
    for setting in (("generic", "all"), ("cuda", "all"), ("cuda", "matmul")):
        # inherited values are "none" by now, so the value read is the setting's own
        found[setting] = _get(*setting)
        _set(*setting, "none")
    try:
        _set("cuda", "matmul", "tf32")
        yield
    finally:
        for setting, own in found.items():
            _set(*setting, own)


@contextmanager
def full_precision_of_models() -> Iterator[None]:
    """Multiply float32 tensors in IEEE float32 on every device, for models that may read or set either interface.

    Both interfaces agree inside the context. On exit, all settings are restored, whatever a model has set; interfaces
    that disagreed before disagree again. One state cannot be restored: `cudnn.conv` and `cudnn.rnn` that were never
    set. In PyTorch 2.13 they read "tf32" until a setting above them changes; after this context they are "tf32".
    """
    found: dict[tuple[str, str], str] = {}
    matmul: str | None = None
    cudnn: bool | None = None
    try:
        for backend, kind in SETTINGS:
            # inherited values are "none" by now, so the value read is the setting's own
            found[backend, kind] = _get(backend, kind)
            _set(backend, kind, "none" if kind == "all" else "ieee")
        with _no_warnings():
            matmul = torch.get_float32_matmul_precision()
            try:
                cudnn = torch.backends.cudnn.allow_tf32
            except RuntimeError:  # the flag disagrees with the "ieee" above, so it is True
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
    """Suppress warnings: PyTorch 2.9 warns once about any use of the older flags."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
