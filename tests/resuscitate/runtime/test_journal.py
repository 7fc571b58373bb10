"""A killed run goes on from its journal, measures nothing twice, and ends bit-identical."""

import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch

import resuscitate
from resuscitate import EMA, Exact
from resuscitate.errors import JournalError
from resuscitate.runtime.journal import MAGIC, Journal
from resuscitate.statistics.outputs import OutputMoments
from tests.compare import same
from tests.networks import Residual, Shared, chain, images, pruned_copy, seeded

PROGRAM = """
    import os, signal, sys
    import torch
    import resuscitate
    from resuscitate.runtime.journal import Journal
    from tests.networks import *

    torch.set_num_threads(1)
    build, when, journal, options = eval(sys.argv[1]), int(sys.argv[2]), sys.argv[3], eval(sys.argv[4])
    append, seen = Journal._append, []

    def dying(self, record):
        seen.append(record)
        if len(seen) == abs(when):
            if when > 0:  # in the middle of an append
                self._file.write(record[: len(record) // 2])
                self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, record)

    Journal._append = dying
    dense = seeded(build)
    resuscitate.repair(pruned_copy(dense), dense, images(), batch_size=7, resume=journal, **options)
"""


def repaired(build, **options):
    dense = seeded(build)
    model = pruned_copy(dense)
    return model, resuscitate.repair(model, dense, images(), batch_size=7, **options)


@pytest.mark.parametrize("when", [1, 2, 3, -2, -3], ids=lambda n: f"{'in' if n > 0 else 'before'} append {abs(n)}")
@pytest.mark.parametrize(
    ("build", "options"),
    [
        (chain, {"method": "channelwise", "recalibrate": "exact"}),
        (Shared, {"method": "asr", "skip_first": False}),
        (Residual, {"method": "asr", "schedule": "parallel", "recalibrate": "exact"}),
        (chain, {"method": "refit"}),
    ],
    ids=["node walk", "prefix walk", "parallel", "refit"],
)
def test_a_killed_run_resumes_and_ends_bit_identical(build, options, when, tmp_path):
    journal = tmp_path / "journal"
    program = [sys.executable, "-c", textwrap.dedent(PROGRAM), build.__name__, str(when), str(journal), repr(options)]
    assert subprocess.run(program, timeout=120, check=False).returncode == -9
    undisturbed, _ = repaired(build, **options)
    model, report = repaired(build, **options, resume=journal)
    assert report.resumed == max(abs(when) - 2, 0)
    assert same(model, undisturbed)


def test_every_prefix_of_a_journal_leads_to_the_same_end(tmp_path):
    """Killed anywhere, to the byte: what stands in the file up to there is used, and no more."""
    options = {"method": "channelwise", "recalibrate": "exact", "diagnostics": True}
    whole = tmp_path / "whole"
    undisturbed, first = repaired(chain, **options, resume=whole)
    content = whole.read_bytes()
    counts = set()
    for length in sorted({0, 5, len(MAGIC), len(content), *range(30, len(content), 101)}):
        part = tmp_path / "part"
        part.write_bytes(content[:length])
        model, report = repaired(chain, **options, resume=part)
        assert same(model, undisturbed)
        assert len(part.read_bytes()) == len(content)
        assert [row.explained for row in report.layers] == [row.explained for row in first.layers]
        assert [(row.status, row.reason) for row in report.layers] == [(row.status, row.reason) for row in first.layers]
        counts.add(report.resumed)
    assert counts == set(range(6))  # two layers and three BatchNorms


def test_what_is_known_is_not_measured_again(tmp_path, monkeypatch):
    journal = tmp_path / "journal"
    repaired(chain, method="channelwise", recalibrate="exact", resume=journal)
    calls, update = [], OutputMoments.update
    monkeypatch.setattr(OutputMoments, "update", lambda *given: calls.append(given) or update(*given))
    repaired(chain, method="channelwise", recalibrate="exact", resume=journal)
    assert not calls


