"""Ranks whose images take other paths through the network are refused: they would merge moments of other modules."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import resuscitate
from resuscitate.errors import DistributedError
from tests.networks import images, pruned_copy, seeded
from tests.ranks import joined
from tests.wired import conv

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with Gloo")


class Domains(nn.Module):
    """A BatchNorm for dark images, and one for bright ones."""

    def __init__(self):
        super().__init__()
        self.first, self.last = conv(3, 6, 3), conv(6, 4)
        self.dark, self.bright = nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x):
        norm = self.bright if bool(x.mean() > 5) else self.dark
        return self.last(norm(self.first(x)).relu())


def work(rank, folder, shift):
    model, error = pruned_copy(seeded(Domains)), None
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = images(16, seed=rank) + shift * rank
    with joined(rank, 2, folder) as group:
        try:
            resuscitate.recalibrate_batchnorm(model, x, group=group, batch_size=8, progress=False)
        except DistributedError as caught:
            error = str(caught)
        changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
        torch.save((error, changed), f"{folder}/{rank}")
        dist.barrier()


@pytest.mark.parametrize("shift", [0, 20], ids=["alike", "apart"])
def test_ranks_that_run_other_modules_are_refused_and_nothing_is_changed(shift, tmp_path):
    for process in mp.spawn(work, (str(tmp_path), shift), nprocs=2, join=False).processes:
        process.join(120)
        assert not process.is_alive(), "a rank hangs"
    for rank in range(2):
        error, changed = torch.load(tmp_path / f"{rank}")
        if shift:
            assert "rank 1 runs other modules" in error
            assert "'dark'" in error
            assert not changed
        else:
            assert error is None
            assert {key.split(".")[0] for key in changed} == {"dark"}
