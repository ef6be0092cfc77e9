"""Dropout whose mask is computed from a seed instead of being drawn and kept."""

from engine.kernels.dropout.op import Dropout, dropout

__all__ = ["Dropout", "dropout"]
