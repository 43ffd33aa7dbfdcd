"""Optimizers that keep the delta small while it is trained."""

from dtrain.optim.adamr import AdamR

__all__ = ["AdamR"]
