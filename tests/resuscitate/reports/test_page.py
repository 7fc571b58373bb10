"""The page: one file that needs no other, shows what the report holds, and lets nothing of it through as markup."""

import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import resuscitate
from resuscitate.errors import ResuscitateError
from resuscitate.reports.page import render
from resuscitate.reports.page.figures import linear_axis, log_axis, slope
from tests.networks import chain, images, pruned_copy, seeded

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Strict(HTMLParser):
    """Raises where tags do not close as they open; collects the text and the tags."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(page):
    parser = Strict()
    parser.feed(page)
    assert parser.open == []
    return parser


def report():
    dense = seeded(chain)
    model = copy.deepcopy(dense)
    resuscitate.sparsify(model, 0.8)
    found = resuscitate.repair(model, dense, images(), method="asr").to_dict()
    variances = {"dense": [0.1, 1.0, 10.0, 0.0], "pruned": [0.01, 0.2, 1.0, 0.0], "repaired": [0.1, 1.1, 9.0, 0.0]}
    return {
        **found,
        "scores": {"dense": 99.0, "pruned": 12.5, "repaired": 97.25},
        "channels": {"3": variances},
        "masks": [row._asdict() for row in resuscitate.Masks.from_zeros(model).table()],
        "provenance": {
            "method": "asr",
            "command": "resuscitate repair -m x",
            "versions": {"torch": "9"},
            "date": "now",
        },
    }


def test_it_shows_what_the_report_holds():
    document = report()
    parser = read(render(document))
    text = " ".join(parser.text)
    for said in (
        "97.2 %",
        "12.5 %",
        "resuscitate repair -m x",
        "torch 9",
        "slope 0.98",
        "79.99%",
        "Time",
        "Variance of each layer",
    ):
        assert said in text, said
    heads = [tag for tag, _ in parser.tags].count("th")
    assert heads == 11  # no column without a value
    assert [tag for tag, _ in parser.tags].count("tr") == 1 + len(document["layers"])
    assert "Conv2d" in text


@pytest.mark.parametrize(
    ("options", "layers", "batchnorms"),
    [
        ({"method": "asr"}, "3 of 4", None),
        ({"method": "mean"}, "4 of 4", None),
        ({"method": "refit"}, "4 of 4", None),
        ({"method": "asr", "recalibrate": "exact", "skip_last": False}, "3 of 4", "3"),
        ({"method": "bn"}, None, "3"),
    ],
    ids=["asr", "mean", "refit", "asr and BatchNorm", "bn"],
)
def test_layers_and_batchnorms_are_counted_apart(options, layers, batchnorms):
    dense = seeded(chain)
    found = resuscitate.repair(pruned_copy(dense), dense, images(), **options, progress=False)
    cards = dict(re.findall(r'<div class="card"><b>(.*?)</b>(.*?)</div>', render(found.to_dict())))
    cards = {name: value for value, name in cards.items()}
    assert cards.get("layers repaired") == layers
    assert cards.get("BatchNorms re-estimated") == batchnorms
    assert cards["images"] == "24"


def test_a_reader_who_has_not_run_it_is_told_what_came_of_it():
    dense = seeded(chain)
    model = copy.deepcopy(dense)
    masks = [row._asdict() for row in resuscitate.sparsify(model, 0.8).table()]
    found = resuscitate.repair(model, dense, images(), progress=False).to_dict() | {"masks": masks}
    page = render(found)
    text = " ".join(read(page).text)
    before, after = (f"{found['agreement'][when]:.1%}" for when in ("before", "after"))
    done = (
        "A pruned network was repaired from 24 unlabelled images. 80.0% of the original weights are pruned. "
        "On 8 of these images, which it used"
    )
    came = f"it gives the same class as the network before pruning for {after} (without repair: {before})."
    assert f"{done}, {came}" in text
    assert "Error of each layer" in text
    assert "Variance of each layer" not in text
    errors = re.findall(r"<title>11, (\w+): ([\d.]+)</title>", page)
    assert errors == [
        ("before", f"{found['layers'][-1]['error_before']:.3g}"),
        ("after", f"{found['layers'][-1]['error_after']:.3g}"),
    ]
    assert "what the words mean" in text
    assert "was undone" in render(found | {"undone": True})


def test_a_search_shows_what_it_tried_and_an_allocation_its_name():
    trials = [
        {"sparsity": 0.75, "agreement": 0.99, "seconds": 1.0},
        {"sparsity": 0.5, "agreement": 1.0, "seconds": 1.0},
    ]
    document = report() | {"trials": trials, "target": 0.98, "allocation": {"name": "measured", "exponent": 0.5}}
    text = " ".join(read(render(document)).text)
    assert text.index("50.0% pruned") < text.index("75.0% pruned")
    assert "wanted: 98.0%" in text
    assert "measured allocation (factors to the power 0.5)" in text


def test_of_a_long_name_the_end_is_shown_and_the_whole_is_a_hint():
    document = report()
    document["layers"][1]["name"] = "resnet.encoder.stages.0.layers.0.convolution"
    page = render(document)
    assert ">….0.layers.0.convolution</text>" in page
    assert "<title>resnet.encoder.stages.0.layers.0.convolution</title>" in page


def test_it_needs_nothing_beside_itself():
    page = render(report())
    assert not re.findall(r"(?:src|href|@import|url\()", page)
    assert "http" not in page
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


def test_its_pictures_are_sound_svg_within_their_frames():
    pictures = re.findall(r"<svg.*?</svg>", render(report()), re.DOTALL)
    assert len(pictures) == 6
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        _, _, width, height = map(float, root.get("viewBox").split())
        for part in root.iter():
            for key in ("x", "x1", "x2", "cx"):
                assert 0 <= float(part.get(key, 0)) <= width
            for key in ("y", "y1", "y2", "cy"):
                assert 0 <= float(part.get(key, 0)) <= height


def test_names_and_notes_are_text_not_markup():
    document = report()
    evil = "<script>alert(1)</script>\"'&"
    document["layers"][0]["name"] = document["layers"][1]["reason"] = evil
    document["notes"] = [evil]
    document["scores"] = {evil: 3.0}
    document["masks"][0]["layer"] = evil
    document["channels"] = {evil: document["channels"]["3"]}
    document["provenance"] = {"command": evil, "method": evil, "options": {"model": evil}, "versions": {evil: evil}}
    parser = read(render(document))
    assert [tag for tag, _ in parser.tags].count("script") == 1
    assert "alert(1)" not in "".join(re.findall(r"<script>(.*?)</script>", render(document), re.DOTALL))


def test_reports_of_steps_and_rounds():
    dense = seeded(chain)
    steps = resuscitate.compress(copy.deepcopy(dense), 0.8, images(), steps=3).to_dict()
    model = copy.deepcopy(dense)
    masks = resuscitate.sparsify(model, 0.9)
    rounds = resuscitate.regrow(model, dense, masks, 0.7, images(), rounds=2).to_dict()
    for document, count in ((steps, 3), (rounds, 2)):
        parser = read(render(json.loads(json.dumps(document))))
        text = " ".join(parser.text)
        assert "Step by step" in text
        assert "What each layer keeps" in text
        assert [tag for tag, _ in parser.tags].count("tr") == 1 + count + 1 + 4


@pytest.mark.parametrize(
    "document",
    [{}, {"layers": []}, {"layers": [{"name": "x"}]}, {"layers": 3}, {"steps": [3]}, {"masks": [{"kept": 1}]}],
    ids=str,
)
def test_what_is_no_report_is_refused(document):
    with pytest.raises(ResuscitateError, match="report"):
        render(document)


def test_a_slope_by_hand():
    pairs = [(x, 3 * x**0.7) for x in (0.1, 1.0, 5.0)]
    assert slope(pairs) == pytest.approx(0.7)
    assert slope([(0.0, 1.0), (1.0, 0.0), (2.0, 2.0)]) is None


@settings(max_examples=50)
@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=8))
def test_an_axis_holds_all_its_values_between_its_first_and_last_mark(values):
    place, ticks = log_axis(values, 100, 500)
    assert all(99.9 <= place(value) <= 500.1 for value in values)
    assert place(ticks[0]) == pytest.approx(100)
    assert len(ticks) <= 10


@settings(max_examples=50)
@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=8))
@example([1.000000001])
def test_a_linear_axis_begins_at_zero_and_holds_all_its_values(values):
    place, ticks = linear_axis(values, 100, 500)
    assert all(100 <= place(value) <= 500.1 for value in values)
    assert place(ticks[0]) == 100
    assert place(ticks[-1]) == pytest.approx(500)
    assert len(ticks) <= 6


def test_a_browser_sorts_and_reads_it(tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    press = "<script>document.querySelectorAll('th button')[5].click()</script></body>"
    (tmp_path / "page.html").write_text(render(report()).replace("</body>", press))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
        "--window-size=400,800",
    ]
    done = subprocess.run(
        [browser, *options, "--dump-dom", f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    dead = [int(row) for row in re.findall(r"<tr>(?:<td[^>]*>[^<]*</td>){5}<td[^>]*>(\d+)</td>", done.stdout)]
    assert dead == sorted(dead)
    assert 'aria-sort="ascending"' in done.stdout
