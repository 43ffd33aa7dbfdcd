"""Use a delta: check the base, merge, apply to a live module and remove again."""

from dtrain.runtime.base import check_base, find_tensors, zero_base
from dtrain.runtime.inplace import apply_in_place, remove_in_place
from dtrain.runtime.merge import add, merged, patch, write

__all__ = [
    "add",
    "apply_in_place",
    "check_base",
    "find_tensors",
    "merged",
    "patch",
    "remove_in_place",
    "write",
    "zero_base",
]
