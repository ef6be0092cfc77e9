"""InfoNCE and the other bounds on mutual information, from scores or from embeddings."""

from engine.kernels.mi_bounds.reference import (
    BOUNDS,
    bound_value,
    leave_one_out,
    update_log_ema,
)

__all__ = ["BOUNDS", "bound_value", "leave_one_out", "update_log_ema"]
