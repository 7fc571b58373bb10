"""Compression in steps: the budget, what each step measures, all or nothing."""

import copy
import csv
import json
import sys

import pytest
import torch
from torch import nn

import asr_kernels as ak
import resuscitate
from resuscitate import ASR, Masks, Refit, compress
from resuscitate.errors import CalibrationError
from resuscitate.statistics.fitting import fit
from resuscitate.workflows.stages import stages
from tests.compare import same
from tests.networks import Residual, Untraceable, chain, images, seeded


def schedule(sparsity, steps):
    return list(stages(sparsity, steps, "unstructured"))


class TestCompress:
    @pytest.mark.parametrize("allocation", ["global", "erk", "rr"])
    def test_it_is_pruning_and_refitting_in_turn(self, allocation):
        model = seeded(Residual)
        by_hand, dense = copy.deepcopy(model), copy.deepcopy(model)
        report = compress(model, 0.8, images(40), allocation=allocation, steps=3, walks=3, curvature=False)
        measured = {"calibration": images(40)} if allocation == "rr" else {}
        for stop in schedule(0.8, 3):
            masks = resuscitate.sparsify(by_hand, stop, allocation=allocation, **measured)
            resuscitate.repair(by_hand, dense, images(40), method="refit")
        assert same(model, by_hand)
        assert report.masks == masks == resuscitate.Masks.from_zeros(model)
        assert report.sparsities == schedule(0.8, 3)

    def test_floors_densities_patterns_and_selections_hold_to_the_end(self):
        model = seeded(chain)
        options = {"densities": {"3": 0.5}, "exclude": "11", "min_per_channel": 2}
        masks = compress(model, 0.75, images(40), steps=3, **options).masks
        assert set(masks) == {"0", "3", "6"}
        assert masks["3"].float().mean() == 0.5
        assert masks["6"].flatten(1).sum(1).min() >= 2
        filters = compress(seeded(chain), 0.6, images(40), steps=2, pattern="filter", exclude="11").masks
        assert all(len(row.unique()) == 1 for mask in filters.values() for row in mask.flatten(1))

    @pytest.mark.parametrize("allocation", ["measured", "global"])
    def test_fixed_densities_are_approached_in_steps(self, allocation):
        model, densities = seeded(chain), {"6": 0.4}
        report = compress(model, 0.5, images(40), steps=3, densities=densities, allocation=allocation)
        assert report.masks["6"].float().mean() == pytest.approx(0.4, abs=1e-3)
        assert report.masks.sparsity == pytest.approx(0.5, abs=1e-4)

    def test_fixed_densities_of_all_layers_are_approached_in_steps(self):
        model = seeded(chain)
        densities = resuscitate.allocate(model, 0.8, "erk")
        report = compress(model, 0.8, images(40), steps=4, densities=densities)
        assert {name: float(mask.float().mean()) for name, mask in report.masks.items()} == pytest.approx(densities)
        with pytest.raises(ValueError, match="densities: '6': 1 is not a float"):
            compress(model, 0.5, images(40), densities={"6": 1}, min_per_channel=0)

    def test_depthwise_channels_keep_two_weights_by_default_and_none_on_request(self):
        def build():
            return nn.Sequential(
                nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=24), nn.ReLU(), nn.Conv2d(24, 40, 1)
            )

        def least(**options):
            report = compress(seeded(build), 0.85, images(40), steps=3, keep_worse=True, **options)
            assert report.masks.sparsity == pytest.approx(0.85, abs=1e-2)
            return report.masks["2"].flatten(1).sum(1).min()

        assert least() == least(allocation="global") == 2
        assert least(min_per_channel=0) == 0
        assert least(pattern="filter") == 0

    def test_n_of_m_is_reached_in_steps(self):
        model = seeded(chain)
        report = compress(model, 0.75, images(40), pattern="1:4")
        assert report.sparsities == [0.25, 0.5, 0.75]
        kept = report.masks["3"].unflatten(1, (-1, 4)).sum(2)
        assert (kept == 1).all()
        assert report.masks["0"].all()  # its 3 input channels are no groups of 4
        assert Masks.from_zeros(model)["3"].equal(report.masks["3"])

    def test_relative_repairability_is_measured_with_the_callers_options(self, monkeypatch):
        batches = [{"a": part, "scale": 2.0} for part in images(40).split(8)]
        options = {"forward_fn": lambda model, batch: model(batch["a"] * batch["scale"]), "dtype": "bf16", "seed": 3}
        model, by_hand, dense = seeded(chain), seeded(chain), seeded(chain)
        seen, measure = [], resuscitate.Repairability.measure
        monkeypatch.setattr(
            resuscitate.Repairability, "measure", lambda *a, **given: seen.append(given) or measure(*a, **given)
        )
        running = {**options, "device": "cpu", "batch_size": 8}
        compress(model, 0.8, batches, allocation="rr", steps=[0.6, 0.8], **running)
        assert [{name: given[name] for name in running} for given in seen] == [running] * 2
        for stop in (0.6, 0.8):
            resuscitate.sparsify(by_hand, stop, allocation="rr", calibration=measure(by_hand, batches, **options))
            resuscitate.repair(by_hand, dense, batches, **options)
        assert same(model, by_hand)

    def test_selectors_may_be_an_iterator(self):
        model, other = seeded(chain), seeded(chain)
        compress(model, 0.8, images(40), steps=3, exclude=iter(["11"]))
        compress(other, 0.8, images(40), steps=3, exclude=["11"])
        assert same(model, other)

    def test_images_are_read_once(self):
        reads = []

        def loader():
            reads.append(1)
            yield from images(20).split(5)

        compress(seeded(chain), 0.8, loader, steps=3)
        assert len(reads) == 1

    def test_the_report_can_be_read_and_undone(self):
        model = seeded(chain)
        before = copy.deepcopy(model)
        report = compress(model, 0.8, images(), steps=3)
        assert [step["sparsity"] for step in report.to_dict()["steps"]] == report.sparsities
        assert report.layers[0].status == "refitted"
        assert not same(model, before)
        report.undo()
        assert same(model, before)
        with pytest.raises(RuntimeError, match="undone already"):
            report.undo()

    def test_a_step_alone_says_that_the_whole_is_to_be_undone(self):
        model = seeded(chain)
        before = copy.deepcopy(model)
        report = compress(model, 0.8, images(), steps=3)
        after = copy.deepcopy(model)
        for step in report.steps * 2:
            with pytest.raises(RuntimeError, match=r"one step of what compress returned.* call undo\(\) of the whole"):
                step.undo()
            assert step.to_dict()["method"] == "refit"
        assert same(model, after)
        report.undo()
        assert same(model, before)

    def test_the_ending_says_whether_the_report_or_the_masks_are_saved(self, tmp_path):
        report = compress(seeded(chain), 0.8, images(), steps=3)
        for name in ("run.json", "run.csv", "run.safetensors"):
            report.save(tmp_path / name)
        assert json.loads((tmp_path / "run.json").read_text()) == json.loads(json.dumps(report.to_dict()))
        with open(tmp_path / "run.csv", newline="") as file:
            rows = [
                (int(row["step"]), float(row["sparsity"]), row["name"], row["status"]) for row in csv.DictReader(file)
            ]
        steps = enumerate(zip(report.sparsities, report.steps, strict=True), 1)
        assert rows == [(at, sparsity, row.name, row.status) for at, (sparsity, step) in steps for row in step.layers]
        assert Masks.load(tmp_path / "run.safetensors") == report.masks
        for name in ("run.txt", "run"):
            with pytest.raises(ValueError, match=rf"{name}: it is written as \.json or \.csv or \.safetensors"):
                report.save(tmp_path / name)
            assert not (tmp_path / name).exists()


