"""How many images each part of a repair uses: those that were asked for, less those that are held out, and copies."""

import pytest
import torch

import resuscitate
from resuscitate import Exact
from resuscitate.errors import CalibrationError
from tests.networks import chain, images, pruned_copy, seeded


def repaired(given, **options):
    """The report and the repaired weights."""
    dense = seeded(chain)
    model = pruned_copy(dense)
    return resuscitate.repair(model, dense, given, keep_worse=True, **options), model.state_dict()


def test_the_layers_use_the_first_images_less_those_that_are_held_out_whatever_the_batches():
    found = [repaired(images(200), gain_samples=60, recalibrate="exact", batch_size=size) for size in (16, 60, 200)]
    counts = {(report.images, report.batchnorm_images) for report, _ in found}
    assert len(counts) == 1
    used, pooled = counts.pop()
    assert 40 <= used <= 60 - 1  # every sixth is held out
    assert pooled == 200
    for _, state in found[1:]:
        torch.testing.assert_close(state, found[0][1], rtol=1e-3, atol=1e-4)


def test_so_does_an_exact_recalibration():
    counts = {
        (report.images, report.batchnorm_images)
        for report, _ in (repaired(images(200), recalibrate=Exact(samples=60), batch_size=size) for size in (16, 200))
    }
    assert len(counts) == 1
    assert 40 <= counts.pop()[1] <= 60 - 1
    assert repaired(images(200), method="asr", recalibrate=Exact(samples=60))[0].batchnorm_images == 60


@pytest.mark.parametrize(
    ("count", "options", "seen"),
    [
        ("images", {"method": "asr", "skip_first": False, "gain_samples": 30, "recalibrate": "exact"}, ["0.weight"]),
        ("batchnorm_images", {"method": "bn", "recalibrate": Exact(samples=30)}, ["1.running_var", "7.running_var"]),
    ],
    ids=["layers", "BatchNorm"],
)
def test_copies_come_on_top(count, options, seen):
    given = images(40)
    report, state = repaired(given, augment="flip", draws=2, batch_size=16, **options)
    assert getattr(report, count) == 90
    alone = {**options, "gain_samples": None, "recalibrate": "exact"}
    _, wanted = repaired(torch.cat([given[:30], given[:30].flip(3), given[:30]]), **alone)
    for key in seen:
        torch.testing.assert_close(state[key], wanted[key], rtol=1e-4, atol=1e-5)


def test_too_few_to_leave_one_are_refused():
    given, errors = images(128), []
    for at in range(8):
        try:
            repaired(given.roll(at, 0), gain_samples=1, recalibrate="exact", ridge=0.1)
        except CalibrationError as error:
            errors.append(str(error))
    assert 0 < len(errors) < 8
    assert "are all held out of the fit: raise gain_samples" in errors[0]


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        (images(1), {}, "the only image: "),
        (images(1).repeat(40, 1, 1, 1), {}, "the only image: "),
        (images(4), {"augment": "flip", "draws": 3}, "only 4 different images: "),
        (images(40), {"gain_samples": 5, "batch_size": 5}, "only 5 different images: "),
        (images(8), {}, None),
        (images(4), {"method": "asr"}, None),
    ],
)
def test_few_different_images_are_warned_of_once(caplog, given, options, said):
    repaired(given, **options)
    found = [record.getMessage() for record in caplog.records if "are fitted to" in record.getMessage()]
    assert [text.partition("fitted to ")[2].partition("the outcome")[0] for text in found] == ([said] if said else [])


def test_few_different_images_are_warned_of_once_in_all_steps(caplog):
    resuscitate.compress(seeded(chain), 0.5, images(3), steps=2)
    assert caplog.text.count("are fitted to only 3 different images: ") == 1
