"""What a transformer layer does between its products: attention, dropout + residual + LayerNorm, bias + GELU."""

from engine.kernels.transformer.op import add_norm, attention, attention_fits, bias_gelu, draw_seed

__all__ = ["add_norm", "attention", "attention_fits", "bias_gelu", "draw_seed"]
