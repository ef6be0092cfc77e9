"""Registration of the operations with torch, and the switch between their backends.

Every operation is registered once under `torch.ops.engine`, with one schema for all backends. So torch.compile sees one
opaque node and never a kernel. Backends of an operation:

    reference  the formula in plain torch, differentiated by autograd: the specification the others are tested against
    cpu        fast CPU code with a hand-written backward
    triton     GPU kernels; also on CPU tensors, where triton's interpreter runs them (TRITON_INTERPRET=1), for tests

A host function (in cpu.py and triton.py) takes and returns plain tensors and knows nothing of autograd.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_iter

from engine.errors import ConfigError
from engine.kernels.gradients import no_gradient, transformed

BACKENDS = ("auto", "triton", "cpu", "reference")

LIB = torch.library.Library("engine", "DEF")

# Looked up here and not in `has_triton`: torch.compile cannot trace find_spec.
_HAS_TRITON = importlib.util.find_spec("triton") is not None

log = logging.getLogger("engine")


@dataclass(frozen=True)
class Operation:
    cpu: Callable[..., Any]
    cuda: Callable[..., Any] | None
    fake: Callable[..., Any]
    launches: int | Callable[..., int] | None = None
    family: str = ""
    cpu_anywhere: bool = False


_operations: dict[str, Operation] = {}
_setting = os.environ.get("ENGINE_BACKEND", "auto")
PLAIN = "ENGINE_PLAIN"
_plain = frozenset(name.strip() for name in os.environ.get(PLAIN, "").split(",") if name.strip())
_plain_checked = False
_told: set[str] = set()
_blank = False


class use_backend:
    """Choose the backend of all operations: "auto", "triton", "cpu" or "reference".

    `use_backend("reference")` chooses for the process, `with use_backend("reference"):` for a block. All threads share
    the choice, because torch runs backward passes in threads of its own. The environment variable ENGINE_BACKEND gives
    the choice at the start.

    "auto" takes triton for CUDA tensors if triton is installed, cpu for CPU tensors, else reference. Within the
    transforms of torch.func, under forward-mode AD and in torch.jit.trace it takes reference.

    Args:
        name: The backend.
        plain: Folders of engine/kernels whose Triton kernels are not used: plain torch takes their place. The
            environment variable ENGINE_PLAIN gives them at the start, separated by commas.

    Raises:
        ConfigError: An unknown name, or "triton" without triton installed.

    Example:
        >>> x = torch.zeros(1)
        >>> with use_backend("reference"):
        ...     backend_for(x)
        'reference'
    """

    def __init__(self, name: str, plain: Iterable[str] | None = None):
        global _setting, _plain
        _check(name, "use_backend")
        self.previous = _setting, _plain
        if plain is not None:
            plain = frozenset(plain)
            _check_plain(plain, "use_backend")
            _plain = plain
        _setting = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exception: object) -> None:
        global _setting, _plain
        _setting, _plain = self.previous


@contextlib.contextmanager
def blank_results() -> Iterator[None]:
    """A context in which operations on CUDA tensors return zeros, whatever their kernels did; for `warm.recording`."""
    global _blank
    before, _blank = _blank, True
    try:
        yield
    finally:
        _blank = before


def lazy(module: str, function: str) -> Callable[..., Any]:
    """`function` of `module`, imported at the first call, so that triton and numba are imported only when needed."""

    def call_it(*args: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args)

    call_it.__name__ = call_it.__qualname__ = function
    return call_it


def register(
    name: str,
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
    fake: Callable[..., Any],
    launches: int | Callable[..., int] | None = None,
    cpu_anywhere: bool = False,
) -> None:
    """Register an operation as `torch.ops.engine.NAME`. Forward and backward are two operations.

    Args:
        name: the operation's name.
        schema: torch schema without the name, such as "(Tensor q, float scale, Tensor? mask=None) -> (Tensor, Tensor)".
            Outputs are fresh tensors: neither inputs nor views of them.
        cpu: host function for CPU tensors.
        cuda: host function of the Triton kernels, or None. See `lazy`.
        fake: shapes and dtypes of the outputs for tensors without data.
        launches: number of GPU kernels that one call launches, or a function of its arguments that gives it. None: not
            declared.
        cpu_anywhere: `cpu` is plain torch that works on any device, and so takes the kernels' place where `use_backend`
            calls the operation's folder plain.
    """
    family = (getattr(fake, "__module__", None) or "").removeprefix("engine.kernels.").partition(".")[0]
    operation = _operations[name] = Operation(cpu, cuda, fake, launches, family, cpu_anywhere)
    run = functools.partial(_run, operation)
    LIB.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIB.impl(name, run, "CPU")
    if cuda is not None:
        LIB.impl(name, run, "CUDA")
    torch.library.register_fake(f"engine::{name}", fake, lib=LIB)
    torch.library.register_autograd(f"engine::{name}", no_gradient(name), lib=LIB)


def register_from(folder: str, prefix: str = "", cpu: str = "cpu") -> Callable[..., None]:
    """A shorter `register` for the operations of one folder whose host functions have one name in all its modules.

    Args:
        folder: the operation's package.
        prefix: the operation of function "scores" is named PREFIXscores.
        cpu: the package's module of CPU functions.

    Returns:
        A function (function, schema, cuda, fake, launches). `cuda` is the module of the Triton kernels' host functions,
        or None. `launches` is as for `register`; "by name", the default, is that module's FUNCTION_launches.
    """

    def add(
        function: str,
        schema: str,
        cuda: str | None,
        fake: Callable[..., Any],
        launches: int | Callable[..., int] | Literal["by name"] | None = "by name",
    ) -> None:
        register(
            prefix + function,
            schema,
            cpu=lazy(f"{folder}.{cpu}", function),
            cuda=None if cuda is None else lazy(f"{folder}.{cuda}", function),
            fake=fake,
            launches=lazy(f"{folder}.{cuda}", f"{function}_launches") if launches == "by name" else launches,
        )

    return add


def call(name: str, *args: Any) -> Any:
    """Run a registered operation on the backend of its first tensor. Arguments are positional, as in its schema.

    In eager mode the host function is called directly, because torch's dispatcher would cost more than a small
    operation. Under torch.compile, and under any dispatch mode (fake tensors, FLOP counters), the call goes through
    torch.ops.engine.
    """
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return getattr(torch.ops.engine, name)(*args)
    return _run(_operations[name], *args)


def launches(name: str, *args: Any) -> int:
    """How many GPU kernels `call(name, *args)` launches, as declared at registration; 1 without a declaration.

    The tensors may be fake.
    """
    declared = _operations[name].launches
    if declared is None:
        return 1
    return declared if isinstance(declared, int) else declared(*args)


def operation(name: str) -> Operation:
    """A registered operation's functions and its declared launches."""
    return _operations[name]


