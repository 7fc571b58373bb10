"""Every repair says how near the outputs are to the dense network's, and one that makes them worse is undone."""

import copy
import logging
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import resuscitate
from resuscitate.data.batches import Batches
from resuscitate.engine.session import Session
from resuscitate.methods.base import Method
from resuscitate.network.updates import Weights
from resuscitate.reports.agreement import Agreement
from resuscitate.runtime.distributed import Ranks
from resuscitate.runtime.options import run_options
from tests.compare import same_state
from tests.networks import chain, images, pruned_copy, seeded

KEYS = ["before", "after", "error_before", "error_after", "images", "held_out"]


@dataclass(frozen=True, kw_only=True)
class Negated(Method):
    """Gives each layer the negative of its weights."""

    name = "negated"
    dense = resuscitate.methods.base.DenseAccess.MODEL

    def probe(self, layer):
        return resuscitate.Probe()

    def solve(self, layer, found):
        return Weights(-layer.weight.flatten(1).double(), torch.zeros(len(layer.weight), dtype=torch.float64))


def nearness(model, dense, given):
    """The part of equal largest logits, and the relative error."""
    with torch.no_grad():
        ours, theirs = model(given), dense(given)
    return float((ours.argmax(1) == theirs.argmax(1)).float().mean()), float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("method", ["refit", "asr", "bn"])
def test_a_repair_reports_its_agreement(method):
    dense, given = seeded(chain), images(8)
    model = pruned_copy(dense)
    before = nearness(model, dense, given)
    report = resuscitate.repair(model, dense, given, method=method)
    found = report.to_dict()["agreement"]
    assert list(found) == KEYS
    assert (found["images"], found["held_out"]) == (8, False)
    after = nearness(model, dense, given)
    assert [found[key] for key in KEYS[:4]] == pytest.approx([before[0], after[0], before[1], after[1]], rel=1e-5)
    assert found["error_after"] < found["error_before"] or method == "bn"  # which follows the images
    assert not report.undone


@pytest.mark.parametrize(("count", "held"), [(127, 0), (128, 32), (400, 40)])
def test_a_refit_is_judged_on_images_that_it_was_not_fitted_to(count, held):
    dense, given = seeded(chain), images(count)
    report = resuscitate.repair(pruned_copy(dense), dense, given)
    assert report.images == count - held
    assert report.agreement.held_out == (held > 0)
    assert report.agreement.images == (held or 31)
    gains = resuscitate.repair(pruned_copy(dense), dense, given, method="asr")
    assert (gains.images, gains.agreement.held_out) == (count, False)


def test_the_same_images_are_held_out_in_any_order_and_any_batches():
    given = images(200)

    def held(*batches):
        found = Batches(batches)
        found.hold_out(Ranks())
        chosen = torch.cat([found[index] for index in range(len(found))[-found.held_out :]])
        fitted = torch.cat(list(found.head(len(found) - found.held_out)))
        assert len(fitted) + len(chosen) == 200
        return {tuple(each.flatten().tolist()) for each in chosen}

    first = held(given)
    assert len(first) == 33  # every sixth
    assert first == held(*given.split(7)) == held(given.flip(0)) == held(*given[torch.randperm(200)].split(64))


def test_the_folds_share_the_images_that_are_left():
    batches = Batches(images(128).split(16))
    batches.hold_out(Ranks())
    batches.number_images(Ranks())
    sizes = torch.zeros(4)
    for index in range(len(batches) - batches.held_out):
        for fold, rows in batches.folds(index, 4, batches.counts[index]).items():
            sizes[fold] += len(rows)
    assert sizes.tolist() == [24, 24, 24, 24]


def test_a_repair_that_makes_the_outputs_worse_is_undone_and_says_so(caplog):
    dense, given = seeded(chain), images(128)
    model, kept = pruned_copy(dense, 0.1), pruned_copy(dense, 0.1)
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.WARNING):
        report = resuscitate.repair(model, dense, given, method=Negated())
    assert report.undone
    assert report.to_dict()["undone"]
    assert "undone, because it made the outputs worse" in caplog.text
    assert "undone: below is what was undone" in str(report).splitlines()[0]
    assert "keep_worse=True keeps it" in caplog.text
    assert same_state(model.state_dict(), before)
    report.undo()  # has nothing to do
    assert same_state(model.state_dict(), before)
    with pytest.raises(RuntimeError, match="undone already"):
        report.undo()
    report = resuscitate.repair(kept, dense, given, method=Negated(), keep_worse=True)
    assert not report.undone
    assert report.agreement.fell
    assert not same_state(kept.state_dict(), before)


