"""Critics as differentiable operations: many MLPs at once, and the concat critic without the tensor of all pairs.

    grouped_mlp(inputs, first, rest)    N MLPs of one shape, such as the towers of several separate critics
    grouped_infonce(...)                InfoNCE of several separate critics, from their towers' inputs to the gradient
    concat_scores(x, y, layers)         f([x; y]) of all pairs in O(tile) memory, forward and backward
    concat_infonce(x, y, layers)        InfoNCE of these scores; the gradient comes out of the forward pass

All of them compute in fp32 (fp64 for fp64 inputs), also under autocast. They are bitwise deterministic for one number
of threads. Gradients of gradients raise ConfigError, except by the reference. Hidden layers end in ReLU; with another
activation plain torch runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.kernels.arguments import exact_type, wants_gradient
from engine.kernels.critics import (
    reference,
    registration,  # noqa: F401  (registers the operations)
)
from engine.kernels.critics.plain import FEW_ROWS, concat_shapes, grad_shapes, pieces_of
from engine.kernels.critics.plan import concat_algorithm, tower_algorithm
from engine.kernels.critics.reference import Layers
from engine.kernels.gradients import differentiable_once
from engine.kernels.mi_bounds.op import infonce, mi_lower_bound
from engine.kernels.mi_bounds.reference import infonce_of_scores
from engine.kernels.ranks.agreement import checked
from engine.kernels.ranks.autograd import BoundSettings
from engine.kernels.ranks.bounds import concat_bound
from engine.kernels.ranks.group import find_ranks
from engine.kernels.registry import backend_for, call, log_size


def grouped_mlp(inputs: Sequence[Tensor], first: Layers, rest: Layers, activation: str = "relu") -> Tensor:
    """Run N MLPs of one shape at once, such as the towers of several critics.

    MLPs that read the same input are one product in their first layer. Only the outputs of hidden layers are kept for
    the backward pass.

    Args:
        inputs: Features [B, d_i] each, of any real dtype.
        first: For every input, the first layers of the n_i MLPs that read it: weight [n_i, hidden, d_i] and bias
            [n_i, hidden].
        rest: The further layers, at least one, of all N = sum of n_i MLPs in the order of the inputs: weight
            [N, out, in] and bias [N, out]. All hidden layers have one width.
        activation: Between the layers: relu, elu, gelu, leakyrelu or tanh.

    Returns:
        The outputs [N, B, out], float32 (float64 if any tensor is float64).

    Raises:
        EstimatorError: Shapes, types or devices that do not fit, or an unknown activation.

    Example:
        >>> x, y = torch.randn(8, 3), torch.randn(8, 5)
        >>> first = [(torch.randn(2, 16, 3), torch.zeros(2, 16)), (torch.randn(1, 16, 5), torch.zeros(1, 16))]
        >>> last = (torch.randn(3, 4, 16), torch.zeros(3, 4))
        >>> grouped_mlp([x, y], first, [last]).shape  # two MLPs of x, one of y
        torch.Size([3, 8, 4])
    """
    inputs, first, rest = _exact_towers("grouped_mlp", inputs, first, rest, activation)
    backend = _towers_on(inputs[0], activation)
    with torch.autocast(inputs[0].device.type, enabled=False):
        if backend == "reference":
            return reference.grouped_mlp(inputs, first, rest, activation)
        return _GroupedMLP.apply(len(inputs), *inputs, *_flat(first), *_flat(rest))


def grouped_infonce(
    inputs: Sequence[Tensor],
    first: Layers,
    rest: Layers,
    rows: Sequence[int],
    columns: Sequence[int],
    activation: str = "relu",
    *,
    gather: bool | str = False,
    group: Any = None,
) -> Tensor:
    """InfoNCE bounds of several separate critics at once, to be maximised.

    A separate critic scores a pair by the product of two embeddings, and its bound is
    log B + mean over i of log softmax_j(<h(y_i), g(x_j)>) at j = i. On the CPU one pass gives embeddings, values and
    the gradients of the scores, and the [B, B] scores are never stored.

    Args:
        inputs: Features, as for `grouped_mlp`, whose MLPs are the critics' towers.
        first: As for `grouped_mlp`.
        rest: As for `grouped_mlp`.
        rows: For every critic, the number of the MLP that embeds y, in the order of `grouped_mlp`'s output.
        columns: For every critic, the number of the MLP that embeds x. Every MLP belongs to exactly one critic.
        activation: As for `grouped_mlp`.
        gather: As for `infonce`: the bounds of the joined batch of all ranks. Embeddings are gathered, or travel.
        group: As for `infonce`.

    Returns:
        The bounds [G] in nats, float32 (float64 if any tensor is float64). NaN for a critic with a score that is not
        finite.

    Raises:
        EstimatorError: Shapes, types, devices or numbers that do not fit, no rows, or an unknown activation.

    Source:
        van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018.

    Example:
        >>> x, y = torch.randn(8, 3), torch.randn(8, 5)
        >>> first = [(torch.randn(1, 16, 3), torch.zeros(1, 16)), (torch.randn(1, 16, 5), torch.zeros(1, 16))]
        >>> last = (torch.zeros(2, 4, 16), torch.zeros(2, 4))
        >>> grouped_infonce([x, y], first, [last], rows=[1], columns=[0]).abs() < 1e-5  # equal scores tell nothing
        tensor([True])
    """
    ranks = find_ranks("grouped_infonce", gather, group)
    with contextlib.nullcontext() if ranks is None else checked(ranks, *inputs):
        inputs, first, rest = _exact_towers("grouped_infonce", inputs, first, rest, activation)
        _check_rows("grouped_infonce", inputs[0])
        count = sum(len(w) for w, _ in first)
        if not _every_one(rows, columns, count):
            raise EstimatorError(
                "grouped_infonce", f"rows {rows} and columns {columns} of {count} MLPs", "every MLP once",
                "Name for every critic the MLP of y in `rows` and that of x in `columns`.",
            )  # fmt: skip
    if ranks is not None:
        embedded = grouped_mlp(inputs, first, rest, activation)
        q, k = entries(embedded, rows), entries(embedded, columns)
        return mi_lower_bound(q, k, gather=gather, group=group)
    backend = _towers_on(inputs[0], activation)
    if backend == "reference" or (backend == "triton" and len(inputs[0]) > FEW_ROWS):
        # many rows: scores are streamed, where the operation would store them
        embedded = grouped_mlp(inputs, first, rest, activation)
        q, k = entries(embedded, rows), entries(embedded, columns)
        loss = infonce(q, k)
        return log_size(q.shape[1], loss) - loss
    return _infonce_of_towers(inputs, [*_flat(first), *_flat(rest)], list(rows), list(columns))


def _every_one(rows: Sequence[int], columns: Sequence[int], count: int) -> bool:
    """Whether rows and columns together name each of `count` MLPs once, as many in each."""
    try:
        numbers = [index(number) for number in (*rows, *columns)]
    except TypeError:
        return False
    return len(rows) == len(columns) and sorted(numbers) == list(range(count))


def infonce_of_towers(
    inputs: Sequence[Tensor], stacks: Sequence[Tensor], rows: list[int], columns: list[int]
) -> Tensor:
    """`grouped_infonce` with ReLU, for callers who have checked the shapes: checks take time in a small step.

    Args:
        inputs: As for `grouped_infonce`.
        stacks: weight, bias, weight, bias, ... of `first`, then of `rest`.
        rows: As for `grouped_infonce`.
        columns: As for `grouped_infonce`.
    """
    if _towers_on(inputs[0], "relu") == "cpu":
        dtype = exact_type("grouped_infonce", *inputs, *stacks, integers=True)
        ready = [_to(t, dtype).contiguous() for t in stacks]
        return _infonce_of_towers([_to(x, dtype) for x in inputs], ready, rows, columns)
    pairs = list(zip(stacks[::2], stacks[1::2], strict=True))
    return grouped_infonce(inputs, pairs[: len(inputs)], pairs[len(inputs) :], rows, columns)


def _infonce_of_towers(
    inputs: Sequence[Tensor], stacks: Sequence[Tensor], rows: list[int], columns: list[int]
) -> Tensor:
    split = 2 * len(inputs)
    if wants_gradient(*inputs, *stacks):
        return _GroupedInfoNCE.apply(len(inputs), rows, columns, *inputs, *stacks)
    arguments = inputs[0], inputs[1:], stacks[:split], stacks[split:], rows, columns, False
    return log_size(len(inputs[0]), inputs[0]) - call("critics_grouped_infonce", *arguments)[0]


def entries(stack: Tensor, numbers: Sequence[int]) -> Tensor:
    """stack[numbers] without copying the list to the device: a view for neighbours, else one launch."""
    first = numbers[0]
    if list(numbers) == list(range(first, first + len(numbers))):
        return stack[first : first + len(numbers)]
    parts = stack.unbind()
    return torch.stack([parts[n] for n in numbers])


def concat_scores(x: Tensor, y: Tensor, layers: Layers, activation: str = "relu") -> Tensor:
    """Scores of a concat critic, an MLP over [x; y], on all pairs: scores[i, j] = f([x_j; y_i]).

    The pairs [B · M, dx + dy] are never formed: the first layer is split, W [x; y] = W_x x + W_y y. The hidden layers
    exist for one tile of pairs at a time, and the backward pass computes them again.

    Args:
        x: [M, dx], of any real dtype.
        y: [B, dy], of any real dtype.
        layers: Weight [out, in] and bias [out] of at least two layers. The first reads dx + dy numbers, the last has
            one output, and all hidden layers have one width.
        activation: Between the layers: relu, elu, gelu, leakyrelu or tanh.

    Returns:
        The scores [B, M], float32 (float64 if any tensor is float64).

    Raises:
        EstimatorError: Shapes, types or devices that do not fit, or an unknown activation.

    Example:
        >>> x, y = torch.randn(6, 3), torch.randn(4, 5)
        >>> layers = [(torch.randn(16, 8), torch.zeros(16)), (torch.randn(1, 16), torch.zeros(1))]
        >>> concat_scores(x, y, layers).shape
        torch.Size([4, 6])
    """
    x, y, layers = _exact_pairs("concat_scores", x, y, layers, activation)
    backend = _pairs_on(x, layers, activation)
    with torch.autocast(x.device.type, enabled=False):
        if backend == "reference":
            return reference.concat_scores(x, y, layers, activation)
        return _ConcatScores.apply(x, y, *_flat(layers))


def concat_infonce(
    x: Tensor, y: Tensor, layers: Layers, activation: str = "relu", *, transpose: bool = False,
    gather: bool | str = False, group: Any = None,
) -> Tensor:  # fmt: skip
    """The InfoNCE bound on I(X;Y) with a concat critic, to be maximised: log B + mean_i log softmax_j(S_ij) at j = i.

    The scores are not stored: memory is O(B). On the CPU, value and gradient take one pass over the pairs, a row at a
    time.

    Args:
        x: [B, dx], as for `concat_scores`.
        y: [B, dy], as for `concat_scores`.
        layers: As for `concat_scores`.
        activation: As for `concat_scores`.
        transpose: Take the softmax over y for every x instead.
        gather: As for `infonce`: the bound of the joined batch of all ranks. Each rank scores its own y against all x.
        group: As for `infonce`.

    Returns:
        The bound in nats, 0-d, float32 (float64 if any tensor is float64). NaN if a score is not finite.

    Raises:
        EstimatorError: Shapes, types or devices that do not fit, or an unknown activation.

    Source:
        van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018.

    Example:
        >>> x, y = torch.randn(6, 3), torch.randn(6, 5)
        >>> layers = [(torch.randn(16, 8), torch.zeros(16)), (torch.zeros(1, 16), torch.zeros(1))]
        >>> concat_infonce(x, y, layers).abs() < 1e-5  # equal scores tell nothing
        tensor(True)
    """
    ranks = find_ranks("concat_infonce", gather, group)
    with contextlib.nullcontext() if ranks is None else checked(ranks, x):
        x, y, layers = _exact_pairs("concat_infonce", x, y, layers, activation)
    if ranks is not None:
        return concat_bound(x, y, layers, activation, ranks, BoundSettings("infonce"), transpose=transpose)[0]
    _check_rows("concat_infonce", x)
    if len(x) != len(y):
        raise EstimatorError("concat_infonce", f"{len(x)} and {len(y)} rows", "as many of x as of y", "Give pairs.")
    if _pairs_on(x, layers, activation) == "reference":
        scores = concat_scores(x, y, layers, activation)
        scores = scores.t() if transpose else scores
        losses = infonce_of_scores(scores) + (scores - scores).detach().sum(1)  # NaN where a score is not finite
        return log_size(len(x), losses) - losses.mean()
    with torch.autocast(x.device.type, enabled=False):
        flat = _flat(layers)
        if not wants_gradient(x, y, *flat):
            return log_size(len(x), x) - call("critics_concat_infonce", x, y, flat, transpose, False, False)[0].mean()
        return log_size(len(x), x) - _ConcatInfoNCE.apply(x, y, transpose, *flat)


# Whether the inputs' gradients are wanted, and the layers'.
Wanted = tuple[bool, bool]


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, count, *tensors):
        inputs, first, rest = tensors[:count], tensors[count : 3 * count], tensors[3 * count :]
        out, state = call("critics_mlp_forward", inputs[0], inputs[1:], first, rest)
        ctx.count = count
        ctx.save_for_backward(state, *inputs, *first[::2], *rest[::2])
        return out

    @staticmethod
    @differentiable_once("grouped_mlp")
    def backward(ctx, grad):
        with torch.autocast(grad.device.type, enabled=False):
            return None, *_of_towers("critics_mlp_backward", grad.contiguous(), ctx, ctx.needs_input_grad[1:])


class _GroupedInfoNCE(torch.autograd.Function):
    """Values of the bounds. The forward pass computes the gradients of the embeddings as well."""

    @staticmethod
    def forward(ctx, count, q, k, *tensors):
        inputs, first, rest = tensors[:count], tensors[count : 3 * count], tensors[3 * count :]
        losses, state = call("critics_grouped_infonce", inputs[0], inputs[1:], first, rest, q, k, True)
        ctx.count, ctx.numbers = count, (q, k)
        ctx.save_for_backward(state, *inputs, *first[::2], *rest[::2])
        return log_size(inputs[0].shape[0], losses) - losses

    @staticmethod
    @differentiable_once("grouped_infonce")
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[3:]
        return None, None, None, *_of_towers("critics_grouped_infonce_backward", -grad, ctx, needs, *ctx.numbers)


def _of_towers(
    operation: str, grad: Tensor, ctx, needs: Sequence[bool], *numbers: Sequence[int]
) -> list[Tensor | None]:
    """Gradients of inputs, weights and biases by a backward operation on towers."""
    state, *saved = ctx.saved_tensors
    count = ctx.count
    inputs, first, rest = saved[:count], saved[count : 2 * count], saved[2 * count :]
    wanted = any(needs[:count]), any(needs[count:])
    gradients = call(operation, grad, inputs, first, rest, state, *numbers, *wanted)
    weights = (*first, *rest)
    return _pieces(gradients, grad_shapes(inputs, weights, *wanted), (count, 2 * len(weights)), wanted)


class _ConcatScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, *layers):
        ctx.save_for_backward(x, y, *layers)
        return call("critics_concat_forward", x, y, layers)

    @staticmethod
    @differentiable_once("concat_scores")
    def backward(ctx, grad):
        x, y, *layers = ctx.saved_tensors
        wanted = any(ctx.needs_input_grad[:2]), any(ctx.needs_input_grad[2:])
        with torch.autocast(grad.device.type, enabled=False):
            gradients = call("critics_concat_backward", grad.contiguous(), x, y, layers, *wanted)
        return tuple(_pieces(gradients, concat_shapes(x, y, layers, *wanted), (2, len(layers)), wanted))


class _ConcatInfoNCE(torch.autograd.Function):
    """Mean loss; its gradients are computed forward and scaled backward."""

    @staticmethod
    def forward(ctx, x, y, transpose, *layers):
        needs = ctx.needs_input_grad
        ctx.wanted = any(needs[:2]), any(needs[3:])
        losses, gradients = call("critics_concat_infonce", x, y, layers, transpose, *ctx.wanted)
        ctx.save_for_backward(gradients, x, y, *layers)
        return losses.mean()

    @staticmethod
    @differentiable_once("concat_infonce")
    def backward(ctx, grad):
        gradients, x, y, *layers = ctx.saved_tensors
        shapes = concat_shapes(x, y, layers, *ctx.wanted)
        of_x, of_y, *of_layers = _pieces(gradients * grad, shapes, (2, len(layers)), ctx.wanted)
        return of_x, of_y, None, *of_layers


def _pieces(
    gradients: Tensor, shapes: Sequence[torch.Size], counts: tuple[int, int], wanted: Wanted
) -> list[Tensor | None]:
    """Gradients of the inputs and of the layers out of one 1-d tensor, None for those that are not wanted.

    Args:
        gradients: the wanted ones, one after another.
        shapes: theirs.
        counts: how many inputs there are, and how many tensors of layers.
        wanted: whether those of the inputs are there, and those of the layers.
    """
    pieces = iter(pieces_of(gradients, shapes))
    return [next(pieces) if there else None for count, there in zip(counts, wanted, strict=True) for _ in range(count)]


def _towers_on(x: Tensor, activation: str) -> str:
    return _backend(x, "critics_mlp_forward", activation, lambda: tower_algorithm(x))


def _pairs_on(x: Tensor, layers: Layers, activation: str) -> str:
    return _backend(
        x, "critics_concat_forward", activation, lambda: concat_algorithm(x, [t for w in layers for t in w])
    )


def _backend(x: Tensor, operation: str, activation: str, algorithm: Callable[[], str]) -> str:
    """The backend that runs; "reference" also if plain torch is the chosen algorithm."""
    if activation != "relu":
        return "reference"
    backend = backend_for(x, operation)
    if backend != "triton":
        return backend
    # the Triton kernels accumulate in fp32
    return "reference" if x.dtype == torch.float64 or algorithm() == "eager" else backend


def _flat(layers: Layers) -> list[Tensor]:
    return [tensor.contiguous() for layer in layers for tensor in layer]


def _exact_towers(
    where: str, inputs: Sequence[Tensor], first: Layers, rest: Layers, activation: str
) -> tuple[list[Tensor], Layers, Layers]:
    """The arguments of `grouped_mlp`, checked and in one dtype."""
    _check_activation(where, activation)
    everything = *inputs, *_all(_pairs(where, first)), *_all(_pairs(where, rest))
    dtype = exact_type(where, *everything, integers=True, needed=len(everything))
    inputs = [_to(x, dtype) for x in inputs]
    first, rest = ([(_to(w, dtype), _to(b, dtype)) for w, b in layers] for layers in (first, rest))
    _check_grouped(inputs, first, rest)
    return inputs, first, rest


def _exact_pairs(where: str, x: Tensor, y: Tensor, layers: Layers, activation: str) -> tuple[Tensor, Tensor, Layers]:
    """The arguments of `concat_scores`, checked and in one dtype."""
    _check_activation(where, activation)
    everything = x, y, *_all(_pairs(where, layers))
    dtype = exact_type(where, *everything, integers=True, needed=len(everything))
    x, y, layers = _to(x, dtype), _to(y, dtype), [(_to(w, dtype), _to(b, dtype)) for w, b in layers]
    _check_concat(x, y, layers)
    return x, y, layers


def _pairs(where: str, layers: Layers) -> Layers:
    """The layers, if they are pairs."""
    if not isinstance(layers, Sequence) or not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in layers):
        found = f"a {type(layers).__name__}"
        if isinstance(layers, Sequence):
            odd = next(pair for pair in layers if not (isinstance(pair, Sequence) and len(pair) == 2))
            found = f"a layer that is a {type(odd).__name__}"
            found += f" of {len(odd)}" if isinstance(odd, Sequence) else ""
        do = "Give [(linear.weight, linear.bias), ...]."
        raise EstimatorError(where, found, "a list of pairs (weight, bias)", do)
    return layers


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _check_rows(where: str, x: Tensor) -> None:
    if x.shape[0] == 0:
        raise EstimatorError(where, "no rows", "at least one", "Leave out empty batches.")


def _check_activation(where: str, activation: str) -> None:
    if activation not in reference.ACTIVATIONS:
        raise EstimatorError(
            where, f"activation {activation!r}", f"one of {', '.join(reference.ACTIVATIONS)}", "Choose one of these."
        )


def _check_grouped(inputs: Sequence[Tensor], first: Layers, rest: Layers) -> None:
    fits = len(inputs) == len(first) > 0 and len(rest) > 0 and all(x.dim() == 2 for x in inputs)
    if fits:
        count, width = sum(len(w) for w, _ in first), first[0][0].shape[1]
        for x, (weight, bias) in zip(inputs, first, strict=True):
            fits &= len(x) == len(inputs[0]) and weight.shape == (len(weight), width, x.shape[1])
            fits &= bias.shape == (len(weight), width)
        for n, (weight, bias) in enumerate(rest):
            out = width if n + 1 < len(rest) else weight.shape[1]
            fits &= weight.shape == (count, out, width) and bias.shape == (count, out)
    if not fits:
        raise EstimatorError(
            "grouped_mlp",
            f"inputs {_shapes(inputs)}, first layers {_shapes(_all(first))}, further layers {_shapes(_all(rest))}",
            "inputs [B, d_i]; weights [n_i, hidden, d_i], then [N, hidden, hidden], last [N, out, hidden]",
            "Stack the layers of MLPs of one shape, in the order of the inputs that they read.",
        )


def _check_concat(x: Tensor, y: Tensor, layers: Layers) -> None:
    fits = x.dim() == y.dim() == 2 and len(layers) >= 2
    if fits:
        hidden = len(layers[0][0])
        width = x.shape[1] + y.shape[1]
        for n, (weight, bias) in enumerate(layers):
            out = hidden if n + 1 < len(layers) else 1
            fits &= weight.shape == (out, width) and bias.shape == (out,)
            width = hidden
    if not fits:
        raise EstimatorError(
            "concat_scores",
            f"x {list(x.shape)}, y {list(y.shape)}, layers {_shapes(_all(layers))}",
            "x [M, dx], y [B, dy]; weights [hidden, dx + dy], then [hidden, hidden], last [1, hidden]; their biases",
            "Give the layers of one MLP over [x; y].",
        )


def _all(layers: Layers) -> list[Tensor]:
    return [tensor for layer in layers for tensor in layer]


def _shapes(tensors: Sequence[Tensor]) -> list[list[int]]:
    return [list(t.shape) for t in tensors]
