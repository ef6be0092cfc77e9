"""A pretended GPU: within the context CPU tensors say that they are on `cuda`, and launches are counted.

    with PretendedGpu() as gpu:
        model.to("cuda")                  # nothing moves; from here on the model counts as on the GPU
        with gpu.watch() as seen:
            model(batch).sum().backward()
    print(seen.launches, seen.traffic)

Code that asks for the device (`x.is_cuda`, `x.device.type`, autocast's type, the backend of an operation) gets the
answers of CUDA, while the CPU computes the numbers. Tensors made before the context count as on the GPU. Within it
tensors are where the code puts them, so that copies and reads of values by the host are counted, too.

Torch functions that a CPU runs by other operations than CUDA does (dropout, attention, recurrences) are each one
operation here, with the launches that `bench.launches` gives them. Operations of the engine are counted by their own
declaration, or, without one, by running their CUDA host function with the launches of Triton kernels left out.
"""

from __future__ import annotations

import contextlib
import functools
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_map, tree_unflatten

from bench import rules
from bench.pretend_cuda import CPU, CUDA, cuda_autocast, patches
from engine.kernels import registry

# aten operations that a host waits for, because it reads a value or the size of the result is one
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim",
    "unique_consecutive", "bincount",
}  # fmt: skip


class HostTrafficError(AssertionError):
    """Code waits for the GPU, copies from or to the host, or runs there, where this is not allowed."""


@dataclass
class Seen:
    """What ran: launches by part and by operation, and whatever involved the host.

    Attributes:
        launches: GPU kernels, copies and fills, in all.
        by_operation: launches of each operation; calls: how often it was called.
        by_part: launches of each part of a step, as `engine.profile` names them.
        by_line: launches of each operation by the engine's line that calls it, where the context checks declarations.
            A backward pass counts for the line of its forward pass, if that ran in torch's anomaly mode.
        traffic: how often what waited for the GPU, copied between host and GPU, or ran on the host, so that a
            captured graph would not repeat it.
        failed: operations of the engine whose launches could not be counted, taken as one, and why.
        differ: {operation of the engine: (declared launches, launches of its host function)} where they are not the
            same, and the context checks it.
    """

    by_operation: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    by_part: Counter[str] = field(default_factory=Counter)
    by_line: Counter[tuple[str, str]] = field(default_factory=Counter)
    traffic: Counter[str] = field(default_factory=Counter)
    failed: dict[str, str] = field(default_factory=dict)
    differ: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def launches(self) -> int:
        return sum(self.by_operation.values())


