"""The map: every cell is what one would get by hand, and the transition regime is where it says."""

import copy
import csv
import json
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resuscitate import (
    ASR,
    Accuracy,
    ChannelWise,
    DenseStatistics,
    RecoverabilityMap,
    Refit,
    Repairability,
    recoverability,
    register,
    regrow,
    repair,
    sparsify,
)
from resuscitate.errors import CheckpointError, ResuscitateError
from resuscitate.methods import base
from resuscitate.reports.recoverability import Cell
from tests.networks import chain, images, seeded
from tests.resuscitate.workflows.maps import GRID, Likeness


@dataclass(frozen=True, kw_only=True)
class Listing(ChannelWise):
    """The gains and shifts of `ChannelWise`; a list is among its options."""

    items: list = field(default_factory=list)

    name = "listing"


def of(scores, dense=90.0, chance=10.0):
    """A map of one allocation from {method: {sparsity: score}}."""
    cells = [Cell(s, "erk", m, score, s, 0.0) for m, curve in scores.items() for s, score in curve.items()]
    return RecoverabilityMap(cells, dense, chance, "unstructured", 8)


class TestCells:
    @pytest.mark.parametrize("workers", [1, 2])
    def test_each_is_what_sparsify_repair_and_evaluate_give_by_hand(self, workers):
        dense = seeded(chain)
        evaluate = Accuracy(images(60, seed=7), torch.arange(60) % 10)
        found = recoverability(dense, images(), evaluate, workers=workers, **GRID, progress=False)
        assert [(c.sparsity, c.allocation, c.method) for c in found.cells] == [
            (s, a, m) for s in GRID["sparsities"] for a in GRID["allocations"] for m in GRID["methods"]
        ]
        for cell in found.cells:
            model = copy.deepcopy(dense)
            masks = sparsify(model, cell.sparsity, allocation=cell.allocation)
            if cell.method != "none":
                repair(model, dense if cell.method == "asr" else None, images(), method=cell.method)
            assert cell.score == evaluate(model)
            assert cell.pruned == masks.sparsity
        assert found.dense == evaluate(dense)

    def test_a_method_may_be_any_options_of_repair_under_any_name(self):
        dense = seeded(chain)
        flat = {"method": "asr", "prior": 1.0, "gain_samples": 8}
        methods = {"flat": flat, "nothing": None, "pairs": {"diagnostics": True}}
        score = Likeness(dense)
        found = recoverability(dense, images(), score, sparsities=[0.7], allocations=["erk"], methods=methods)
        model = copy.deepcopy(dense)
        sparsify(model, 0.7, allocation="erk")
        repair(model, dense, images(), method="asr", prior=1.0, gain_samples=8)
        assert found.methods == ["flat", "nothing", "pairs"]
        assert found.curve("erk", "flat")[0.7] == pytest.approx(score(model), abs=1e-5)

    def test_options_that_name_no_method_mean_what_they_mean_to_repair(self):
        dense = seeded(chain)
        score, methods = Likeness(dense), {"default": {}, "eight": {"gain_samples": 8}, "asr": {"method": "asr"}}
        found = recoverability(dense, images(), score, sparsities=[0.7], allocations=["erk"], methods=methods)
        for name, options in methods.items():
            model = copy.deepcopy(dense)
            sparsify(model, 0.7, allocation="erk")
            report = repair(model, dense, images(), **options)
            assert report.method == ("asr" if name == "asr" else "refit")
            assert found.curve("erk", name)[0.7] == pytest.approx(score(model), abs=1e-5)

    def test_a_column_may_be_a_method_or_one_that_is_registered_by_name(self, monkeypatch):
        monkeypatch.setattr(base, "_METHODS", {**base.registered()})

        @register
        @dataclass(frozen=True, kw_only=True)
        class Half(ChannelWise):
            """The gains and shifts of `ChannelWise`, under another name."""

            name = "half"

        dense = seeded(chain)
        grid, score = {"sparsities": [0.7], "allocations": ["erk"]}, Likeness(dense)
        found = recoverability(dense, images(), score, **grid, methods={"ridge": Refit(ridge=0.1), "x": Half()})
        named = recoverability(dense, images(), score, **grid, methods=["half", "channelwise"])
        model = copy.deepcopy(dense)
        sparsify(model, 0.7, allocation="erk")
        repair(model, dense, images(), ridge=0.1)
        assert found.curve("erk", "ridge")[0.7] == pytest.approx(score(model), abs=1e-5)
        assert named.curve("erk", "half") == named.curve("erk", "channelwise") == found.curve("erk", "x")

        # the class is in a function, and no other process can import it: refused where a column needs it
        grid["sparsities"] = [0.7, 0.8]
        alone = recoverability(dense, images(), score, **grid, methods=["channelwise"], workers=2)
        assert alone.curve("erk", "channelwise")[0.7] == named.curve("erk", "half")[0.7]
        with pytest.raises(ValueError, match=r"cannot be pickled .*Half"):
            recoverability(dense, images(), score, **grid, methods=["half"], workers=2)

    def test_workers_take_a_method_whose_options_cannot_be_hashed(self):
        dense, given = seeded(chain), {"sparsities": [0.7, 0.8], "allocations": ["erk"], "methods": {"m": Listing()}}
        alone, shared = (recoverability(dense, images(), Likeness(dense), **given, workers=n) for n in (1, 2))
        assert alone.curve("erk", "m") == shared.curve("erk", "m")

    def test_regrowing_and_means_are_methods_too(self):
        dense = seeded(chain)
        methods = {"mean": {"method": "mean"}, "back": {"past": 0.5, "budget": "damage"}}
        score = Likeness(dense)
        found = recoverability(dense, images(), score, sparsities=[0.7], allocations=["erk"], methods=methods)
        model = copy.deepcopy(dense)
        sparsify(model, 0.7, allocation="erk")
        repair(model, dense, images(), method="mean")
        assert found.curve("erk", "mean")[0.7] == pytest.approx(score(model), abs=1e-5)
        model = copy.deepcopy(dense)
        masks = sparsify(model, 0.85, allocation="erk")
        masks = regrow(model, dense, masks, 0.7, images(), budget="damage")
        assert found.curve("erk", "back")[0.7] == pytest.approx(score(model), abs=1e-5)
        assert [cell.pruned for cell in found.cells][1] == masks.sparsity

    def test_the_dense_model_and_its_repairability_are_measured_once(self, monkeypatch):
        dense, measured = seeded(chain), []

        def counted(kind, measure):
            return lambda *args, **options: (measured.append(kind), measure(*args, **options))[1]

        for kind in (DenseStatistics, Repairability):
            monkeypatch.setattr(kind, "measure", counted(kind.__name__, kind.measure))
        grid = GRID | {"allocations": ["rr", "erk"], "methods": ["asr", "channelwise", "layerwise", "bn"]}
        recoverability(dense, images(), Likeness(dense), **grid)
        assert sorted(measured) == ["DenseStatistics", "Repairability"]

    def test_the_dense_model_stays_as_it_is_found(self):
        dense = seeded(chain).train()
        dense[1].eval()
        before, modes = copy.deepcopy(dense.state_dict()), [m.training for m in dense.modules()]
        recoverability(dense, images(), Likeness(seeded(chain)), **GRID)
        assert [m.training for m in dense.modules()] == modes
        assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())

    def test_images_may_come_from_a_loader_that_reuses_its_memory(self):
        x, dense = images(), seeded(chain)

        def loader():
            buffer = torch.empty(6, 3, 9, 9)
            for part in x.split(6):
                yield buffer.copy_(part)

        grid = GRID | {"methods": ["asr"]}
        one, other = (recoverability(dense, source, Likeness(dense), **grid) for source in (x, loader))
        assert [c.score for c in one.cells] == pytest.approx([c.score for c in other.cells], abs=2e-5)


