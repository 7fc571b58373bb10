"""Networks that keep a value of a batch in one place and read it in another."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import resuscitate
from resuscitate.network.wiring import observe
from tests.compare import same


class Collects(nn.Module):
    """A hook keeps the output of a block, which the head reads behind later layers, as in networks for segmentation."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.later, self.head = nn.Conv2d(8, 8, 3), nn.Linear(16, 4)
        self.features = dict[str, Tensor]()
        self.collect()

    def collect(self) -> None:
        self.block._forward_hooks.clear()
        self.block.register_forward_hook(lambda module, args, output: self.features.__setitem__("block", output))

    def forward(self, x: Tensor) -> Tensor:
        deep = self.later(self.block(x)).relu()
        return self.head(torch.cat([self.features["block"].mean((2, 3)), deep.mean((2, 3))], 1))


class KeepsTable(Collects):
    """Keeps a table that is the same for all batches."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        if self.table is None or len(self.table) != y.shape[-1]:
            self.table = torch.linspace(0, 1, y.shape[-1])
        deep = self.later(y * self.table).relu()
        return self.head(torch.cat([y.mean((2, 3)), deep.mean((2, 3))], 1))


def pair(kind: type[Collects]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    dense = kind().eval()
    model = copy.deepcopy(dense)
    model.collect()
    resuscitate.sparsify(model, 0.7)
    return model, dense


def test_a_network_that_reads_a_feature_later_is_refused_in_several_batches():
    model, dense = pair(Collects)
    before, images = copy.deepcopy(model), torch.randn(64, 3, 8, 8)
    with pytest.raises(resuscitate.ResuscitateError, match="all images in one batch"):
        resuscitate.repair(model, dense, images, batch_size=16)
    assert same(model, before)
    assert resuscitate.repair(model, dense, images, batch_size=64).agreement.error_after < 0.5


def test_a_table_that_is_the_same_for_all_batches_is_allowed():
    model, dense = pair(KeepsTable)
    assert resuscitate.repair(model, dense, torch.randn(64, 3, 8, 8), batch_size=16).walk == "suspended"


def test_a_pass_that_keeps_a_tensor_is_seen():
    images = torch.randn(2, 3, 8, 8)
    for model, keeps in ((Collects(), True), (KeepsTable(), True), (nn.Conv2d(3, 8, 3), False)):
        assert observe(model, lambda model=model: model(images)).keeps_tensors is keeps


class Meets(Collects):
    """Two forward passes at a time wait for each other between keeping a feature and reading it."""

    def __init__(self) -> None:
        super().__init__()
        self.barrier = threading.Barrier(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        if threading.current_thread() is not threading.main_thread():
            self.barrier.wait(10)
        return self.head(self.later(y + self.features["block"].mean()).mean((2, 3)).repeat(1, 2))


def test_passes_that_only_measure_read_their_own_features():
    torch.manual_seed(0)
    model, images = Meets().eval(), torch.randn(32, 3, 8, 8) * torch.linspace(1, 9, 32)[:, None, None, None]
    found = []
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        statistics = resuscitate.DenseStatistics.measure(model, images, batch_size=16)
        found.append(statistics.layers["later"][0].mean)
    torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_passes_of_other_networks_measure_beside_one_another():
    threads, found = torch.get_num_threads(), set[str]()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    model.register_forward_pre_hook(lambda module, args: found.add(threading.current_thread().name))
    torch.set_num_threads(2)
    resuscitate.DenseStatistics.measure(model, torch.randn(32, 3, 8, 8), batch_size=16)
    torch.set_num_threads(threads)
    assert found == {"forward pass"}


class Attention(nn.Module):
    """Sets settings of the process for a while, around its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            q, k, v = self.qkv(x).chunk(3, -1)
            return x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


def settings() -> list[object]:
    cuda = torch.backends.cuda
    sdp = [
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    ]
    return [*sdp, torch.backends.cudnn.enabled, list(warnings.filters)]


@pytest.mark.parametrize("method", ["asr", "refit"])
def test_settings_that_interleaved_passes_change_are_put_back(method: str) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 16), Attention(), Attention(), nn.Linear(16, 5)).eval()
    model, before = copy.deepcopy(dense), settings()
    resuscitate.sparsify(model, 0.5)
    x = list(torch.randn(64, 6, 8).split(16))
    options = {"forward_fn": lambda net, batch: net(batch), "keep_worse": True}
    assert resuscitate.repair(model, dense, x, method=method, **options).walk == "suspended"
    assert settings() == before


def test_a_forward_fn_may_write_to_its_batch():
    model, dense = pair(KeepsTable)
    images = torch.rand(64, 3, 8, 8) * 255
    found = []
    for scale in (torch.Tensor.div, torch.Tensor.div_):
        repaired, batches = copy.deepcopy(model), [{"image": part.clone()} for part in images.split(16)]
        forward_fn = lambda each, batch, scale=scale: each(scale(batch["image"], 255))  # noqa: E731
        resuscitate.repair(repaired, dense, batches, forward_fn=forward_fn)
        assert torch.equal(torch.cat([batch["image"] for batch in batches]), images)
        found.append(repaired)
    assert same(*found)
