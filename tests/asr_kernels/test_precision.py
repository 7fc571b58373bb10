"""Moments and products keep their precision under any autocast and TF32 settings, and the settings are restored."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import asr_kernels as ak
from asr_kernels.precision import full_precision, full_precision_of_models, tensor_cores

BACKENDS = torch.backends
CONV = ak.Window((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
# a window, and the shapes of the layer's input and output
LAYERS = {
    "convolution": (CONV, (5, 6, 9, 7), (5, 4, 9, 7)),
    "strided": (ak.Window((3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1)), (5, 6, 9, 7), (5, 4, 5, 4)),
    "groups": (ak.Window((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), groups=2), (5, 6, 9, 7), (5, 4, 9, 7)),
    "linear": (ak.Window(), (50, 6), (50, 4)),
}
# every setting by which a caller may have allowed a shorter format
WISHES: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "cuda.matmul.allow_tf32": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "cudnn.allow_tf32 = False": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
    "generic": lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
    "generic bf16": lambda: setattr(BACKENDS, "fp32_precision", "bf16"),
    "cuda": lambda: setattr(BACKENDS.cudnn, "fp32_precision", "tf32"),
    "cuda ieee": lambda: setattr(BACKENDS.cudnn, "fp32_precision", "ieee"),
    "cuda.matmul": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "cudnn.conv ieee": lambda: setattr(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
    "cudnn.rnn ieee": lambda: setattr(BACKENDS.cudnn.rnn, "fp32_precision", "ieee"),
    "mkldnn.matmul": lambda: setattr(BACKENDS.mkldnn.matmul, "fp32_precision", "bf16"),
    "mkldnn.conv": lambda: setattr(BACKENDS.mkldnn.conv, "fp32_precision", "bf16"),
    "high, then cuda.matmul ieee": lambda: (
        torch.set_float32_matmul_precision("high"),
        setattr(BACKENDS.cuda.matmul, "fp32_precision", "ieee"),
    ),
}
PLACES = [(backend, kind) for backend in ("cuda", "mkldnn") for kind in ("all", "matmul", "conv", "rnn")]


def readable() -> list[Any]:
    """The value of each setting in both interfaces, or the error message where the interfaces disagree."""
    found: list[Any] = [torch._C._get_fp32_precision_getter(*place) for place in [("generic", "all"), *PLACES]]
    for read in (
        torch.get_float32_matmul_precision,
        lambda: BACKENDS.cuda.matmul.allow_tf32,
        lambda: BACKENDS.cudnn.allow_tf32,
    ):
        try:
            found.append(read())
        except RuntimeError as error:
            found.append(str(error))
    return found


def everything() -> list[Any]:
    """All values readable now, and under every inherited precision: the complete observable state of the settings."""
    parents = [("generic", "all"), ("cuda", "all"), ("mkldnn", "all")]
    found, own = readable(), []
    for parent in parents:
        own.append(torch._C._get_fp32_precision_getter(*parent))
        torch._C._set_fp32_precision_setter(*parent, "none")
    for values in product(("none", "ieee", "tf32"), repeat=3):
        for parent, value in zip(parents, values, strict=True):
            torch._C._set_fp32_precision_setter(*parent, value)
        found += readable()
    for parent, value in zip(parents, own, strict=True):
        torch._C._set_fp32_precision_setter(*parent, value)
    return [found, own]


@pytest.fixture(params=WISHES.values(), ids=WISHES.keys())
def wished(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each of the caller's settings in turn; afterwards PyTorch's initial settings."""
    usual()
    request.param()
    yield
    usual()


def usual() -> None:
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    for place in [("generic", "all"), *PLACES]:
        value = "tf32" if place in (("cuda", "conv"), ("cuda", "rnn")) else "none"
        torch._C._set_fp32_precision_setter(*place, value)


def layer(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[ak.Window, Tensor, Tensor]:
    window, *shapes = LAYERS[name]
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) + 1 for shape in shapes)
    return window, x.to(device, dtype), y.to(device, dtype)


def second_moments(name: str, dtype: torch.dtype) -> list[Tensor]:
    """All results of patch_moments and cross_products for a layer, and of merging them."""
    window, x, y = layer(name, dtype)
    moments = ak.patch_moments(x, y, window)
    merged = moments.merge(ak.patch_moments(x + 1, y, window))
    products = ak.cross_products(x, y.abs(), window, moments.mean, moments.target)
    total = products + products
    return [moments.mean, moments.target, moments.xx, moments.xy, moments.yy, merged.xx, products.xy, total.yy]


