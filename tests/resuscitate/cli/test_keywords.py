"""Messages name options as the shell has them."""

import logging

import pytest

from resuscitate.cli.keywords import as_flags, warnings_with_flags

NAMES = {"keep_worse", "skip_first", "memory", "sparsity", "on_nonfinite", "method", "steps", "scratch"}


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("keep_worse=True keeps it", "--keep-worse keeps it"),
        ("; pass skip_first=False", "; pass --no-skip-first"),
        ("free space, name another with scratch=, or give more memory=", None),
        ("sparsity=0.5 removes 1e-3; give memory='4GiB'", "--sparsity 0.5 removes 1e-3; give --memory 4GiB"),
        ("leave them out with on_nonfinite='skip'", "leave them out with --on-nonfinite skip"),
        ("pass forward_fn=, or Exact(samples=3)", "pass forward_fn=, or Exact(samples=3)"),
        ("steps=[0.9, 0.5] must ascend", "steps=[0.9, 0.5] must ascend"),
        ("method=Refit(ridge=1) here", "method=Refit(ridge=1) here"),
        ("repair(memory=3)", "repair(memory=3)"),
        ("a/memory=b.npz?x", "a/memory=b.npz?x"),
    ],
)
def test_keywords_of_the_library_are_written_as_flags(message, words):
    assert as_flags(message, NAMES) == (words or "free space, name another with --scratch, or give more --memory")


def test_warnings_have_flags_within_the_context_alone(caplog):
    log = logging.getLogger("resuscitate")
    with warnings_with_flags(NAMES):
        log.warning("%s: keep_worse=True keeps it", "undone")
    log.warning("keep_worse=True keeps it")
    assert [record.getMessage() for record in caplog.records] == [
        "undone: --keep-worse keeps it",
        "keep_worse=True keeps it",
    ]
