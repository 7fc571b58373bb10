"""Which weights of a model go: allocations over its layers, patterns within one, and removal for good."""

from .allocation import allocate
from .pruning import sparsify
from .repairability import Repairability
from .structured import Shrinkage, shrink

__all__ = ["Repairability", "Shrinkage", "allocate", "shrink", "sparsify"]
