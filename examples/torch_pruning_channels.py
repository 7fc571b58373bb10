"""Remove channels from a torchvision ResNet-18, repair what is left from unlabelled images, and make it smaller.

Needs torchvision and Torch-Pruning (pip install torch-pruning), which finds the channels that are only removed
together. The weights and the images are random, so that the script runs anywhere. For a network of your own change the
lines marked "yours".
"""

import copy

import torch
import torchvision
from torch.nn.functional import interpolate

import resuscitate

torch.manual_seed(0)
dense = torchvision.models.resnet18().eval()  # yours: weights="DEFAULT", or load_state_dict
images = interpolate(torch.randn(64, 3, 8, 8), 64)  # yours: resuscitate.load_images("folder", size=224, ...)
resuscitate.recalibrate_batchnorm(dense, images)  # yours: leave this out; a trained network has its statistics

model = copy.deepcopy(dense)
masks = resuscitate.sparsify(model, 0.4, pattern="channels", example=images[:2])  # zeros, in the shapes of the dense
method = resuscitate.Refit(ridge=0.1)  # yours: leave method out, and a ridge is chosen for each layer
report = resuscitate.repair(model, dense, images, method=method)
small = resuscitate.shrink(model, masks, images[:2])  # removes the zeros: the same function, fewer channels

print(f"{small.flops[0] / small.flops[1]:.2f} times fewer FLOPs, {small.parameters[1]:,} parameters are left")
print(f"refitted in {report.seconds:.0f} s; agreement with the dense network: {report.agreement}")
torch.save(model, "smaller.pt")  # the whole network: its shapes are no longer those of the class
