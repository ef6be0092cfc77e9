"""Launches of torch's own operations on CUDA: kernels, copies and fills, from the shapes of a call.

The rules state where they come from. "Source" is torch's, aten/src/ATen/native/cuda; "measured" is a trace of the
two-stage step on one H200 (torch 2.11, CUDA 13.0, cuDNN 9). What no rule names is one launch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_iter

# MultiTensorApply.cuh: tensors a launch by the number of lists, chunks a launch, elements a chunk.
TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
WITH_NUMBERS = {1: 96, 2: 64, 3: 48, 4: 36, 5: 30}  # the same with a number for each tensor
CHUNKS, CHUNK = 320, 65_536

# Shape.cu: tensors that one CatArrayBatchedCopy takes.
CAT = 128

# SDPA by cuDNN's or the flash kernel, measured: one forward. Its backward: a dot product of the output and its
# gradient, the gradients, and a conversion of dq (source: flash_bwd_launch_template.h; cuDNN's is alike).
ATTENTION, ATTENTION_BACKWARD = 1, 3


def rnn(layers: int, weights: Sequence[Tensor]) -> int:
    """One call of cuDNN for `layers` x directions. Measured: two memory fills, a product of the inputs, a bias pass and
    the persistent kernel; and a copy of every weight, where they do not lie in one buffer in cuDNN's order."""
    return 5 * layers + (0 if _flat(weights) else len(weights))


def rnn_backward(layers: int, weights: Sequence[Tensor]) -> int:
    """Measured: the persistent kernel, the element-wise pass, products and their split sums for dx, dW and dU, bias
    gradients, fills; and a copy of every weight, as forward."""
    return 14 * layers + (0 if _flat(weights) else len(weights))


def _flat(weights: Sequence[Tensor]) -> bool:
    """Whether each begins where the one before ends (source: `try_get_weight_buf` in cudnn/RNN.cpp)."""
    ends = [w.data_ptr() + w.numel() * w.element_size() for w in weights]
    return all(w.data_ptr() == end for w, end in zip(weights[1:], ends, strict=False))


