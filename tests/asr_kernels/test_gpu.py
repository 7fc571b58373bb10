"""Tests that need a GPU: no host synchronisation, CUDA graphs, streams, devices, new memory that holds NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import asr_kernels as ak
from asr_kernels.precision import full_precision_of_models

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(params=["planes", "short planes", "rows"])
def pair(request) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense and pruned activations, in each layout that the kernels treat differently."""
    torch.manual_seed(0)
    shape = (64, 24, 7, 7) if request.param == "short planes" else (8, 24, 30, 30)
    form = torch.channels_last if request.param == "rows" else torch.contiguous_format
    dense, noise = torch.randn(2, *shape, device="cuda")
    return dense.contiguous(memory_format=form), (0.3 * dense + 0.1 * noise + 1).contiguous(memory_format=form)


@pytest.fixture
def errors_on_waiting() -> Iterator[None]:
    """Raise an error wherever the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def wanted(dense: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    """The pruned activations, repaired by the reference backend."""
    with ak.use_backend("reference"):
        repaired = pruned.clone(memory_format=torch.preserve_format)
        ak.repair_(repaired, ak.channel_moments(dense))
    return repaired


def test_repair_never_waits_for_the_host(pair, errors_on_waiting):
    dense, pruned = pair
    # the first iteration compiles the kernels
    for _ in range(2):
        running = ak.channel_moments(dense).update_(dense)
        ak.paired_moments(dense, pruned)
        ak.repair_(pruned, running)


def test_repair_runs_in_a_cuda_graph(pair):
    dense, pruned = pair
    target, first = ak.channel_moments(dense), pruned.clone(memory_format=torch.preserve_format)
    other = 1.7 * first - 2
    ak.repair_(pruned, target)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gain, shift, _ = ak.repair_(pruned, target)
    for images in (first, other):
        pruned.copy_(images)
        graph.replay()
        torch.testing.assert_close(pruned, wanted(dense, images))
        assert gain.isfinite().all()
        assert shift.isfinite().all()


def test_two_streams_give_the_same_results(pair):
    dense, pruned = pair
    results, streams = [], [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for turn in range(20):
        with torch.cuda.stream(streams[turn % 2]):
            x = pruned.clone(memory_format=torch.preserve_format)
            ak.repair_(x, ak.channel_moments(dense))
            results.append(x)
    torch.cuda.synchronize()
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_device_of_the_tensor(pair):
    dense, pruned = (x.to("cuda:1") for x in pair)
    expected = wanted(dense, pruned)
    assert torch.cuda.current_device() == 0
    ak.repair_(pruned, ak.channel_moments(dense))
    torch.testing.assert_close(pruned, expected)


def test_moments_from_the_host_are_moved_to_the_tensor(pair):
    dense, pruned = pair
    expected = wanted(dense, pruned)
    target = ak.channel_moments(dense.cpu())
    whole = ak.channel_moments(torch.cat([dense, pruned]))
    for merged in (
        ak.ChannelMoments.empty(24).update_(dense).update_(pruned),
        ak.channel_moments(pruned, running=target),
        ak.channel_moments(pruned).merge(target),
        ak.paired_moments(dense, dense).merge(ak.paired_moments(pruned.cpu(), pruned.cpu())).pruned,
    ):
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(merged.var, whole.var, rtol=1e-6, atol=0)
    gain, _, _ = ak.repair_(pruned, target)
    assert gain.is_cuda
    torch.testing.assert_close(pruned, expected)


def test_nan_in_new_memory_changes_nothing(pair):
    dense, pruned = pair
    expected = wanted(dense, pruned)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        # torch.empty then returns memory filled with NaN
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(5, device="cuda").isnan().all()
        assert ak.paired_moments(dense, pruned).corr.isfinite().all()
        ak.repair_(pruned, ak.channel_moments(dense))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(pruned, expected)


def test_inductor_runs_repair_in_one_graph(pair):
    dense, pruned = pair
    target, expected = ak.channel_moments(dense), wanted(dense, pruned)

    def repair(x):
        ak.repair_(x, target)
        return x.relu()

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(repair, fullgraph=True)(pruned), expected.relu())


@pytest.fixture(params=["plain", "older flags", "fp32_precision", "autocast"])
def caller(request) -> Iterator[None]:
    """Each setting by which a caller allows TF32 or bfloat16."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    with full_precision_of_models():
        if request.param == "older flags":
            torch.set_float32_matmul_precision("high")
            cudnn.allow_tf32 = True
        if request.param == "fp32_precision":
            cudnn.conv.fp32_precision = matmul.fp32_precision = "tf32"
        with torch.autocast("cuda", torch.bfloat16, enabled=request.param == "autocast"):
            yield


@pytest.mark.parametrize("groups", [1, 2])
def test_second_moments_are_as_accurate_as_on_the_host(pair, caller, groups):
    dense, pruned = (t.cpu().contiguous() for t in pair)
    window = ak.Window((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), groups=groups)
    there = ak.patch_moments(pruned.cuda(), dense.cuda(), window)
    exact = ak.patch_moments(pruned.double(), dense.double(), window)
    scale = exact.xx.diagonal(dim1=1, dim2=2).amax()
    for name in ("xx", "xy"):
        assert (getattr(there, name).cpu() - getattr(exact, name)).abs().max() < 1e-5 * scale
    moved = dense.abs()
    points = exact.mean, exact.target
    products = ak.cross_products(pruned.cuda(), moved.cuda(), window, *(point.cuda() for point in points))
    expected = ak.cross_products(pruned.double(), moved.double(), window, *points)
    assert (products.xy.cpu() - expected.xy).abs().max() < 1e-5 * scale


def test_second_moments_never_wait_and_give_the_same_bits(pair, errors_on_waiting):
    dense, pruned = pair
    window = ak.Window((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    # the first call compiles the kernels
    first, second = (ak.patch_moments(pruned, dense, window) for _ in range(2))
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first.xx, second.xx)
    assert torch.equal(first.xy, second.xy)