def test_a_repair_that_few_images_find_worse_is_kept_and_doubted(caplog):
    dense, given = seeded(chain), images(24)
    model = pruned_copy(dense, 0.1)
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.WARNING):
        report = resuscitate.repair(model, dense, given, method=Negated())
    assert not report.undone
    assert "the outputs seem to be worse, but these images are too few to undo the repair for that" in caplog.text
    report.undo()
    assert same_state(model.state_dict(), before)
    caplog.clear()
    resuscitate.repair(model, dense, given, method=Negated(), keep_worse=True)
    assert "too few" not in caplog.text


def test_a_compression_that_makes_the_outputs_worse_leaves_the_pruned_weights(caplog):
    dense, given = seeded(chain), images(128)
    model, pruned = copy.deepcopy(dense), copy.deepcopy(dense)
    report = resuscitate.compress(model, 0.1, given, method=Negated())
    report.masks.apply_(pruned)
    assert report.undone
    assert "the compression was undone" in caplog.text
    assert same_state(model.state_dict(), pruned.state_dict())
    report.undo()
    assert same_state(model.state_dict(), dense.state_dict())


def test_a_compression_that_few_images_find_worse_is_kept_and_doubted(caplog):
    dense, given = seeded(chain), images(24)
    model = copy.deepcopy(dense)
    with caplog.at_level(logging.WARNING):
        report = resuscitate.compress(model, 0.1, given, method=Negated())
    assert not report.undone
    assert "these images are too few to undo the compression for that" in caplog.text
    report.undo()
    assert same_state(model.state_dict(), dense.state_dict())
    caplog.clear()
    resuscitate.compress(model, 0.1, given, method=Negated(), keep_worse=True)
    assert "too few" not in caplog.text


def test_compress_and_regrow_report_the_agreement_of_the_whole():
    dense, given = seeded(chain), images(140)
    model = copy.deepcopy(dense)
    compressed = resuscitate.compress(model, 0.7, given, steps=3)
    found = compressed.to_dict()["agreement"]
    assert (found["images"], found["held_out"]) == (35, True)
    assert found["error_after"] < found["error_before"]
    assert all(step["agreement"] is None for step in compressed.to_dict()["steps"])
    regrown = resuscitate.regrow(model, dense, compressed.masks, 0.4, given)
    assert regrown.agreement.error_before == pytest.approx(found["error_after"])
    assert regrown.agreement.error_after < regrown.agreement.error_before


def test_a_regrowth_that_makes_the_outputs_worse_is_undone():
    dense, given = seeded(chain), images(128)
    model = copy.deepcopy(dense)
    masks = resuscitate.sparsify(model, 0.2)
    before = copy.deepcopy(model.state_dict())
    report = resuscitate.regrow(model, dense, masks, 0.1, given, method=Negated())
    assert report.undone
    assert report.masks.sparsity == masks.sparsity
    assert same_state(model.state_dict(), before)


