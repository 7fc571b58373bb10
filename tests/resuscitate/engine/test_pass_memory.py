"""The memory of one suspended pass: what is freed, what is moved out, and what comes back."""

import weakref
from types import SimpleNamespace

import pytest
import torch

from resuscitate.engine.pass_memory import SMALL, PassStorages, SharedStore, TrialPass, Unread, is_shared
from resuscitate.runtime.activations import Store
from resuscitate.runtime.passes import RestartError
from tests.resuscitate.engine.walks import is_empty

pytestmark = pytest.mark.usefixtures("two_at_a_time")
CPU = torch.device("cpu")
SIZE = 2 * SMALL  # elements of what is large enough to be moved


class TestLive:
    def test_what_is_spent_is_freed_and_a_read_of_it_is_a_restart(self):
        with Store(1 << 20, CPU) as store, PassStorages(set(), SharedStore(store), {}) as live:
            unread, kept = torch.zeros(SIZE) + 1, torch.zeros(SIZE) + 2
            view = unread[1:]
            numbers = {number for storage, number in live.alive() if storage._cdata == _key(unread)}
            live.unread = {"stop": Unread(live.operator_hash, numbers)}
            live.put("stop", [])
            assert (unread.untyped_storage().nbytes(), kept.untyped_storage().nbytes()) == (0, 4 * SIZE)
            live.get()
            assert float(kept.sum()) == 2 * SIZE
            for x in (unread, view):
                with pytest.raises(RestartError):
                    x + 1

    def test_what_is_used_at_a_stop_is_not_freed_whatever_the_trial_says(self):
        with Store(1 << 20, CPU) as store, PassStorages(set(), SharedStore(store), {}) as live:
            x, y = torch.ones(SIZE) * 3, torch.ones(SIZE) * 4
            live.unread = {"stop": Unread(live.operator_hash, set(range(live.count)))}
            live.put("stop", [x])
            assert (x.untyped_storage().nbytes(), y.untyped_storage().nbytes()) == (4 * SIZE, 0)

    def test_a_pass_that_came_by_other_operators_frees_nothing(self):
        """The numbers of its storages are not those of the trial."""
        with Store(1 << 20, CPU) as store, PassStorages(set(), SharedStore(store), {}) as live:
            x = torch.ones(SIZE) * 3
            live.unread = {"stop": Unread(live.operator_hash, set(range(live.count)))}
            y = x + 1
            live.put("stop", [])
            assert x.untyped_storage().nbytes() == y.untyped_storage().nbytes() == 4 * SIZE

    @pytest.mark.parametrize("keep", [False, True])
    def test_views_and_overwritten_values_come_back(self, keep):
        with Store(1, CPU) as store, PassStorages(set(), SharedStore(store), {}) as live:
            whole = torch.arange(3.0 * SIZE).view(3, SIZE) * 1
            row = whole[1]
            row.add_(1)
            column = whole.t()[5:9]
            expected = whole.clone(), row.clone(), column.clone()
            for turn in range(3):
                live.put(f"{turn}", [])
                assert whole.untyped_storage().nbytes() == 0
                if keep:
                    live.get(keep=True)
                    live.put(f"{turn}", [])
                live.get()
                torch.testing.assert_close((whole, row, column), expected, rtol=0, atol=0)
                row.mul_(2)
                expected[0][1].mul_(2)
                expected = expected[0], expected[0][1].clone(), expected[0].t()[5:9].clone()
            assert row.untyped_storage()._cdata == whole.untyped_storage()._cdata
            live.finish()
            assert store.resident == 0
            assert is_empty(store)

    def test_what_another_pass_reads_comes_back_and_stays(self):
        with Store(1, CPU) as store:
            kept = SharedStore(store)
            owner, reader = PassStorages(set(), kept, {}), PassStorages(set(), kept, {})
            with owner:
                shared, own = torch.ones(SIZE) * 3, torch.ones(SIZE) * 4
            owner.put("stop", [])
            assert shared.untyped_storage().nbytes() == own.untyped_storage().nbytes() == 0
            with reader:
                assert float((shared + 1).sum()) == 4 * SIZE
            assert own.untyped_storage().nbytes() == 0
            owner.put("stop", [])
            assert shared.untyped_storage().nbytes() == 4 * SIZE
            owner.get()
            owner.put("next", [])
            assert shared.untyped_storage().nbytes() == 4 * SIZE
            owner.finish()
            reader.finish()
            assert float(own.sum()) == 4 * SIZE
            assert not kept.owners
            assert is_empty(store)

    def test_the_budget_is_counted_and_given_back(self):
        with (
            Store(4 * 4 * SIZE, CPU) as store,
            PassStorages(set(), SharedStore(store), {}) as live,
        ):  # half is set aside
            values = [torch.ones(SIZE) * n for n in range(5)]
            live.put("stop", [])
            assert store.resident == 2 * 4 * SIZE
            assert sum(x.untyped_storage().nbytes() > 0 for x in values) == 2
            live.get()
            assert store.resident == 0
            assert [float(x[0]) for x in values] == [0, 1, 2, 3, 4]

    def test_storages_are_numbered_but_not_kept(self):
        with TrialPass(set()) as made:
            x = torch.ones(SIZE) * 2
            reference = weakref.ref(x)
            assert len(list(made.alive())) == 2 - 1  # the ones are gone
            del x
            assert reference() is None
            assert not list(made.alive())


def test_a_trial_tells_what_is_read_no_more():
    with TrialPass(set()) as trial:
        a = torch.ones(4)
        b = a + 1
        trial.suspend_at("first", [])
        c = a * b
        trial.suspend_at("second", [])
        c + 1
        trial.suspend_at("twice", [])
        trial.suspend_at("twice", [])
        kept = b + 1
        trial.suspend_at("third", [])
    del a, b, c
    assert {name: each.numbers for name, each in trial.unread().items()} == {
        "first": set(),
        "second": {0},
        "third": {0, 1, 2, 3},  # `kept`, number 4, outlives the pass
    }
    assert kept.shape == (4,)


@pytest.mark.parametrize(("device", "shared"), [("cpu", True), ("cuda", False)])
def test_a_storage_on_a_gpu_may_be_freed(device, shared):
    """torch calls each of them shared; this stands for one."""
    assert is_shared(SimpleNamespace(device=torch.device(device), is_shared=lambda: True)) == shared
    assert not is_shared(torch.ones(2).untyped_storage())


def _key(x):
    return x.untyped_storage()._cdata
