"""What lies between the encoders of several modalities and a fusion encoder, as one operation.

cube, means = stack_sequences([text, audio, vision], [token_mask, audio_length, vision_length], 100, ...)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.dropout.reference import PIECE
from engine.kernels.gradients import differentiable_once
from engine.kernels.registry import backend_for, call, register_from
from engine.kernels.stacked import reference
from engine.kernels.stacked.cpu import TYPES

MOST = 3  # sequences that one launch takes


def stack_sequences(
    sequences: Sequence[Tensor],
    valid: Sequence[Tensor],
    size: int,
    *,
    fill: Sequence[bool] | None = None,
    rates: Sequence[float] | None = None,
    hidden: Sequence[float] | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """K padded sequences as one cube, and their means over valid places.

    Each sequence is cleared where it is not valid, or filled there with its mean; then dropped out; then its mean over
    valid places is taken. The cube holds its first `size` places. Some samples' sequences are hidden from the cube.

    Args:
        sequences: one to three, [B, L_k, D], float32, bfloat16 or float16.
        valid: for each its lengths int64 [B], or a mask [B, L_k] of integers, 0 where a place is not valid.
        size: of the cube's second axis. Shorter sequences are padded, longer ones cut.
        fill: whether places that are not valid, up to max(L_k, size), hold the sequence's mean over the valid ones.
        rates: of dropout, in [0, 1).
        hidden: probability that a sample's sequence is 0 in the cube, in [0, 1). The means do not change.
        seed: int64 [1], from `engine.kernels.transformer.draw_seed`. Required for rates above 0.

    Returns:
        the cube, float32 [B, size, K, D]; and K means, float32 [B, D], 0 where no place is valid. Differentiable once
        in the sequences.

    Raises:
        ValueError: shapes or types that do not fit, rates outside [0, 1), or rates without a seed.

    Example:
        >>> x, length = torch.tensor([[[2.0], [4.0], [9.0]]]), torch.tensor([2])
        >>> cube, means = stack_sequences([x], [length], 4, fill=[True])
        >>> cube[0, :, 0, 0], means
        (tensor([2., 4., 3., 3.]), [tensor([[3.]])])
    """
    count = len(sequences)
    fill = [False] * count if fill is None else list(fill)
    rates = [0.0] * count if rates is None else list(map(float, rates))
    hidden = [0.0] * count if hidden is None else list(map(float, hidden))
    _check(sequences, valid, size, fill, rates, hidden, seed)
    if backend_for(sequences[0], "stack_sequences") == "reference":
        return reference.stack(sequences, valid, size, fill, rates, hidden, seed)
    cube, *means = _Stack.apply(list(valid), size, fill, rates, hidden, seed, *sequences)
    return cube, means


def stacks(sequences: Sequence[Tensor]) -> bool:
    """Whether Triton kernels run on sequences like these."""
    return (
        not torch.compiler.is_compiling()
        and len(sequences) <= MOST
        and all(x.dtype in TYPES for x in sequences)
        and sequences[0].shape[2] <= PIECE
        and backend_for(sequences[0], "stack_sequences") == "triton"
    )


def _check(
    sequences: Sequence[Tensor], valid: Sequence[Tensor], size: int, fill: Sequence[bool], rates: Sequence[float],
    hidden: Sequence[float], seed: Tensor | None,
) -> None:  # fmt: skip
    count = len(sequences)
    if not 0 < count <= MOST or any(len(given) != count for given in (valid, fill, rates, hidden)) or size < 1:
        raise ValueError(f"{count} sequences of size {size}: 1 to {MOST}, with as many masks, rates and so on")
    batch, _, d = sequences[0].shape
    for x, ok in zip(sequences, valid, strict=True):
        if x.dtype not in TYPES or x.dim() != 3 or (x.shape[0], x.shape[2]) != (batch, d) or d > PIECE:
            raise ValueError(f"a sequence {list(x.shape)} of {x.dtype}; see engine.kernels.stacked.stack_sequences")
        if ok.is_floating_point() or ok.shape not in ((batch,), x.shape[:2]):
            raise ValueError(f"a mask {list(ok.shape)} of {ok.dtype} for a sequence {list(x.shape)}")
    if not all(0 <= p < 1 for p in (*rates, *hidden)) or (any((*rates, *hidden)) and seed is None):
        raise ValueError(f"rates {rates} and {hidden} with seed={seed}: in [0, 1), and above 0 they need a seed")


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, valid, size, fill, rates, hidden, seed, *sequences):
        ctx.settings = fill, rates, hidden
        ctx.lengths, ctx.types = [x.shape[1] for x in sequences], [TYPES.index(x.dtype) for x in sequences]
        ctx.save_for_backward(seed, *valid)
        first, *others = sequences
        cube, means = call("stack_sequences", first, others, valid, size, fill, rates, hidden, seed)
        return cube, *means

    @staticmethod
    @differentiable_once("stack_sequences")
    def backward(ctx, grad, *mean_grads):
        seed, *valid = ctx.saved_tensors
        arguments = (valid, ctx.lengths, *ctx.settings, seed, ctx.types)
        gradients = call("stack_sequences_backward", grad, mean_grads, *arguments)
        needed = ctx.needs_input_grad[6:]
        return *(None,) * 6, *(g if need else None for g, need in zip(gradients, needed, strict=True))


def _fake_stack(first, others, valid, size, fill, rates, hidden, seed):
    batch, _, d = first.shape
    kinds = 1 + len(others)
    new = {"dtype": torch.float32}
    return first.new_empty((batch, size, kinds, d), **new), [first.new_empty((batch, d), **new) for _ in range(kinds)]


def _fake_stack_backward(grad, mean_grads, valid, lengths, fill, rates, hidden, seed, types):
    batch, _, _, d = grad.shape
    return [grad.new_empty((batch, n, d), dtype=TYPES[kind]) for n, kind in zip(lengths, types, strict=True)]


_SETTINGS = "bool[] fill, float[] rates, float[] hidden, Tensor? seed"
_add = register_from("engine.kernels.stacked")
_add(
    "stack_sequences",
    f"(Tensor first, Tensor[] others, Tensor[] valid, int size, {_SETTINGS}) -> (Tensor, Tensor[])",
    "triton", _fake_stack, 1,
)  # fmt: skip
_add(
    "stack_sequences_backward",
    f"(Tensor grad, Tensor[] mean_grads, Tensor[] valid, int[] lengths, {_SETTINGS}, int[] types) -> Tensor[]",
    "triton", _fake_stack_backward, 1,
)  # fmt: skip
