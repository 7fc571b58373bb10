"""Augmented images: changed copies beside the images, the same each time that they are read."""

import copy

import pytest
import torch

import resuscitate
from resuscitate.data.augment import augmented
from resuscitate.data.batches import Batches
from resuscitate.errors import CalibrationError
from resuscitate.runtime.distributed import Ranks
from tests.compare import same_state
from tests.networks import chain, images, pruned_copy, seeded


def test_flip_mirrors_in_every_other_draw():
    given = images(4)
    assert torch.equal(augmented(given, "flip", 0, torch.arange(4)), given.flip(3))
    assert torch.equal(augmented(given, ["flip"], 1, torch.arange(4)), given)


def test_crop_moves_each_image_and_fills_with_zeros():
    given = torch.arange(1, 101, dtype=torch.float32).view(1, 1, 10, 10).expand(50, 1, 10, 10)
    keys = torch.arange(50)
    moved = augmented(given, "crop", 0, keys)
    assert moved.shape == given.shape
    places = set()
    for each in moved[:, 0]:
        row, column = (int(place) for place in (each == 45).nonzero()[0])  # was at row 4, column 4
        places.add((row - 4, column - 4))
        assert (each == 0).sum() == 100 - (10 - abs(row - 4)) * (10 - abs(column - 4))
    assert places == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}
    assert torch.equal(moved, augmented(given, "crop", 0, keys))
    assert not torch.equal(moved, augmented(given, "crop", 1, keys))


@pytest.mark.parametrize("held_out", [False, True])
def test_crop_depends_on_no_order_and_no_split_into_batches(held_out):
    given, found = images(140), []
    for batches in (given.split(40), given.flip(0).split(17)):
        read = Batches(batches)
        if held_out:
            read.hold_out(Ranks())
        read.augment(["flip", "crop"], 2)
        copies = torch.cat([read[index] for index in range(len(read) - read.held_out)])
        found.append(sorted(copies.flatten(1).tolist()))
    assert found[0] == found[1]


def test_a_function_may_draw_and_the_callers_random_state_stays():
    torch.manual_seed(3)
    before = torch.get_rng_state()

    def noisy(batch):
        return batch + torch.randn_like(batch)

    keys = torch.arange(len(images()))
    once, again, other = (augmented(images(), noisy, draw, keys) for draw in (0, 0, 1))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_copies_follow_the_images_and_held_out_ones_have_none():
    given = images(128)
    batches = Batches(given.split(40))
    batches.hold_out(Ranks())
    batches.augment("flip", 2)
    fitted = len(batches) - batches.held_out
    assert batches.images(fitted) == 3 * 96
    assert batches.images() == 3 * 96 + 32
    for index in range(0, fitted, 3):
        assert torch.equal(batches[index + 1], batches[index].flip(3))
        assert torch.equal(batches[index + 2], batches[index])
    batches.number_images(Ranks())
    for index in range(0, fitted, 3):  # so that cross-validation is not judged on copies of what it saw
        copies = (batches.folds(at, 4, batches.counts[at]) for at in (index, index + 1, index + 2))
        first, *others = ({fold: rows.tolist() for fold, rows in each.items()} for each in copies)
        assert others == [first, first]


def test_a_sample_has_no_copy_and_no_held_out_image():
    batches = Batches(images(128).split(40))
    batches.hold_out(Ranks())
    batches.augment("flip", 2)
    found = batches.sample(32, Ranks())
    assert set(found) <= set(range(0, len(batches) - batches.held_out, 3))
    assert sum(map(len, found.values())) == 32


@pytest.mark.parametrize("method", [resuscitate.Refit(ridge=0.1), resuscitate.ASR()])
def test_a_repair_with_copies_is_that_of_all_images(method):
    dense, given = seeded(chain), images(20)
    model, by_hand = pruned_copy(dense), pruned_copy(dense)
    report = resuscitate.repair(model, dense, given, method=method, augment="flip")
    assert report.images == 40
    resuscitate.repair(by_hand, dense, torch.cat([given, given.flip(3)]), method=method)
    for one, other in zip(model.state_dict().values(), by_hand.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_compress_and_regrow_take_them():
    dense = seeded(chain)
    plain, with_copies = copy.deepcopy(dense), copy.deepcopy(dense)
    resuscitate.compress(plain, 0.7, images(20), steps=2)
    masks = resuscitate.compress(with_copies, 0.7, images(20), steps=2, augment=["flip", "crop"], draws=2).masks
    assert not same_state(plain.state_dict(), with_copies.state_dict())
    report = resuscitate.regrow(with_copies, dense, masks, 0.5, images(20), augment="crop")
    assert report.rounds[0].report.images == 40


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"augment": "rotate"}, ValueError, "augment='rotate' is unknown; there are 'flip', 'crop'"),
        ({"augment": []}, ValueError, "unknown"),
        ({"augment": "flip", "draws": 0}, ValueError, "draws=0 must be a whole number of at least 1"),
        ({"augment": "flip", "recalibrate": "ema"}, ValueError, "'ema' cuts its own batches, without copies: leave"),
        ({"augment": "flip", "forward_fn": lambda m, x: m(x)}, ValueError, "with a forward_fn, give a function"),
        ({"augment": lambda batch: batch[:1]}, CalibrationError, "augment returned 1 images from a batch of 20"),
    ],
)
def test_errors(options, error, message):
    dense = seeded(chain)
    model, before = pruned_copy(dense), pruned_copy(dense)
    with pytest.raises(error, match=message):
        resuscitate.repair(model, dense, images(20), **options)
    assert same_state(model.state_dict(), before.state_dict())


def test_other_inputs_need_a_function():
    dense = seeded(lambda: torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3)))
    with pytest.raises(CalibrationError, match=r"'flip' is for images \(N, C, H, W\), not \(30, 6\); give a function"):
        resuscitate.repair(pruned_copy(dense), dense, torch.randn(30, 6), augment="flip")
    resuscitate.repair(pruned_copy(dense), dense, torch.randn(30, 6), augment=lambda x: x + 0.1)
