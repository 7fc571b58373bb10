"""What outputs are matched to: a dense model, its statistics from a file, or what BatchNorm remembers."""

import copy
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import resuscitate
from resuscitate import DenseStatistics, cli
from resuscitate.errors import CalibrationError, CheckpointError, ModelMismatchError
from resuscitate.models import digitnet
from tests.compare import same
from tests.networks import Residual, Shared, Untraceable, Zoo, chain, images, pruned_copy, seeded


class TestStatisticsFile:
    @pytest.mark.parametrize("build", [chain, Residual, Shared, Untraceable, Zoo], ids=lambda b: b.__name__)
    @pytest.mark.parametrize("schedule", ["sequential", "parallel"])
    def test_it_gives_what_the_dense_model_gives(self, build, schedule, tmp_path):
        dense = seeded(build)
        DenseStatistics.measure(dense, images(), batch_size=128).save(tmp_path / "dense.safetensors")
        by_model, by_file = pruned_copy(dense), pruned_copy(dense)
        options = {"method": "channelwise", "schedule": schedule, "skip_first": False}
        first = resuscitate.repair(by_model, dense, images(), **options)
        second = resuscitate.repair(by_file, tmp_path / "dense.safetensors", images(), **options)
        assert same(by_model, by_file)
        assert first.target == "dense model"
        assert second.target == f"dense statistics ({tmp_path / 'dense.safetensors'})"
        assert not [note for note in second.notes if "statistics" in note]

    def test_one_file_serves_many_prunings_without_a_dense_forward(self, monkeypatch):
        dense = seeded(chain)
        statistics, prunings = DenseStatistics.measure(dense, images()), [pruned_copy(dense, s) for s in (0.5, 0.7)]
        monkeypatch.setattr(dense, "forward", lambda *_: pytest.fail("the dense model was run"))
        for model in prunings:
            assert resuscitate.repair(model, statistics, images()).target.startswith("dense statistics")

    def test_batchnorm_statistics_are_copied_from_it_where_they_differ(self):
        dense = seeded(chain)
        statistics, model = DenseStatistics.measure(dense, images()), pruned_copy(dense)
        undisturbed = copy.deepcopy(model)
        resuscitate.repair(undisturbed, statistics, images())
        for statistic in (model[1].running_mean, model[1].running_var):
            statistic.add_(1)
        report = resuscitate.repair(model, statistics, images())
        assert "1 BatchNorms had other statistics than the dense model: copied from it" in report.notes
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), undisturbed.buffers(), strict=True))
        assert torch.equal(model[1].running_var, dense[1].running_var)

    @pytest.mark.parametrize("other", [images(seed=7), images(20)], ids=["other images", "fewer"])
    def test_other_images_are_noted(self, other, caplog):
        dense = seeded(chain)
        statistics = DenseStatistics.measure(dense, images())
        with caplog.at_level(logging.WARNING, logger="resuscitate"):
            report = resuscitate.repair(pruned_copy(dense), statistics, other)
        assert any("the dense statistics come from 24 images" in note for note in report.notes)
        assert any("the dense statistics come from 24 images" in record.message for record in caplog.records)

    def test_neither_the_order_nor_the_batches_of_the_images_matter(self):
        dense = seeded(chain)
        first = DenseStatistics.measure(dense, images(), batch_size=5)
        second = DenseStatistics.measure(dense, [images().flip(0)[:20], images().flip(0)[20:]])
        assert (first.digest, first.images, first.model) == (second.digest, second.images, second.model)
        for name, calls in first.layers.items():
            torch.testing.assert_close(calls[0].var, second.layers[name][0].var, rtol=1e-5, atol=0)

    def test_what_needs_pairs_refuses_it(self):
        dense = seeded(chain)
        model = pruned_copy(dense)
        before = copy.deepcopy(model)
        for target in (DenseStatistics.measure(dense, images()), "running"):
            with pytest.raises(ValueError, match="image by image: pass dense as a model"):
                resuscitate.repair(model, target, images(), diagnostics=True)
        assert same(model, before)

    def test_the_file_of_another_network_is_refused_by_layer(self):
        statistics = DenseStatistics.measure(seeded(chain), images())
        with pytest.raises(ModelMismatchError, match="nothing is known of layer 'stem'"):
            resuscitate.repair(pruned_copy(seeded(Residual)), statistics, images())
        wider = seeded(lambda: chain(width=6))
        with pytest.raises(ModelMismatchError, match="layer '0' had 8 channels, the model has 6"):
            resuscitate.repair(pruned_copy(wider), statistics, images())

    def test_files_of_another_kind_are_refused(self, tmp_path):
        dense = seeded(chain)
        save_file(dense.state_dict(), tmp_path / "weights.safetensors")
        (tmp_path / "broken.safetensors").write_bytes(b"nothing")
        for name, problem in (("weights", "holds no dense statistics"), ("broken", "not a readable safetensors file")):
            with pytest.raises(CheckpointError, match=problem):
                resuscitate.repair(pruned_copy(dense), tmp_path / f"{name}.safetensors", images())
        with pytest.raises(OSError, match="nowhere"):
            resuscitate.repair(pruned_copy(dense), tmp_path / "nowhere.safetensors", images())


