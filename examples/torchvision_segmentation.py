"""Repair a pruned segmentation network, whose output is a map of classes and not one class for each image.

Needs torchvision. The weights and the images are random, so that the script runs anywhere. For a network of your own
change the lines marked "yours".
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import resuscitate


@torch.no_grad()
def same_class(model: nn.Module, dense: nn.Module, images: Tensor) -> float:
    """The part of the pixels to which both networks give the same class."""
    found, wanted = (network.eval()(images)["out"].argmax(1) for network in (model, dense))
    return (found == wanted).float().mean().item()


torch.manual_seed(0)
dense = lraspp_mobilenet_v3_large(weights_backbone=None).eval()  # yours: weights="DEFAULT", or load_state_dict
images, test_images = interpolate(torch.randn(80, 3, 8, 8), 96).split(64)  # yours: resuscitate.load_images("folder")
resuscitate.recalibrate_batchnorm(dense, images)  # yours: leave this out; a trained network has its statistics

model = copy.deepcopy(dense)
masks = resuscitate.sparsify(model, 0.5)  # yours: or a network that you have pruned yourself
before = same_class(model, dense, test_images)
report = resuscitate.repair(model, dense, images)
masks.check(model)  # the pruned weights are still zero

print(f"{masks.sparsity:.1%} of the weights are zero; refitted in {report.seconds:.0f} s")
print(f"agreement with the dense network: {report.agreement}")  # without logits: the error of all outputs
print(f"pixels of the same class: {before:.3f} -> {same_class(model, dense, test_images):.3f}")
torch.save(model.state_dict(), "repaired.pt")