def test_a_checksum_that_fails_ends_what_is_believed(tmp_path):
    journal = tmp_path / "journal"
    undisturbed, _ = repaired(chain, resume=journal)
    content = bytearray(journal.read_bytes())
    content[-3] ^= 1
    journal.write_bytes(content)
    model, report = repaired(chain, resume=journal)
    assert report.resumed == 3
    assert same(model, undisturbed)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"method": "channelwise"}, "options"),
        ({"ridge": 0.1}, "options"),
        ({"include": "3"}, "options"),
        ({"calibration": images(seed=5)}, "images"),
        ({"dense": seeded(chain, 3)}, "dense"),
        ({"model": pruned_copy(seeded(chain), 0.7)}, "model"),
    ],
    ids=lambda c: next(iter(c)) if isinstance(c, dict) else None,
)
def test_the_journal_of_another_run_is_refused_and_nothing_is_changed(change, part, tmp_path):
    journal = tmp_path / "journal"
    repaired(chain, resume=journal)
    content, dense = journal.read_bytes(), seeded(chain)
    given = {"model": pruned_copy(dense), "dense": dense, "calibration": images(), **change}
    before = {key: value.clone() for key, value in given["model"].state_dict().items()}
    with pytest.raises(JournalError, match=rf"journal of another run: .*{part}.* differ"):
        resuscitate.repair(**given, batch_size=7, resume=journal)
    assert journal.read_bytes() == content
    assert all(torch.equal(value, before[key]) for key, value in given["model"].state_dict().items())


CUT = {"batches": 2, "batch_size": 8}


def scaled(model, batch, by=1.0):
    return model(batch * by)


def masked(**options):
    return {"masks": resuscitate.Masks.from_zeros(pruned_copy(seeded(chain))), **options}


