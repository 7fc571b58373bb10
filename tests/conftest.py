"""Shared by the tests: backends, memory layouts, trained networks with their images, concurrent forward passes."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import asr_kernels as ak
import resuscitate
from resuscitate.data.images import load_images, load_labels
from resuscitate.models import build, resnet20
from tests.networks import DATA

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["reference", "torch", "triton"]

# a worker of pytest-xdist sets it, and output would be cut to it
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.pop("COLUMNS", None)

# a machine may be busy: no example fails for its time
with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("no deadline", deadline=None)
    settings.load_profile("no deadline")

# the tests' tensors are small: threads would only wait for one another
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, lest one process is left with them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend in turn, in force while the test runs."""
    if request.param == "triton":
        pytest.importorskip("triton")
        if not INTERPRETED and not torch.cuda.is_available():
            pytest.skip("kernels need a GPU, or Triton's interpreter (TRITON_INTERPRET=1)")
    with ak.use_backend(request.param):
        yield request.param


@pytest.fixture
def device() -> str:
    """The GPU where there is one; the interpreter works on CPU tensors."""
    return "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Call it, and a tensor that the interpreter can afford has many pieces of many tiles, some of them cut."""
    tiles = pytest.importorskip("asr_kernels.backends.triton_tiles")
    pieces = pytest.importorskip("asr_kernels.backends.triton_pieces")
    moments = pytest.importorskip("asr_kernels.backends.triton_moments")
    affine = pytest.importorskip("asr_kernels.backends.triton_affine")
    small = {
        tiles: {"TILE": 32, "TILE_CHANNELS": 2, "WORTH_FOLDING": 1},
        pieces: {"THREADS": 4, "FEW_THREADS": 4, "PROGRAMS": 4, "WIDTH": 8, "MOST_CHUNKS": 2, "WORTH": 1},
        moments: {"MANY": (2, 8), "FEW": (1, 8)},
    }

    def forget() -> None:
        for kernels in (moments, affine):
            kernels.PLANS.clear()

    def shrink() -> None:
        forget()
        for module, values in small.items():
            for name, value in values.items():
                monkeypatch.setattr(module, name, value)

    yield shrink
    forget()


@dataclass(frozen=True)
class Layout:
    """A view of a tensor: `shape` in memory, then `view`; its channels lie on `channel_dim`."""

    shape: tuple[int, ...]
    view: Callable[[Tensor], Tensor] = lambda x: x
    channel_dim: int = 1
    start: int = 1  # elements before it: with 1 its address is no multiple of 16 bytes

    def place(self, dtype: torch.dtype, device: str, mean: float = 0.5, std: float = 2.0) -> tuple[Tensor, Tensor]:
        """(view, memory): normal values in the view, NaN in all of the memory that the view leaves out."""
        size = torch.Size(self.shape).numel()
        memory = torch.full((size + 32,), torch.nan, dtype=dtype, device=device)
        view = self.view(memory[self.start : self.start + size].view(self.shape))
        values = torch.randn(view.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        view.copy_(values.mul_(std).add_(mean))
        return view, memory


LAYOUTS = {
    # 49 elements: planes that no vector divides, several to a tile
    "7x7": Layout((4, 3, 7, 7)),
    # so many images of short planes that a kernel takes them as rows
    "3x3, many images": Layout((70, 3, 3, 3)),
    # planes of whole 4-element vectors
    "14x14": Layout((3, 2, 14, 14)),
    # planes of whole 16-element vectors
    "16x16": Layout((2, 3, 16, 16)),
    # a prime number of elements, and more of them than one tile holds
    "53x59": Layout((2, 2, 53, 59)),
    "1x1": Layout((6, 5, 1, 1)),
    "one image": Layout((1, 3, 11, 13)),
    "one channel": Layout((3, 1, 8, 8)),
    "single value": Layout((1, 1, 1, 1)),
    "channels_last": Layout((4, 7, 7, 5), lambda x: x.movedim(-1, 1)),
    # more channels than one tile of rows, and not a multiple of it
    "channels_last, 67 channels": Layout((2, 3, 3, 67), lambda x: x.movedim(-1, 1)),
    "every other channel": Layout((4, 6, 5, 5), lambda x: x[:, ::2]),
    "every other channel, channels_last": Layout((4, 5, 5, 6), lambda x: x.movedim(-1, 1)[:, ::2]),
    # rows with gaps on two axes: no (N, C, L) view of them exists
    "cut planes": Layout((3, 2, 8, 9), lambda x: x[:, :, 1:, ::2]),
    "cut to 1x1": Layout((6, 3, 4, 4), lambda x: x[:, :, :1, :1]),
    "transposed planes": Layout((3, 2, 5, 7), lambda x: x.transpose(2, 3)),
    "channel_dim=-1": Layout((4, 5, 6, 3), channel_dim=-1),
    "channel_dim=0": Layout((3, 4, 5, 6), channel_dim=0),
    "linear": Layout((17, 5)),
    "linear, one row": Layout((1, 5)),
    "one axis": Layout((7,), channel_dim=0),
    "sequence": Layout((2, 3, 31)),
    "volume": Layout((2, 3, 3, 4, 5)),
}


LAYOUTS |= {f"{name}, aligned": replace(layout, start=16) for name, layout in LAYOUTS.items()}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request: pytest.FixtureRequest) -> Layout:
    """Every layout in turn."""
    return request.param


