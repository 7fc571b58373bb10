"""The command in a child process, killed or starved at chosen points; then the user's folder is looked at."""

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file

import resuscitate
from resuscitate import cli
from tests.compare import same_state
from tests.user import MODEL

resource = pytest.importorskip("resource")


IMAGES = ("-c", "images.npz")
DENSE = ("-m", MODEL, "--dense", "dense.safetensors", *IMAGES)
REPAIR = ("repair", *DENSE, "--pruned", "pruned.safetensors")
OUTPUTS = ("-o", "out.safetensors", "--report", "run.json")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
class TestFaults:
    @pytest.fixture(autouse=True)
    def stands(self, user):
        """Whatever happens, the user's own files stay."""
        before = contents(user)
        yield
        after = contents(user)
        assert {name: after.get(name) for name in before} == before

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
    def test_a_signal_at_any_point(self, user, number):
        words = [*REPAIR, *OUTPUTS, "--resume", "run.journal", "--memory", "1KiB", "--scratch", "."]
        inputs = set(contents(user))
        calls = count_calls(words)
        assert done(user) == {"out.safetensors", "run.json"} | inputs
        expected = load("out.safetensors")
        ended = set()
        points = [*range(calls // 8, calls, calls // 6), *range(calls - 36, calls, 7)]
        for point in points:
            for name in ("out.safetensors", "run.json"):
                (user / name).write_text("old")
            code = in_child(words, lambda point=point: at_call(point, lambda: os.kill(os.getpid(), number)))
            ended.add(code)
            # what is there is whole: the old file or the new one
            if (user / "out.safetensors").read_bytes() != b"old":
                assert same_state(load("out.safetensors"), expected)
            if (user / "run.json").read_text() != "old":
                assert json.loads((user / "run.json").read_text())["method"] == "refit"
            left = done(user) - inputs - {"out.safetensors", "run.json", "run.journal"}
            if number == signal.SIGINT:
                assert not left
            # a kill gives no time to tidy up: a temporary file at most, which the next run removes
            assert all(name.endswith(".tmp") for name in left)
            assert in_child(words) == 0
            assert done(user) == {"out.safetensors", "run.json"} | inputs
            assert same_state(load("out.safetensors"), expected)
        assert ended - {0} == {130 if number == signal.SIGINT else -number}

    @pytest.mark.parametrize(
        ("words", "written"),
        [
            ([*REPAIR, "-o", "out.safetensors"], "out.safetensors"),
            ([*REPAIR, *OUTPUTS, "--resume", "run.journal"], "run.journal"),
            ([*REPAIR, *OUTPUTS, "--memory", "1KiB", "--scratch", "."], "scratch"),
            (
                ["compress", *DENSE, "--sparsity", "0.5", "--steps", "2", *OUTPUTS, "--masks", "masks.safetensors"],
                "json",
            ),
            (["stats", *DENSE, "-o", "out.safetensors"], "out.safetensors"),
            (["export", "-m", MODEL, "--weights", "dense.safetensors", *IMAGES, "-o", "out.pt2"], "out.pt2"),
        ],
        ids=["weights", "journal", "scratch", "compress", "stats", "export"],
    )
    def test_a_disk_that_fills_up(self, user, words, written, capfd):
        inputs = set(contents(user))
        left = {"run.journal"} if written == "run.journal" else set()
        assert in_child(words, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))) == 1
        said = capfd.readouterr().err
        assert said.startswith("Error: ")
        assert said.count("\n") == 1
        assert "File too large" in said
        assert written in said
        assert done(user) - inputs == left

    def test_two_processes_on_one_output(self, user):
        inputs = set(contents(user))
        both = [in_child([*REPAIR, *OUTPUTS, "--method", method], wait=False) for method in ("refit", "bn")]
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in both] == [0, 0]
        assert done(user) - inputs == {"out.safetensors", "run.json"}
        assert len(load_file("out.safetensors")) == len(load_file("dense.safetensors"))
        assert json.loads((user / "run.json").read_text())["method"] in ("refit", "bn")

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write to")
    @pytest.mark.parametrize("option", ["-o", "--report"])
    def test_where_nothing_can_be_written_is_said_before_any_work(self, user, option, capfd):
        names = {"-o": "out.safetensors", "--report": "run.json"}
        names[option] = f"/proc/self/{names[option]}"
        words = [word for pair in names.items() for word in pair]
        assert in_child([*REPAIR, *words], lambda: setattr(resuscitate.data.images, "ImageStream", None)) == 1
        assert "cannot write into this folder" in capfd.readouterr().err


def load(path):
    """The tensors, none of them still in the file, which is written over in place here."""
    return {key: value.clone() for key, value in load_file(path).items()}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def done(folder):
    return {path.name for path in folder.iterdir() if path.is_file()}


def in_child(words, prepare=lambda: None, wait=True):
    """Run the command in a child of this process, which has imported all; its exit code, or minus the signal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12, of threads; the child uses none of them
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if wait else child
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        prepare()
        cli.app([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 99
    finally:
        os._exit(code)


def at_call(point, act):
    """Act at the `point`-th call of a function of the package in this process."""
    package, calls = str(Path(resuscitate.__file__).parent), [0]

    def profile(frame, event, arg):
        if event == "call" and frame.f_code.co_filename.startswith(package):
            calls[0] += 1
            if calls[0] == point:
                sys.setprofile(None)
                act()

    sys.setprofile(profile)
    return calls


def count_calls(words):
    """How many there are in the whole command, by way of a file."""
    calls = []

    def count():
        calls.append(at_call(-1, None))
        original = os._exit

        def leave(code):
            sys.setprofile(None)
            Path("calls").write_text(str(calls[0][0]))
            original(code)

        os._exit = leave

    assert in_child(words, count) == 0
    found = int(Path("calls").read_text())
    Path("calls").unlink()
    return found
