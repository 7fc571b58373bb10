"""What a user of the command line has: a folder with a module, weights and images, and the command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

import asr_kernels
import resuscitate
from resuscitate import cli
from tests.networks import chain

# what a user's own module has: a network as torch has it, one without BatchNorm or bias, and no network
NETWORKS = """
from torch import nn

def small():
    stages = []
    for c_in, c_out in ((3, 8), (8, 8), (8, 16)):
        stages += [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

def bare():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.ReLU())

def broken():
    raise RuntimeError("out of\\nnetworks")

number = int
"""
# a method of the user's own, of which nothing else knows
METHODS = '''
import os
from dataclasses import dataclass

import resuscitate as rs


@rs.register
@dataclass(frozen=True, kw_only=True)
class MedianGain(rs.Method):
    """One gain per layer: the median over channels of the dense over the pruned standard deviation.

    median_eps: added to the pruned variances. match_mean: match the means too. power: of the gain, or None.
    """

    median_eps: float = 1e-8
    match_mean: bool = True
    power: float | None = 1.0

    name = "median-gain"

    def probe(self, layer):
        return rs.Probe(rs.OutputMoments)

    def solve(self, layer, found):
        if os.environ.get("FAIL_AT") == layer.name:
            raise ValueError(f"no gain for {layer.name}")
        ratio = (found.dense.var / (found.pruned.var + self.median_eps)).sqrt()
        gain = ratio.median().expand_as(ratio) ** (1.0 if self.power is None else self.power)
        shift = found.dense.mean - gain * found.pruned.mean
        return rs.Gain(gain.clone(), shift if self.match_mean else 0 * shift)
'''
MODEL, BARE = "users_networks:small", "users_networks:bare"
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def command(*words, code=0):
    """Run the real command in a pipe."""
    folders = {str(Path(package.__file__).parents[1]) for package in (asr_kernels, resuscitate)}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "resuscitate", *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == code, done.stderr
    return done


def invoke(*words, code=0):
    """Run the command in this process."""
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done


def repair(*words, code=0, prefix=""):
    weights = {"--pruned": f"{prefix}pruned.safetensors", "--dense": f"{prefix}dense.safetensors"}
    fixed = [word for pair in weights.items() for word in pair]
    model = BARE if prefix else MODEL
    return invoke("repair", "-m", model, *fixed, "-c", "images.npz", "-o", "repaired.safetensors", *words, code=code)


def loaded(path):
    model = chain()
    model.load_state_dict(load_file(path), strict=True)
    return model.eval()


def unframed(text):
    """What Rich has broken into lines and put a frame around."""
    return " ".join(text.replace("│", "").split())


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()
