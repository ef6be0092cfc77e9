from engine.kernels.critics.op import grouped_mlp
from engine.kernels.critics.reference import ACTIVATIONS, concat_scores, mlp, separate_scores

__all__ = ["ACTIVATIONS", "concat_scores", "grouped_mlp", "mlp", "separate_scores"]
