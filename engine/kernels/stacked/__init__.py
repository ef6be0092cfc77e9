"""Sequences of several modalities as one cube for a fusion encoder, and their means."""

from engine.kernels.stacked.op import stack_sequences

__all__ = ["stack_sequences"]
