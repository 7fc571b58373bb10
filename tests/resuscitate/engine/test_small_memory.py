"""Repairs by suspended passes in a small memory: what is freed, and that no value changes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resuscitate
from resuscitate.engine.pass_memory import PassStorages
from resuscitate.runtime.activations import Store
from resuscitate.runtime.passes import RestartError
from tests.networks import Shuffled, chain, images, pruned_copy, seeded
from tests.resuscitate.engine.walks import is_empty, run_batch

pytestmark = pytest.mark.usefixtures("two_at_a_time")
OPTIONS = {"refit": {"method": "refit", "recalibrate": "exact"}, "asr": {"method": "asr"}}
methods = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture
def stores(monkeypatch):
    """The stores of the repairs within a test."""
    found, init = [], Store.__init__

    def noted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        found.append(self)

    monkeypatch.setattr(Store, "__init__", noted)
    return found


@pytest.fixture
def freed(monkeypatch):
    """The storages that were freed while something referred to them: how many bytes each had."""
    sizes, put = [], PassStorages.put

    def noted(self, stop, used):
        before = {storage._cdata: storage.nbytes() for storage, _ in self.alive()}
        put(self, stop, used)
        for storage, _ in self.alive():
            if storage._cdata in self.freed:
                assert storage.nbytes() == 0
                sizes.append(before[storage._cdata])

    monkeypatch.setattr(PassStorages, "put", noted)
    return sizes


def in_and_out(build, options, x=None, **more):
    """Repaired with plenty of memory, and with hardly any: the same bits."""
    x = list(images(40, size=16).split(8)) if x is None else x
    dense, models = seeded(build), []
    for memory in ("1GiB", "20KB"):
        models.append(pruned_copy(dense))
        report = resuscitate.repair(
            models[-1], dense, x, memory=memory, progress=False, **{"forward_fn": run_batch, **options, **more}
        )
        assert (report.walk, report.bytes_spilled > 0) == ("suspended", memory == "20KB")
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict(), rtol=0, atol=0)
    return dense, models[1]


class Deep(nn.Module):
    """Its frames keep every value of a pass, though few are read again."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, 6, 3, padding=1) for c in (3, 6, 6, 6))

    def forward(self, x):
        a = self.convs[0](x)
        b = F.relu(a)
        c = self.convs[1](b)
        d = F.relu(c)
        e = self.convs[2](d)
        return self.convs[3](F.relu(e))


class Moody(Deep):
    """Dark batches read once more what bright ones, such as the example, do not."""

    def forward(self, x):
        bright = bool(x.mean() > -5)
        a = self.convs[0](x)
        b = F.relu(a)
        c = self.convs[1](b)
        e = self.convs[2](F.relu(c))
        if not bright:
            e = e + a
        return self.convs[3](F.relu(e))


class MoodyKept(Moody):
    """The same, and what is read once more is kept for the trial as well."""

    def forward(self, x):
        self.dummy = None
        a = self.convs[0](x)
        c = self.convs[1](F.relu(a))
        e = self.convs[2](F.relu(c))
        bright = bool(x.mean() > -5)
        e = e + a * (0.0 if bright else 1.0)
        return self.convs[3](F.relu(e))


class Skipping(Deep):
    """Dark batches pass the third convolution by."""

    def forward(self, x):
        y = F.relu(self.convs[1](F.relu(self.convs[0](x))))
        if bool(x.mean() > -5):
            y = F.relu(self.convs[2](y))
        return self.convs[3](y)


class TestWhatIsSpent:
    @methods
    def test_is_freed(self, freed, options):
        dense = seeded(Deep)
        resuscitate.repair(
            pruned_copy(dense),
            dense,
            images(24, size=16).split(8),
            forward_fn=run_batch,
            progress=False,
            memory="1MiB",
            **_plain(options),
        )
        assert len(freed) >= 3 * 3

    def test_is_not_looked_for_where_there_is_room(self, freed):
        dense, x = seeded(Deep), images(24, size=16).split(8)
        resuscitate.repair(pruned_copy(dense), dense, x, forward_fn=run_batch, progress=False)
        assert not freed

    @methods
    def test_and_read_all_the_same_is_computed_anew(self, options, monkeypatch):
        """Batches that take another branch than the example: their passes begin anew, and the result is right."""
        restarts, read = [], PassStorages.read

        def noted(self, values):
            try:
                read(self, values)
            except RestartError:
                restarts.append(1)
                raise

        monkeypatch.setattr(PassStorages, "read", noted)
        x = list(images(32, size=16).split(8))
        x[1], x[3] = x[1] - 10, x[3] - 10
        options = {**_plain(options), "forward_fn": run_batch, "relu_aware": False, "ridge": 0.01}
        options = options if options["method"] == "refit" else {"method": "asr", "forward_fn": run_batch}
        results = []
        for build in (Moody, MoodyKept):
            dense = seeded(build)
            results.append(pruned_copy(dense))
            before = len(restarts)
            resuscitate.repair(results[-1], dense, x, progress=False, memory="1MiB", **options)
            assert (len(restarts) > before) == (build is Moody)
        torch.testing.assert_close(results[0].state_dict(), results[1].state_dict(), rtol=1e-4, atol=1e-5)


@methods
def test_a_batch_that_passes_a_layer_by_is_measured_at_the_next_one(options):
    """Its value there is spilled before the others have come to that layer."""
    x = list(images(40, size=16).split(8))
    x[1], x[3] = x[1] - 10, x[3] - 10
    in_and_out(Skipping, {**_plain(options), "keep_worse": True}, x)


