"""What lies between the recurrences of a bidirectional module: differentiable, over padded batches.

The backward direction runs over rows that are turned round within their lengths. Tensors that a recurrence reads or
writes are ordered by step, [L, B, ...], as cuDNN wants them. On a GPU each function is one kernel (triton.py). The host
functions here are their formulas, in plain torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.registry import call, lazy, register

# -- host functions of the CPU --


def _mirrored(x: Tensor, length: Tensor) -> Tensor:
    """x [L, B, d] with the first length[b] steps of every row turned round."""
    step = torch.arange(len(x), device=x.device)[:, None]
    place = torch.where(step < length, length - 1 - step, step)
    return x.gather(0, place[..., None].expand_as(x))


def _cleared(x: Tensor, length: Tensor) -> Tensor:
    """x [L, B, d] with 0 behind the first length[b] steps of every row."""
    behind = torch.arange(len(x), device=x.device)[:, None] >= length
    return x.masked_fill(behind[..., None], 0)


def turn(x: Tensor, length: Tensor, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, L, d] by steps, [L, B, d]; the same turned round; and a first state of zeros, [1, B, hidden]."""
    plain = x.transpose(0, 1).contiguous()
    plain = plain.clone() if plain.data_ptr() == x.data_ptr() else plain  # an operation's results are its own
    return plain, _mirrored(plain, length), x.new_zeros(1, len(x), hidden)


def join(forward: Tensor, backward: Tensor, length: Tensor, on: bool) -> tuple[Tensor, Tensor]:
    """Both directions [L, B, H] side by side, 0 behind a row's length. `backward` was computed turned round.

    on: for another layer, [L, B, 2H], and the same turned round. Else [B, L, 2H], and nothing.
    """
    joined = _cleared(torch.cat([forward, _mirrored(backward, length)], -1), length)
    if on:
        return joined, _mirrored(joined, length)
    return joined.transpose(0, 1).clone(memory_format=torch.contiguous_format), joined.new_empty(0)


def join_backward(
    grad: Tensor | None, turned_grad: Tensor | None, length: Tensor, on: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `join`'s directions, of those of its results that have one."""
    given = [g if on else g.transpose(0, 1) for g in (grad,) if g is not None]
    given += [_mirrored(g, length) for g in (turned_grad,) if g is not None]
    first, second = _cleared(sum(given), length).chunk(2, -1)
    return first.clone(memory_format=torch.contiguous_format), _mirrored(second, length)


def norm(
    forward: Tensor, backward: Tensor, length: Tensor, weight: Tensor, shift: Tensor, eps: float, clear: bool
) -> Tensor:  # fmt: skip
    """relu(LayerNorm(both directions' sum)), [B, L, H]; the sum is 0 behind a row's length, with `clear` the result."""
    total = _cleared(forward + _mirrored(backward, length), length)
    y = F.relu(F.layer_norm(total, weight.shape, weight, shift, eps))
    return (_cleared(y, length) if clear else y).transpose(0, 1).clone(memory_format=torch.contiguous_format)


def norm_backward(
    grad: Tensor, forward: Tensor, backward: Tensor, length: Tensor, weight: Tensor, shift: Tensor, eps: float,
    clear: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `norm`'s directions, and of weight and shift [2, H]."""
    total = _cleared(forward + _mirrored(backward, length), length)
    y, mean, scale = torch.native_layer_norm(total, weight.shape, weight, shift, eps)
    grad = torch.where(y > 0, grad.transpose(0, 1), 0)
    grad = (_cleared(grad, length) if clear else grad).contiguous()
    arguments = (grad, total, weight.shape, mean, scale, weight, shift, [True] * 3)
    of_total, *of_norm = torch.ops.aten.native_layer_norm_backward(*arguments)
    of_total = _cleared(of_total, length)
    return of_total, _mirrored(of_total, length), torch.stack(of_norm)


# -- operations --


class Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, length, hidden):
        ctx.save_for_backward(length)
        plain, turned, start = call("recurrent_turn", x, length, hidden)
        ctx.mark_non_differentiable(start)
        return plain, turned, start

    @staticmethod
    def backward(ctx, grad, turned_grad, _):
        (length,) = ctx.saved_tensors
        return (grad + call("recurrent_turn", turned_grad.transpose(0, 1), length, 0)[1]).transpose(0, 1), None, None


class Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, length, on):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(length)
        ctx.on = on
        return call("recurrent_join", forward, backward, length, on)

    @staticmethod
    def backward(ctx, grad, turned_grad):
        if grad is None and turned_grad is None:
            return (None,) * 4
        return *call("recurrent_join_backward", grad, turned_grad, *ctx.saved_tensors, ctx.on), None, None


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, length, weight, shift, eps, clear):
        ctx.settings = eps, clear
        ctx.save_for_backward(forward, backward, length, weight, shift)
        return call("recurrent_norm", forward, backward, length, weight, shift, eps, clear)

    @staticmethod
    def backward(ctx, grad):
        of_forward, of_backward, sums = call("recurrent_norm_backward", grad, *ctx.saved_tensors, *ctx.settings)
        return of_forward, of_backward, None, *sums, None, None


def _fake_turn(x: Tensor, length: Tensor, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[1], x.shape[0], x.shape[2])
    return x.new_empty(shape), x.new_empty(shape), x.new_empty(1, x.shape[0], hidden)


def _fake_join(forward: Tensor, backward: Tensor, length: Tensor, on: bool) -> tuple[Tensor, Tensor]:
    steps, texts, hidden = forward.shape
    shape = (steps, texts, 2 * hidden) if on else (texts, steps, 2 * hidden)
    return forward.new_empty(shape), forward.new_empty(shape if on else 0)


def _fake_join_backward(
    grad: Tensor | None, turned_grad: Tensor | None, length: Tensor, on: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    like = turned_grad if grad is None else grad
    first, second, both = like.shape
    shape = (first, second, both // 2) if on else (second, first, both // 2)
    return like.new_empty(shape), like.new_empty(shape)


def _fake_norm(forward: Tensor, *_: object) -> Tensor:
    steps, texts, hidden = forward.shape
    return forward.new_empty(texts, steps, hidden)


def _fake_norm_backward(
    grad: Tensor, forward: Tensor, backward: Tensor, length: Tensor, weight: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return forward.new_empty(forward.shape), backward.new_empty(backward.shape), weight.new_empty(2, len(weight))


def _register(name: str, schema: str, fake: object, launches: int = 1) -> None:
    kernels = lazy("engine.kernels.recurrent.triton", name)
    formula = globals()[name]
    register(f"recurrent_{name}", schema, cpu=formula, cuda=kernels, fake=fake, launches=launches, cpu_anywhere=True)


_NORM = "Tensor forward, Tensor backward, Tensor length, Tensor weight, Tensor shift, float eps, bool clear"
_register("turn", "(Tensor x, Tensor length, int hidden) -> (Tensor, Tensor, Tensor)", _fake_turn)
_register("join", "(Tensor forward, Tensor backward, Tensor length, bool on) -> (Tensor, Tensor)", _fake_join)
_register(
    "join_backward",
    "(Tensor? grad, Tensor? turned_grad, Tensor length, bool on) -> (Tensor, Tensor)",
    _fake_join_backward,
)
_register("norm", f"({_NORM}) -> Tensor", _fake_norm)
# the second launch adds up the programs' parts of the gradients of weight and shift
_register("norm_backward", f"(Tensor grad, {_NORM}) -> (Tensor, Tensor, Tensor)", _fake_norm_backward, launches=2)
