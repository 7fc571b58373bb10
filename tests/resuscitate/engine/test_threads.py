"""Calls from several threads of one process."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest

import resuscitate
from tests.compare import same_state
from tests.networks import Residual, Untraceable, chain, images, pruned_copy, seeded


def refitted(dense, given):
    model = pruned_copy(dense)
    resuscitate.repair(model, dense, given, keep_worse=True)
    return model.state_dict()


def corrected(dense, given):
    model = pruned_copy(dense)
    resuscitate.repair(model, dense, given, method="asr", keep_worse=True)
    return model.state_dict()


def compressed(dense, given):
    model = copy.deepcopy(dense)
    resuscitate.compress(model, 0.6, given, steps=2, keep_worse=True)
    return model.state_dict()


def recalibrated(dense, given):
    model = pruned_copy(dense)
    resuscitate.recalibrate_batchnorm(model, given)
    return model.state_dict()


@pytest.mark.parametrize("call", [refitted, corrected, compressed, recalibrated])
def test_calls_from_several_threads_follow_one_another(call):
    nets = [seeded(build, seed) for build in (chain, Residual, Untraceable) for seed in (1, 2)]
    cases = [(dense, images(32, seed=seed).split(8)) for seed, dense in enumerate(nets)]
    expected = [call(*case) for case in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        found = list(pool.map(call, *zip(*cases, strict=True)))
    assert all(map(same_state, found, expected))
