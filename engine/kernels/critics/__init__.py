from engine.kernels.critics.op import concat_infonce, concat_scores, grouped_infonce, grouped_mlp
from engine.kernels.critics.reference import ACTIVATIONS, mlp, separate_scores

__all__ = ["ACTIVATIONS", "concat_infonce", "concat_scores", "grouped_infonce", "grouped_mlp", "mlp", "separate_scores"]
