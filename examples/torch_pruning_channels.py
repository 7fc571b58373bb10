"""Repair a torchvision ResNet-18 that Torch-Pruning has made smaller, from unlabelled images.

Needs torchvision and Torch-Pruning (pip install torch-pruning). The weights and the images are random, so that the
script runs anywhere. For a network of your own change the lines marked "yours".
"""

import copy

import torch
import torch_pruning
import torchvision
from torch.nn.functional import interpolate

import resuscitate

torch.manual_seed(0)
dense = torchvision.models.resnet18().eval()  # yours: weights="DEFAULT", or load_state_dict
images = interpolate(torch.randn(64, 3, 8, 8), 64)  # yours: resuscitate.load_images("folder", size=224, ...)
resuscitate.recalibrate_batchnorm(dense, images)  # yours: leave this out; a trained network has its statistics

small = copy.deepcopy(dense)  # yours: the network as your pruner left it, NNCF's or a script's too
importance = torch_pruning.importance.MagnitudeImportance(p=2)
options = {"pruning_ratio": 0.3, "ignored_layers": [small.fc]}
torch_pruning.pruner.MagnitudePruner(small, images[:1], importance, **options).step()

method = resuscitate.Refit(ridge=0.1)  # yours: leave method out, and a ridge is chosen for each layer
report = resuscitate.repair(small, dense, images, method=method)  # which channels are left is found

print(report.notes)
print(f"refitted in {report.seconds:.0f} s; agreement with the dense network: {report.agreement}")
torch.save(small.state_dict(), "smaller.pt")
fresh = torchvision.models.resnet18().eval()  # yours: the class of the dense network
resuscitate.load_weights(fresh, "smaller.pt", smaller=True)  # gives its layers the shapes in the file
print("read again:", torch.equal(fresh(images[:2]), small(images[:2])))
