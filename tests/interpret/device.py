"""Where the kernels' cases run: in triton's interpreter on the CPU, or as they are on a GPU (`--device cuda`).

On a GPU the tensors that a test makes are made there, random ones from the same CPU generators, so that inputs are the
same on both; and what a test compares with, a host function of the CPU, is given copies.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map

VARIABLE = "ENGINE_TEST_DEVICE"  # set by the option --device, before test modules are imported


def device() -> torch.device:
    return torch.device(os.environ.get(VARIABLE, "cpu"))


def on_gpu() -> bool:
    return device().type != "cpu"


def times() -> int:
    """How often to compute what has to be bit-equal: the interpreter runs programs in one order, a GPU in any."""
    return 3 if on_gpu() else 2


def missing() -> str | None:
    """Why the cases cannot run where they should, or None."""
    from bench.gpu import missing as no_gpu
    from engine.kernels.registry import has_triton

    if not has_triton():
        return "triton is not installed"
    if on_gpu():
        if os.environ.get("TRITON_INTERPRET") == "1":
            return "TRITON_INTERPRET=1 and a GPU exclude each other"
        return no_gpu()
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a process of its own: TRITON_INTERPRET=1 pytest tests/interpret (make test does)"
    return None


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """Within the context torch's float32 products have this precision on a GPU: fp32, tf32 or bf16 (autocast).

    What a kernel of such products is judged by there. The interpreter multiplies in float32 whatever is asked, and so
    torch does here.
    """
    if not on_gpu():
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        with torch.autocast(device().type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two results are the same: bit for bit, or, on a GPU, where specialisations of one kernel contract
    products and sums differently, to rounding."""
    if not on_gpu():
        return torch.equal(a, b)
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-6 * b.abs().max()) if a.numel() else True


# Whether tensors that name no device are made on the device of the cases; not in the CPU's host functions.
_placing = True


def _made_there(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A constructor of torch's that makes tensors on the device; a generator of the CPU draws there, and they move."""

    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> Tensor:
        if not _placing or kwargs.get("device") is not None:
            return function(*args, **kwargs)
        generator = kwargs.get("generator")
        if isinstance(generator, torch.Generator) and generator.device.type == "cpu":
            return function(*args, **kwargs | {"device": "cpu"}).to(device())
        return function(*args, **kwargs | {"device": device()})

    return make


@contextlib.contextmanager
def tests_run_there() -> Iterator[None]:
    """Within the context a test's tensors are made where the cases run, and the CPU's host functions take them."""
    if not on_gpu():
        yield
        return
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with contextlib.ExitStack() as stack:
        for patch in [*_patches(), *_constructors()]:
            stack.enter_context(patch)
        yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


def _constructors() -> Iterator[Any]:
    for function in _device_constructors():
        name = function.__name__
        if getattr(torch, name, None) is function:
            yield mock.patch.object(torch, name, _made_there(function))


def _patches() -> Iterator[Any]:
    from engine.kernels import registry

    def run(operation: Any, *args: Any, _original: Callable = registry._run) -> Any:
        of_the_cpu = registry._setting == "cpu" and any(isinstance(a, Tensor) and not a.is_cpu for a in tree_iter(args))
        return on_the_host(_original)(operation, *args) if of_the_cpu else _original(operation, *args)

    def backend_for(tensor: Tensor, op: str | None = None, _original: Callable = registry.backend_for) -> str:
        return "cpu" if registry._setting == "cpu" else _original(tensor, op)

    for name, module in list(sys.modules.items()):
        if not name.startswith("engine."):
            continue
        if getattr(module, "backend_for", None) is registry.backend_for:
            yield mock.patch.object(module, "backend_for", backend_for)
        if name.startswith("engine.kernels.") and name.endswith((".cpu", ".batched")):
            for key, value in vars(module).items():
                if isinstance(value, types.FunctionType) and value.__module__ == name and not key.startswith("_"):
                    yield mock.patch.object(module, key, on_the_host(value))
    yield mock.patch.object(registry, "_run", run)


def on_the_host(function: Callable) -> Callable:
    """The function on copies of its tensors on the CPU; its results are moved to where the arguments are."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"].startswith("engine.kernels."):
            return function(*args, **kwargs)  # a GPU's host function that makes do with this one
        places = [t.device for t in tree_iter((args, kwargs)) if isinstance(t, Tensor) and not t.is_cpu]
        if not places:
            return function(*args, **kwargs)
        args, kwargs = tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, (args, kwargs))
        with mock.patch.object(sys.modules[__name__], "_placing", False):
            out = function(*args, **kwargs)
        return tree_map(lambda v: v.to(places[0]) if isinstance(v, Tensor) else v, out)

    return call


@contextlib.contextmanager
def launches_noticed(notice: Callable[[], None], compute: bool = True) -> Iterator[None]:
    """Within the context `notice` is called at every launch of a Triton kernel.

    Without `compute` the interpreter leaves out the kernel itself, whose results are then whatever lay there.
    """
    if on_gpu():
        from triton.runtime.jit import JITFunction as Launcher

        method = "run"
    else:
        from triton.runtime.interpreter import GridExecutor as Launcher

        method = "__call__"
    original = getattr(Launcher, method)

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        notice()
        if not (compute or on_gpu()):
            return None
        with _disable_current_modes():  # the interpreter's own copies are no work of the GPU's
            return original(self, *args, **kwargs)

    with mock.patch.object(Launcher, method, launch):
        yield
