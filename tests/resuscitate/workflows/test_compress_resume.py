"""Compression that was interrupted goes on from its journals, and refuses those of another one."""

import sys

import pytest

from resuscitate import compress
from resuscitate.errors import JournalError
from tests.compare import same
from tests.networks import chain, images, seeded


@pytest.mark.parametrize("killed", [3, 6], ids=["before a walk", "within a walk"])
def test_an_interrupted_run_goes_on_from_its_journals(killed, tmp_path, monkeypatch):
    undisturbed = seeded(chain)
    options = {"steps": 3, "allocation": "global"}
    compress(undisturbed, 0.8, images(), **options)
    module = sys.modules["resuscitate.methods.refit"]
    original, fits = module.attempt, []

    def interrupted(*args, **given):
        fits.append(1)
        if len(fits) == killed:
            raise KeyboardInterrupt
        return original(*args, **given)

    model = seeded(chain)
    monkeypatch.setattr(module, "attempt", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(model, 0.8, images(), **options, resume=tmp_path / "journals")
    report = compress(model, 0.8, images(), **options, resume=tmp_path / "journals")
    assert len(fits) == 1 + 3 * 4  # nothing is fitted twice but for the one that was interrupted
    assert sum(step.resumed for step in report.steps) == killed - 1
    assert same(model, undisturbed)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"sparsity": 0.9}, "sparsity, steps"),
        ({"steps": 2}, "steps"),
        ({"steps": [0.5, 0.8]}, "steps"),
        ({"walks": 3}, "walks"),
        ({"curvature": False}, "curvature"),
        ({"allocation": "erk"}, "allocation"),
        ({"pattern": "filter"}, "pattern"),
        ({"forward_fn": lambda m, x: m(x)}, "forward_fn"),
        ({"relu_aware": False}, r"method \(relu_aware\)"),
        ({"ridge": 0.5}, r"method \(ridge\)"),
        ({"seed": 1}, "seed"),
        ({"dtype": "bf16"}, "dtype"),
        ({"exclude": "11"}, "exclude"),
        ({"include": ["0", "3"]}, "include"),
        ({"densities": {"0": 1.0}}, "densities"),
        ({"min_per_layer": 9}, "min_per_layer"),
        ({"min_per_channel": 1}, "min_per_channel"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_the_folder_of_another_compression_is_refused_and_the_message_names_the_option(changes, options, tmp_path):
    given = {"sparsity": 0.8, "calibration": images(), "steps": 3, "resume": tmp_path / "journals"}
    compress(seeded(chain), **given)
    before = {path: path.read_bytes() for path in (tmp_path / "journals").iterdir()}
    model = seeded(chain)
    with pytest.raises(
        JournalError, match=rf"run\.journal is the journal of another run: options \({options}\) differ"
    ):
        compress(model, **given | changes)
    assert same(model, seeded(chain))
    assert {path: path.read_bytes() for path in (tmp_path / "journals").iterdir()} == before
    assert [step.resumed for step in compress(seeded(chain), **given).steps] == [4, 4, 4]


def test_the_folder_of_another_model_or_other_images_is_refused(tmp_path):
    given = {"steps": 2, "resume": tmp_path / "journals"}
    compress(seeded(chain), 0.8, images(), **given)
    for model, x, part in ((seeded(chain, 3), images(), "model"), (seeded(chain), images(seed=5), "images")):
        with pytest.raises(JournalError, match=f"journal of another run: {part} differ"):
            compress(model, 0.8, x, **given)
