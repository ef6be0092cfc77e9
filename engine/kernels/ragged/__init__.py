"""Batches out of sequences that lie end to end: gathered and right-padded where they are."""

from engine.kernels.ragged.op import Source, pad, pad_batches, scale

__all__ = ["Source", "pad", "pad_batches", "scale"]
