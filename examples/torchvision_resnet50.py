"""Prune a torchvision ResNet-50 to 80 % sparsity, repair it from unlabelled images, and save it.

Needs torchvision. The weights and the images are random, so that the script runs anywhere. For a network of your own
change the lines marked "yours".
"""

import copy

import torch
import torchvision
from torch.nn.functional import interpolate

import resuscitate

torch.manual_seed(0)
dense = torchvision.models.resnet50().eval()  # yours: weights="DEFAULT", or load_state_dict
images = interpolate(torch.randn(32, 3, 8, 8), 64)
# yours: resuscitate.load_images("folder", size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
#                                max_samples=256)
resuscitate.recalibrate_batchnorm(dense, images)  # yours: leave this out; a trained network has its statistics

model = copy.deepcopy(dense)
masks = resuscitate.sparsify(model, 0.8)  # yours: or a network that you have pruned yourself
method = resuscitate.Refit(ridge=0.1)  # yours: leave method out, and a ridge is chosen for each layer
report = resuscitate.repair(model, dense, images, method=method)
masks.check(model)  # the pruned weights are still zero

print(f"{masks.sparsity:.1%} of the weights are zero; refitted in {report.seconds:.0f} s")
print(f"agreement with the dense network: {report.agreement}")
torch.save(model.state_dict(), "repaired.pt")
