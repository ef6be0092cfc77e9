"""CubeMLP's axis mixes as operations: what `reference.axis_mix` says, without permuted copies of the cube.

On CPU tensors a kernel compiled at first use (cube_mix.cpp) runs a tile of columns through both layers, the residual
and the LayerNorm while it is in the caches; on CUDA tensors Triton kernels do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels import registry
from engine.kernels.arguments import check_number, exact_type, wants_gradient
from engine.kernels.compiling import constant_when_compiled
from engine.kernels.cube_mix import cpu, reference
from engine.kernels.gradients import differentiable_once

ACTIVATIONS = cpu.ACTIVATIONS
# fc1 weight and bias, fc2 weight and bias, residual weight, norm weight and bias, as in `cube_mix`.
Weights = Sequence[Tensor | None]

_FUNCTIONS = {
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "leakyrelu": torch.nn.functional.leaky_relu,
    "elu": torch.nn.functional.elu,
    "hardtanh": torch.nn.functional.hardtanh,
    "hardshrink": torch.nn.functional.hardshrink,
}


def cube_mix(
    x: Tensor,
    axis: int,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual_weight: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    activation: str = "gelu",
    ln_first: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """Mix one axis of a cube with a residual two-layer perceptron and a LayerNorm, as CubeMLP does.

    With MLP(u) = fc2(activation(fc1(u))) and the residual projection R, all along `axis`:

        ln_first=False:  y = LayerNorm(MLP(x) + R(x))
        ln_first=True:   y = MLP(LayerNorm(x)) + R(x)

    LayerNorm and all sums are float32 (float64 for float64 x), also under autocast. Products are float32 on the CPU.
    On a GPU they follow the caller's precision: autocast's dtype if autocast is on, tf32 if torch's own products may
    be tf32 (`torch.set_float32_matmul_precision`), else float32 as three tf32 products of split factors. Results are
    bitwise the same in every run, whatever the number of threads.

    Args:
        x: [B, l, k, d], or of any number of axes, of any floating dtype. The length of `axis` is d_in.
        axis: The axis that is mixed. The others are kept.
        fc1_weight: [d_hidden, d_in].
        fc1_bias: [d_hidden] or None.
        fc2_weight: [d_out, d_hidden].
        fc2_bias: [d_out] or None.
        residual_weight: R, [d_out, d_in]. None is the identity; then d_in must be d_out.
        norm_weight: [d_out], or [d_in] with `ln_first`.
        norm_bias: As norm_weight.
        activation: gelu (exact), relu, tanh, leakyrelu, elu, hardtanh or hardshrink, with torch's defaults.
        ln_first: Where LayerNorm stands, see above.
        eps: Of LayerNorm.

    Returns:
        x with the length of `axis` changed to d_out, float32 (float64 for float64 x). Without autocast, x and weights
        that all have one type of 16 bits give that type. Differentiable once in x and in the weights.

    Raises:
        ValueError: An unknown activation, or shapes that do not belong together.
        EstimatorError: Types other than floating ones, or tensors on several devices.

    Source:
        Sun et al., CubeMLP: An MLP-based Model for Multimodal Sentiment Analysis and Depression Estimation, ACM
        Multimedia 2022.

    Example:
        >>> x, w, b = torch.randn(2, 10, 3, 4), torch.randn(10, 10), torch.zeros(10)
        >>> cube_mix(x, 1, w, b, w, b, None, torch.ones(10), b).mean(1).abs().max() < 1e-5  # normalised along axis 1
        tensor(True)
    """
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual_weight, norm_weight, norm_bias)
    exact_type("cube_mix", x, *weights)
    if not isinstance(axis, int) or not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis!r} of an x with {x.ndim} axes")
    axis = axis % x.ndim
    _check("cube_mix", x.shape[axis], weights, activation, eps, ln_first)
    return _mix(x, axis, weights, activation, ln_first, eps)


def cube_block(
    x: Tensor,
    time: Weights,
    modality: Weights,
    channel: Weights,
    *,
    activation: str = "gelu",
    ln_first: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """Mix time, then modality, then channel: `cube_mix` along axes 1, 2 and 3.

    On a GPU, modality and channel are one operation if the modality axis and its hidden layer are short (up to 8) and
    the channels are not. Under autocast, what goes from one axis to the next has autocast's dtype there.

    Args:
        x: [B, l, k, d], of any floating dtype.
        time: The seven weights of axis 1, in the order of `cube_mix`'s arguments.
        modality: Those of axis 2.
        channel: Those of axis 3.
        activation: Of all three, as for `cube_mix`.
        ln_first: Of all three, as for `cube_mix`.
        eps: Of all three, as for `cube_mix`.

    Returns:
        [B, l_out, k_out, d_out], float32 (float64 for float64 x). Differentiable once in x and in the weights.

    Raises:
        ValueError: As `cube_mix`, or x has other than four axes.
        EstimatorError: As `cube_mix`.

    Source:
        Sun et al., CubeMLP, ACM Multimedia 2022.

    Example:
        >>> def weights(n): return (torch.eye(n), None, torch.eye(n), None, None, torch.ones(n), torch.zeros(n))
        >>> cube_block(torch.randn(2, 10, 3, 4), weights(10), weights(3), weights(4)).shape
        torch.Size([2, 10, 3, 4])
    """
    exact_type("cube_block", x, *time, *modality, *channel)
    if x.ndim != 4:
        raise ValueError(f"x of shape {list(x.shape)}, expected [B, l, k, d]")
    for axis, weights in enumerate((time, modality, channel), 1):
        _check("cube_block", x.shape[axis], weights, activation, eps, ln_first)
    settings = (activation, ln_first, eps)
    if not on_triton(x) or _longest(modality) > cpu.SHORT or _longest(channel) <= cpu.SHORT:
        for axis, weights in enumerate((time, modality, channel), 1):
            x = _mix(x, axis, weights, *settings)
        return x
    precision = _precision(x)
    x = _mix(x, 1, time, *settings, cpu.STORAGE.get(precision, torch.float32))
    batch, length, _, _ = x.shape
    rows = x.flatten(0, 1)
    if wants_gradient(x, *modality, *channel):
        y = _CubePair.apply(rows, *settings, precision, *modality, *channel)
    else:
        y = _pair_forward(rows, (*modality, *channel), (*settings, precision), False)[0]
    return y.view(batch, length, *y.shape[1:])


def available(x: Tensor) -> bool:
    """Whether a fast backend runs on tensors like x. If not, the formula runs.

    The first call for CPU tensors compiles the kernel, which takes seconds and is logged, unless it was kept.
    """
    if x.dtype not in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type):
        return False
    backend = registry.backend_for(x, "cube_mix_forward")
    if backend == "cpu":
        return _double() if x.dtype == torch.float64 else _single()
    return backend == "triton" and x.dtype != torch.float64


def on_triton(x: Tensor) -> bool:
    """Whether Triton kernels run on tensors like x."""
    return registry.backend_for(x, "cube_mix_forward") == "triton" and available(x)


# Constants to torch.compile, which must not look inside.
@constant_when_compiled
def _single() -> bool:
    return cpu.library(torch.float32) is not None


@constant_when_compiled
def _double() -> bool:
    return cpu.library(torch.float64) is not None


@constant_when_compiled
def _tf32() -> bool:
    """Whether torch's own products of float32 matrices may be tf32."""
    cuda = torch.backends.cuda.matmul
    # torch before 2.9 has only the older name; newer ones refuse to read it once the newer name was set
    return cuda.fp32_precision == "tf32" if hasattr(cuda, "fp32_precision") else cuda.allow_tf32