class TestWorkers:
    def test_a_cell_that_fails_is_named(self):
        dense = seeded(chain)
        evaluate = Accuracy(images(4), torch.arange(4))
        grid = {"sparsities": [0.5, 0.9995], "allocations": ["erk"], "methods": ["asr"]}
        with pytest.raises(ResuscitateError, match=r"asr at sparsity 0\.9995, allocation erk: .*at most"):
            recoverability(dense, images(), evaluate, **grid, workers=2, chance=-1)

    def test_what_cannot_be_sent_is_refused_with_what_to_do(self):
        dense = seeded(chain)
        with pytest.raises(ValueError, match=r"cannot be pickled .*; use a function or class at the top of a module"):
            recoverability(dense, images(), lambda model: 50.0, **GRID, workers=2)


class TestTransition:
    def test_by_hand(self):
        # half of the lead of 90 over 10 is lost at 50
        found = of({"bn": {0.5: 80, 0.7: 60, 0.9: 20}, "asr": {0.5: 84, 0.7: 80, 0.9: 40}})
        assert found.limit("erk", "bn") == pytest.approx(0.75)
        assert found.limit("erk", "asr") == pytest.approx(0.85)
        start, end, still_open = found.transition("erk", "asr")
        assert (start, end, still_open) == (pytest.approx(0.75), pytest.approx(0.85), False)
        assert list(found.findings()) == ["erk: asr still holds where bn fails, sparsity 0.750 to 0.850"]

    def test_a_repair_that_never_fails_leaves_it_open(self):
        found = of({"bn": {0.5: 40, 0.9: 20}, "asr": {0.5: 84, 0.9: 60}})
        start, end, still_open = found.transition("erk", "asr")
        assert (start, end, still_open) == (pytest.approx(0.4), 0.9, True)  # from the dense score at sparsity 0
        assert str(found.transition("erk", "asr")) == "0.400 to beyond 0.900"

    def test_there_is_none_where_the_baseline_holds_or_the_repair_fails_first(self):
        assert of({"bn": {0.5: 80}, "asr": {0.5: 90}}).transition("erk", "asr") is None
        assert of({"bn": {0.5: 30}, "asr": {0.5: 20}}).transition("erk", "asr") is None

    def test_another_baseline_may_be_named_and_an_unknown_one_is_refused(self):
        found = of({"bn-ema": {0.5: 20}, "asr": {0.5: 80}})
        assert found.transition("erk", "asr", baseline="bn-ema").open
        with pytest.raises(ValueError, match="'bn' is not in the map, which has bn-ema, asr"):
            found.transition("erk", "asr")

    @given(
        bn=st.lists(st.floats(10, 90), min_size=3, max_size=3),
        asr=st.lists(st.floats(10, 90), min_size=3, max_size=3),
    )
    def test_within_it_the_baseline_is_below_half_of_the_lead_and_the_repair_above(self, bn, asr):
        at = (0.3, 0.6, 0.9)
        curves = {"bn": dict(zip(at, sorted(bn, reverse=True), strict=True))}
        curves["asr"] = dict(zip(at, sorted(asr, reverse=True), strict=True))
        regime = of(curves).transition("erk", "asr")
        inside = [s for s in at if curves["bn"][s] < 50 <= curves["asr"][s]]
        if regime is None:
            assert not inside
        else:
            assert all(regime.start - 1e-9 <= s <= regime.end + 1e-9 for s in inside)
            assert all(s in inside for s in at if regime.start + 1e-9 < s < regime.end - 1e-9)