@pytest.mark.parametrize(
    ("first", "then", "option"),
    [
        ({}, {"forward_fn": scaled}, "forward_fn"),
        ({"forward_fn": scaled}, {"forward_fn": partial(scaled, by=2.0)}, "forward_fn"),
        ({"forward_fn": lambda m, x: m(x)}, {"forward_fn": lambda m, x: m(x + 1)}, "forward_fn"),
        ({}, {"seed": 1}, "seed"),
        ({}, {"on_nonfinite": "skip"}, "on_nonfinite"),
        ({}, {"include": ["0", "3"]}, "layers"),
        ({}, {"exclude": "3"}, "layers"),
        ({}, {"skip_last": True}, "layers"),
        ({}, {"diagnostics": True}, "diagnostics"),
        ({"diagnostics": True}, {}, "diagnostics"),
        ({"method": "asr"}, {"method": "asr", "diagnostics": True}, "diagnostics"),
        ({}, masked(), "masks"),
        ({}, {"relu_aware": False}, "relu_aware"),
        ({}, {"means": "filter"}, "means"),
        ({}, {"dtype": "bf16"}, "dtype"),
        ({}, {"recalibrate": "exact"}, "recalibrate"),
        ({"recalibrate": "exact"}, {"recalibrate": Exact(frozen="recalibrate")}, "frozen"),
        ({"method": "asr"}, {"method": "asr", "prior": "mean"}, "prior"),
        ({"method": "asr"}, {"method": "asr", "bias": False}, "bias"),
        ({"method": "asr"}, {"method": "asr", "schedule": "parallel"}, "schedule"),
        ({"recalibrate": EMA(**CUT)}, {"recalibrate": EMA(**CUT, momentum=0.5)}, "momentum"),
        ({}, {"gain_samples": 8}, "images"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "default",
)
def test_a_journal_under_another_option_is_refused_and_the_message_names_it(first, then, option, tmp_path):
    journal = tmp_path / "journal"
    repaired(chain, **first, resume=journal)
    content = journal.read_bytes()
    with pytest.raises(JournalError, match=rf"journal of another run: .*options \(.*\b{option}\b.*\) differ"):
        repaired(chain, **then, resume=journal)
    assert journal.read_bytes() == content
    _, report = repaired(chain, **first, resume=journal)
    assert report.resumed >= 2


def test_what_changes_no_result_may_differ(tmp_path):
    journal = tmp_path / "journal"
    repaired(chain, forward_fn=partial(scaled, by=2.0), resume=journal)
    harmless = {"memory": "1GiB", "scratch": tmp_path, "device": "cpu", "progress": False}
    _, report = repaired(chain, forward_fn=partial(scaled, by=2.0), resume=journal, **harmless)
    assert report.resumed == 4


def test_statistics_that_were_measured_otherwise_are_another_dense_network(tmp_path):
    dense, journal = seeded(chain), tmp_path / "journal"
    plain, half = (resuscitate.DenseStatistics.measure(dense, images(), dtype=dtype) for dtype in (None, "bf16"))
    assert (plain.model, plain.digest) == (half.model, half.digest)
    resuscitate.repair(pruned_copy(dense), plain, images(), resume=journal)
    with pytest.raises(JournalError, match="journal of another run: dense differ"):
        resuscitate.repair(pruned_copy(dense), half, images(), resume=journal)


def test_rank_0_says_whose_journal_it_is(tmp_path):
    """What another rank computes of its own function, with its own device in it, is not compared."""
    from resuscitate.runtime.distributed import Ranks

    class Second(Ranks):
        def __init__(self):
            super().__init__()
            self.rank, self.sent = 1, []

        def broadcast(self, content):
            return self.sent.pop(0)

    with Journal(tmp_path / "journal", {"forward_fn": "on cuda:0"}, Ranks()) as first:
        first.add("conv", {"weight": torch.ones(2)}, {"status": "refitted"})
    second = Second()
    second.sent = [(tmp_path / "journal").read_bytes(), b'{"forward_fn": "on cuda:0"}']
    with Journal(tmp_path / "journal", {"forward_fn": "on cuda:1"}, second) as journal:
        assert list(journal.entries) == ["conv"]


def test_the_same_images_in_another_order_are_other_images_where_only_the_first_count(tmp_path):
    journal, dense = tmp_path / "journal", seeded(chain)
    resuscitate.repair(pruned_copy(dense), dense, images(), gain_samples=8, recalibrate="exact", resume=journal)
    with pytest.raises(JournalError, match="journal of another run: images differ"):
        resuscitate.repair(
            pruned_copy(dense), dense, images().flip(0), gain_samples=8, recalibrate="exact", resume=journal
        )


def test_a_file_that_is_no_journal_is_refused_and_kept(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("do not overwrite")
    with pytest.raises(JournalError, match="is not a journal"):
        repaired(chain, resume=path)
    assert path.read_text() == "do not overwrite"


def test_a_folder_in_the_place_of_a_file_is_named_and_a_file_in_that_of_a_folder(tmp_path):
    with pytest.raises(JournalError, match=r"is a folder, and resume= takes a file here"):
        repaired(chain, resume=tmp_path)
    (tmp_path / "notes.txt").write_text("do not overwrite")
    with pytest.raises(JournalError, match=r"notes\.txt is a file, and resume= takes a folder here"):
        resuscitate.compress(seeded(chain), 0.5, images(), resume=tmp_path / "notes.txt")


def test_it_holds_whatever_tensors_a_layer_wrote(tmp_path):
    from resuscitate.runtime.distributed import Ranks

    tensors = {"weight": torch.randn(3, 2, 5), "bias": torch.randn(3).bfloat16()}
    with Journal(tmp_path / "journal", {"model": "a"}, Ranks()) as journal:
        journal.add("conv", tensors, {"status": "refitted"})
    with Journal(tmp_path / "journal", {"model": "a"}, Ranks()) as journal:
        found, row = journal.entries["conv"]
    assert all(torch.equal(found[key], value) for key, value in tensors.items())
    assert row == {"status": "refitted"}


def test_the_command_line_removes_the_journal_once_all_is_written(tmp_path):
    from safetensors.torch import load_file, save_file
    from typer.testing import CliRunner

    from resuscitate import cli
    from resuscitate.models import digitnet

    dense = seeded(digitnet)
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    save_file(pruned_copy(dense, 0.8).state_dict(), tmp_path / "pruned.safetensors")
    import numpy as np

    np.save(tmp_path / "images.npy", images(20, 1, 8).numpy())
    command = ["repair", "--model", "digitnet", "--calibration", "images.npy", "--pruned", "pruned.safetensors"]
    command += ["--dense", "dense.safetensors"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for name, more in (("plain", []), ("resumed", ["--resume", "journal"])):
            done = CliRunner().invoke(cli.app, [*command, "--output", f"{name}.safetensors", *more])
            assert done.exit_code == 0, done.output
    assert not (tmp_path / "journal").exists()
    plain, resumed = (load_file(tmp_path / f"{name}.safetensors") for name in ("plain", "resumed"))
    assert all(torch.equal(plain[key], resumed[key]) for key in plain)
