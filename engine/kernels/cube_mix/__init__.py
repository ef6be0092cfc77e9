"""CubeMLP's axis mix: a residual two-layer perceptron and a LayerNorm along one axis of a cube."""
