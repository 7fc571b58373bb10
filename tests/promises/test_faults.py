"""Whatever fails, and wherever: input files stay, the model is bit for bit as it was, nothing is left behind."""

import contextlib
import copy
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import resuscitate
from resuscitate.errors import JournalError
from tests.compare import same_state
from tests.conftest import running_passes
from tests.networks import Residual, Shared, Untraceable, chain, images, pruned_copy, seeded

OPTIONS = {
    "refit": {},
    "asr and BatchNorm": {"method": "asr", "recalibrate": "exact"},
    "parallel": {
        "method": "channelwise",
        "schedule": "parallel",
        "recalibrate": resuscitate.EMA(batches=2, batch_size=8),
    },
    "means": {"means": "kernel"},
    "mean": {"method": "mean"},
    "bn": {"method": "bn"},
}


def run_batch(model, batch):
    return model(batch)


CASES = [
    pytest.param(build, options, id=f"{build.__name__}, {name}")
    for build in (chain, Residual, Shared)
    for name, options in OPTIONS.items()
    if (build, name) != (Shared, "bn")  # it has no BatchNorm
]
CASES += [
    pytest.param(Untraceable, {}, id="Untraceable, refit"),
    pytest.param(Untraceable, {"method": "asr", "recalibrate": "exact"}, id="Untraceable, asr and BatchNorm"),
    pytest.param(Residual, {"forward_fn": run_batch}, id="Residual, forward_fn"),
    pytest.param(Residual, {"forward_fn": run_batch, "means": "kernel"}, id="Residual, forward_fn, means"),
    pytest.param(Residual, {"forward_fn": run_batch, "method": "bn", "memory": "20KB"}, id="Residual, forward_fn, bn"),
]
# those of a walk by suspended passes too
INTERRUPTED = {**OPTIONS, "forward_fn": {"forward_fn": run_batch, "batch_size": 8, "recalibrate": "exact"}}


