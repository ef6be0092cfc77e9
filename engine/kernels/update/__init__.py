"""The end of a training step in one pass over the weights: clipping, unscaling, Adam or AdamW, and their average."""

from engine.kernels.update.op import inspect, move
from engine.kernels.update.tables import Settings, Table

__all__ = ["Settings", "Table", "inspect", "move"]