def _precision(x: Tensor) -> str:
    """Of a GPU's products: fp32, tf32, bf16 or fp16."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        for name, storage in cpu.STORAGE.items():
            if storage == dtype:
                return name
    return "tf32" if _tf32() else "fp32"


def _autocasts(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _longest(weights: Weights) -> int:
    """The largest of an axis' input, hidden layer and output."""
    return max(*weights[0].shape, len(weights[2]))


def _check(where: str, d_in: int, weights: Weights, activation: str, eps: float, ln_first: bool) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    check_number(where, "eps", eps, 0)
    names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "residual_weight", "norm_weight", "norm_bias")
    for n in (0, 2, 5, 6):  # the others may be None
        if weights[n] is None or weights[n].dim() == 0:
            raise ValueError(
                f"{names[n]} is {'None' if weights[n] is None else 'a number'}, expected a tensor of weights"
            )
    hidden, d_out, residual = weights[0].shape[0], weights[2].shape[0], weights[4]
    norm = (d_in if ln_first else d_out,)
    expected = ((hidden, d_in), (hidden,), (d_out, hidden), (d_out,), (d_out, d_in), norm, norm)
    for name, weight, shape in zip(names, weights, expected, strict=True):
        if weight is not None and weight.shape != shape:
            raise ValueError(f"{name} has shape {list(weight.shape)}, expected {list(shape)} (the axis has {d_in})")
    if residual is None and d_in != d_out:
        raise ValueError(f"without residual_weight d_in must equal d_out; found {d_in} and {d_out}")


