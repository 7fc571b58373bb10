"""Statistics that several repairs use."""

import pytest
import torch
from torch import nn

import asr_kernels as ak
from resuscitate.engine.kept import KeptStatistics
from resuscitate.runtime.activations import Store
from resuscitate.statistics.base import Place
from resuscitate.statistics.patches import PatchCovariances


@pytest.mark.parametrize("memory", ["1GiB", 64], ids=["in memory", "spilled"])
@pytest.mark.parametrize("moments", [ak.PatchMoments, ak.RowMoments])
def test_a_kept_statistic_comes_back_with_the_same_bits_and_as_often_as_asked(moments, memory, tmp_path):
    torch.manual_seed(0)
    layer, found = nn.Linear(6, 4), PatchCovariances(Place("fc", nn.Linear(6, 4)))
    for fold in range(2):
        of_samples = torch.randn(20, 6), torch.randn(20, 4)
        rows = ak.row_moments(*of_samples, 30)
        found.folds[fold] = rows if moments is ak.RowMoments else ak.patch_moments(*of_samples, ak.Window())
    expected = {fold: dict(vars(each)) for fold, each in found.folds.items()}
    with Store(memory, torch.device("cpu"), tmp_path) as store:
        kept = KeptStatistics(store)
        kept.add(found)
        assert ("fc" in kept, "other" in kept) == (True, False)
        assert (store.bytes_spilled > 0) == (memory == 64)
        for _ in range(2):
            again = kept.get(Place("fc", layer))
            assert (type(again), again.place.module) == (PatchCovariances, layer)
            assert again.folds.keys() == expected.keys()
            for fold, parts in expected.items():
                assert type(again.folds[fold]) is moments
                for name, part in parts.items():
                    torch.testing.assert_close(vars(again.folds[fold])[name], part, rtol=0, atol=0)
            again.folds.clear()  # as a refit does
