"""Progress: a line for each work within another; nothing in a pipe."""

import re

import pytest

from resuscitate.utils import progress
from resuscitate.utils.progress import Bar, track


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def test_work_within_work_has_a_line_of_its_own(capsys):
    for _ in track([0.5, 0.9], "compress", 2, show=True):
        with Bar("refit", ["conv1", "conv2"], 8, show=True) as bar:
            bar.advance("conv1", 8)
            bar.note("error 0.900 -> 0.100")
            bar.advance("conv2", 4)
            progress._displays[0].refresh()
    shown = capsys.readouterr().err
    assert "compress: 2/2" in shown
    assert "refit: 2/2 conv2" in shown
    assert "error 0.900 -> 0.100" in shown
    assert not progress._displays


def test_on_a_narrow_terminal_the_name_of_the_layer_is_cut_off_and_not_the_time_left(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    name = "a_very_long_name_of_a_layer.features.0.block.1.conv1.of.a.model"
    with Bar("refit", [name, "conv2"], 8, show=True) as bar:
        bar.advance(name, 8)
        bar.note("error 0.900 -> 0.100")
        progress._displays[0].refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert re.search(r"(\d|-):(\d\d|--):(\d\d|--) \S{16} refit: 1/2 a_very\w*… +error 0.900 -> 0.100", shown)


def test_a_single_step_counts_its_images(capsys):
    with Bar("dense statistics", ["all layers"], 1000, show=True) as bar:
        bar.advance("all layers", 600)
        bar.advance("all layers", 300)
        progress._displays[0].refresh()
    assert "dense statistics: all layers, image 900/1,000" in capsys.readouterr().err


def test_in_a_pipe_nothing_is_shown(capsys):
    assert list(track([1, 2], "compress", 2)) == [1, 2]
    with Bar("refit", ["conv1"], 8) as bar:
        bar.advance("conv1", 8)
        bar.note("done")
    assert capsys.readouterr().err == ""


def test_an_error_ends_the_display():
    with pytest.raises(RuntimeError), Bar("refit", ["conv1"], 8, show=True):
        raise RuntimeError
    assert not progress._displays