def _mix(
    x: Tensor,
    axis: int,
    weights: Weights,
    activation: str,
    ln_first: bool,
    eps: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`cube_mix`. dtype: the result's on a GPU."""
    if not available(x):
        dtypes = {t.dtype for t in (x, *weights) if t is not None}
        if x.device.type == "cpu" and dtypes <= set(cpu.STORAGE.values()) and not _autocasts(x):
            # torch's CPU products and LayerNorm of 16 bits sum in 16 bits
            exact = [None if w is None else w.float() for w in weights]
            y = _mix(x.float(), axis, exact, activation, ln_first, eps)
            return y.to(x.dtype) if len(dtypes) == 1 else y
        if len(dtypes) > 1:
            exact = torch.float64 if x.dtype == torch.float64 else torch.float32
            x, weights = x.to(exact), [None if w is None else w.to(exact) for w in weights]
        return reference.axis_mix(x, axis, *weights, activation=_FUNCTIONS[activation], ln_first=ln_first, eps=eps)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    columns = x.reshape(math.prod(before), x.shape[axis], math.prod(after))
    settings = (activation, ln_first, eps, _precision(x) if on_triton(x) else "fp32")
    if wants_gradient(x, *weights):
        y = _CubeMix.apply(columns, *settings, dtype, *weights)
    else:
        y = _forward(columns, weights, settings, dtype, False)[0]
    return y.view(*before, len(weights[2]), *after)


def _used(x: Tensor, weights: Weights) -> list[Tensor | None]:
    """x and the weights as the host functions take them: a GPU's kernels read x in 16 bits too."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return [x if on_triton(x) else x.to(dtype), *(None if w is None else w.to(dtype) for w in weights)]


def _forward(
    x: Tensor, weights: Weights, settings: tuple[str, bool, float, str], dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """y; what the backward pass needs (nothing without `keep`); x and the weights as the kernel read them."""
    used = _used(x, weights)
    dtype = torch.float64 if x.dtype == torch.float64 else dtype
    return *registry.call("cube_mix_forward", *used, *settings, dtype, keep), used


def _pair_forward(
    x: Tensor, weights: Weights, settings: tuple[str, bool, float, str], keep: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """The same of modality and channel. The second result is x with its modalities mixed."""
    used = _used(x, weights)
    return *registry.call("cube_pair_forward", *used, *settings, keep), used


class _CubeMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, activation: str, ln_first: bool, eps: float, precision: str, dtype: torch.dtype,
        *weights: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.settings = (activation, ln_first, eps, precision)
        ctx.dtypes = (x.dtype, *(None if w is None else w.dtype for w in weights))
        y, kept, (x, *weights) = _forward(x, weights, ctx.settings, dtype, True)
        ctx.save_for_backward(x, kept, *weights)
        return y

    @staticmethod
    @differentiable_once("cube_mix")
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        need_x = ctx.needs_input_grad[0]
        all_gradients = registry.call("cube_mix_backward", dy, *ctx.saved_tensors, *ctx.settings, need_x)
        dx, *gradients = _given_types(all_gradients, need_x, ctx.dtypes)
        return (dx, None, None, None, None, None, *gradients)


class _CubePair(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, activation: str, ln_first: bool, eps: float, precision: str, *weights: Tensor | None
    ) -> Tensor:
        ctx.settings = (activation, ln_first, eps, precision)
        ctx.dtypes = (x.dtype, *(None if w is None else w.dtype for w in weights))
        y, mixed, kept, (x, *weights) = _pair_forward(x, weights, ctx.settings, True)
        ctx.save_for_backward(x, mixed, kept, *weights)
        return y

    @staticmethod
    @differentiable_once("cube_block")
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        need_x = ctx.needs_input_grad[0]
        all_gradients = registry.call("cube_pair_backward", dy, *ctx.saved_tensors, *ctx.settings, need_x)
        dx, *gradients = _given_types(all_gradients, need_x, ctx.dtypes)
        return (dx, None, None, None, None, *gradients)


def _given_types(
    gradients: Sequence[Tensor], need_x: bool, dtypes: Sequence[torch.dtype | None]
) -> list[Tensor | None]:
    """The gradient of x and those of the weights, each in its tensor's dtype, None for what has none."""
    of_weights = iter(gradients[:-1] if need_x else gradients)
    dx = gradients[-1].to(dtypes[0]) if need_x else None
    return [dx, *(None if d is None else next(of_weights).to(d) for d in dtypes[1:])]


# -- registration --


def _storage(x: Tensor, precision: str) -> torch.dtype:
    return cpu.STORAGE.get(precision, torch.float64 if x.dtype == torch.float64 else torch.float32)


def _fake_forward(
    x: Tensor, fc1: Tensor, bias1, fc2: Tensor, bias2, residual, scale, shift, activation, ln_first, eps, precision,
    dtype, keep,
):  # fmt: skip
    outer, d_in, inner = x.shape
    size = cpu.kept_size(outer, inner, d_in, fc1.shape[0], fc2.shape[0], ln_first) if keep else 0
    y = x.new_empty(outer, fc2.shape[0], inner, dtype=dtype)
    return y, x.new_empty(size, dtype=_storage(x, precision))


def _fake_backward(dy: Tensor, x: Tensor, kept: Tensor, *rest) -> list[Tensor]:
    *weights, _, _, _, _, need_x = rest
    return _like(weights, x, need_x)


def _fake_pair_forward(x: Tensor, *rest):
    modality, channel, (_, ln_first, _, precision, keep) = rest[:7], rest[7:14], rest[14:]
    rows, _, d_in = x.shape
    m_out, hidden, d_out = modality[2].shape[0], channel[0].shape[0], channel[2].shape[0]
    storage = _storage(x, precision)
    size = cpu.kept_size(rows * m_out, 1, d_in, hidden, d_out, ln_first) if keep else 0
    y = x.new_empty(rows, m_out, d_out, dtype=torch.promote_types(storage, torch.float32))
    return y, x.new_empty(rows, m_out, d_in, dtype=storage), x.new_empty(size, dtype=storage)


def _fake_pair_backward(dy: Tensor, x: Tensor, mixed: Tensor, kept: Tensor, *rest) -> list[Tensor]:
    return _like(rest[:14], x, rest[-1])


def _like(weights: Weights, x: Tensor, need_x: bool) -> list[Tensor]:
    gradients = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights if w is not None]
    return [*gradients, x.new_empty(x.shape)] if need_x else gradients


