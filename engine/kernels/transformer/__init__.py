"""What a transformer layer does between its products: attention, dropout + residual + LayerNorm, bias + GELU."""

from engine.kernels.transformer.embedding import embed_norm
from engine.kernels.transformer.op import add_norm, attention, attention_fits, bias_gelu, draw_seed, runs_kernels
from engine.kernels.transformer.sums import parts_of

__all__ = [
    "add_norm",
    "attention",
    "attention_fits",
    "bias_gelu",
    "draw_seed",
    "embed_norm",
    "parts_of",
    "runs_kernels",
]
