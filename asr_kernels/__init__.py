"""Per-channel moments and in-place corrections of activations: functions of tensors only.

Three backends share one interface: Triton kernels on a GPU, vectorised PyTorch elsewhere, and a float64 reference that
both are tested against.
"""

from .backends import use_backend
from .moments import ChannelMoments, PairedMoments, channel_moments, paired_moments
from .ops import affine_, repair_, repair_factors
from .patches import CrossProducts, PatchMoments, PatchSums, cross_products, patch_moments
from .rows import RowMoments, row_moments
from .window import Window

__all__ = [
    "ChannelMoments",
    "CrossProducts",
    "PairedMoments",
    "PatchMoments",
    "PatchSums",
    "RowMoments",
    "Window",
    "affine_",
    "channel_moments",
    "cross_products",
    "paired_moments",
    "patch_moments",
    "repair_",
    "repair_factors",
    "row_moments",
    "use_backend",
]
