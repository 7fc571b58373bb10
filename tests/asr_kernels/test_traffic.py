"""Memory accesses of the kernels, counted in Triton's interpreter: each value once, and nothing outside the tensor."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

import asr_kernels as ak

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="counted in Triton's interpreter (TRITON_INTERPRET=1)"
)

LAYOUTS = {
    "planes": lambda: torch.randn(2, 2, 7, 9),
    "planes of whole vectors": lambda: torch.randn(1, 2, 16, 16).bfloat16(),
    "short planes": lambda: torch.randn(70, 3, 3, 3).half(),
    "rows": lambda: torch.randn(2, 5, 4, 4).contiguous(memory_format=torch.channels_last),
    "linear": lambda: torch.randn(40, 5),
    "with gaps": lambda: torch.randn(3, 6, 5, 8)[:, ::2, 1:],
    "float64": lambda: torch.randn(4, 3, 5, 5, dtype=torch.float64),
}


class Traffic(Counter):
    """Number of unmasked accesses by (kind, address, bytes)."""

    def of(self, kind: str, x: Tensor) -> list[int]:
        """How often each value of x was read or written."""
        size, start = x.element_size(), x.data_ptr()
        steps = [torch.arange(n) * s for n, s in zip(x.shape, x.stride(), strict=True)]
        offsets = sum(s.view(-1, *[1] * (x.dim() - d - 1)) for d, s in enumerate(steps)).flatten().tolist()
        return [self[kind, start + o * size, size] for o in offsets]

    def bytes(self, kind: str, outside: list[Tensor]) -> int:
        """Bytes read or written outside the memory of these tensors."""
        ranges = [(x.data_ptr(), x.data_ptr() + x.untyped_storage().nbytes()) for x in outside]
        return sum(
            size * times
            for (k, address, size), times in self.items()
            if k == kind and not any(low <= address < high for low, high in ranges)
        )


@pytest.fixture
def counted(monkeypatch):
    """A context that counts all loads and stores of the interpreter."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    traffic = Traffic()

    def count(kind, pointers, mask, dtype):
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)]
        traffic.update((kind, int(a), dtype.primitive_bitwidth // 8) for a in addresses.flatten())

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counting_load(self, pointers, mask, *rest):
        count("read", pointers, mask, pointers.get_element_ty())
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        count("written", pointers, mask, pointers.get_element_ty())
        return store(self, pointers, value, mask, *rest)

    @contextmanager
    def counting() -> Iterator[Traffic]:
        traffic.clear()
        with monkeypatch.context() as patch, ak.use_backend("triton"):
            patch.setattr(builder, "create_masked_load", counting_load)
            patch.setattr(builder, "create_masked_store", counting_store)
            yield traffic

    return counting


@pytest.fixture(params=["usual blocks", "small blocks"])
def blocks(request, small_blocks):
    """The usual block sizes: few pieces of one tile; or small blocks: many pieces of several tiles."""
    if request.param == "small blocks":
        small_blocks()


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def x(request) -> Tensor:
    torch.manual_seed(0)
    return request.param()


def small_change(x: Tensor, tensors: int) -> int:
    """Bytes of other accesses that are allowed: partial moments, written once and read once, and C-sized vectors."""
    from asr_kernels.backends.triton_moments import plan_moments

    views = ak.views.as_ncl(*[x] * tensors, channel_dim=1) or ak.views.as_ncl(
        *[x.contiguous()] * tensors, channel_dim=1
    )
    (measure, _), moments = plan_moments(*views)
    # finish_kernel reads the shifts of the first piece once more
    return 2 * measure.arguments["partials_ptr"].nbytes + 2 * moments.nbytes


def test_triton_moments_read_once(counted, blocks, x):
    with counted() as traffic:
        ak.channel_moments(x)
    if ak.views.as_ncl(x, channel_dim=1):
        assert set(traffic.of("read", x)) == {1}
        assert traffic.bytes("read", outside=[x]) <= small_change(x, 1)
    assert not any(traffic.of("written", x))
    assert traffic.bytes("written", outside=[x]) <= small_change(x, 1)


def test_triton_paired_moments_read_once(counted, blocks, x):
    if not ak.views.as_ncl(x, channel_dim=1):
        pytest.skip("paired_moments copies this layout first")
    y = x.clone(memory_format=torch.preserve_format)
    with counted() as traffic:
        ak.paired_moments(x, y)
    for tensor in (x, y):
        assert set(traffic.of("read", tensor)) == {1}
        assert not any(traffic.of("written", tensor))
    assert traffic.bytes("read", outside=[x, y]) <= small_change(x, 2)


def test_triton_affine_reads_once_and_writes_once(counted, blocks, x):
    factor = torch.rand(x.shape[1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    with counted() as traffic:
        ak.affine_(x, factor, factor)
    assert set(traffic.of("read", x)) == set(traffic.of("written", x)) == {1}
    # nothing else is written, not even the gaps in its memory
    assert sum(n for (kind, *_), n in traffic.items() if kind == "written") == x.numel()


def test_triton_traffic_counts_a_second_read(counted):
    x = torch.randn(2, 3, 4, 4)
    with counted() as traffic:
        ak.channel_moments(x)
        ak.channel_moments(x)
    assert set(traffic.of("read", x)) == {2}