class TestTable:
    def test_json_comes_back_as_it_was(self, tmp_path):
        found = of({"bn": {0.5: 80.0}, "asr": {0.5: 84.5}})
        found.save(tmp_path / "map.json")
        assert RecoverabilityMap.load(tmp_path / "map.json") == found
        (tmp_path / "map.json").write_text(json.dumps({"cells": [1]}))
        with pytest.raises(CheckpointError, match="holds no recoverability map"):
            RecoverabilityMap.load(tmp_path / "map.json")

    def test_csv_is_tidy_a_row_a_cell(self, tmp_path):
        of({"bn": {0.5: 80.0, 0.9: 20.0}}).save(tmp_path / "map.csv")
        rows = list(csv.DictReader((tmp_path / "map.csv").read_text().splitlines()))
        assert [(row["sparsity"], row["allocation"], row["method"], row["score"], row["dense"]) for row in rows] == [
            ("0.5", "erk", "bn", "80.0", "90.0"),
            ("0.9", "erk", "bn", "20.0", "90.0"),
        ]
        with pytest.raises(ValueError, match=r"written as \.json or \.csv"):
            of({"bn": {0.5: 80.0}}).save(tmp_path / "map.xlsx")

    def test_the_best_allocation_is_the_one_of_the_highest_score(self):
        cells = [Cell(0.5, a, "bn", score, 0.5, 0.0) for a, score in (("erk", 50.0), ("lamp", 60.0), ("global", 60.0))]
        assert RecoverabilityMap(cells, 90.0, 10.0, "unstructured", 8).best(0.5, "bn") == "lamp"


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sparsities": [1.5]}, r"not in \[0, 1\)"),
            ({"sparsities": []}, "at least one sparsity"),
            ({"allocations": ["erkk"]}, "unknown allocation 'erkk'.*did you mean erk"),
            ({"allocations": "erk"}, r"allocations='erk' is one name; give several, such as \['erk'\]"),
            ({"methods": ["arr"]}, "unknown method 'arr'.*did you mean asr"),
            ({"methods": {"mine": {"priors": 1}}}, r"method 'mine': repair\(\) has no option 'priors'"),
            ({"methods": {"mine": {"method": "asr", "ridge": 1}}}, "method 'mine': method 'asr' has no option 'ridge'"),
            ({"methods": {"mine": {"method": ASR(), "prior": 1}}}, r"method 'mine': prior: .*method=ASR\(prior="),
            ({"methods": {"mine": {"ridge": -1.0}}}, "method 'mine': ridge=-1.0 must be"),
            ({"methods": {"mine": {"past": 2.0}}}, "method 'mine': past=2.0 must be"),
            ({"methods": {"mine": {"past": 0.3, "budget": "fair"}}}, "method 'mine': budget='fair' is unknown"),
            (
                {"methods": {"mine": {"past": 0.3, "schedule": "parallel"}}},
                r"mine': regrow\(\) has no option 'schedule'",
            ),
            ({"methods": {"mine": {"method": "bn", "skip_first": True}}}, "skip_first is for methods that change"),
            ({"max_batches": 0}, "max_batches must be"),
            ({"pattern": "2:4"}, "has no sparsity to vary"),
            ({"workers": 0}, "must be at least 1"),
            ({"chance": 200.0}, r"no more than chance=200; look at .* or give chance="),
        ],
        ids=lambda value: str(value)[:30],
    )
    def test_before_any_cell_is_filled(self, options, message):
        dense = seeded(chain)
        score = Likeness(dense)
        with pytest.raises((ValueError, TypeError), match=message):
            recoverability(dense, images(), score, **GRID | options)
        assert score.calls <= 1

    def test_an_int_is_no_sparsity(self):
        with pytest.raises(TypeError, match="give a float"):
            recoverability(seeded(chain), images(), lambda model: 50.0, **GRID | {"sparsities": [1]})

    def test_a_score_that_is_no_number_is_refused(self):
        with pytest.raises(ValueError, match="evaluate returned nan"):
            recoverability(seeded(chain), images(), lambda model: float("nan"), **GRID)
