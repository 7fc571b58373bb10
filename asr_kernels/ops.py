"""The public operations: check the arguments, view the tensor as (N, C, L), pick the backend, guard the device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from . import compiled, factors
from .factors import Prior, Rule
from .moments import ChannelMoments, PairedMoments

Backend = Literal["auto", "triton", "torch", "reference"]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_chosen: ContextVar[str | None] = ContextVar("asr_kernels_backend", default=None)


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Run the operations inside on one backend: "auto", "triton", "torch" or "reference".

    Without it the environment variable ASR_BACKEND decides, and without that "auto": Triton for tensors on a GPU where
    Triton is installed, else torch. Holds for the current thread or task. Raises ValueError for an unknown name.
    """
    token = _chosen.set(_checked_backend(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def channel_moments(
    x: Tensor, channel_dim: int = 1, *, running: ChannelMoments | None = None, tolerance: float = 1e-6
) -> ChannelMoments:
    """Count, mean and sum of squared deviations of every channel of `x`, over all its other dimensions.

    `x`: float16, bfloat16, float32 or float64, of any strides, never empty; float64 moments of shape (C,) on the same
    device. Half precision is summed in float32, and every sum is shifted or checked against cancellation, so that the
    variance holds at a mean of 1e4 standard deviations. `running`: moments of earlier values, merged with these (by the
    kernel itself where there is one); from another device they are moved. `tolerance` is the relative error of the
    variance up to which that check lets plain sums stand: a larger one saves the torch backend a second pass. Raises
    ValueError for an empty tensor, a missing dimension or unlike C, TypeError for another dtype.
    """
    _check(x, channel_dim)
    if running is not None and running.channels != x.shape[channel_dim]:
        raise ValueError(f"moments of {running.channels} and of {x.shape[channel_dim]} channels do not merge")
    running = running and running.to(x.device)
    count = x.numel() // x.shape[channel_dim]
    if torch.compiler.is_compiling():
        found = ChannelMoments(count, *compiled.channel_moments(x, channel_dim, tolerance))
        return found if running is None else running.merge(found)
    with torch.no_grad(), _device_guard(x):
        view = _as_ncl(x, channel_dim=channel_dim) or _as_ncl(x.contiguous(), channel_dim=channel_dim)
        return _backend(x, "moments").channel_moments(*view, tolerance, running)


def paired_moments(dense: Tensor, pruned: Tensor, channel_dim: int = 1) -> PairedMoments:
    """Moments of two tensors of one shape, dtype and device, and their covariance, in one pass over the two.

    Shapes, dtypes and errors as `channel_moments`; ValueError too where the two differ.
    """
    _check(dense, channel_dim)
    _check(pruned, channel_dim)
    if (dense.shape, dense.dtype, dense.device) != (pruned.shape, pruned.dtype, pruned.device):
        raise ValueError(
            "paired moments need one shape, dtype and device, "
            f"not {tuple(dense.shape)} {dense.dtype} on {dense.device} and "
            f"{tuple(pruned.shape)} {pruned.dtype} on {pruned.device}"
        )
    if torch.compiler.is_compiling():
        mean_d, m2_d, mean_p, m2_p, comoment = compiled.paired_moments(dense, pruned, channel_dim)
    else:
        with torch.no_grad(), _device_guard(dense):
            views = _as_ncl(dense, pruned, channel_dim=channel_dim)
            views = views or _as_ncl(dense.contiguous(), pruned.contiguous(), channel_dim=channel_dim)
            mean_d, m2_d, mean_p, m2_p, comoment = _backend(dense, "moments").paired_moments(*views)
    count = dense.numel() // dense.shape[channel_dim]
    return PairedMoments(ChannelMoments(count, mean_d, m2_d), ChannelMoments(count, mean_p, m2_p), comoment)


def repair_factors(
    dense: ChannelMoments,
    pruned: ChannelMoments,
    *,
    rule: Rule = "asr",
    prior: Prior = "median",
    bias: bool = True,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """Gain and shift, float64 (C,), such that `y <- gain * y + shift` repairs the pruned outputs y.

    With vd and vp the dense and pruned variance of a channel (arXiv 2605.21426, "Adaptive Signal Resuscitation"):

    - `layerwise`: one gain, sqrt(mean(vd) / (mean(vp) + eps)), for all channels;
    - `channelwise`: raw = sqrt(vd / (vp + eps));
    - `asr`: s * raw + (1 - s) with s = vp / (vp + prior), so always between 1 and raw. `prior` is the layer's median
      of vp (the lower of two middles), its mean, or a positive number.

    The shift is mean_d - gain * mean_p, or 0 without `bias`. The gain is 1 for a dead channel (vp = 0, or
    no more than float32's rounding of a constant), and for the whole layer where the prior is 0 (half the channels
    dead). Statistics over channels take the finite ones; a NaN or an infinity stays in its own channel. Dense moments
    from another device than the pruned ones' are moved; else nothing waits for the device. Raises ValueError for
    moments of nothing, unlike C, an unknown rule or prior.
    """
    if dense.channels != pruned.channels:
        raise ValueError(f"{dense.channels} dense channels cannot repair {pruned.channels} pruned ones")
    if not dense.count or not pruned.count:
        raise ValueError("cannot repair from moments of no values; call update_ or channel_moments first")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, not {eps}")
    if rule not in get_args(Rule):
        raise ValueError(f"unknown rule {rule!r}; there are {', '.join(get_args(Rule))}")
    if prior not in ("median", "mean") and (isinstance(prior, str) or not 0 < prior < float("inf")):
        raise ValueError(f"prior must be 'median', 'mean' or a positive variance, not {prior!r}")
    dense = dense.to(pruned.mean.device)
    if torch.compiler.is_compiling():
        return factors.repair_factors(dense, pruned, rule, prior, bias, eps)
    with torch.no_grad(), _device_guard(pruned.mean):
        return _backend(pruned.mean, "factors").repair_factors(dense, pruned, rule, prior, bias, eps)


def affine_(x: Tensor, gain: Tensor, shift: Tensor, channel_dim: int = 1, *, relu: bool = False) -> Tensor:
    """x <- gain * x + shift, channel by channel, in place; returns x. With `relu`, what is negative then becomes 0.

    `x` as in `channel_moments`, and it may be a view with gaps: its own memory is written and none beside it. `gain`
    and `shift`: shape (C,), any floating dtype and device. Computed in float32 (float64 for float64), rounded once to
    x's dtype. The version of x moves, as for any operation in place: autograd refuses to go back through a value of x
    that it had saved. An empty tensor is left as it is. Raises ValueError for other shapes or memory that overlaps
    itself (expanded tensors), TypeError for another dtype.
    """
    _check(x, channel_dim, empty=True)
    channels = x.shape[channel_dim]
    for name, factor in (("gain", gain), ("shift", shift)):
        if factor.shape != (channels,):
            raise ValueError(
                f"{name} has shape {tuple(factor.shape)}, but x has {channels} channels on axis {channel_dim}"
            )
    if torch.compiler.is_compiling():
        compiled.affine_(x, gain, shift, channel_dim, relu)
        return x
    if _overlaps(x):
        raise ValueError("x overlaps itself in memory, or may (an expanded tensor?); clone it first")
    if x.numel() == 0:
        return x
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    gain, shift = (factor.detach().to(x.device, dtype).contiguous() for factor in (gain, shift))
    with torch.no_grad(), _device_guard(x):
        backend = _backend(x, "affine")
        for view in _ncl_parts(x, channel_dim):
            backend.affine_(view, gain, shift, relu)
    return x


def repair_(
    x: Tensor,
    dense_moments: ChannelMoments,
    rule: Rule = "asr",
    *,
    prior: Prior = "median",
    bias: bool = True,
    eps: float = 1e-8,
    channel_dim: int = 1,
    relu: bool = False,
) -> tuple[Tensor, Tensor, ChannelMoments]:
    """Measure the pruned outputs `x`, decide by `repair_factors`, and correct them in place.

    Returns the gain and the shift that were applied, float64 (C,), and the moments of `x` before. On a GPU that is four
    launches and two conversions; none waits for the host, so a CUDA graph can hold them. Dense moments from another
    device are moved first. Errors as `channel_moments`, `repair_factors` and `affine_`; `x` is unchanged when one is
    raised.
    """
    pruned = channel_moments(x, channel_dim)
    gain, shift = repair_factors(dense_moments, pruned, rule=rule, prior=prior, bias=bias, eps=eps)
    affine_(x, gain, shift, channel_dim, relu=relu)
    return gain, shift, pruned


def _check(x: Tensor, channel_dim: int, empty: bool = False) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor, not {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"expected float16, bfloat16, float32 or float64, not {x.dtype}; convert it first")
    if not -x.dim() <= channel_dim < x.dim():
        raise ValueError(f"a tensor of shape {tuple(x.shape)} has no channel axis {channel_dim}")
    if x.numel() == 0 and not empty:
        raise ValueError(f"an empty tensor (shape {tuple(x.shape)}) has no moments")


def _overlaps(x: Tensor) -> bool:
    """Could two indices share an address? No, where every stride steps over all that the smaller strides reach."""
    reach = 0
    for stride, size in sorted((x.stride(d), x.shape[d]) for d in range(x.dim()) if x.shape[d] > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _as_ncl(*tensors: Tensor, channel_dim: int) -> list[Tensor]:
    """(N, C, L) views of tensors of one shape, the other dimensions folded alike; empty where strides forbid it.

    A lone tensor is taken in the order of its memory, for no order of its values matters; two keep their logical order.
    """
    first = tensors[0]
    channel = channel_dim % first.dim()
    dims = [d for d in range(first.dim()) if d != channel and first.shape[d] > 1]
    if len(tensors) == 1:
        dims.sort(key=first.stride, reverse=True)
    folds: list[tuple[int, tuple[int, ...]]] = []
    for d in dims:
        size, strides = first.shape[d], tuple(x.stride(d) for x in tensors)
        if folds and all(outer == inner * size for outer, inner in zip(folds[-1][1], strides, strict=True)):
            folds[-1] = (folds[-1][0] * size, strides)
        else:
            folds.append((size, strides))
    if len(folds) > 2:
        return []
    while len(folds) < 2:
        folds.insert(0, (1, (0,) * len(tensors)))
    (n, n_strides), (length, l_strides) = folds
    return [
        x.as_strided((n, x.shape[channel], length), (ns, x.stride(channel), ls), x.storage_offset())
        for x, ns, ls in zip(tensors, n_strides, l_strides, strict=True)
    ]


def _ncl_parts(x: Tensor, channel_dim: int) -> Iterator[Tensor]:
    """(N, C, L) views that together cover `x`, whatever its strides: one, where they allow it."""
    if view := _as_ncl(x, channel_dim=channel_dim):
        yield from view
        return
    channel = channel_dim % x.dim()
    _, split = min((x.shape[d], d) for d in range(x.dim()) if d != channel and x.shape[d] > 1)
    for part in x.unbind(split):
        yield from _ncl_parts(part, channel - (split < channel))


def _checked_backend(name: str) -> str:
    if name not in get_args(Backend):
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(get_args(Backend))}")
    return name


def _backend(x: Tensor, part: Literal["moments", "factors", "affine"]) -> ModuleType:
    name = _chosen.get() or _checked_backend(os.environ.get("ASR_BACKEND", "auto"))
    if name == "auto":
        name = "triton" if x.is_cuda and find_spec("triton") else "torch"
    if name != "triton":
        return import_module(f".{name}_ops" if name == "torch" else f".{name}", __package__)
    if find_spec("triton") is None:
        raise RuntimeError("the triton backend needs the package triton (pip install triton); or use_backend('torch')")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"the triton backend needs a tensor on a GPU, not on {x.device}; move it, use_backend('auto'), or set "
            "TRITON_INTERPRET=1 before the first import to run the kernels in Triton's interpreter"
        )
    return import_module(f".triton_{part}", __package__)


def _device_guard(x: Tensor) -> Any:
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()