class TestOtherOutputs:
    def test_a_dense_prediction_has_an_error_and_no_classes(self):
        dense = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1)))
        agreement = resuscitate.repair(pruned_copy(dense), dense, images()).agreement
        assert (agreement.before, agreement.after) == (None, None)
        assert agreement.error_after < agreement.error_before

    @pytest.mark.parametrize("count", [24, 140])
    def test_sequences_with_the_images_on_the_second_axis_have_an_error_too(self, count):
        class Sequences(nn.Sequential):
            def forward(self, x):
                return super().forward(x).mean(2).permute(2, 0, 1)  # (T, N, K)

        dense = seeded(lambda: Sequences(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1)))
        agreement = resuscitate.repair(pruned_copy(dense), dense, images(count)).agreement
        assert (agreement.before, agreement.after) == (None, None)
        assert agreement.error_after < agreement.error_before

    def test_lists_of_other_lengths_cannot_be_compared(self):
        class Boxes(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 8, 3)

            def forward(self, x):
                x = self.conv(x)
                return [x[x > 0.5]]

        dense = seeded(Boxes)
        assert resuscitate.repair(pruned_copy(dense), dense, images()).agreement is None

    @pytest.mark.parametrize("boxes", [0, 10])
    def test_as_many_boxes_for_each_image_are_no_logits(self, boxes):
        class Detector(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 5, 3)

            def forward(self, given):
                found = self.conv(torch.stack(given)).flatten(2).transpose(1, 2)  # (N, places, 4 coordinates and score)
                best = [places[places[:, 4].topk(boxes).indices] for places in found]
                return [{"boxes": each[:, :4], "scores": each[:, 4]} for each in best]

        dense, given = seeded(Detector), [list(images(8)) for _ in range(4)]
        report = resuscitate.repair(pruned_copy(dense), dense, given, forward_fn=lambda model, batch: model(batch))
        assert (report.images, report.agreement) == (32, None)

    def test_outputs_that_are_all_zero_are_not_compared(self):
        dense = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Threshold(1e9, 0.0)))
        assert resuscitate.repair(pruned_copy(dense), dense, images()).agreement is None

    def test_a_tensor_without_a_row_for_each_image_is_left_out(self):
        class WithProposals(nn.Sequential):
            def forward(self, x):
                x = super().forward(x)
                return x, x[x > 0.5]

        dense = seeded(lambda: WithProposals(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1)))
        assert resuscitate.repair(pruned_copy(dense), dense, images()).agreement.error_after > 0

    def test_the_batches_of_a_forward_fn_are_not_split(self):
        dense = seeded(chain)
        given = images(140).split(70)
        report = resuscitate.repair(pruned_copy(dense), dense, given, forward_fn=lambda model, batch: model(batch))
        assert (report.images, report.agreement.images, report.agreement.held_out) == (140, 70, False)

    def test_without_a_dense_network_there_is_nothing_to_agree_with(self):
        assert resuscitate.repair(pruned_copy(seeded(chain)), images(), method="bn").agreement is None


@pytest.mark.parametrize(
    ("numbers", "fell"),
    [
        ((0.5, 0.4, 0.8, 0.9), True),
        ((0.5, 0.6, 0.8, 0.9), False),  # more of the classes
        ((0.5, 0.5, 0.8, 0.9), True),
        ((1.0, 1.0, 0.0, 1e-6), False),  # rounding
        ((0.5, 0.4, 0.8, 0.7), False),
        ((None, None, 0.8, 0.9), True),
        ((None, None, 0.8, None), True),
        ((None, None, None, 0.9), False),
        ((None, None, None, None), False),
        ((1.0, 0.1, None, None), True),
        ((0.1, 1.0, None, None), False),
    ],
)
def test_the_agreement_fell(numbers, fell):
    assert Agreement(*numbers, 32, True).fell == fell
    assert not Agreement(*numbers, 31, False).fell


@pytest.mark.parametrize(("held_out", "which"), [(True, "held-out images"), (False, "of the images that it used")])
def test_its_text_says_whether_the_images_were_held_out(held_out, which):
    found = str(Agreement(0.25, 0.5, 0.9, None, 40, held_out))
    assert found == f"same class 0.250 -> 0.500, error 0.900 -> not finite on 40 {which}"


class Masked(nn.Module):
    """Logits of which the first is masked by minus infinity."""

    def __init__(self):
        super().__init__()
        self.network = chain()

    def forward(self, x):
        return self.network(x) - torch.tensor([torch.inf] + [0.0] * 9)


def test_an_image_that_is_not_finite_is_refused_also_where_it_is_held_out():
    dense, given = seeded(chain), images(128, size=4)
    model = pruned_copy(dense)
    before = copy.deepcopy(model.state_dict())
    with Session([model, dense], run_options("repair()", {})) as session:
        batches = session.read(given)
        batches.hold_out(session.ranks)
        held = torch.cat([batches[index] for index in range(len(batches) - batches.held_out, len(batches))])
    (where,) = (given == held[0]).flatten(1).all(1).nonzero()
    given[where] = torch.nan
    with pytest.raises(resuscitate.NonFiniteError, match="on_nonfinite='skip'"):
        resuscitate.repair(model, dense, given)
    assert same_state(model.state_dict(), before)
    assert resuscitate.repair(model, dense, given, on_nonfinite="skip").skipped == 1


def test_infinite_values_of_a_mask_count_as_no_difference():
    dense, given = seeded(Masked), images(8)
    report = resuscitate.repair(pruned_copy(dense), dense, given)
    assert 0 < report.agreement.error_after < report.agreement.error_before < 10
