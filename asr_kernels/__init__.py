"""Per-channel moments and in-place corrections of activations: tensors in, tensors out.

Three backends behind one face: Triton kernels on a GPU, a bandwidth-bound PyTorch path elsewhere, and a plain float64
reference that both are tested against.
"""

from .moments import ChannelMoments, PairedMoments
from .ops import affine_, channel_moments, paired_moments, repair_, repair_factors, use_backend
from .patches import CrossProducts, PatchMoments, Window, cross_products, patch_moments

__all__ = [
    "ChannelMoments",
    "CrossProducts",
    "PairedMoments",
    "PatchMoments",
    "Window",
    "affine_",
    "channel_moments",
    "cross_products",
    "paired_moments",
    "patch_moments",
    "repair_",
    "repair_factors",
    "use_backend",
]
