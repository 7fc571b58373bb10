"""Which weights of a model go: allocations over its layers, patterns within one, and removal for good."""

from .allocation import allocate
from .pruning import sparsify
from .repairability import Repairability

__all__ = ["Repairability", "allocate", "sparsify"]
