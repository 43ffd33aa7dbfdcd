"""The Lightning layer: decides *when*. The engine in `dtrain` decides *how*."""

from dtrain.callbacks.adamr import AdamRCallback
from dtrain.callbacks.compression import DeltaCompressionCallback, Outcome
from dtrain.callbacks.finished import compress_finished

__all__ = ["AdamRCallback", "DeltaCompressionCallback", "Outcome", "compress_finished"]