class TestRunningStatistics:
    @pytest.mark.parametrize("build", [chain, Residual], ids=lambda b: b.__name__)
    @pytest.mark.parametrize("batch_size", [24, 5])
    def test_channelwise_is_exact_recalibration_by_another_name(self, build, batch_size):
        """BN(gain * x + shift) with the kept statistics, against BN(x) with re-estimated ones."""
        dense = seeded(build)
        for module in dense.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eps = 1e-12
        by_gains, by_batchnorm = pruned_copy(dense), pruned_copy(dense)
        options = {"batch_size": batch_size}
        report = resuscitate.repair(
            by_gains, "running", images(), method="channelwise", eps=0.0, skip_first=False, **options
        )
        behind_layers = [name for name in ("1", "4", "7", "bn0", "bn1") if name in dict(dense.named_modules())]
        resuscitate.recalibrate_batchnorm(by_batchnorm, images(), **options)
        if build is Residual:  # bn2 reads a sum: no layer's gain can stand for it
            by_batchnorm.bn2.load_state_dict(dense.bn2.state_dict())
        assert len(behind_layers) == sum(row.status == "repaired" for row in report.layers)
        torch.testing.assert_close(by_gains(images(9, seed=3)), by_batchnorm(images(9, seed=3)), rtol=1e-4, atol=1e-5)
        assert report.target == "running statistics"

    def test_layers_that_no_batchnorm_alone_reads_are_left_alone_and_reported(self):
        report = resuscitate.repair(pruned_copy(seeded(Residual)), "running", images(), method="asr", skip_first=False)
        rows = {row.name: row.reason or row.status for row in report.layers}
        assert rows["stem"] == rows["conv1"] == "repaired"
        assert (
            rows["conv2"]
            == rows["head"]
            == "no BatchNorm alone reads it, whose running statistics its output could match"
        )

    def test_the_docstring_says_that_it_is_no_stronger(self):
        docstring = " ".join(resuscitate.repair.__doc__.split())
        assert "**exact recalibration by another name**, and no stronger" in docstring


@pytest.mark.parametrize("limit", [0, -1, True])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(CalibrationError, match="max_samples must be a whole number of at least 1"):
        DenseStatistics.measure(seeded(chain), images(), max_samples=limit)


def test_another_kind_of_dense_is_refused():
    with pytest.raises(TypeError, match="a module, a statistics file or 'running', not int"):
        resuscitate.repair(pruned_copy(seeded(chain)), 5, images())


class TestCorrelations:
    def test_they_tell_what_share_any_gain_could_bring_back(self):
        dense = seeded(chain)
        untouched = copy.deepcopy(dense)
        with torch.no_grad():
            untouched[3].weight *= 0.3  # nothing is lost that a gain cannot bring back
        lossy = pruned_copy(dense, 0.9)
        whole, part = (
            resuscitate.repair(model, dense, images(), method="channelwise", diagnostics=True, include="3").layers[-1]
            for model in (untouched, lossy)
        )
        assert whole.explained == pytest.approx(1.0, abs=1e-4)
        assert 0.0 <= part.explained < 0.9

    @pytest.mark.parametrize("build", [Residual, Untraceable], ids=["graph", "suspended"])
    def test_they_are_the_squared_correlation_of_the_two_outputs(self, build):
        dense = seeded(build)
        name = "conv1" if build is Residual else "body.3"
        model = pruned_copy(dense)
        outputs = []
        for net in (dense, model):
            with net.get_submodule(name).register_forward_hook(lambda m, a, out: outputs.append(out)), torch.no_grad():
                net(images())
        y, x = (out.transpose(0, 1).flatten(1).double() for out in outputs)
        corr = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(y, x, strict=True)])
        expected = float((corr.square() * y.var(1)).sum() / y.var(1).sum())
        options = {"method": "asr", "diagnostics": True, "include": name, "skip_first": False, "batch_size": 5}
        report = resuscitate.repair(model, dense, images(), **options)
        assert report.layers[-1].explained == pytest.approx(expected, rel=1e-4)

    def test_they_do_not_change_the_repair(self):
        dense = seeded(Residual)
        plain, paired = pruned_copy(dense), pruned_copy(dense)
        resuscitate.repair(plain, dense, images(), method="asr", batch_size=5)
        resuscitate.repair(paired, dense, images(), method="asr", batch_size=5, diagnostics=True)
        torch.testing.assert_close(plain.state_dict(), paired.state_dict(), rtol=2e-5, atol=2e-6)


def test_the_command_line_measures_once_and_repairs_from_the_file(tmp_path, monkeypatch):
    dense = seeded(digitnet)
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    save_file(pruned_copy(dense, 0.8).state_dict(), tmp_path / "pruned.safetensors")
    np.save(tmp_path / "images.npy", images(20, 1, 8).numpy())
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        done = CliRunner().invoke(cli.app, [*arguments, "--model", "digitnet", "--calibration", "images.npy"])
        assert done.exit_code == 0, done.output
        return done.output

    assert "20 images" in run("stats", "--dense", "dense.safetensors", "--output", "stats.safetensors")
    repair = ["repair", "--method", "asr", "--pruned", "pruned.safetensors", "--output"]
    run(*repair, "model.safetensors", "--dense", "dense.safetensors")
    assert "dense statistics" in run(*repair, "file.safetensors", "--dense-stats", "stats.safetensors")
    assert "running statistics" in run(*repair, "running.safetensors", "--dense", "running")
    one, two = (load_file(f"{name}.safetensors") for name in ("model", "file"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    both = [*repair, "x.safetensors", "--dense", "running", "--dense-stats", "stats.safetensors"]
    done = CliRunner().invoke(cli.app, [*both, "--model", "digitnet", "--calibration", "images.npy"])
    assert done.exit_code == 2
