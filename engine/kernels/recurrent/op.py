"""A bidirectional GRU or LSTM over a right-padded batch, as an operation.

What torch.nn.GRU and LSTM compute on a packed batch, from the same weights. On CPU tensors a kernel compiled at first
use (engine/kernels/recurrent/recurrent.cpp) runs it without padding and without one small torch operation per step.
On a GPU cuDNN runs, and the host waits for nothing (cudnn.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from engine.kernels import registry
from engine.kernels.arguments import exact_type, looks_at
from engine.kernels.compiling import constant_when_compiled
from engine.kernels.gradients import differentiable_once
from engine.kernels.recurrent import cpu, cudnn, reference

WIDEST = 8192  # hidden units that `bidirectional_norm` takes
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def parameters(module: nn.RNNBase) -> list[Tensor] | None:
    """The weights of a module in the operation's order, or None if the operation does not compute such a module.

    It computes modules that are bidirectional and batch first, with biases, without projections and without dropout
    between the layers.
    """
    if not (module.bidirectional and module.batch_first and module.bias) or module.proj_size:
        return None
    if module.dropout and module.training and module.num_layers > 1:
        return None
    suffixes = [f"_l{layer}{end}" for layer in range(module.num_layers) for end in ("", "_reverse")]
    return [getattr(module, name + suffix) for suffix in suffixes for name in WEIGHTS]


def available(x: Tensor) -> bool:
    """Whether the compiled kernel runs on tensors like x.

    That needs a CPU tensor, a backend other than the reference, and a library that could be compiled and loaded. The
    first call compiles it, which takes seconds and is logged, unless it was kept.
    """
    if x.device.type != "cpu" or registry.backend_for(x, "recurrent_forward") != "cpu":
        return False
    return _compiled(x.dtype)


@constant_when_compiled
def _compiled(dtype: torch.dtype) -> bool:
    return cpu.library(torch.float64 if dtype == torch.float64 else torch.float32) is not None


def bidirectional(x: Tensor, length: Tensor, weights: Sequence[Tensor], cell: str) -> Tensor:
    """Hidden states of a bidirectional GRU's or LSTM's last layer, as torch.nn computes them on a packed batch.

    The result of a row depends on that row alone, bit for bit, and not on the number of threads. The computation is
    float32 (float64 if any tensor is float64), also under autocast; there a GPU may round operands of products to TF32.

    Args:
        x: [B, L, d], right-padded, of any floating dtype. Frames past a row's length are not read.
        length: int64 [B], from 1 to L.
        weights: Per layer and direction: input [GH, d], hidden [GH, H] and their biases [GH]; see `parameters`.
        cell: "gru" or "lstm".

    Returns:
        [B, L, 2H], both directions side by side, zero past a row's length. Differentiable once in x and in the weights.

    Raises:
        DataError: Lengths out of range.
        ValueError: Shapes that do not belong together.
        EstimatorError: Types other than floating ones, or tensors on several devices.

    Example:
        >>> gru = torch.nn.GRU(4, 6, bidirectional=True, batch_first=True)
        >>> bidirectional(torch.randn(2, 5, 4), torch.tensor([5, 3]), parameters(gru), "gru").shape
        torch.Size([2, 5, 12])
    """
    dtype = exact_type("the recurrence", x, *weights)
    cpu.check(x, weights, cell)
    # one type for all: the kernels read memory as what x is
    x, weights = x.to(dtype), [w.to(dtype) for w in weights]
    if available(x):
        return _Recurrent.apply(x, length, cell, *weights)
    if not x.is_cuda or registry.backend_for(x) == "reference":
        if looks_at(length):
            length = cpu.checked(length, x, x.shape[0] * x.shape[1]).to(length.device)
        return reference.bidirectional(x, length, weights, cell)
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return _Recurrent.apply(x, length, cell, *weights)
    tf32 = torch.is_autocast_enabled("cuda")
    with torch.autocast("cuda", enabled=False):
        return cudnn.bidirectional(x, length, weights, cell, tf32)


def bidirectional_norm(
    x: Tensor, length: Tensor, weights: Sequence[Tensor], cell: str, norm: nn.LayerNorm, clear: bool
) -> Tensor:
    """relu(norm(the sum of both directions)) of `bidirectional`, on a GPU; `fuses_norm` says where it can run.

    Args:
        x, length, weights, cell: as for `bidirectional`.
        norm: over the hidden size H, with weight and bias.
        clear: 0 past a row's length; otherwise LayerNorm reads 0 there.

    Returns:
        [B, L, H].
    """
    exact_type("the recurrence", x, *weights)
    cpu.check(x, weights, cell)
    tf32 = torch.is_autocast_enabled("cuda")
    with torch.autocast("cuda", enabled=False):
        every = [*(w.float() for w in weights), norm.weight, norm.bias]
        return cudnn.bidirectional(x.float(), length, every, cell, tf32, cudnn.Normed(norm.eps, clear))


def fuses_norm(x: Tensor, weights: Sequence[Tensor], norm: nn.Module) -> bool:
    """Whether `bidirectional_norm` runs on tensors like these: on a GPU by Triton kernels, in float32, not compiled."""
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor) or not x.is_cuda or type(norm) is not nn.LayerNorm:
        return False
    given = (x, *weights, norm.weight, norm.bias)
    known = all(t is not None and t.dtype in (torch.float16, torch.bfloat16, torch.float32) for t in given)
    fits = known and norm.weight.dtype == torch.float32 and norm.weight.shape == weights[1].shape[1:]
    watched = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks
    return bool(
        fits and not watched and norm.weight.numel() <= WIDEST and registry.backend_for(x, "recurrent_norm") == "triton"
    )


class _Recurrent(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, x: Tensor, length: Tensor, cell: str, *weights: Tensor) -> Tensor:
        # lengths are data: a graph, whose shapes must not depend on them, makes room for a full batch
        graph = torch.compiler.is_compiling() or x.is_cuda or registry.is_static()
        tokens = x.shape[0] * x.shape[1] if graph else int(length.sum())
        out, state = registry.call("recurrent_forward", x, length, list(weights), cell, tokens)
        ctx.save_for_backward(x, length, out, state, *weights)
        ctx.cell = cell
        return out

    @staticmethod
    @differentiable_once("the recurrence")
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, gradient: Tensor) -> tuple:
        x, length, out, state, *weights = ctx.saved_tensors
        need = ctx.needs_input_grad[0]
        gradients = registry.call("recurrent_backward", gradient, x, length, weights, out, state, ctx.cell, need)
        return (gradients[-1] if need else None, None, None, *gradients[: len(weights)])


def _fake_forward(x: Tensor, length: Tensor, weights: Sequence[Tensor], cell: str, tokens: int) -> tuple:
    hidden, layers = weights[1].shape[1], len(weights) // 8
    width = 0 if x.device.type == "cuda" else cpu.state_width(layers, hidden, cell)
    return x.new_empty(x.shape[0], x.shape[1], 2 * hidden), x.new_empty(tokens * width)


def _fake_backward(
    gradient: Tensor, x: Tensor, length: Tensor, weights: Sequence[Tensor], out: Tensor, state: Tensor, cell: str,
    input_gradient: bool,
) -> list[Tensor]:  # fmt: skip
    gradients = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]
    return [*gradients, x.new_empty(x.shape)] if input_gradient else gradients


registry.register(
    "recurrent_forward",
    "(Tensor x, Tensor length, Tensor[] weights, str cell, SymInt tokens) -> (Tensor, Tensor)",
    cpu=cpu.forward,
    cuda=cudnn.forward,
    fake=_fake_forward,
    launches=cudnn.forward_launches,
)
registry.register(
    "recurrent_backward",
    "(Tensor gradient, Tensor x, Tensor length, Tensor[] weights, Tensor out, Tensor state, str cell, "
    "bool input_gradient) -> Tensor[]",
    cpu=cpu.backward,
    cuda=cudnn.backward,
    fake=_fake_backward,
    launches=cudnn.backward_launches,
)
