"""Product samples p(x|z) p(y,z): isolated k-nearest-neighbour sampling, and sampling within strata of a discrete z."""

from engine.kernels.knn_product.reference import (
    Strata,
    label_strata,
    product_indices,
    product_rows,
    stratified_product_indices,
)

__all__ = ["Strata", "label_strata", "product_indices", "product_rows", "stratified_product_indices"]