def _copies(*tensors: Tensor | None) -> int:
    """Launches that copy tensors which are not contiguous."""
    return sum(t is not None and not t.is_contiguous() for t in tensors)


def _forward_launches(x: Tensor, *rest) -> int:
    return _copies(x, *rest[:7]) + 1 if x.numel() else 0


def _backward_launches(dy: Tensor, x: Tensor, kept: Tensor, *rest) -> int:
    weights = rest[:7]
    if not x.numel():
        return sum(w is not None for w in weights)
    return _copies(dy, x, *weights) + (2 if _longest(weights) <= cpu.SHORT else 3)


def _pair_forward_launches(x: Tensor, *rest) -> int:
    return _copies(x, *rest[:14]) + 1 if x.numel() else 0


def _pair_backward_launches(dy: Tensor, x: Tensor, mixed: Tensor, kept: Tensor, *rest) -> int:
    """Two for the channels, one for the modalities, one for the sums of both."""
    weights = rest[:14]
    return _copies(dy, x, *weights) + 4 if x.numel() else sum(w is not None for w in weights)


def _weights(prefix: str = "") -> str:
    names = ("fc1", "bias1", "fc2", "bias2", "residual", "scale", "shift")
    optional = ("bias1", "bias2", "residual")
    return ", ".join(f"Tensor{'?' if n in optional else ''} {prefix}{n}" for n in names)


_SETTINGS = "str activation, bool ln_first, float eps, str precision"
_BOTH = f"{_weights('m_')}, {_weights()}, {_SETTINGS}"

_mix_operation = registry.register_from("engine.kernels.cube_mix", "cube_mix_")
_pair_operation = registry.register_from("engine.kernels.cube_mix", "cube_")

_mix_operation(
    "forward",
    f"(Tensor x, {_weights()}, {_SETTINGS}, ScalarType dtype, bool keep) -> (Tensor, Tensor)",
    "triton", _fake_forward, _forward_launches,
)  # fmt: skip
_mix_operation(
    "backward",
    f"(Tensor dy, Tensor x, Tensor kept, {_weights()}, {_SETTINGS}, bool need_x) -> Tensor[]",
    "triton", _fake_backward, _backward_launches,
)  # fmt: skip
_pair_operation(
    "pair_forward",
    f"(Tensor x, {_BOTH}, bool keep) -> (Tensor, Tensor, Tensor)",
    "triton", _fake_pair_forward, _pair_forward_launches,
)  # fmt: skip
_pair_operation(
    "pair_backward",
    f"(Tensor dy, Tensor x, Tensor mixed, Tensor kept, {_BOTH}, bool need_x) -> Tensor[]",
    "triton", _fake_pair_backward, _pair_backward_launches,
)  # fmt: skip
