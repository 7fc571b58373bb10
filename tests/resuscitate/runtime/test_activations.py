"""A memory budget, what happens beyond it, and that nothing is left behind."""

import os
import subprocess
import sys
import textwrap
from contextlib import closing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

import resuscitate
from resuscitate.errors import ResuscitateError
from resuscitate.runtime import activations as storage
from resuscitate.runtime import spill
from resuscitate.runtime.activations import Frame, Store, free_memory, parse_memory
from resuscitate.runtime.spill import HostMemory, ScratchFile
from resuscitate.utils.raw_bytes import view_bytes
from tests.device import device
from tests.networks import Residual, Shuffled, Zoo, chain, images, pruned_copy, seeded

CPU = torch.device("cpu")


class ReadTwice(nn.Module):
    """Four convolutions without BatchNorm; a sum behind the third one reads the first one's output once more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.conv3, self.conv4 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.conv1(x)
        b = self.conv2(a.relu())
        return self.conv4((self.conv3(b.relu()) + a).relu())


class Tied(nn.Module):
    """A view of the first weight is made before that changes, and read at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 16, bias=False), nn.Linear(16, 16), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        back = self.first.weight.t()
        return self.last(nn.functional.linear(self.middle(self.first(x).relu()).relu(), back))


def open_files(folder) -> list[str]:
    """The files of this process in a folder, the nameless ones too."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue
        found += [target] if target.startswith(str(folder)) else []
    return found


class TestFrame:
    @pytest.mark.parametrize("budget", [1 << 20, 1], ids=["in memory", "in scratch"])
    def test_any_nest_of_values_comes_back(self, budget):
        x = torch.arange(24.0).view(2, 3, 4)
        value = {"a": (x, 5), "b": [x.half(), None], "c": x.transpose(0, 2), "d": torch.tensor(3), "e": x[:0]}
        with Store(budget, CPU) as store:
            frame = Frame(store)
            frame.close({"key": value})
            found = frame.open(["key"])["key"]
            torch.testing.assert_close(found, value)
            assert found["c"].stride() == value["c"].stride()
            frame.close({}, keep=())
            assert store.resident == 0
            assert "key" not in frame

    @pytest.mark.parametrize("budget", [1 << 20, 1], ids=["in memory", "in scratch"])
    def test_views_of_one_memory_stay_views_of_one_memory(self, budget):
        x = torch.zeros(4, 6)
        with Store(budget, CPU) as store:
            frame = Frame(store)
            frame.close({"x": x, "left": x[:, :3]})
            left = frame.open(["left"])["left"]
            left += 1  # changed in place, and never handed back
            frame.close({}, keep=["x", "left"])
            found = frame.open(["x"])["x"]
            assert torch.equal(found[:, :3], torch.ones(4, 3))
            assert torch.equal(found[:, 3:], torch.zeros(4, 3))

    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40), st.booleans()), max_size=40), st.integers(0, 300))
    @settings(deadline=None)
    def test_whatever_is_put_changed_and_dropped_the_rest_stays_as_it_was(self, moves, budget):
        expected: dict[int, torch.Tensor] = {}
        with Store(2 * budget + 1, CPU) as store:
            frame = Frame(store)
            for count, (key, size, drop) in enumerate(moves):
                if key in frame and not drop:
                    found = frame.open([key])
                    found[key].add_(count)
                    expected[key] = expected[key] + count
                    frame.close({}, keep=list(expected))
                elif key in frame:
                    frame.open([])
                    del expected[key]
                    frame.close({}, keep=list(expected))
                else:
                    expected[key] = torch.full((size,), float(count))
                    frame.open([])
                    frame.close({key: expected[key].clone()}, keep=list(expected))
                assert store.resident <= store.budget
            found = frame.open(list(expected))
            assert all(torch.equal(found[key], expected[key]) for key in expected)
            frame.close({})
            assert store.resident == 0

    @pytest.mark.parametrize("budget", [1 << 20, 1], ids=["in memory", "in scratch"])
    def test_lazy_conjugates_and_negatives_keep_their_values(self, budget):
        values = torch.complex(torch.arange(4.0), torch.ones(4))
        with Store(budget, CPU) as store:
            frame = Frame(store)
            frame.close({"conjugate": values.conj(), "negative": values.conj().imag})
            found = frame.open(["conjugate", "negative"])
            assert torch.equal(found["conjugate"], values.conj())
            assert torch.equal(found["negative"], -values.imag)
            frame.close({})

    def test_what_others_hold_is_not_spilled(self):
        weight = torch.ones(3, 4)
        with Store(1, CPU) as store:
            frame = Frame(store, {weight.untyped_storage().data_ptr()})
            frame.close({0: weight.t()})
            weight.mul_(2)
            assert torch.equal(frame.open([0])[0], weight.t())
            assert store.bytes_spilled == 0

    def test_a_freed_region_is_used_again(self):
        with Store(1, CPU) as store:
            frame = Frame(store)
            for _ in range(10):
                frame.close({0: torch.zeros(1000)})
                frame.open([0])
            assert store._place.end <= 2 * 4000

    def test_host_memory_gives_back_what_it_was_given(self):
        place = HostMemory()
        data = torch.arange(10, dtype=torch.uint8)
        region = place.write(data, None)
        place.write(data + 1, region)
        place.read(region, found := torch.empty_like(data))
        assert torch.equal(found, data + 1)
        place.free(region)
        assert not place.held


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("500MB", 500 * 10**6), ("2g", 2 << 30), ("1.5 MiB", 3 << 19), (4096, 4096), ("77", 77)],
)
def test_an_amount_of_memory(text, size):
    assert parse_memory(text, CPU) == size


def test_half_of_what_is_free_by_default():
    assert 0.4 * free_memory(CPU) < parse_memory(None, CPU) < 0.6 * free_memory(CPU)


@pytest.mark.parametrize("text", ["much", "", "-1", "4 bananas", "0"])
def test_what_is_no_amount_is_refused_before_anything_is_changed(text):
    dense = seeded(chain)
    with pytest.raises(ValueError, match="memory="):
        resuscitate.repair(pruned_copy(dense), dense, images(), memory=text)


def run_batch(model, batch):
    return model(batch)


class TestBudget:
    @pytest.mark.parametrize("build", [chain, Residual, Zoo, Shuffled], ids=lambda b: b.__name__)
    @pytest.mark.parametrize("recalibrate", [None, "exact"])
    @pytest.mark.parametrize("walk", ["graph", "suspended"])
    def test_what_is_free_changes_no_bit(self, build, recalibrate, walk, tmp_path):
        dense = seeded(build)
        options = {"method": "channelwise", "recalibrate": recalibrate, "batch_size": 5, "scratch": tmp_path}
        options |= {"forward_fn": run_batch} if walk == "suspended" else {}
        plain, spilled = pruned_copy(dense), pruned_copy(dense)
        loader = DataLoader(images(), 5)
        all_in = resuscitate.repair(plain, dense, loader, memory="1GiB", **options)
        out = resuscitate.repair(spilled, dense, loader, memory="20KB", **options)
        assert (all_in.walk, all_in.bytes_spilled) == (walk, 0)
        assert (out.walk, out.bytes_spilled > 0) == (walk, True)
        assert all(
            torch.equal(a, b) for a, b in zip(plain.state_dict().values(), spilled.state_dict().values(), strict=True)
        )

    def test_a_layer_read_twice_is_corrected_for_both_whatever_is_free(self, backend, device, tmp_path):
        dense = seeded(ReadTwice).to(device)
        models, spilled = [pruned_copy(dense), pruned_copy(dense)], []
        for model, memory in zip(models, ("1GiB", "10KB"), strict=True):
            options = {"method": "asr", "skip_first": False, "batch_size": 4, "memory": memory, "scratch": tmp_path}
            spilled.append(resuscitate.repair(model, dense, images(4).to(device), **options).bytes_spilled)
        assert spilled[0] == 0 < spilled[1]
        for a, b in zip(*(model.state_dict().values() for model in models), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts open files as Linux shows them")
    def test_views_of_a_weight_show_its_changes(self):
        dense, results = seeded(Tied), []
        for memory in ("1GiB", "1KB"):
            results.append(pruned_copy(dense))
            x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).split(16)
            options = {"memory": memory, "method": "channelwise", "skip_first": False, "keep_worse": True}
            report = resuscitate.repair(results[-1], dense, list(x), include=["first", "middle", "last"], **options)
            assert (report.walk, report.bytes_spilled > 0) == ("graph", memory == "1KB")
        torch.testing.assert_close(results[1].state_dict(), results[0].state_dict(), rtol=0, atol=0)

    @pytest.mark.parametrize("end", ["success", "error", "interrupt"])
    def test_scratch_is_removed_on(self, end, tmp_path, monkeypatch):
        dense, seen = seeded(chain), []

        def watched(*args):
            seen.extend(open_files(tmp_path))
            if end != "success":
                raise OSError("disk gone") if end == "error" else KeyboardInterrupt

        monkeypatch.setattr(resuscitate.engine.writer, "write_change", watched)
        options = {"memory": 1, "scratch": tmp_path}
        try:
            resuscitate.repair(pruned_copy(dense), dense, images(), **options)
        except (OSError, KeyboardInterrupt):
            assert end != "success"
        assert seen
        assert not open_files(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_scratch_is_removed_on_a_kill(self, tmp_path):
        program = """
            import os, signal, sys
            import resuscitate
            from tests.networks import chain, images, pruned_copy, seeded
            resuscitate.engine.writer.write_change = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            dense = seeded(chain)
            resuscitate.repair(pruned_copy(dense), dense, images(), memory=1, scratch=sys.argv[1])
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], timeout=120, check=False)
        assert done.returncode == -9
        assert not list(tmp_path.iterdir())

    def test_a_scratch_folder_that_cannot_be_written_is_named(self, tmp_path):
        dense = seeded(chain)
        with pytest.raises(ResuscitateError, match=r"scratch folder .*nowhere.*memory="):
            resuscitate.repair(pruned_copy(dense), dense, images(), memory=1, scratch=tmp_path / "nowhere")

    def test_a_batch_larger_than_the_budget_is_warned_of(self, caplog):
        dense = seeded(chain)
        resuscitate.repair(pruned_copy(dense), dense, images(), memory="1KiB")
        assert [r.message for r in caplog.records if "use smaller batches" in r.message]


