"""Suspended forward passes, and a runner that runs chains of them."""

import contextvars
import gc
import itertools
import threading
import time
import weakref

import pytest
import torch

from resuscitate.errors import ResuscitateError
from resuscitate.runtime import passes
from resuscitate.runtime.passes import Pass, PassRunner, RestartError, at_a_time, current, end, suspend, threads_kept
from tests.conftest import running_passes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_pass_remains():
    yield
    gc.collect()
    assert not running_passes()


def stepping(events, name, stops=2):
    """A forward pass that is suspended `stops` times and records its steps in `events`."""

    def run():
        try:
            for step in range(stops):
                events.append(f"{name}{step}")
                suspend()
            events.append(f"{name} ends")
        finally:
            events.append(f"{name} left")

    return run


def again(each, times):
    """A chain that resumes one pass `times` times."""
    for _ in range(times):
        yield each


class TestPass:
    def test_it_continues_from_where_it_was_suspended(self):
        events = []
        each = Pass(stepping(events, "a"))
        assert not each.ended
        for expected in (["a0"], ["a0", "a1"], ["a0", "a1", "a ends", "a left"]):
            assert not each.ended
            PassRunner(1).run([again(each, 1)])
            assert events == expected
        assert each.ended
        assert each.error is None
        assert not each.again

    def test_the_model_cannot_catch_the_error_that_cancels_it(self):
        events = []

        def run():
            try:
                suspend()
            except Exception:
                events.append("handled")
            finally:
                events.append("left")

        each = Pass(run, finish=lambda: events.append("finished"))
        PassRunner(1).run([again(each, 1)])
        end([each])
        assert events == ["left", "finished"]
        assert each.ended
        assert each.error is None

    def test_a_pass_cancelled_before_it_began_does_not_run(self):
        events = []
        each = Pass(stepping(events, "a"), finish=lambda: events.append("finished"))
        end([each])
        PassRunner(1).run([again(each, 1)])
        assert each.ended
        assert not events

    def test_a_running_pass_that_is_cancelled_unwinds_when_it_is_suspended_next(self):
        events, begun, go = [], threading.Event(), threading.Event()

        def run():
            begun.set()
            go.wait(10)
            try:
                suspend()
                events.append("went on")
            finally:
                events.append("left")

        each = Pass(run)
        each.resume(lambda: None)
        assert begun.wait(10)
        each.cancel()
        go.set()
        each.join()
        assert events == ["left"]

    def test_a_deleted_pass_is_cancelled_and_its_thread_ends(self):
        events = []
        each = Pass(stepping(events, "a"))
        reference = weakref.ref(each)
        PassRunner(1).run([again(each, 1)])
        assert [t.name for t in threading.enumerate()].count("forward pass") == 1
        del each
        assert reference() is None
        assert not running_passes()
        assert events == ["a0", "a left"]

    def test_an_error_in_finish_is_an_error_of_the_pass(self):
        def finish():
            raise OSError("disk gone")

        each = Pass(lambda: None, finish=finish)
        with pytest.raises(OSError, match="disk gone"):
            PassRunner(1).run([again(each, 1)])
        assert isinstance(each.error, OSError)

    def test_a_restart_is_not_an_error(self):
        def run():
            raise RestartError

        each = Pass(run)
        PassRunner(1).run([again(each, 1)])
        assert each.ended
        assert each.again
        assert each.error is None

    def test_it_has_its_own_state_contextvars_gradient_mode_and_threads(self):
        variable, seen = contextvars.ContextVar("variable"), {}
        variable.set("the caller's")
        before, after = torch.get_num_threads(), None

        def run():
            seen["state"], seen["variable"] = current(), variable.get()
            seen["gradients"], seen["threads"] = torch.is_grad_enabled(), torch.get_num_threads()
            variable.set("its own")
            suspend()
            seen["kept"] = current(), variable.get(), torch.is_grad_enabled()

        with torch.enable_grad(), threads_kept():
            each = Pass(run, state="state", threads=before + 1)
            PassRunner(1).run([again(each, 2)])
            assert torch.is_grad_enabled()
            after = torch.get_num_threads()
        assert seen == {
            "state": "state",
            "variable": "the caller's",
            "gradients": False,
            "threads": before + 1,
            "kept": ("state", "its own", False),
        }
        assert variable.get() == "the caller's"
        assert after in (before, before + 1)
        assert torch.get_num_threads() == before
        assert current() is None

    def test_the_number_of_intra_op_threads_is_restored_for_later_threads(self):
        before, seen = torch.get_num_threads(), []

        def run():
            raise KeyError

        with pytest.raises(KeyError), threads_kept():
            PassRunner(1).run([again(Pass(run, threads=before + 2), 1)])
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert seen == [before]

    def test_it_counts_as_begun_before_its_thread_has_started(self, monkeypatch):
        """The pass may be suspended, and be resumed by another thread, before `start` returns."""
        events, stopped = [], threading.Event()
        each = Pass(stepping(events, "a", stops=1))
        start, main = threading.Thread.start, threading.get_ident()

        def slow(thread):
            start(thread)
            if threading.get_ident() == main and thread.name == "forward pass":
                assert stopped.wait(10)
                each.resume(lambda: None)

        monkeypatch.setattr(threading.Thread, "start", slow)
        each.resume(stopped.set)
        each.join()
        assert events == ["a0", "a ends", "a left"]


