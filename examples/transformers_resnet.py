"""Repair a pruned Hugging Face network from batches that are dictionaries.

Needs transformers. The weights and the images are random, so that the script runs anywhere. For a network of your own
change the lines marked "yours".
"""

import copy

import torch
from torch.nn.functional import interpolate
from transformers import ResNetConfig, ResNetForImageClassification

import resuscitate

torch.manual_seed(0)
config = ResNetConfig(embedding_size=16, hidden_sizes=[32, 64, 128, 256], depths=[2, 2, 2, 2], num_labels=10)
dense = ResNetForImageClassification(config).eval()  # yours: AutoModelForImageClassification.from_pretrained("folder")
images = interpolate(torch.randn(160, 3, 8, 8), 64)
batches = [{"pixel_values": batch, "labels": torch.zeros(len(batch))} for batch in images.split(32)]
# yours: a DataLoader of your dataset, with the image processor as its transform
resuscitate.recalibrate_batchnorm(dense, batches)  # yours: leave this out; a trained network has its statistics

model = copy.deepcopy(dense)
masks = resuscitate.sparsify(model, 0.8)  # yours: or a network that you have pruned yourself
# "pixel_values" of each batch is read, and the labels are not. A network that takes more than images:
# forward_fn=lambda model, batch: model(batch["pixel_values"], batch["pixel_mask"])
report = resuscitate.repair(model, dense, batches)
masks.check(model)  # the pruned weights are still zero

print(f"{masks.sparsity:.1%} of the weights are zero; refitted in {report.seconds:.0f} s")
print(f"agreement with the dense network: {report.agreement}")
model.save_pretrained("repaired")
