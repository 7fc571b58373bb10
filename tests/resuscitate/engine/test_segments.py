"""Segments of the graph walk without nodes: two requests in a row that measure the same value."""

import pytest
import torch
from torch import nn

from resuscitate.engine.writer import Writer
from tests.networks import seeded
from tests.resuscitate.engine.walks import both_walks, repaired


def upsampling():
    """A convolution that reads a transposed one directly, at the end."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, stride=2), nn.Conv2d(8, 4, 1)
    )


class ReadTwice(nn.Module):
    """A BatchNorm and a sum read the last convolution."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.b(self.a(x).relu())
        return self.bn(y).relu() + y


@pytest.mark.parametrize(
    ("build", "options"),
    [(upsampling, {"method": "refit"}), (ReadTwice, {"method": "asr", "recalibrate": "exact"})],
    ids=["refit", "asr, exact"],
)
def test_the_last_request_may_measure_what_the_one_before_does(build, options):
    both_walks(build, options)


class _KilledError(Exception):
    pass


def test_a_refit_resumes_behind_a_layer_that_measures_what_a_known_one_does(tmp_path, monkeypatch):
    dense = seeded(lambda: nn.Sequential(*upsampling(), nn.ReLU(), nn.Conv2d(4, 4, 3)))
    expected, _ = repaired(dense)
    write, written = Writer.write, []

    def killed_after_three(self, measurement, update):
        write(self, measurement, update)
        written.append(measurement.name)
        if len(written) == 3:
            raise _KilledError

    monkeypatch.setattr(Writer, "write", killed_after_three)
    journal = tmp_path / "journal"
    with pytest.raises(_KilledError):
        repaired(dense, resume=journal)
    monkeypatch.undo()
    model, report = repaired(dense, resume=journal)
    assert (report.walk, report.resumed) == ("graph", 3)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
