"""A plugin of pytest that continues a run that was stopped: `-p benchmarks.speed.resumed_tests --passed FILE`.

FILE lists the tests that have passed, one a line. They do not run again.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option `--passed`."""
    parser.addoption("--passed", type=Path, help="file that lists the tests that have passed")


def pytest_configure(config: pytest.Config) -> None:
    """Use the file."""
    config.pluginmanager.register(Passed(config.getoption("passed")))


class Passed:
    """Leaves out the tests that a file lists, and adds to it each test that passes, as soon as it has.

    With pytest-xdist the reports of several tests arrive in turns; each process adds the same names, which is harmless.
    """

    def __init__(self, listed: Path) -> None:
        self.listed = listed
        self.passed: set[str] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out the tests that are listed."""
        known = set(self.listed.read_text().splitlines()) if self.listed.exists() else set()
        items[:] = [item for item in items if item.nodeid not in known]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add the test once its fixtures are gone; a skipped test has not passed."""
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)
        if report.when == "teardown" and report.passed and report.nodeid in self.passed:
            with self.listed.open("a") as file:
                file.write(f"{report.nodeid}\n")