def _plain(options):
    """Without what needs a BatchNorm."""
    return {key: value for key, value in options.items() if key != "recalibrate"}


class Views(nn.Module):
    """Views of one memory and operations in place, before and after each layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.branch, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 6, 1)

    def forward(self, x):
        whole = self.bn(self.stem(x)).contiguous()
        left, right = whole[:, :4], whole[:, 4:]
        left.relu_()
        total = whole.sum()
        right += self.branch(left)
        left -= 0.01 * total.tanh()
        return self.head(whole.permute(0, 1, 3, 2)) + whole[:, :6].transpose(2, 3)


class Cached(nn.Module):
    """A table that the first pass computes and the later ones read; `by_shape`: one for each shape of its input."""

    def __init__(self, by_shape=False):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3)
        self.by_shape, self.tables = by_shape, {}

    def forward(self, x):
        x = F.relu(self.stem(x))
        key = tuple(x.shape[1:]) if self.by_shape else None
        if key not in self.tables:
            self.tables[key] = torch.linspace(0, 1, 8 * 32 * 32).view(8, 32, 32).cos()
        return self.last(x + self.tables[key][:, : x.shape[2], : x.shape[3]])


class Converted(nn.Module):
    """Values that leave torch on the way."""

    def __init__(self):
        super().__init__()
        self.stem, self.middle, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 6, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        first = self.middle(x)
        scale = 1 + 0.1 * float(x.numpy()[:, :, 0, 0].mean())
        offset = sum(x[0, 0, 0].tolist()) / 100
        return self.last(F.relu(first) * scale + offset + torch.from_numpy(x.numpy().mean((0, 2, 3)))[:, None, None])


class Buffer(nn.Module):
    """A buffer that each pass replaces."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.register_buffer("buf", torch.zeros(8, 16, 16))

    def forward(self, x):
        x = F.relu(self.stem(x))
        self.buf = x.mean(0)
        return self.last(x)


class TestNetworks:
    @methods
    @pytest.mark.parametrize("build", [Views, Converted, chain, Deep], ids=lambda build: build.__name__)
    def test_hardly_any_memory_changes_no_bit(self, build, options):
        in_and_out(build, options if build in (Views, chain) else _plain(options))

    @methods
    def test_views_are_as_along_the_graph(self, options):
        x = list(images(40, size=16).split(8))
        dense, model = in_and_out(Shuffled, options, x=x)
        expected = pruned_copy(dense)
        assert resuscitate.repair(expected, dense, x, progress=False, **options).walk == "graph"
        torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)

    @methods
    @pytest.mark.parametrize("by_shape", [False, True], ids=["one table", "by shape"])
    def test_a_table_in_an_attribute(self, by_shape, options):
        sizes = (16, 16, 20, 16, 20) if by_shape else (16,) * 5
        x = [images(8, size=size, seed=seed) for seed, size in enumerate(sizes)]
        expected = torch.linspace(0, 1, 8 * 32 * 32).view(8, 32, 32).cos()
        dense, model = in_and_out(lambda: Cached(by_shape), _plain(options), x=x)
        for net in (dense, model):
            assert len(net.tables) == len(set(sizes))
            for table in net.tables.values():
                assert torch.equal(table, expected)

    @methods
    def test_a_buffer_that_the_forward_replaces(self, options):
        x = list(images(40, size=16).split(8))
        dense, model = seeded(Buffer), None
        for memory in ("1GiB", "20KB"):
            model = pruned_copy(dense)
            report = resuscitate.repair(
                model, dense, x, memory=memory, forward_fn=run_batch, progress=False, **_plain(options)
            )
            assert report.walk == "suspended"
            for net in (dense, model):
                assert net.buf.shape == (8, 16, 16)
                assert net.buf.untyped_storage().nbytes() == 4 * 8 * 16 * 16
                assert net.buf.isfinite().all()
            with torch.no_grad():
                assert torch.equal(model(x[0]), model(x[0]))

    @methods
    @pytest.mark.parametrize("memory", ["1GiB", "20KB"])
    def test_the_callers_images_are_left_alone(self, options, memory):
        """Even where the forward_fn hands them to the model as they are, and keeps them."""
        kept, x = [], list(images(40, size=16).split(8))
        x = [part.clone() for part in x]
        before, sizes = [part.clone() for part in x], [part.untyped_storage().nbytes() for part in x]

        def run(model, batch):
            kept.append(batch)
            assert batch.untyped_storage().nbytes() == batch.nbytes
            return model(batch)

        dense = seeded(chain)
        resuscitate.repair(pruned_copy(dense), dense, x, forward_fn=run, memory=memory, progress=False, **options)
        for part, size, was in zip(x, sizes, before, strict=True):
            assert part.untyped_storage().nbytes() == size
            assert torch.equal(part, was)
        whole = [each for each in kept if len(each) == 8]  # copies, which it may keep
        assert whole
        assert all(any(torch.equal(each, was) for was in before) for each in whole)

    @methods
    @pytest.mark.parametrize("memory", ["1GiB", "20KB", "1MB"])
    def test_nothing_is_left_in_the_store(self, options, memory, stores, tmp_path):
        dense = seeded(chain)
        x = images(40, size=16).split(8)
        resuscitate.repair(
            pruned_copy(dense), dense, list(x), forward_fn=run_batch, memory=memory, scratch=tmp_path, **options
        )
        assert stores
        for store in stores:
            assert store.resident == 0
            assert is_empty(store)