def launches(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """GPU launches of one aten operation that was called with these arguments and gave `out`."""
    name = func._schema.name.split("::")[-1]
    if name in NOTHING or is_view(func) or _empty(args, out):
        return 0
    if (rule := BY_NAME.get(name)) is not None:
        return rule if isinstance(rule, int) else rule(args, kwargs, out)
    if name.startswith("_foreach_"):
        return foreach(args, out, mixed=name.startswith("_foreach_copy"))
    return 1


@functools.cache
def is_view(func: Any) -> bool:
    """Whether an operation returns views of its inputs, or its inputs themselves."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _empty(args: tuple, out: Any) -> bool:
    """Nothing to write: torch launches nothing then."""
    tensors = [t for t in tree_iter(out) if isinstance(t, Tensor)]
    if not tensors:
        tensors = [t for t in tree_iter(args) if isinstance(t, Tensor)]
    return bool(tensors) and all(t.numel() == 0 for t in tensors)


# -- lists of tensors -------------------------------------------------------------------------------------------------


def multi_tensor(sizes: Sequence[int], depth: int, numbers: bool = False) -> int:
    """Launches of multi_tensor_apply on tensors of these sizes, `depth` lists of them. Source: MultiTensorApply.cuh.

    Args:
        numbers: there is a number for each tensor, too.
    """
    most = (WITH_NUMBERS if numbers else TENSORS)[min(depth, 5)]
    count = blocks = tensors = 0
    for size in sizes:
        if size == 0:
            continue
        tensors += 1
        chunks = math.ceil(size / CHUNK)
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if blocks == CHUNKS or (tensors == most and last):
                count, blocks, tensors = count + 1, 0, 0 if last else 1
    return count + (blocks > 0)


def foreach(args: tuple, out: Any, mixed: bool = False) -> int:
    """A foreach operation on lists; one kernel a tensor where the lists do not fit together (the slow path).

    Args:
        mixed: the lists may be of different types, each of one: copies (source: ForeachBinaryOpList.cu).
    """
    lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
    depth = len(lists) + isinstance(out, list | tuple)
    first = lists[0]
    numbers = any(isinstance(a, list | tuple) and a and isinstance(a[0], int | float) for a in args)
    alike = all(
        t.dtype == (part if mixed else first)[0].dtype
        and t.stride() == like.stride()
        and (t.is_floating_point() or numbers)  # whole numbers added to such tensors (source: ForeachUtils.h)
        for part in lists
        for t, like in zip(part, first, strict=False)
    )
    return multi_tensor([t.numel() for t in first], depth, numbers) if alike else len(first)


def _foreach_norm(args: tuple, kwargs: dict, out: Any) -> int:
    """Partial sums of every chunk, then one clean-up. Source: ForeachReduceOp.cu."""
    return multi_tensor([t.numel() for t in args[0]], 1) + 1


def _fused_adam(args: tuple, kwargs: dict, out: Any) -> int:
    """Four lists, five with amsgrad. Source: fused_adam_impl.cu."""
    return multi_tensor([t.numel() for t in args[0]], 5 if args[4] else 4)


def _fused_sgd(args: tuple, kwargs: dict, out: Any) -> int:
    return multi_tensor([t.numel() for t in args[0]], 3 if args[2] else 2)


# -- single operations ------------------------------------------------------------------------------------------------


def _cat(args: tuple, kwargs: dict, out: Any) -> int:
    """Source: Shape.cu. Inputs of several types are copied one by one."""
    parts = [t for t in args[0] if t.numel()]
    return math.ceil(len(parts) / CAT) if len({t.dtype for t in parts}) == 1 else len(parts)


def _sort(args: tuple, kwargs: dict, out: Any) -> int:
    """Source: Sort.cpp: up to 4,096 a row one kernel after the indices are written, more by radix passes."""
    x = args[0]
    return 3 if x.dim() == 0 or x.shape[-1] <= 4096 else 9


def _embedding_backward(args: tuple, kwargs: dict, out: Any) -> int:
    """Source: Embedding.cu. Few indices and no padding index: a fill and one kernel; else they are sorted first:
    a fill, the sort of pairs, counts by two scans, and three kernels over segments."""
    indices, padding = args[1], args[3]
    return 2 if indices.numel() <= 3072 and padding < 0 else 14


def _index_put(args: tuple, kwargs: dict, out: Any) -> int:
    """Source: IndexingKernel.cu, Indexing.cu. Adding up sorts the indices: wrapping them takes three kernels each,
    then a linear index, its sort and the kernel itself (measured: indexing_backward_kernel)."""
    accumulate = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
    count = sum(i is not None for i in args[1])
    return 3 * count + 8 if accumulate else 1


def _layer_norm_backward(args: tuple, kwargs: dict, out: Any) -> int:
    """Source: layer_norm_kernel.cu: dx, and the gradients of weight and bias in a kernel (measured: 2)."""
    mask = args[7] if len(args) > 7 else (True, True, True)
    return bool(mask[0]) + bool(mask[1] or mask[2])


def _addmm(args: tuple, kwargs: dict, out: Any) -> int:
    """Source: Blas.cpp: the bias is an epilogue of cuBLASLt where it is one row; else it is copied first."""
    return 1 if args[0].dim() == 1 else 2


def _convolution_backward(args: tuple, kwargs: dict, out: Any) -> int:
    mask = args[-1]
    return 2 * sum(map(bool, mask[:2])) + bool(mask[2])


def _randperm(args: tuple, kwargs: dict, out: Any) -> int:
    """Source: Randperm.cu: random keys, their sort, and a pass over equal keys."""
    return 4


NOTHING = {
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias",
    "lift_fresh", "lift_fresh_copy", "resize_", "set_", "detach_", "_has_compatible_shallow_copy_type", "is_same_size",
    "_local_scalar_dense_", "unsafe_chunk", "unsafe_split", "rename", "alias", "requires_grad_",
}  # fmt: skip

BY_NAME: dict[str, int | Callable[[tuple, dict, Any], int]] = {
    "cat": _cat,
    "stack": _cat,
    "_fused_adam_": _fused_adam,
    "_fused_adamw_": _fused_adam,
    "_fused_sgd_": _fused_sgd,
    "_foreach_norm": _foreach_norm,
    "sort": _sort,
    "argsort": _sort,
    "topk": 3,  # source: TopK: a radix pass, the gathering, the sort
    "embedding_dense_backward": _embedding_backward,
    "index_put": _index_put,
    "index_put_": _index_put,
    "_index_put_impl_": _index_put,
    "native_layer_norm_backward": _layer_norm_backward,
    "addmm": _addmm,
    "baddbmm": 2,
    "convolution": 2,
    "convolution_backward": _convolution_backward,
    "randperm": _randperm,
    "logsumexp": 6,  # source: ReduceOps.cpp: maximum, its finiteness, difference, exponential, sum, logarithm
    "nonzero": 4,
    "masked_select": 6,
    "_unique2": 8,
    "bincount": 4,
    "equal": 3,
    "_local_scalar_dense": 1,  # the copy to the host
    "cumsum": 1,
    "var_mean": 1,
    "index_add_": 1,
    "scatter_add_": 1,
    "_cdist_forward": 1,
    "_euclidean_dist": 8,
}