class TestCrew:
    def test_a_runner_of_one_runs_the_chains_one_after_the_other(self):
        events = []
        PassRunner(1).run([again(Pass(stepping(events, name, 1)), 2) for name in "abc"])
        assert events == [f"{name}{what}" for name in "abc" for what in ("0", " ends", " left")]

    def test_the_code_of_a_chain_runs_between_its_passes(self):
        events = []
        first, second = Pass(stepping(events, "a", 1)), Pass(stepping(events, "b", 1))

        def chain():
            yield first
            events.append("measured a")
            yield second
            events.append("measured b")

        PassRunner(2).run([chain()])
        assert events == ["a0", "measured a", "b0", "measured b"]
        end([first, second])

    def test_no_chain_and_an_empty_chain_are_allowed(self):
        PassRunner(2).run([])
        PassRunner(2).run([iter(()), iter(())])

    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_exactly_size_chains_run_at_a_time(self, size):
        lock, now, most, met = threading.Lock(), [0], [0], threading.Barrier(size)

        def run():
            for _ in range(2):
                with lock:
                    now[0] += 1
                    most[0] = max(most[0], now[0])
                if size > 1:
                    met.wait(10)  # times out unless all of them run at this moment
                time.sleep(0.001)
                with lock:
                    now[0] -= 1
                suspend()

        runner = PassRunner(size)
        each = [Pass(run) for _ in range(4 * size)]
        runner.run([again(one, 3) for one in each])
        assert most == [size]
        assert all(one.ended for one in each)

    @pytest.mark.parametrize("size", [1, 2])
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    @pytest.mark.parametrize("where", ["a pass", "a chain"])
    def test_an_error_is_raised_and_no_pass_is_resumed_after_it(self, size, error, where):
        events, calls = [], itertools.count()

        def failing():
            suspend()
            raise error("broken")

        def chain():
            yield Pass(lambda: events.append("broken chain"))
            raise error("broken")

        broken = again(Pass(failing), 2) if where == "a pass" else chain()

        def waiting():
            next(calls)
            suspend()

        later = [Pass(waiting) for _ in range(50)]
        with pytest.raises(error, match="broken"):
            PassRunner(size).run([broken, *(again(each, 1) for each in later)])
        begun = next(calls)
        assert begun < 50 if size > 1 else begun == 0
        time.sleep(0.01)
        assert next(calls) == begun + 1
        end(later)

    def test_a_thread_that_cannot_be_started_is_an_error(self, monkeypatch):
        start, calls = threading.Thread.start, itertools.count()

        def failing(thread):
            if thread.name == "forward pass" and next(calls) == 3:
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", failing)
        each = [Pass(suspend) for _ in range(8)]
        with pytest.raises(ResuscitateError, match="each batch needs its own thread; use larger batches"):
            PassRunner(2).run([again(one, 1) for one in each])
        end(each)

    def test_passes_suspended_in_one_run_continue_in_the_next(self):
        events = []
        each = [Pass(stepping(events, name)) for name in "ab"]
        for expected in ({"a0", "b0"}, {"a1", "b1"}, {"a ends", "a left", "b ends", "b left"}):
            events.clear()
            PassRunner(2).run([again(one, 1) for one in each])
            assert set(events) == expected

    def test_many_passes_at_many_stops(self):
        """No wake-up is lost, and no pass starts twice."""
        for _ in range(20):
            events = []
            each = [Pass(stepping(events, f"{n}:", 3)) for n in range(8)]
            for _ in range(4):
                PassRunner(3).run([again(one, 1) for one in each])
            assert sorted(events) == sorted(f"{n}:{what}" for n in range(8) for what in (0, 1, 2, " ends", " left"))
            for one in each:
                one.join()


@pytest.mark.parametrize(
    ("passes_", "memory", "each", "expected"),
    [
        (10, 1, 0, (4, 1)),
        (3, 1, 0, (3, 1)),
        (2, 1, 0, (2, 2)),
        (1, 1, 0, (1, 4)),
        (0, 1, 0, (1, 4)),
        (10, 100, 40, (2, 2)),
        (10, 100, 1000, (1, 4)),
        (10, 0, 1, (1, 4)),
        (10, 100, 1, (4, 1)),
    ],
)
def test_how_many_passes_run_at_a_time(passes_, memory, each, expected, monkeypatch):
    monkeypatch.setattr(passes.torch, "get_num_threads", lambda: 4)
    assert at_a_time(CPU, passes_, memory, each) == expected
    assert at_a_time(torch.device("cuda"), passes_, memory, each) == (1, None)
