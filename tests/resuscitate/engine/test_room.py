"""A loader is read as far as there is room, and the log says so; what the caller holds is never cut."""

import copy
import itertools
import logging

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import resuscitate
from resuscitate.data.calibration import Room, read_batches
from resuscitate.engine.room import in_memory, in_stores
from resuscitate.network.runner import Network
from resuscitate.runtime import activations as storage
from resuscitate.runtime.activations import Store
from resuscitate.runtime.spill import ScratchFile
from resuscitate.utils.nested import bytes_of
from tests.networks import Residual, Untraceable, chain, images, pruned_copy, seeded

CPU = torch.device("cpu")
MIB = 1 << 20
EACH = images(1).nbytes
# so that no test reads without end where nothing stops it
END = 300


class Vast(Dataset):
    """A thousand million images, of which there are really 40."""

    def __init__(self):
        self.images, self.read = images(40), 0

    def __len__(self):
        return 10**9

    def __getitem__(self, index):
        self.read += 1
        assert self.read <= 16 * END
        return self.images[index % 40]


def endless():
    """Batches of 16 images, without a length."""
    parts = itertools.cycle(images(80).split(16))
    for count, part in enumerate(parts):
        assert count < END
        yield part


def endless_loader():
    return DataLoader(Vast(), 16)


@pytest.fixture
def free_disk(monkeypatch):
    """1 MiB is free in the scratch folder; the value is a list of the sizes that scratch files grew to."""
    sizes = []
    monkeypatch.setattr(storage, "free_disk", lambda folder: MIB)
    close = ScratchFile.close
    monkeypatch.setattr(ScratchFile, "close", lambda self: (sizes.append(self.end), close(self))[1])
    return sizes


def cuts(caplog):
    return [text for text in (r.getMessage() for r in caplog.records) if text.startswith("only the first")]