def state(model):
    """All that a failed repair could have changed."""
    return [
        {key: value.clone() for key, value in model.state_dict().items()},
        [(name, type(module), module.training) for name, module in model.named_modules()],
        [(name, p.requires_grad) for name, p in model.named_parameters()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        torch.get_rng_state(),
    ]


def unchanged(model, before):
    now = state(model)
    assert same_state(before[0], now[0])
    assert before[1:4] == now[1:4]
    assert torch.equal(before[4], now[4])
    assert not running_passes()


def repair(model, dense, calibration, **options):
    return resuscitate.repair(model, dense, calibration, progress=False, **options)


class TestInTheProcess:
    @pytest.mark.usefixtures("two_at_a_time")
    @pytest.mark.parametrize(("build", "options"), CASES)
    def test_a_loader_that_raises_at_any_batch(self, build, options):
        dense = seeded(build)
        model = pruned_copy(dense)
        before = state(model)
        for good in range(6):

            def loader(good=good):
                yield from images(40).split(8)[:good]
                raise OSError("disk gone")

            with pytest.raises(OSError, match="disk gone"):
                repair(model, dense, loader(), **options)
            unchanged(model, before)

    @pytest.mark.usefixtures("two_at_a_time")
    @pytest.mark.parametrize(("build", "options"), CASES)
    @pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
    def test_out_of_memory_or_an_interrupt_in_any_layer_at_any_time(self, build, options, error, monkeypatch):
        """A layer's own forward fails at its n-th call, for every n, or for twenty or more of them."""
        dense = seeded(build)
        model = pruned_copy(dense)
        before = state(model)
        original, calls, fatal = nn.functional.conv2d, itertools.count(1), 0

        def failing(*args, **kwargs):
            if next(calls) == fatal:  # in whichever thread
                raise error("no memory left")
            return original(*args, **kwargs)

        monkeypatch.setattr(nn.functional, "conv2d", failing)
        monkeypatch.setattr(
            nn.Conv2d, "_conv_forward", lambda self, x, w, b: failing(x, w, b, self.stride, self.padding)
        )
        for _ in range(2):  # the first time has one look more at the images
            calls = itertools.count(1)
            repair(copy.deepcopy(model), dense, images(), **options, batch_size=8)
        total = next(calls) - 1
        assert total >= 3
        for at in range(1, total + 1, max(1, total // 20)):
            calls, fatal = itertools.count(1), at
            with pytest.raises(error):
                repair(model, dense, images(), **options, batch_size=8)
            unchanged(model, before)

    # Python ignores an interrupt within a `__del__`, with this warning
    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
    @pytest.mark.usefixtures("two_at_a_time")
    @pytest.mark.parametrize("options", INTERRUPTED.values(), ids=INTERRUPTED)
    def test_an_interrupt_at_any_of_our_own_lines(self, options):
        """What SIGINT does, at twenty points of a repair: the model is as it was, or wholly repaired."""
        dense = seeded(chain)
        model = pruned_copy(dense)
        before, repaired = state(model), copy.deepcopy(model)
        repair(copy.deepcopy(model), dense, images(), **options)  # the first time has one look more at the images
        total = traced(partial(repair, repaired, dense, images(), **options), None)
        after = state(repaired)
        for at in range(1, total, max(1, total // 20)):
            report = None
            with contextlib.suppress(KeyboardInterrupt):
                traced(partial(repair, model, dense, images(), **options), at)
                report = True
            if report is None:
                unchanged(model, before)
            else:  # an interrupt within a generator's clean-up may be swallowed by Python itself
                unchanged(model, after)
                model = pruned_copy(dense)

    def test_an_interrupt_as_a_mode_of_torch_ends_leaves_no_mode(self, monkeypatch):
        """Python looks for signals as a function begins, also where that is the `__exit__` of a mode."""
        dense = seeded(chain)
        model = pruned_copy(dense)
        before = state(model)

        def interrupted(mode, *_):
            torch.set_grad_enabled(False)
            raise KeyboardInterrupt

        monkeypatch.setattr(resuscitate.network.operands._ProductCatcher, "__exit__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            repair(model, dense, images(), method="refit")
        assert not torch.overrides._get_current_function_mode_stack()
        assert torch.is_grad_enabled()
        unchanged(model, before)

    def test_one_journal_takes_one_run_at_a_time(self, tmp_path):
        dense = seeded(chain)
        model = pruned_copy(dense)

        pytest.importorskip("fcntl")
        first = repair(model, dense, [images()], resume=tmp_path / "run.journal")
        held = resuscitate.utils.files.open_locked(tmp_path / "run.journal")
        with pytest.raises(JournalError, match=r"run\.journal is another run's, which still goes on"):
            repair(pruned_copy(dense), dense, [images()], resume=tmp_path / "run.journal")
        held.close()
        again = repair(pruned_copy(dense), dense, [images()], resume=tmp_path / "run.journal")
        assert (first.resumed, again.resumed) == (0, 4)


def traced(run, at):
    """Run with a SIGINT at the `at`-th line of the package that is executed; how many lines there were.

    The lines of the forward passes' threads count too; the signal is the main thread's.
    """
    package, lines = str(Path(resuscitate.__file__).parent), itertools.count(1)
    # the line of a `with` is traced once more as it is left; Python looks for no signal before it has released a lock
    files = {str(path): path.read_text().splitlines() for path in Path(package).rglob("*.py")}
    locks = {(name, at) for name, text in files.items() for at, each in enumerate(text, 1) if "lock:" in each}
    # where signals are taken care of, Python looks for them at the calls alone, not at each line
    elsewhere = str(Path(package, "utils", "interrupts.py"))

    def line(frame, event, arg):
        if event == "line" and (frame.f_code.co_filename, frame.f_lineno) not in locks and next(lines) == at:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return line

    def call(frame, event, arg):
        name = frame.f_code.co_filename
        # an interrupt as a `__del__` begins is lost, with all that this would do: Python has no means against it
        ours = name.startswith(package) and name != elsewhere and frame.f_code.co_name != "__del__"
        return line if ours else None

    previous = sys.gettrace()
    threading.settrace(call)
    sys.settrace(call)
    try:
        run()
    finally:
        sys.settrace(previous)
        threading.settrace(previous)
    return next(lines) - 1


@pytest.mark.slow
def test_a_hundred_repairs_in_one_process_leave_memory_flat():
    """Tensors, open files and threads, which are counted exactly, and resident memory to 16 MiB."""
    program = """
        import gc, os, threading
        import torch
        import resuscitate
        from tests.networks import Residual, chain, images, pruned_copy, seeded

        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        def look():
            gc.collect()
            tensors = sum(isinstance(found, torch.Tensor) for found in gc.get_objects())
            return tensors, len(os.listdir("/proc/self/fd")), threading.active_count()

        dense, x = seeded(lambda: chain(width=24)), images(24)
        model = pruned_copy(dense)
        budget, suspended = {"memory": "100KiB"}, {"forward_fn": lambda model, batch: model(batch), "batch_size": 8}
        options = [{}, {"method": "bn"}, {"method": "asr", **budget}, {"method": "asr", "recalibrate": "exact"}]
        options += [{"method": "asr", **suspended}, {**budget, **suspended}, budget, suspended]
        for turn in range(100):
            report = resuscitate.repair(model, dense, x, **options[turn % 8], progress=False)
            report.undo()
            del report
            if turn == 19:
                before, memory = look(), resident()
        assert look() == before, (before, look())
        assert resident() - memory < 16 << 20, (memory, resident())
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    ended = subprocess.run(command, env=environment, timeout=300, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