def backend_for(tensor: Tensor, op: str | None = None) -> str:
    """The backend that runs an operation on `tensor`: "triton", "cpu" or "reference".

    It depends on the tensor's device, on what is installed and on the setting alone.

    Args:
        tensor: a tensor of the operation.
        op: a registered operation; "auto" then avoids a backend that it lacks.

    Raises:
        ConfigError: the chosen backend cannot run on the tensor's device.
    """
    device, setting = tensor.device.type, _setting
    if setting not in BACKENDS:
        _check(setting, "ENGINE_BACKEND")
    if setting == "reference":
        return "reference"
    if not torch.compiler.is_compiling() and transformed():
        if setting == "auto":
            return "reference"
        raise ConfigError(
            f"backend {setting}", "a transform of torch.func, forward-mode AD, or torch.jit.trace", "plain tensors",
            'use_backend("auto") or use_backend("reference"): the formulas, which torch transforms.',
        )  # fmt: skip
    has_kernels = op is None or _operations[op].cuda is not None
    if _plain and op is not None and is_plain(_operations[op].family):
        return "cpu" if device == "cpu" and setting in ("auto", "cpu") else "reference"
    if setting == "auto":
        chosen = "cpu" if device == "cpu" else "reference"
        if device == "cuda" and has_kernels and has_triton():
            chosen = "triton"
        if not torch.compiler.is_compiling():
            _tell(device, chosen)
        return chosen
    if setting == "cpu" and device != "cpu":
        raise ConfigError("backend cpu", f"a tensor on {device}", "a tensor on cpu", 'Move it, or use_backend("auto").')
    if setting == "triton" and not (has_kernels and has_triton() and (device == "cuda" or interpreting())):
        what = f"a tensor on {device}" if has_triton() else "no triton"
        raise ConfigError(
            "backend triton",
            what if has_kernels else f"{op}, which has no Triton kernel",
            "triton installed and a tensor on cuda (or TRITON_INTERPRET=1 for tests on cpu)",
            'Move the tensor, install engine[triton], or use_backend("auto").',
        )
    return setting


