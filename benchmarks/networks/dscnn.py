"""DS-CNN for keyword spotting, the network of MLPerf Tiny: depthwise-separable, with TensorFlow's "SAME" padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F


class SameConv2d(nn.Conv2d):
    """A convolution that pads its input by max((ceil(n / s) - 1) s + k - n, 0), an odd pixel at the end."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for n, k, s in zip(reversed(x.shape[2:]), reversed(self.kernel_size), reversed(self.stride), strict=True):
            total = max((-(-n // s) - 1) * s + k - n, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


class DSCNN(nn.Module):
    """10x4 convolution of stride 2, then four pairs of depthwise 3x3 and pointwise 1x1: (N, 1, 49, 10) to (N, classes).

    Each convolution has a bias and is followed by BatchNorm (eps 1e-3) and ReLU. Keys as in `kws_dscnn.safetensors`.
    """

    def __init__(self, channels: int = 64, classes: int = 12) -> None:
        super().__init__()
        self.conv0 = SameConv2d(1, channels, (10, 4), stride=2)
        self.bn0 = nn.BatchNorm2d(channels, eps=1e-3)
        for index in range(1, 5):
            self.add_module(f"dw{index}", SameConv2d(channels, channels, 3, groups=channels))
            self.add_module(f"dw{index}_bn", nn.BatchNorm2d(channels, eps=1e-3))
            self.add_module(f"pw{index}", SameConv2d(channels, channels, 1))
            self.add_module(f"pw{index}_bn", nn.BatchNorm2d(channels, eps=1e-3))
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        for index in range(1, 5):
            for part in ("dw", "pw"):
                conv, batchnorm = getattr(self, f"{part}{index}"), getattr(self, f"{part}{index}_bn")
                x = F.relu(batchnorm(conv(x)))
        return self.fc(x[:, :, :24, :5].mean((2, 3)))


def load_dscnn(folder: Path) -> tuple[DSCNN, Tensor, Tensor]:
    """The trained network in eval mode, the clips as inputs (500, 1, 49, 10), and their labels (500,)."""
    model = DSCNN().eval()
    model.load_state_dict(load_file(folder / "kws_dscnn.safetensors"))
    clips = np.load(folder / "kws_mfcc.npz")
    inputs = (torch.from_numpy(clips["mfcc"]).float() - float(clips["zero"])) * float(clips["scale"])
    return model, inputs[:, None], torch.from_numpy(clips["labels"]).long()
