"""Answers of `torch.cuda` and autocast for `bench.pretend`, as if there were a GPU."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

if TYPE_CHECKING:
    from bench.pretend import PretendedGpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CAPABILITY = (9, 0)
MEMORY = 80 << 30


class _Queue:
    """A stream or an event that does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.cuda_stream = self.stream_id = 0

    def wait_stream(self, *args: Any) -> None:
        pass

    wait_event = record_stream = record = wait = wait_stream

    def record_event(self, *args: Any) -> _Queue:
        return self


def _as_cpu(function: Callable) -> Callable:
    """A function of autocast that takes the device type cuda for the CPU."""

    @functools.wraps(function)
    def call(device_type: Any = "cuda", *args: Any, **kwargs: Any) -> Any:
        return function("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    return call


def patches(gpu: PretendedGpu, functions: Callable) -> list[Any]:
    """What `torch.cuda` and autocast answer as long as the pretended GPU is there.

    Args:
        functions: makes a context in which the GPU's torch functions are replaced.
    """
    from engine import profile

    original = torch.amp.autocast_mode.autocast.__init__

    def init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        original(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    @contextlib.contextmanager
    def part(name: str) -> Iterator[None]:
        gpu.parts.append(name)
        try:
            yield
        finally:
            gpu.parts.pop()

    def from_numpy(array: Any, _original: Callable = torch.from_numpy) -> Tensor:
        return gpu.put(_original(array), CPU)

    group = torch._C._group_tensors_by_device_and_dtype
    run_backward = torch.autograd._engine_run_backward

    def grouped(lists: Any, with_indices: bool = False, _original: Callable = group) -> Any:
        groups = _original(lists, with_indices)
        return {
            (CPU if gpu.on_host(next(t for t in tensors[0] if t is not None)) else CUDA, dtype): (tensors, indices)
            for (_, dtype), (tensors, indices) in groups.items()
        }

    def backward(*args: Any, **kwargs: Any) -> Any:
        with functions(gpu):
            return run_backward(*args, **kwargs)

    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda *a, **k: True,
        "get_device_capability": lambda *a: CAPABILITY,
        "get_device_properties": lambda *a: mock.Mock(
            multi_processor_count=132, major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=MEMORY,
            shared_memory_per_multiprocessor=228 << 10, L2_cache_size=50 << 20, name="pretended",
        ),
        "get_device_name": lambda *a: "pretended",
        "mem_get_info": lambda *a: (MEMORY, MEMORY),
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda *a: gpu.traffic("torch.cuda.synchronize"),
        "current_stream": lambda *a: _Queue(),
        "Stream": _Queue,
        "Event": _Queue,
        "stream": lambda *a: contextlib.nullcontext(),
        "device": lambda *a: contextlib.nullcontext(),
        "get_rng_state_all": list,
    }  # fmt: skip
    patches = [mock.patch.object(torch.cuda, name, value) for name, value in cuda.items()]
    patches += [
        mock.patch.object(torch.amp.autocast_mode.autocast, "__init__", init),
        mock.patch.object(torch, "is_autocast_enabled", _as_cpu(torch.is_autocast_enabled)),
        mock.patch.object(torch, "get_autocast_dtype", _as_cpu(torch.get_autocast_dtype)),
        mock.patch.object(torch, "from_numpy", from_numpy),
        mock.patch.object(torch.backends.cudnn, "is_acceptable", lambda *a: False),
        mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped),
        mock.patch.object(torch.autograd, "_engine_run_backward", backward),
    ]
    # parts are looked up in the modules that import the name
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("engine.") and getattr(module, "part", None) is profile.part:
            patches.append(mock.patch.object(module, "part", part))
    return patches


# autocast computes these in float32 on CUDA, and leaves them as they are on a CPU
IN_FLOAT32 = (
    "layer_norm", "native_layer_norm", "group_norm", "softmax.int", "log_softmax.int", "exp", "expm1", "log", "log10",
    "log1p", "log2", "reciprocal", "rsqrt", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "softplus", "sum",
    "sum.dim_IntList", "prod", "cumsum", "norm.Scalar", "norm.ScalarOpt_dim", "logsumexp", "l1_loss", "mse_loss",
    "smooth_l1_loss", "huber_loss", "nll_loss", "cosine_similarity", "binary_cross_entropy_with_logits", "cdist",
)  # fmt: skip


@contextlib.contextmanager
def cuda_autocast() -> Iterator[None]:
    """Within the context autocast on CPU tensors computes in float32 what it computes in float32 on CUDA."""
    library = torch.library.Library("aten", "IMPL", "AutocastCPU")
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def in_float32(operation: Any) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(key):
                leaves, form = tree_flatten((args, kwargs))
                leaves = [v.float() if isinstance(v, Tensor) and v.dtype == torch.bfloat16 else v for v in leaves]
                args, kwargs = tree_unflatten(leaves, form)
                return operation(*args, **kwargs)

        return run

    for name in IN_FLOAT32:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "AutocastCPU"):
            library.impl(name, in_float32(operation))
    try:
        yield
    finally:
        library._destroy()