class TestRepair:
    @pytest.mark.parametrize("method", ["asr", "refit", "bn"])
    @pytest.mark.parametrize("build", [Residual, Untraceable])
    @pytest.mark.parametrize("loader", [endless, endless_loader])
    def test_a_loader_without_end_is_read_until_memory_and_half_of_the_disk_are_full(
        self, free_disk, caplog, loader, build, method
    ):
        dense = seeded(build)
        model = pruned_copy(dense)
        expected = copy.deepcopy(model)
        report = resuscitate.repair(model, dense, loader(), method=method, memory="256KiB", progress=False)
        used = report.images or report.batchnorm_images
        assert used >= 16
        assert max(free_disk) <= MIB // 2 + 16 * EACH  # a batch goes there whole
        (said,) = cuts(caplog)
        of = " of 1,000,000,000" if loader is endless_loader else ""
        assert said.startswith(f"only the first {used:,}{of} images are used: there is no room for more in the memory")
        assert "memory= and scratch= give more, max_samples= says how many to take" in said
        # what was used is what the log says
        images = itertools.islice(loader(), used // 16)
        resuscitate.repair(expected, dense, list(images), method=method, memory="256KiB", progress=False)
        assert all(torch.equal(x, expected.state_dict()[key]) for key, x in model.state_dict().items())

    @pytest.mark.parametrize("loader", [endless, endless_loader])
    def test_a_limit_for_which_there_is_room_is_kept_and_nothing_is_said(self, free_disk, caplog, loader):
        dense = seeded(Residual)
        report = resuscitate.repair(pruned_copy(dense), dense, loader(), max_samples=30, memory="256KiB")
        assert report.images == 30
        assert not cuts(caplog)

    @pytest.mark.parametrize("loader", [endless, endless_loader])
    def test_a_limit_for_which_there_is_none_is_not_undercut_in_silence(self, free_disk, caplog, loader):
        dense = seeded(Residual)
        options = {"max_samples": 4000, "memory": "256KiB", "progress": False}
        report = resuscitate.repair(pruned_copy(dense), dense, loader(), **options)
        assert report.images < 4000
        assert cuts(caplog)[0].startswith(f"only the first {report.images} of 4,000 images are used")

    @pytest.mark.parametrize("wrap", [lambda x: x, lambda x: x.numpy(), lambda x: list(x.split(16)), lambda x: [[x]]])
    def test_what_the_caller_holds_is_used_whole(self, monkeypatch, caplog, wrap):
        monkeypatch.setattr(storage, "free_disk", lambda folder: 0)
        dense = seeded(chain)
        for given in (wrap(images(80)), lambda: wrap(images(80))):
            model = pruned_copy(dense)
            report = resuscitate.repair(model, dense, given, memory="1KiB", method="asr", progress=False)
            assert report.images == 80
        assert not cuts(caplog)

    def test_one_batch_is_used_whatever_it_takes(self, monkeypatch, caplog):
        monkeypatch.setattr(storage, "free_disk", lambda folder: 0)
        dense = seeded(chain)
        report = resuscitate.repair(pruned_copy(dense), dense, endless(), memory="1KiB", method="asr", progress=False)
        assert report.images == 16
        assert cuts(caplog)[0].startswith("only the first 16 images are used")


class TestHeldInMemory:
    """`compress`, `regrow` and `recoverability` hold the images, and no scratch."""

    @pytest.mark.parametrize("loader", [endless, endless_loader])
    def test_compress(self, caplog, loader):
        report = resuscitate.compress(seeded(chain), 0.5, loader(), steps=1, memory=100 * EACH, progress=False)
        assert [step.images for step in report.steps] == [96]
        (said,) = cuts(caplog)
        assert "no room for more in the memory budget; memory= gives more" in said

    def test_regrow(self, caplog):
        dense = seeded(chain)
        model = copy.deepcopy(dense)
        masks = resuscitate.sparsify(model, 0.8)
        grown = resuscitate.regrow(model, dense, masks, 0.6, endless(), memory=100 * EACH, progress=False)
        assert grown.rounds[0].report.images == 96
        assert len(cuts(caplog)) == 1

    def test_recoverability(self, monkeypatch, caplog):
        monkeypatch.setattr(storage, "free_memory", lambda device: 200 * EACH)
        options = {"evaluate": lambda model: 50.0, "allocations": ["global"], "methods": ["bn"], "progress": False}
        found = resuscitate.recoverability(seeded(chain), endless(), sparsities=[0.5], **options)
        assert found.images == 96
        assert len(cuts(caplog)) == 1

    def test_images_on_the_host_of_a_gpu_have_half_of_its_memory(self, monkeypatch):
        monkeypatch.setattr(storage, "free_memory", lambda device: {"cpu": 200, "cuda": 10**6}[device.type])
        assert in_memory("1GiB", "cuda", chain()).left == [100]
        assert in_memory(None, None, chain()).left == [100]
        assert in_memory("1KiB", "cpu", chain()).left == [1024]
        assert in_memory(None, "cpu", chain(), holders=4).left == [25]


class TestStreams:
    """What holds no image reads them all."""

    def long(self):
        return itertools.islice(endless(), 200)

    def test_dense_statistics(self, free_disk, monkeypatch, caplog):
        monkeypatch.setattr(storage, "free_memory", lambda device: 1)
        assert resuscitate.DenseStatistics.measure(seeded(chain), self.long(), progress=False).images == 3200
        assert not cuts(caplog)

    def test_damage(self, free_disk, monkeypatch, caplog):
        monkeypatch.setattr(storage, "free_memory", lambda device: 1)
        dense, given = seeded(chain), self.long()
        resuscitate.damage(pruned_copy(dense), dense, given)
        assert next(given, None) is None
        assert not cuts(caplog)


class TestReading:
    def room(self, size):
        return Room([(size, bytes_of)], "a test", "")

    def test_every_limit_counts(self):
        room = Room([(100, lambda batch: 10), (30, lambda batch: 12)], "a test", "")
        assert [room.take(None) for _ in range(4)] == [True, True, False, False]
        assert room.left == [80, 6]

    def test_what_a_limit_leaves_of_the_last_batch_counts(self, caplog):
        found = list(read_batches(endless(), max_samples=20, room=self.room(20 * EACH)))
        assert sum(map(len, found)) == 20
        assert not cuts(caplog)

    def test_images_that_come_sorted_by_class_are_warned_of_where_the_room_ends(self, caplog):
        labelled = ((x, torch.full((16,), index)) for index, x in enumerate(endless()))
        list(read_batches(labelled, room=self.room(48 * EACH)))
        assert "sorted by class, and only the first 48 are used" in caplog.text

    @pytest.mark.parametrize(
        ("loader", "total"),
        [
            (DataLoader(Vast(), 16), "1,000,000,000"),
            (DataLoader(images(75), 16), "75"),
            (DataLoader(images(75), 16, drop_last=True), "64"),
            (DataLoader(list(images(80).split(16)), batch_size=None), "80"),
            (DataLoader(images(80), 16, sampler=range(40)), "48"),
        ],
        ids=["vast", "short last batch", "last batch dropped", "whole batches", "sampler"],
    )
    def test_of_how_many_is_known_from_the_loader(self, caplog, loader, total):
        list(read_batches(loader, room=self.room(16 * EACH)))
        assert cuts(caplog)[0].startswith(f"only the first 16 of {total} images are used")

    def test_a_long_loader_gets_a_hint(self, caplog):
        with caplog.at_level(logging.INFO, logger="resuscitate"):
            list(read_batches(DataLoader(Vast(), 16), max_samples=32, room=self.room(MIB)))
            list(read_batches(DataLoader(images(80), 16), room=self.room(MIB)))
            assert "max_samples=" not in caplog.text
            list(read_batches(DataLoader(Vast(), 16), room=self.room(16 * EACH)))
        assert (
            "all 1,000,000,000 images of the loader are read, if there is room; max_samples= takes fewer" in caplog.text
        )


class TestStores:
    def test_half_of_the_free_disk_and_what_is_left_of_the_budget(self, free_disk):
        with Store(10 * MIB, CPU) as store:
            assert store.room() == 5 * MIB + MIB // 2
            store.admit(MIB)
            assert store.room() == 4 * MIB + MIB // 2

    def test_a_folder_that_is_not_there_has_no_room(self, tmp_path):
        with Store(10 * MIB, CPU, tmp_path / "missing") as store:
            assert store.room() == 5 * MIB

    def test_behind_a_gpu_half_of_the_host_memory(self, monkeypatch):
        monkeypatch.setattr(storage, "free_memory", lambda device: 6 * MIB if device.type == "cpu" else 0)
        assert Store(10 * MIB, torch.device("cuda")).room() == 5 * MIB + 3 * MIB

    @pytest.mark.parametrize(("together", "expected"), [(True, 1), (False, 2)])
    def test_images_and_activations_share_the_room_of_one_store(self, free_disk, together, expected):
        net, x = Network(seeded(chain)), images(16)
        first = Store(10 * MIB, CPU)
        second = first if together else Store(20 * MIB, CPU)
        with torch.no_grad():
            room = in_stores(first, second, [net, net])
            before = room.left.copy()
            assert room.take(x)
        assert len(before) == expected
        taken = [a - b for a, b in zip(before, room.left, strict=True)]
        # at most the output of the last convolution waits, 16 channels of 9 x 9, in each of the networks
        assert sum(taken) == x.nbytes + 2 * len(x) * 16 * 81 * 4
