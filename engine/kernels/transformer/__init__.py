"""What a transformer layer does between its products: dropout + residual + LayerNorm, and bias + GELU."""

from engine.kernels.transformer.op import add_norm, bias_gelu, draw_seed

__all__ = ["add_norm", "bias_gelu", "draw_seed"]