class TestStepsWithoutAWalk:
    """Steps before the last `walks` are solved from one measurement with the inputs of the dense network."""

    def test_only_the_last_steps_measure_the_pruned_network(self):
        report = compress(seeded(Residual), 0.8, images(40), steps=5)
        assert [step.walk for step in report.steps] == ["none", "none", "none", "graph", "graph"]
        assert {row.status for step in report.steps for row in step.layers} == {"refitted"}
        report = compress(seeded(Residual), 0.8, images(40), steps=5, walks=9)
        assert [step.walk for step in report.steps] == ["graph"] * 5

    def test_a_method_that_measures_outputs_measures_them_in_each_step(self):
        by_default, in_each = seeded(chain), seeded(chain)
        report = compress(by_default, 0.8, images(40), steps=4, method="channelwise")
        compress(in_each, 0.8, images(40), steps=4, method="channelwise", walks=4)
        assert [step.walk for step in report.steps] == ["graph"] * 4
        assert same(by_default, in_each)

    def test_they_refit_to_the_moments_of_the_dense_network(self):
        """One linear layer: its inputs are the same in both networks, so both ways give one result."""
        torch.manual_seed(0)
        x = torch.randn(200, 6) @ torch.randn(6, 6)
        found = [nn.Sequential(nn.Linear(6, 4)) for _ in range(2)]
        found[1].load_state_dict(found[0].state_dict())
        for model, walks in zip(found, (1, 4), strict=True):
            compress(model, 0.75, x, steps=[0.25, 0.5, 0.6, 0.75], walks=walks)
        assert same(*found)

    def test_they_fit_the_inputs_that_a_layer_has_in_the_dense_network(self, monkeypatch):
        model, after = seeded(chain), []
        dense, pruned = copy.deepcopy(model), copy.deepcopy(model)
        module = sys.modules["resuscitate.workflows.steps"]
        original = module.carry_out

        def carry_out(plan, model, *args, **options):
            report = original(plan, model, *args, **options)
            after.append(copy.deepcopy(model))
            return report

        monkeypatch.setattr(module, "carry_out", carry_out)
        compress(model, 0.8, images(40), steps=[0.5, 0.8], walks=1, ridge=0.1, allocation="global", curvature=False)
        mask = resuscitate.sparsify(pruned, 0.5)["3"]
        with torch.no_grad():
            x = dense[:3](images(40))
            moments = ak.patch_moments(x, dense[3](x), ak.Window((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)))
        fitted = fit(moments, pruned[3].weight.detach().flatten(1), mask.flatten(1), ridge=0.1)
        torch.testing.assert_close(after[0][3].weight.flatten(1).double(), fitted.weight, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("build", [Residual, chain, Untraceable])
    def test_a_budget_of_memory_changes_no_bit(self, build, tmp_path):
        models = [seeded(build) for _ in range(2)]
        reports = [
            compress(model, 0.8, images(40), steps=4, batch_size=8, memory=memory, scratch=tmp_path)
            for model, memory in zip(models, (None, 4096), strict=True)
        ]
        assert same(*models)
        assert [report.steps[-1].bytes_spilled > 0 for report in reports] == [False, True]


class TestAllOrNothing:
    def test_a_failure_in_the_last_step_leaves_the_model_as_it_was(self, monkeypatch):
        model = seeded(chain).train()
        before, calls = copy.deepcopy(model), []
        module = sys.modules["resuscitate.workflows.steps"]
        original = module.carry_out

        def fail_at_the_third(*args, **options):
            calls.append(1)
            if len(calls) == 3:
                raise OSError("disk gone")
            return original(*args, **options)

        monkeypatch.setattr(module, "carry_out", fail_at_the_third)
        with pytest.raises(OSError, match="disk gone"):
            compress(model, 0.8, images(), steps=3)
        assert same(model, before)
        assert model.training

    def test_what_cannot_be_is_refused_and_nothing_is_changed(self):
        model = seeded(chain)
        before = copy.deepcopy(model)
        for options, message in (
            ({"allocation": "magic"}, "unknown allocation"),
            ({"pattern": "2:4"}, "keeps 2 of 4"),
            ({"steps": 0}, "must be at least 1"),
            ({"min_per_layer": 10**6}, "lower the floor"),
        ):
            with pytest.raises(ValueError, match=message):
                compress(model, 0.8, images(), **options)
        with pytest.raises(ValueError, match="calibration is missing"):
            compress(model, 0.8, None)
        assert same(model, before)


def test_a_model_that_is_one_layer_is_compressed_too():
    model = nn.Sequential(nn.Linear(6, 4))
    assert compress(model, 0.75, torch.randn(50, 6), steps=2).masks.sparsity == 0.75


@pytest.mark.real_data
@pytest.mark.slow
def test_on_a_real_network_a_refit_goes_far_beyond_batchnorm_and_steps_beyond_a_refit(real):
    dense, calibration, test, labels = real
    calibration, score = calibration[:128], resuscitate.Accuracy(test[:1000], labels[:1000])
    pruned = copy.deepcopy(dense)
    resuscitate.sparsify(pruned, 0.9, allocation="erk")
    by_batchnorm, by_refit, by_steps = copy.deepcopy(pruned), copy.deepcopy(pruned), copy.deepcopy(dense)
    resuscitate.repair(by_batchnorm, calibration=calibration, method="bn")
    resuscitate.repair(by_refit, dense, calibration, method="refit")
    compress(by_steps, 0.9, calibration, allocation="erk", steps=3)
    assert score(by_refit) > score(by_batchnorm) + 20
    assert score(by_steps) > score(by_refit) + 2


class TestMethods:
    @pytest.mark.parametrize(
        ("method", "options"),
        [
            (Refit(ridge=0.1), {"ridge": 0.1}),
            (ASR(), {"method": "asr"}),
            (ASR(prior="mean"), {"method": "asr", "prior": "mean"}),
        ],
        ids=["refit", "asr", "asr with options"],
    )
    def test_an_object_is_the_name_with_its_options(self, method, options):
        one, other = seeded(chain), seeded(chain)
        report = compress(one, 0.8, images(), steps=2, method=method)
        compress(other, 0.8, images(), steps=2, **options)
        assert same(one, other)
        assert {step.method for step in report.steps} == {method.name}

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"method": "asr", "ridge": 0.1}, TypeError, "method 'asr' has no option 'ridge'"),
            ({"method": Refit(), "ridge": 0.1}, TypeError, r"method=Refit\(ridge=\.\.\.\)"),
            ({"ridge": -1.0}, ValueError, "ridge=-1.0 must be"),
            ({"method": "magic"}, ValueError, "method='magic' is unknown"),
            ({"schedule": "parallel"}, TypeError, r"compress\(\) has no option 'schedule'"),
            ({"max_batches": 0}, CalibrationError, "max_batches must be"),
            ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite='ignore' is unknown"),
            ({"allocation": "magic"}, ValueError, "unknown allocation"),
            ({"pattern": "magic"}, ValueError, "unknown pattern"),
            ({"min_per_layer": -1}, ValueError, "min_per_layer=-1"),
            ({"walks": 0}, ValueError, "walks=0 must be at least 1"),
            ({"walks": 1.5}, TypeError, "walks=1.5 must be a whole number"),
        ],
        ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
    )
    def test_a_bad_option_is_refused_before_an_image_is_read(self, options, error, message):
        model = seeded(chain)
        with pytest.raises(error, match=message):
            compress(model, 0.8, unread, **options)
        assert same(model, seeded(chain))


def unread():
    raise AssertionError("the images were read")
