"""What is promised of a repair holds on networks that were not written for it, with random weights, on 16 images."""

import copy
import time
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import resuscitate
from resuscitate.network.wiring import output_leaves
from tests.outside.networks import NETWORKS, package

# quick ones, no two alike; `make test` runs these, `make outside` all
FEW = "torchvision:shufflenet_v2_x0_5", "torchvision:swin", "timm:nf_resnet50", "transformers:ViT"


def _parameter(network):
    marks = [pytest.mark.outside] + [pytest.mark.slow] * (str(network) not in FEW)
    return pytest.param(network, id=str(network), marks=marks)


@pytest.fixture(params=map(_parameter, NETWORKS))
def network(request):
    try:
        package(request.param.package)
    except ImportError:
        pytest.skip(f"{request.param.package} is not installed; `make outside` brings it along")
    return request.param


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def outputs(model, images):
    return [leaf for leaf in output_leaves(copy.deepcopy(model).eval()(images)) if isinstance(leaf, Tensor)]


def error(found, wanted):
    return sum(float((x - y).square().sum()) for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize("job", ["asr", "refit", "compress"])
def test_zeros_stay_and_flags_too_outputs_are_finite_and_undo_is_exact(network, job, record_property):
    dense, images = network.build()
    model, given = copy.deepcopy(dense), images.clone()
    for index, module in enumerate(model.modules()):
        module.training = index % 3 == 0
    flags = [module.training for module in model.modules()]
    pattern = {"pattern": network.pattern}
    if job != "compress":
        masks = resuscitate.sparsify(model, 0.5, allocation="uniform", **pattern)
    before, pruned = state(model), outputs(model, images)
    started = time.process_time()
    if job == "compress":
        report = resuscitate.compress(model, 0.7, images, steps=2, ridge=1e-2, **pattern)  # choosing one takes longer
        masks = report.masks
    else:
        report = resuscitate.repair(model, dense, images, method=job)
    seconds = time.process_time() - started

    masks.check(model)
    assert [module.training for module in model.modules()] == flags
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(images, given)
    after, wanted = outputs(model, images), outputs(dense, images)
    assert all(output.isfinite().all() for output in after)
    if job == "refit":
        assert error(after, wanted) < error(pruned, wanted)
    done = {row.name for row in report.layers if row.status in ("repaired", "refitted")}
    assert done
    assert {row.name for row in report.layers} == {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    }
    report.undo()
    undone = model.state_dict()
    assert undone.keys() == before.keys()
    assert all(torch.equal(undone[name], tensor) for name, tensor in before.items())

    left = Counter(row.reason for row in report.layers if row.name not in done)
    walk = report.steps[-1].walk if job == "compress" else report.walk
    record_property("outside", [str(network), job, walk, len(done), len(report.layers), seconds, dict(left)])