def setting() -> str:
    """What `use_backend` or ENGINE_BACKEND chose: one of `BACKENDS`."""
    return _setting


def families() -> list[str]:
    """The folders of engine/kernels that have operations with Triton kernels, for `use_backend(..., plain=...)`."""
    here = Path(__file__).parent
    return sorted(path.parent.name for path in here.glob("*/op.py") if path.with_name("triton.py").exists())


def is_plain(family: str) -> bool:
    """Whether `use_backend` or ENGINE_PLAIN puts plain torch in the place of a folder's Triton kernels.

    Raises:
        ConfigError: a folder without Triton kernels was named.
    """
    global _plain_checked
    if not _plain_checked and not torch.compiler.is_compiling():
        _check_plain(_plain, PLAIN)
        _plain_checked = True
    return family in _plain


def has_triton() -> bool:
    """Whether triton is installed; does not import it."""
    return _HAS_TRITON


_static = False


@contextlib.contextmanager
def static() -> Iterator[None]:
    """A context in which nothing may read values on the host, whatever the device: a static step's functions."""
    global _static
    before, _static = _static, True
    try:
        yield
    finally:
        _static = before


def is_static() -> bool:
    """Whether a static step's function runs."""
    return _static


def interpreting() -> bool:
    """Whether triton's interpreter runs the kernels, on the CPU. Fixed when triton is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def log_size(size: int, like: Tensor) -> float | Tensor:
    """log(size). In a graph it is a tensor, because math.log would fix a dynamic size."""
    return like.new_full((), size).log() if torch.compiler.is_compiling() else math.log(size)


def _run(operation: Operation, *args: Any) -> Any:
    tensor = next(a for a in args if isinstance(a, Tensor))
    if torch.is_autocast_enabled(tensor.device.type):
        # a host function chooses its own precision: autocast would take its fp32 products in 16 bits
        with torch.autocast(tensor.device.type, enabled=False):
            return _run(operation, *args)
    if _plain and operation.cpu_anywhere and is_plain(operation.family):
        return operation.cpu(*args)
    if tensor.is_cuda:
        # a launch goes to the current device, which need not be the tensor's
        with torch.cuda.device(tensor.device):
            results = operation.cuda(*args)
        if _blank:
            for result in tree_iter(results):
                result.zero_()
        return results
    if _setting == "triton" and backend_for(tensor) == "triton":
        return operation.cuda(*args)
    return operation.cpu(*args)


def _check(name: str, where: str) -> None:
    if name not in BACKENDS:
        raise ConfigError(where, repr(name), f"one of {', '.join(BACKENDS)}", "Choose one of these.")
    if name == "triton" and not has_triton():
        raise ConfigError(where, "no triton", "triton installed", 'Install engine[triton], or use "auto".')


def _check_plain(plain: frozenset[str], where: str) -> None:
    if unknown := plain.difference(families()):
        raise ConfigError(where, repr(min(unknown)), f"one of {', '.join(families())}", "Name folders of kernels.")


def _tell(device: str, chosen: str) -> None:
    if device in _told:
        return
    _told.add(device)
    why = {
        "triton": "triton is installed",
        "cpu": "CPU tensors",
        "reference": "no kernels for this device" if device != "cuda" else "triton is not installed, or has no kernel",
    }[chosen]
    log.info("kernels on %s tensors: backend %s (%s)", device, chosen, why)