class PretendedGpu:
    """See the module's text.

    Args:
        strict: raise HostTrafficError, naming the operation, where `Seen.traffic` would have an entry.
        check: compare the launches that operations declare with those of their host functions, in `Seen.differ`.
    """

    def __init__(self, strict: bool = False, check: bool = False):
        self.strict, self.check = strict, check
        self.seen: Seen | None = None
        self.parts: list[str] = []
        self._host: dict[int, Tensor] = {}  # kept alive, so that no other storage gets their address
        self._made_on: torch.device | None = None
        self._lifting = False
        self._silent = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> PretendedGpu:
        for patch in patches(self, _functions):
            self._stack.enter_context(patch)
        self._stack.enter_context(cuda_autocast())
        self._stack.enter_context(_Functions(self))
        self._stack.enter_context(_Operations(self))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._host.clear()

    @contextlib.contextmanager
    def watch(self) -> Iterator[Seen]:
        """Within the context launches are counted."""
        before, self.seen = self.seen, Seen()
        try:
            yield self.seen
        finally:
            self.seen = before

    # -- where tensors are --

    def on_host(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self._host

    def put(self, out: Any, device: torch.device | None) -> Any:
        """Note that the tensors of `out` are on `device`."""
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                if device is not None and device.type == "cpu":
                    self._host[_storage(tensor)] = tensor.detach()
                else:
                    self._host.pop(_storage(tensor), None)
        return out

    # -- what is run --

    def record(self, name: str, launches: int) -> None:
        if self.seen is None or self._silent:
            return
        self.seen.calls[name] += 1
        self.seen.by_operation[name] += launches
        self.seen.by_part[self.parts[-1] if self.parts else "rest"] += launches
        if self.check and launches:
            self.seen.by_line[_line(), name] += launches

    def traffic(self, what: str) -> None:
        if self.seen is None or self._silent:
            return
        self.seen.traffic[what] += 1
        if self.strict:
            raise HostTrafficError(what)

    @contextlib.contextmanager
    def as_one(self, name: str, launches: int) -> Iterator[None]:
        """What runs within the context is one operation of so many launches."""
        self.record(name, launches)
        self._silent += 1
        try:
            yield
        finally:
            self._silent -= 1

    @contextlib.contextmanager
    def made_on(self, device: torch.device | None, lifting: bool = False) -> Iterator[None]:
        """Within the context tensors that are made of nothing are on `device`."""
        before = self._made_on, self._lifting
        self._made_on, self._lifting = device, lifting
        try:
            yield
        finally:
            self._made_on, self._lifting = before

    def place_of(self, tensors: list[Tensor]) -> torch.device:
        """Where an operation on these tensors runs; without any: where the call said, or, within torch, the GPU."""
        if not tensors:
            return self._made_on or CUDA
        return CPU if all(self.on_host(t) for t in tensors) else CUDA


class HostTraffic(PretendedGpu):
    """A context in which HostTrafficError names the first operation that a CUDA graph could not hold.

    That is one that waits for the GPU, copies between host and GPU, or runs on the host. Tensors made before the
    context count as on the GPU.
    """

    def __init__(self) -> None:
        super().__init__(strict=True)

    def __enter__(self) -> HostTraffic:
        super().__enter__()
        self.seen = Seen()
        return self


# -- the functions of torch -------------------------------------------------------------------------------------------


class _Functions(TorchFunctionMode):
    """Answers questions for the device, and sends what names a device on with the CPU in its place."""

    def __init__(self, gpu: PretendedGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        gpu, name = self.gpu, getattr(func, "__name__", "")
        if func is torch.device or name == "_parse_to":
            return func(*args, **kwargs)
        if func == _DEVICE:
            if (real := func(args[0])).type != "cpu":
                return real
            return CPU if gpu.on_host(args[0]) else CUDA
        if func in _IS_CUDA:
            return not gpu.on_host(args[0])
        if func == _IS_CPU:
            return gpu.on_host(args[0])
        if func == torch.Tensor.get_device:
            return -1 if gpu.on_host(args[0]) else 0
        if name in _MOVES and args and isinstance(args[0], Tensor):
            return self._move(name, args, kwargs)
        if name in ("tolist", "numpy") and isinstance(args[0], Tensor) and not gpu.on_host(args[0]):
            gpu.traffic(f"Tensor.{name}")
        items = name in ("__getitem__", "__setitem__")
        if items and not gpu.on_host(args[0]) and _from_host(args[1]):
            gpu.traffic(f"Tensor.{name} with a list of the host")
            gpu.record("copy to the GPU", 1)
        if name == "pin_memory" or kwargs.get("pin_memory"):
            gpu.traffic("pinned memory")
            if name == "pin_memory":
                return args[0]
        replaced = _REPLACED.get(name)
        if replaced is not None and (out := replaced(gpu, args, kwargs)) is not NotImplemented:
            return out
        return self._on_cpu(func, args, kwargs)

    def _on_cpu(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """`func` with the CPU in the place of every device among its arguments."""
        kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"}
        leaves, form = tree_flatten((args, kwargs))
        named = [torch.device(v) if k == "device" else v for k, v in kwargs.items() if k == "device" and v is not None]
        named += [v for v in leaves if isinstance(v, torch.device)]
        device = next((d for d in named if isinstance(d, torch.device)), None)
        if device is not None and device.type not in ("cpu", "cuda"):
            return func(*args, **kwargs)
        tensors = any(isinstance(v, Tensor) for v in leaves)
        if device is not None:
            args, kwargs = tree_unflatten([CPU if isinstance(v, torch.device) else v for v in leaves], form)
            if kwargs.get("device") is not None:
                kwargs["device"] = CPU
        place = device if device is not None or tensors else CPU
        name = getattr(func, "__name__", "")
        if name == "new_tensor" and place is None:
            place = CPU if self.gpu.on_host(args[0]) else CUDA
        if name in _FROM_HOST_DATA and place is not None and place.type == "cuda":
            self.gpu.traffic(f"torch.{name}")
            self.gpu.record("copy to the GPU", 1)
        with self.gpu.made_on(place if place is None or place.type == "cpu" else CUDA, name in _LIFTING):
            out = func(*args, **kwargs)
        return self.gpu.put(out, place) if name in _FROM_HOST_DATA and place is not None else out

    def _move(self, name: str, args: tuple, kwargs: dict) -> Any:
        """`tensor.to`, `.cpu` and `.cuda`: a copy where the tensor is elsewhere."""
        gpu, tensor, rest = self.gpu, args[0], list(args[1:])
        target: torch.device | None = {"cpu": CPU, "cuda": CUDA}.get(name)
        dtype = kwargs.get("dtype")
        if name == "to":
            like = next((a for a in [*rest, kwargs.get("other")] if isinstance(a, Tensor)), None)
            if like is not None:
                target, dtype = (CPU if gpu.on_host(like) else CUDA), like.dtype
            for value in [*rest, kwargs.get("device")]:
                if isinstance(value, torch.dtype):
                    dtype = value
                elif isinstance(value, str | torch.device):
                    target = torch.device(value)
        here = CPU if gpu.on_host(tensor) else CUDA
        if tensor.is_meta or (target is not None and target.type not in ("cpu", "cuda")):
            return getattr(torch.Tensor, name)(*args, **kwargs)
        moving = target is not None and target.type != here.type
        copied = tensor
        if moving:
            to = "GPU" if here.type == "cpu" else "host"
            gpu.traffic(f"copy to the {to}{' without waiting' * (to == 'GPU' and bool(kwargs.get('non_blocking')))}")
            with gpu.as_one("copy to the GPU" if here.type == "cpu" else "copy to the host", 1):
                copied = gpu.put(tensor.clone(), target)
        if dtype is not None and dtype != tensor.dtype:
            return torch.Tensor.to(copied, dtype)
        return torch.Tensor.clone(copied) if kwargs.get("copy") and not moving else copied


@contextlib.contextmanager
def _functions(gpu: PretendedGpu) -> Iterator[None]:
    """The mode on, once: torch takes it off within a function, such as a whole backward pass."""
    on = any(isinstance(mode, _Functions) for mode in torch.overrides._get_current_function_mode_stack())
    with contextlib.nullcontext() if on else _Functions(gpu):
        yield


_DEVICE = torch.Tensor.device.__get__
_IS_CUDA = (torch.Tensor.is_cuda.__get__,)
_IS_CPU = torch.Tensor.is_cpu.__get__
_MOVES = ("to", "cpu", "cuda")
_FROM_HOST_DATA = ("tensor", "as_tensor", "asarray", "new_tensor")
_LIFTING = (*_FROM_HOST_DATA, "__getitem__", "__setitem__")  # whose host data are dealt with where they are called


def _from_host(index: Any) -> bool:
    """Whether an index holds numbers of the host: a list, a range or an array."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(p, list | range) or (type(p).__module__ == "numpy" and getattr(p, "ndim", 0)) for p in parts)


def _dropout(gpu: PretendedGpu, args: tuple, kwargs: dict) -> Any:
    """torch's dropout on CUDA is one fused operation."""
    values = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
    x, p = values["input"], values.get("p", 0.5)
    if gpu.on_host(x) or not values.get("training", True) or not 0 < p < 1:
        return NotImplemented
    return torch.native_dropout(x, p, True)[0]


class _Attention(torch.autograd.Function):
    """The launches of fused attention, and something of its shape."""

    @staticmethod
    def forward(ctx, gpu, q, k, v):
        ctx.gpu, ctx.shapes = gpu, (q, k, v)
        with gpu.as_one("scaled_dot_product_attention", rules.ATTENTION):
            return torch.zeros_like(q) + v.mean(-2, keepdim=True)

    @staticmethod
    def backward(ctx, grad):
        with ctx.gpu.as_one("scaled_dot_product_attention backward", rules.ATTENTION_BACKWARD):
            return None, *(torch.zeros_like(x) for x in ctx.shapes)


def _attention(gpu: PretendedGpu, args: tuple, kwargs: dict) -> Any:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    values = dict(zip(names, args, strict=False)) | kwargs
    inputs = [values[n] for n in names[:3]]
    if gpu.on_host(inputs[0]):
        return NotImplemented
    if torch.is_autocast_enabled("cuda"):
        mask = values.get("attn_mask")
        inputs = [t.to(torch.get_autocast_dtype("cuda")) for t in inputs]
        if mask is not None and mask.is_floating_point():
            mask.to(inputs[0].dtype)
    return _Attention.apply(gpu, *inputs)


class _Rnn(torch.autograd.Function):
    """The launches of one call of cuDNN's recurrences, and something of its shape."""

    @staticmethod
    def forward(ctx, gpu, x, shape, layers, *weights):
        ctx.gpu, ctx.layers = gpu, layers
        ctx.save_for_backward(x, *weights)
        with gpu.as_one("cudnn rnn", rules.rnn(layers, weights)):
            return x.new_zeros(shape) + x.mean()

    @staticmethod
    def backward(ctx, grad):
        x, *weights = ctx.saved_tensors
        launches = rules.rnn_backward(ctx.layers, weights)
        with ctx.gpu.as_one("cudnn rnn backward", launches):
            return None, torch.zeros_like(x), None, None, *(torch.zeros_like(w) for w in weights)


def _recurrence(cell: str, gpu: PretendedGpu, args: tuple, kwargs: dict) -> Any:
    x = args[0]
    if gpu.on_host(x) or kwargs or not isinstance(args[2], list | tuple):  # packed sequences: as on the CPU
        return NotImplemented
    _, state, weights, _, layers, _, _, both, batch_first = args
    hidden = (state if cell == "gru" else state[0]).shape[-1]
    if torch.is_autocast_enabled("cuda"):
        x, *weights = (t.to(torch.get_autocast_dtype("cuda")) for t in (x, *weights))
    shape = (*x.shape[:2], hidden * (1 + bool(both)))
    out = _Rnn.apply(gpu, x, shape, layers * (1 + bool(both)), *weights)
    last = out[:, -1] if batch_first else out[-1]
    return (out, last[None]) if cell == "gru" else (out, last[None], last[None])


_REPLACED = {
    "dropout": _dropout,
    "scaled_dot_product_attention": _attention,
    "gru": functools.partial(_recurrence, "gru"),
    "lstm": functools.partial(_recurrence, "lstm"),
}


# -- the operations beneath -------------------------------------------------------------------------------------------


class _Operations(TorchDispatchMode):
    def __init__(self, gpu: PretendedGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, gpu = kwargs or {}, self.gpu
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        name = func._schema.name.split("::")[-1]
        place = gpu.place_of(tensors)
        if place.type == "cuda":
            self._look_for_traffic(name, args, kwargs, tensors)
            if func.namespace == "engine":
                return self._engine(name, args)
        with torch._C.DisableTorchFunction():
            out = func(*args, **kwargs)
        if place.type == "cuda":
            gpu.record(f"{func.namespace}.{name}", rules.launches(func, args, kwargs, out))
        elif _makes_a_tensor(out) and not rules.is_view(func) and name not in rules.NOTHING:
            gpu.traffic(f"aten.{name} on the host")
        if tensors and rules.is_view(func):
            return out
        if name == "copy_" or (name.endswith("_") and tensors):  # in place: the tensor stays where it is
            return out
        return gpu.put(out, place)

    def _look_for_traffic(self, name: str, args: tuple, kwargs: dict, tensors: list[Tensor]) -> None:
        gpu = self.gpu
        if name in WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None and len(tensors) == 1):
            gpu.traffic(f"aten.{name}")
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        ):
            gpu.traffic(f"aten.{name} with a mask")
        elif any(gpu.on_host(t) and t.dim() > 0 for t in tensors):
            asynchronous = name == "copy_" and (kwargs.get("non_blocking") or args[2:] == (True,))
            gpu.traffic(f"aten.{name} with a tensor of the host" + " without waiting" * bool(asynchronous))
            if name in ("copy_", "index", "index_put", "index_put_", "_index_put_impl_"):
                gpu.record("copy to the GPU", sum(gpu.on_host(t) for t in tensors))
        elif name == "lift_fresh" and not gpu._lifting and tensors[0].dim():
            gpu.traffic("aten.lift_fresh: a tensor of the host's numbers")

    def _engine(self, name: str, args: tuple) -> Any:
        """An operation of the engine: its launches, and results of the right shapes: ones, which divide and have a
        logarithm, and zeros for indices."""
        gpu = self.gpu
        with _functions(gpu):
            if gpu.seen is not None and not gpu._silent:
                gpu.record(f"engine.{name}", self._launches(name, args))
            out = registry.operation(name).fake(*args)
            for tensor in tree_iter(out):
                tensor.fill_(1 if tensor.is_floating_point() else 0)
        return gpu.put(out, CUDA)

    def _launches(self, name: str, args: tuple) -> int:
        operation, seen = registry.operation(name), self.gpu.seen
        declared = operation.launches is not None or operation.cuda is None
        count = registry.launches(name, *args)
        if operation.cuda is None or (declared and not self.gpu.check):
            return count
        try:
            launched = launched_by_the_host_function(self.gpu, name, args)
        except Exception as cause:
            seen.failed[name] = f"{type(cause).__name__}: {cause}"
            return count
        if declared and launched != count:
            seen.differ[name] = count, launched
        return count if declared else launched


def launched_by_the_host_function(gpu: PretendedGpu, name: str, args: tuple) -> int:
    """Launches of an operation's CUDA host function: it is run, but its Triton kernels are only counted."""
    import triton

    kernels = Counter[str]()

    def run(self: Any, *arguments: Any, grid: Any = None, **named: Any) -> None:
        kernels[self.fn.__name__] += 1

    # what it leaves unwritten must not get into the step's tensors
    with torch._C.DisableTorchFunction():
        args = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, args)
    silent, gpu._silent = gpu._silent, 0
    strict, gpu.strict = gpu.strict, False
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(triton.runtime.JITFunction, "run", run))
            # within an operation torch takes the modes off
            stack.enter_context(_functions(gpu))
            stack.enter_context(_Operations(gpu))
            seen = stack.enter_context(gpu.watch())
            registry.operation(name).cuda(*args)
    finally:
        gpu._silent, gpu.strict = silent, strict
    return seen.launches + sum(kernels.values())


def _line() -> str:
    """The engine's innermost line that is not one of its kernels', of this call or of the forward pass that it
    differentiates; with the name of the backward pass's node."""
    node = torch._C._current_autograd_node()
    if node is None:
        frames, prefix = [(f.filename, f.lineno) for f in traceback.extract_stack()], ""
    else:
        written = "".join(node.metadata.get("traceback_") or ())
        frames, prefix = re.findall(r'File "([^"]+)", line (\d+)', written), f"{node.name()} of "
    own = [(name.rpartition("/engine/")[2], number) for name, number in frames if "/engine/" in name]
    outside = [place for place in own if not place[0].startswith(("kernels/", "streams.py", "profile.py"))]
    name, number = (outside or own or [("elsewhere", 0)])[-1]
    return f"{prefix}{name}:{number}"


def _makes_a_tensor(out: Any) -> bool:
    return any(isinstance(t, Tensor) for t in tree_iter(out))


def _storage(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()._cdata
