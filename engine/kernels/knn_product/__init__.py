"""Product samples p(x|z) p(y,z): isolated k-nearest-neighbour sampling, and sampling within strata of a discrete z."""

from engine.kernels.knn_product.epoch import EpochProducts, draw_epoch
from engine.kernels.knn_product.op import (
    Bank,
    ProductRows,
    ProductSampler,
    knn_product_samples,
    product_indices,
    product_rows,
    stratified_product_indices,
)
from engine.kernels.knn_product.reference import Strata, label_strata

__all__ = [
    "Bank",
    "EpochProducts",
    "ProductRows",
    "ProductSampler",
    "Strata",
    "draw_epoch",
    "knn_product_samples",
    "label_strata",
    "product_indices",
    "product_rows",
    "stratified_product_indices",
]
