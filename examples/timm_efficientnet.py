"""Repair a pruned timm EfficientNet, whose convolutions pad as TensorFlow's "SAME", and write a report of it.

Needs timm. The weights and the images are random, so that the script runs anywhere. For a network of your own change
the lines marked "yours".
"""

import copy

import timm
import torch
from torch.nn.functional import interpolate

import resuscitate

torch.manual_seed(0)
dense = timm.create_model("tf_efficientnet_b0").eval()  # yours: pretrained=True, or load_state_dict
images = interpolate(torch.randn(128, 3, 8, 8), 64)
# yours: resuscitate.load_images("folder", size=224, mean=dense.default_cfg["mean"], std=dense.default_cfg["std"],
#                                max_samples=256)
resuscitate.recalibrate_batchnorm(dense, images)  # yours: leave this out; a trained network has its statistics

model = copy.deepcopy(dense)
masks = resuscitate.sparsify(model, 0.5)  # yours: or a network that you have pruned yourself
method = resuscitate.Refit(ridge=0.1)  # yours: leave method out, and a ridge is chosen for each layer
report = resuscitate.repair(model, dense, images, method=method)
masks.check(model)  # the pruned weights are still zero

print(f"{masks.sparsity:.1%} of the weights are zero; refitted in {report.seconds:.0f} s")
print(f"agreement with the dense network: {report.agreement}")
report.save("repaired.json")  # `resuscitate report repaired.json` makes a page of it
torch.save(model.state_dict(), "repaired.pt")
