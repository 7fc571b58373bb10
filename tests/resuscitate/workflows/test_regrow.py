"""`regrow` in rounds: repairs and callbacks between them, its report, its methods, refusals."""

import copy
import csv
import json

import pytest
import torch
from torch.nn import functional as F

import resuscitate
from resuscitate import ASR, Masks, Refit, regrow, repair, sparsify
from resuscitate.errors import CalibrationError, JournalError, MaskError, ModelMismatchError
from resuscitate.statistics.fitting import single_weight_error_reduction
from tests.compare import same
from tests.networks import Residual, chain, images, seeded

LABELLED = [(images(20, seed=s), torch.arange(20) % 10) for s in (3, 4)]


def pruned(dense, sparsity=0.9, **options):
    model = copy.deepcopy(dense)
    return model, sparsify(model, sparsity, **options)


class TestRounds:
    def test_it_is_regrowing_and_repairing_in_turn(self):
        dense = seeded(Residual)
        model, masks = pruned(dense)
        by_hand = copy.deepcopy(model)
        grown = regrow(model, dense, masks, 0.7, images(40), rounds=2)
        middle = regrow(by_hand, dense, masks, grown.rounds[0].sparsity, images(40))
        assert regrow(by_hand, dense, middle.masks, 0.7, images(40)).masks == grown.masks
        assert same(model, by_hand)
        assert [round(each.sparsity, 2) for each in grown.rounds] == [0.8, 0.7]
        assert all(each.report.method == "refit" for each in grown.rounds)

    def test_it_stops_at_the_accuracy_asked_for(self):
        dense = seeded(chain)
        model, masks = pruned(dense)
        scores = iter([10.0, 50.0, 90.0])
        seen = []

        def evaluate(candidate):
            seen.append((candidate is model, candidate.training))
            return next(scores)

        model.train()
        grown = regrow(model, dense, masks, 0.3, images(), rounds=4, evaluate=evaluate, accuracy=45.0)
        assert [each.score for each in grown.rounds] == [10, 50]
        assert grown.sparsity == pytest.approx(0.6, abs=0.01)
        assert seen == [(True, False)] * 2
        assert model.training

    def test_a_user_may_train_between_the_rounds_and_pruned_weights_stay_zero(self):
        dense = seeded(chain)
        model, masks = pruned(dense)
        calls = []

        def finetune(candidate, given):
            calls.append(given.sparsity)
            candidate.train()
            optimizer = torch.optim.SGD(candidate.parameters(), lr=0.01)
            for x, y in LABELLED:
                optimizer.zero_grad()
                F.cross_entropy(candidate(x), y).backward()
                optimizer.step()

        grown = regrow(model, dense, masks, 0.7, images(), rounds=2, finetune=finetune, method=None)
        assert calls == [each.sparsity for each in grown.rounds]
        grown.masks.check(model)
        assert not model.training
        assert not torch.equal(model[1].running_mean, dense[1].running_mean)

    def test_undo_puts_all_back(self):
        dense = seeded(chain)
        model, masks = pruned(dense)
        before = copy.deepcopy(model)
        grown = regrow(model, dense, masks, 0.5, images())
        assert not same(model, before)
        with pytest.raises(RuntimeError, match=r"one step of what regrow returned.* call undo\(\) of the whole"):
            grown.rounds[-1].report.undo()
        grown.undo()
        assert same(model, before)
        with pytest.raises(RuntimeError, match="undone already"):
            grown.undo()

    @pytest.mark.parametrize("method", ["asr", None])
    def test_the_ending_says_whether_the_report_or_the_masks_are_saved(self, tmp_path, method):
        dense = seeded(chain)
        model, masks = pruned(dense)
        grown = regrow(model, dense, masks, 0.5, images(), rounds=2, budget="damage", method=method)
        for name in ("run.json", "run.csv", "run.safetensors"):
            grown.save(tmp_path / name, {"command": "x"})
        written = json.loads((tmp_path / "run.json").read_text())
        assert written == json.loads(json.dumps(grown.to_dict() | {"provenance": {"command": "x"}}))
        with open(tmp_path / "run.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        for index, each in enumerate(grown.rounds):
            mine = {row["name"]: row for row in rows if row["round"] == str(index + 1)}
            assert {name: int(row["regrown"]) for name, row in mine.items() if row["regrown"]} == each.regrown
            assert {name: row["status"] for name, row in mine.items() if row["status"]} == (
                {row.name: row.status for row in each.report.layers} if each.report else {}
            )
            assert {float(row["sparsity"]) for row in mine.values()} == {each.sparsity}
        assert Masks.load(tmp_path / "run.safetensors") == grown.masks
        for name in ("run.txt", "run"):
            with pytest.raises(ValueError, match=rf"{name}: it is written as \.json or \.csv or \.safetensors"):
                grown.save(tmp_path / name)
            assert not (tmp_path / name).exists()

    def test_a_killed_run_goes_on_from_its_journals(self, tmp_path, monkeypatch):
        dense = seeded(Residual)
        model, masks = pruned(dense)
        options = {"budget": "damage", "saliency": "residual", "rounds": 2}
        expected, fresh = copy.deepcopy(model), copy.deepcopy(model)
        regrow(expected, dense, masks, 0.7, images(40), **options)
        walks, write = [], resuscitate.engine.writer.write_change

        def fail(change, flags):
            walks.append(change.name)
            if len(walks) == 8:
                raise KeyboardInterrupt
            return write(change, flags)

        monkeypatch.setattr(resuscitate.engine.writer, "write_change", fail)
        with pytest.raises(KeyboardInterrupt):
            regrow(model, dense, masks, 0.7, images(40), resume=tmp_path, **options)
        assert same(model, fresh)
        monkeypatch.undo()
        measured = []
        monkeypatch.setattr(
            resuscitate.pruning.importance,
            "single_weight_error_reduction",
            lambda *a, **k: measured.append(1) or single_weight_error_reduction(*a, **k),
        )
        grown = regrow(model, dense, masks, 0.7, images(40), resume=tmp_path, **options)
        assert not measured
        assert grown.rounds[0].report.resumed > 0
        assert same(model, expected)

    def test_the_journals_of_other_images_are_refused(self, tmp_path):
        dense = seeded(chain)
        model, masks = pruned(dense)
        options = {"budget": "damage", "resume": tmp_path, "method": None}
        regrow(copy.deepcopy(model), dense, masks, 0.7, images(), **options)
        with pytest.raises(JournalError, match="images differ"):
            regrow(model, dense, masks, 0.7, images(seed=8), **options)

    @pytest.mark.parametrize(
        ("changes", "option"),
        [
            ({"sparsity": 0.6}, "sparsity"),
            ({"rounds": 1}, "rounds"),
            ({"budget": "damage"}, "budget"),
            ({"saliency": "residual"}, "saliency"),
            ({"initial": "zero"}, "initial"),
            ({"method": "asr"}, r"method \(.*\)"),
            ({"densities": {"0": 1.0}}, "densities"),
            ({"forward_fn": lambda m, x: m(x)}, "forward_fn"),
            ({"seed": 1}, "seed"),
            ({"dtype": "bf16"}, "dtype"),
            ({"finetune": lambda model, masks: None}, "finetune"),
        ],
        ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
    )
    def test_the_folder_of_another_regrowth_is_refused_and_the_message_names_the_option(
        self, changes, option, tmp_path
    ):
        dense = seeded(chain)
        model, masks = pruned(dense)
        given = {"sparsity": 0.7, "calibration": images(), "rounds": 2, "resume": tmp_path}
        regrow(copy.deepcopy(model), dense, masks, **given)
        before = copy.deepcopy(model)
        with pytest.raises(JournalError, match=rf"run\.journal is .* another run: options \({option}\) differ"):
            regrow(model, dense, masks, **given | changes)
        assert same(model, before)
        # evaluate and accuracy are not part of the journals' identity
        grown = regrow(model, dense, masks, **given, evaluate=lambda model: 50.0, accuracy=40.0)
        assert [each.report.resumed for each in grown.rounds] == [4]

    def test_to_re_estimate_batchnorm_is_another_regrowth_than_to_repair_nothing(self, tmp_path):
        dense = seeded(chain)
        model, masks = pruned(dense)
        regrow(copy.deepcopy(model), dense, masks, 0.7, images(), resume=tmp_path, method="bn")
        with pytest.raises(JournalError, match=r"another run: options \(method\) differ"):
            regrow(model, dense, masks, 0.7, images(), resume=tmp_path, method=None)

    def test_a_small_memory_makes_no_difference(self, tmp_path):
        dense, results = seeded(Residual), []
        for memory in (None, 200_000):
            model, masks = pruned(dense)
            options = {"memory": memory, "scratch": tmp_path, "batch_size": 8, "saliency": "residual"}
            regrow(model, dense, masks, 0.7, images(40, size=24), **options)
            results.append(model)
        assert same(*results)

    def test_the_result_is_a_mapping_of_the_masks_and_no_masks(self):
        dense = seeded(chain)
        model, masks = pruned(dense)
        grown = regrow(model, dense, masks, 0.5, images(), method=None)
        assert not isinstance(grown, Masks)
        assert Masks(grown) == grown.masks
        repair(model, dense, images(), masks=grown)

    def test_the_report_reads_and_writes(self):
        dense = seeded(chain)
        model, masks = pruned(dense)
        grown = regrow(model, dense, masks, 0.5, images(), rounds=2)
        plain = grown.to_dict()
        assert [row["sparsity"] for row in plain["rounds"]] == [each.sparsity for each in grown.rounds]
        assert sum(row["regrown"]["3"] for row in plain["rounds"]) == grown.regrown["3"]
        assert grown.masks.table()[1].note == f"{grown.regrown['3']:,} regrown"


class TestMethods:
    @pytest.mark.parametrize(
        ("method", "options"),
        [
            (Refit(relu_aware=False), {"method": "refit", "relu_aware": False}),
            (ASR(prior="mean"), {"method": "asr", "prior": "mean"}),
        ],
        ids=["refit", "asr"],
    )
    def test_an_object_is_the_name_with_its_options(self, method, options):
        dense, results = seeded(chain), []
        for chosen in ({"method": method}, options):
            model, masks = pruned(dense)
            grown = regrow(model, dense, masks, 0.7, images(), **chosen)
            assert grown.rounds[0].report.method == method.name
            results.append(model)
        assert same(*results)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"method": "asr", "ridge": 0.1}, TypeError, "method 'asr' has no option 'ridge'"),
            ({"method": Refit(), "ridge": 0.1}, TypeError, r"method=Refit\(ridge=\.\.\.\)"),
            ({"ridge": -1.0}, ValueError, "ridge=-1.0 must be"),
            ({"method": "magic"}, ValueError, "method='magic' is unknown"),
            ({"method": ASR(), "initial": "refit"}, ValueError, "needs a refit"),
            ({"recalibrate": "exact"}, TypeError, r"regrow\(\) has no option 'recalibrate'"),
            ({"batch_size": 0}, CalibrationError, "batch_size must be"),
            ({"pattern": "channels", "forward_fn": print}, ValueError, "takes no forward_fn"),
            ({"rounds": 0}, ValueError, "rounds=0"),
            ({"budget": "fair"}, ValueError, "budget='fair' is unknown"),
        ],
        ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
    )
    def test_a_bad_option_is_refused_before_an_image_is_read(self, options, error, message):
        def unread():
            raise AssertionError("the images were read")

        dense = seeded(chain)
        model, masks = pruned(dense)
        before = copy.deepcopy(model)
        with pytest.raises(error, match=message):
            regrow(model, dense, masks, 0.7, unread, **options)
        assert same(model, before)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"sparsity": 0.95}, ValueError, r"sparsity=0\.95 is above the 0\.9.*sparsify removes"),
            ({"sparsity": 1}, TypeError, "give a float"),
            ({"budget": "fair"}, ValueError, "budget='fair' is unknown"),
            ({"saliency": "best"}, ValueError, "saliency='best' is unknown"),
            ({"saliency": "gradient"}, ValueError, "labelled"),
            ({"labelled": LABELLED}, ValueError, "labelled"),
            ({"saliency": "gradient", "labelled": []}, CalibrationError, "no batches"),
            ({"saliency": "gradient", "labelled": [images()]}, CalibrationError, "pairs of images and labels"),
            ({"saliency": {"0": torch.ones(2, 2)}}, MaskError, "denser masks"),
            ({"initial": "refit", "method": None}, ValueError, "needs a refit"),
            ({"rounds": 0}, ValueError, "rounds=0"),
            ({"accuracy": 0.5}, ValueError, "evaluate"),
            ({"loss": F.cross_entropy}, ValueError, "loss is for saliency 'gradient'"),
            ({"evaluate": lambda model: float("nan")}, ValueError, "must return a finite score"),
            ({"masks": {}}, ValueError, "masks is empty"),
            ({"masks": {"0": torch.ones(3, 3)}}, MaskError, "made for another model"),
            ({"masks": {"zzz": torch.ones(3, 3)}}, MaskError, "zzz"),
            ({"calibration": None}, CalibrationError, "calibration is missing"),
            ({"pattern": "channels", "saliency": "residual"}, ValueError, "single weights"),
            ({"pattern": "rows"}, ValueError, "pattern='rows'"),
        ],
    )
    def test_before_anything_is_changed(self, options, error, message):
        dense = seeded(chain)
        model, masks = pruned(dense)
        before = copy.deepcopy(model)
        given = {"masks": masks, "sparsity": 0.8, "calibration": images(), **options}
        with pytest.raises(error, match=message):
            regrow(model, dense, **given)
        assert same(model, before)

    def test_a_mask_of_weights_that_are_not_zero_and_another_network(self):
        dense = seeded(chain)
        model, masks = pruned(dense)
        with pytest.raises(MaskError, match="are not zero"):
            regrow(copy.deepcopy(dense), dense, masks, 0.5, images())
        with pytest.raises(ModelMismatchError, match="dense"):
            regrow(model, model, masks, 0.5, images())
        with pytest.raises((ModelMismatchError, MaskError)):
            regrow(model, seeded(Residual), masks, 0.5, images())

    def test_a_callback_that_changes_the_masks(self):
        dense = seeded(chain)
        model, masks = pruned(dense)
        before = copy.deepcopy(model)

        def meddle(candidate, given):
            given["3"][:] = True

        with pytest.raises(MaskError, match="finetune changed its mask"):
            regrow(model, dense, masks, 0.5, images(), finetune=meddle)
        assert same(model, before)

    def test_a_callback_that_fails_leaves_the_model_as_it_was(self):
        dense = seeded(chain)
        model, masks = pruned(dense)
        before = copy.deepcopy(model)
        model.train()
        for fail in ({"evaluate": lambda model: 1 / 0}, {"finetune": lambda model, masks: 1 / (model.eval() is None)}):
            with pytest.raises(ZeroDivisionError):
                regrow(model, dense, masks, 0.5, images(), **fail)
            assert same(model, before)
            assert model.training