class TestFreedPages:
    """What a process has freed is given back before it grows beyond the budget."""

    @pytest.fixture
    def given_back(self, monkeypatch):
        given = []
        monkeypatch.setattr(storage, "resident_memory", lambda: self.resident)
        monkeypatch.setattr(storage, "give_back_freed", lambda: given.append(self.resident))
        self.resident = 1000
        return given

    def test_where_the_process_has_grown_by_nearly_the_budget(self, given_back):
        with Store(160, CPU) as store:
            self.resident = 1000 + 140
            store.tidy()
            assert given_back == []
            self.resident = 1000 + 141
            store.tidy()
        assert given_back == [1141]

    def test_a_budget_on_a_gpu_is_none_of_the_process(self, given_back):
        with Store(160, torch.device("cuda")) as store:
            self.resident = 1000 + 1000
            store.tidy()
        assert given_back == []

    @pytest.mark.parametrize(("size", "times"), [(1, 3), (10, 16), (11, 33), (640, 33)])
    def test_it_is_seen_to_whenever_a_64th_of_the_budget_has_come_and_gone(self, given_back, size, times):
        with Store(640, CPU) as store:
            self.resident = 1000 + 640
            store.reserve = 0
            for _ in range(33):
                assert store.admit(size)
                store.release(size)
        assert len(given_back) == times


def test_bytes_of_a_gpu_pass_through_host_memory_to_and_from_a_file(monkeypatch):
    def view(data: Tensor) -> memoryview:
        assert data.device == CPU
        return view_bytes(data)

    monkeypatch.setattr(spill, "view_bytes", view)
    place = torch.device("cuda", 0) if torch.cuda.is_available() else device()
    data = torch.arange(100, dtype=torch.uint8).to(place)
    with closing(ScratchFile(None)) as file:
        region = file.write(data, None)
        read = torch.zeros_like(data)
        file.read(region, read)
    assert read.device == region.device == place
    assert torch.equal(read.cpu(), data.cpu())