@pytest.fixture(params=["images", "channels", "positions"])
def vast(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, device: str) -> Iterator[Tensor]:
    """(5, 5, 5) float16 values, 2^29 + 1 elements apart on one axis: a stride that fits 32 bits, but not its multiples.

    On a CPU they lie in a sparse file, of which only their own pages exist. An offset that wrapped around would still
    hit the file, 2^31 elements lower, and read a zero.
    """
    size, start = 2**32 + 2**10, 2**31
    if device == "cuda":
        if torch.cuda.mem_get_info()[0] < 2 * size + 2**30:
            pytest.skip("needs 9.6 GB of free GPU memory")
        memory = torch.zeros(size, dtype=torch.float16, device=device)
    else:
        path = tmp_path_factory.mktemp("vast") / "memory"
        memory = torch.from_file(str(path), shared=True, size=size, dtype=torch.float16)
        # mapped until the tensor goes, but the file is no one else's
        path.unlink()
    strides = {"images": (2**29 + 1, 5, 1), "channels": (5, 2**29 + 1, 1), "positions": (5, 1, 2**29 + 1)}
    x = memory.as_strided((5, 5, 5), strides[request.param], start)
    yield x.copy_(torch.arange(1.0, 126.0).view(5, 5, 5) / 8)
    if device == "cuda":
        # for the tests of other processes
        del memory, x
        torch.cuda.empty_cache()


NORMALISED = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.fixture
def two_at_a_time(monkeypatch):
    """Two suspended passes run at a time, with one intra-op thread each; afterwards the threads of all are gone.

    By the number of intra-op threads there would be two as well, but these wait for one another on a busy machine.
    """

    def two(device, passes, memory=1, each=0):
        return max(min(passes, 2, memory // each if each else 2), 1), 1

    for module in (resuscitate.engine.suspended_walk, resuscitate.engine.measure):
        monkeypatch.setattr(module, "at_a_time", two)
    yield
    assert not running_passes()


def running_passes():
    """The threads of forward passes that do not end within a second."""
    deadline = time.monotonic() + 1
    while (found := [t for t in threading.enumerate() if t.name == "forward pass"]) and time.monotonic() < deadline:
        time.sleep(0.001)
    return found


@pytest.fixture(scope="session")
def real():
    """The trained ResNet-20, unlabelled images to repair from, and labelled ones to test on."""
    if not (DATA / "cifar10_resnet20.safetensors").exists():
        pytest.skip("needs the trained networks and images")
    dense = resnet20().eval()
    dense.load_state_dict(load_file(DATA / "cifar10_resnet20.safetensors"))
    calibration = load_images(DATA / "cifar10_jpeg_train.npz", max_samples=256, **NORMALISED)
    test = DATA / "cifar10_jpeg_test.npz"
    return dense, calibration, load_images(test, max_samples=2000, **NORMALISED), load_labels(test, max_samples=2000)


@pytest.fixture
def trained_network():
    """A function from the name of a trained network, "resnet20" or "resnet32", to it."""

    def load(name):
        path = DATA / f"cifar10_{name}.safetensors"
        if not path.exists():
            pytest.skip("needs the trained networks and images")
        network = build(name).eval()
        network.load_state_dict(load_file(path))
        return network

    return load


@pytest.fixture
def keywords():
    """The trained keyword-spotting DS-CNN, which pads as TensorFlow's "SAME"; its clips, and their labels."""
    if not (DATA / "kws_dscnn.safetensors").exists():
        pytest.skip("needs the trained networks and images")
    from benchmarks.networks.dscnn import load_dscnn

    return load_dscnn(DATA)