def first_moments(dtype: torch.dtype, last: bool, device: str) -> list[Tensor]:
    """Results of all operations on channels."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 3, 8, 8, generator=generator).to(device, dtype) for _ in range(2))
    if last:
        a, b = (t.contiguous(memory_format=torch.channels_last) for t in (a, b))
    pair, far = ak.paired_moments(a, b), ak.channel_moments(b + 100)
    merged, pooled = pair.dense.merge(far), ak.ChannelMoments.pool([pair.dense, pair.pruned, far])
    running = ak.channel_moments(a, running=far).affine(pair.corr, pair.cov)
    gain, shift, _ = ak.repair_(a, merged)
    infinite = b.clone()
    ak.affine_(infinite, torch.full((3,), torch.inf), torch.ones(3), relu=True)
    twice = pair.merge(pair).comoment
    return [pair.comoment, merged.mean, merged.m2, pooled.m2, running.m2, gain, shift, a, infinite, twice]


@pytest.mark.parametrize("short", [torch.bfloat16, torch.float16], ids=str)
class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("name", LAYERS)
    def test_changes_no_bit_of_second_moments(self, name, dtype, short):
        wanted = second_moments(name, dtype)
        with torch.autocast("cpu", short):
            found = second_moments(name, dtype)
            assert torch.is_autocast_enabled("cpu")
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("last", [False, True], ids=["planes", "rows"])
    def test_changes_no_bit_of_channel_operations(self, backend, device, dtype, last, short):
        wanted = first_moments(dtype, last, device)
        with torch.autocast(device, short):
            found = first_moments(dtype, last, device)
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


class Watched(TorchDispatchMode):
    """Record, for each product that is not float64, its dtype and the matmul and convolution settings at the call."""

    PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution_backward")

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()
        self.settings: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.PRODUCTS and args[0].dtype != torch.float64:
            self.types.add(args[0].dtype)
            self.settings |= {torch._C._get_fp32_precision_getter("mkldnn", kind) for kind in ("matmul", "conv")}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", LAYERS)
def test_products_are_computed_in_full_precision(wished, name):
    before = everything()
    with Watched() as watched, torch.autocast("cpu", torch.bfloat16):
        second_moments(name, torch.float32)
    assert watched.types == {torch.float32}
    assert watched.settings <= {"ieee", "none"}
    assert everything() == before


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
def test_settings_are_restored_after_an_error(wished, device):
    def fails() -> None:
        with full_precision(torch.device(device)):
            found.extend(torch._C._get_fp32_precision_getter(backend, kind) for kind in ("matmul", "conv"))
            raise ZeroDivisionError

    before, found, backend = everything(), [], "cuda" if device == "cuda" else "mkldnn"
    with pytest.raises(ZeroDivisionError):
        fails()
    assert set(found) <= {"ieee", "none"}
    assert everything() == before


def test_tensor_cores_are_used_inside_and_all_settings_restored(wished):
    device, before = torch.device("cuda"), everything()
    with full_precision(device):
        within = everything()
        with tensor_cores(device):
            assert torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32"
        assert everything() == within
        with pytest.raises(RuntimeError, match="of the caller"), tensor_cores(device):
            raise RuntimeError("of the caller")
        assert everything() == within
    assert everything() == before


def test_patch_moments_of_meta_tensors_have_shapes():
    window, x, y = layer("convolution", device="meta")
    assert ak.patch_moments(x, y, window).xx.shape == (1, 54, 54)


def test_settings_that_were_never_set_stay_unset():
    program = """
        import torch
        from asr_kernels.precision import full_precision
        from tests.asr_kernels.test_precision import everything
        before = everything()
        with full_precision(torch.device("cuda")):
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert everything() == before
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=120)


class TestModels:
    def test_both_interfaces_agree_inside_and_are_restored_after(self, wished):
        before = everything()
        with full_precision_of_models():
            assert set(readable()[:9]) == {"ieee"}
            assert readable()[9:] == ["highest", False, False]
        assert everything() == before

    @pytest.mark.parametrize("error", [None, ZeroDivisionError])
    def test_settings_made_by_a_model_are_undone(self, wished, error):
        before = everything()
        try:
            with full_precision_of_models():
                with BACKENDS.cudnn.flags(enabled=False, allow_tf32=True):
                    torch.set_float32_matmul_precision("medium")
                BACKENDS.cudnn.allow_tf32 = True
                BACKENDS.fp32_precision = "tf32"
                BACKENDS.cudnn.conv.fp32_precision = "none"
                if error:
                    raise error
        except ZeroDivisionError:
            assert error
        assert everything() == before

    def test_contexts_can_be_nested(self, wished):
        before = everything()
        with full_precision_of_models():
            inside = everything()
            with full_precision(torch.device("cuda")), full_precision_of_models():
                pass
            assert everything() == inside
        assert everything() == before

    def test_no_warning_about_the_older_flags(self, monkeypatch, recwarn):
        # as PyTorch 2.9 does, once per process
        def warned(function):
            return lambda *args: (warnings.warn("use the new interface", stacklevel=2), function(*args))[1]

        for name in ("get_float32_matmul_precision", "set_float32_matmul_precision"):
            monkeypatch.setattr(torch, name, warned(getattr(torch, name)))
        with full_precision_of_models():
            assert not recwarn.list
        assert not recwarn.list
