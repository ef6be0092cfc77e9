"""Races in Triton kernels, which triton's interpreter cannot show: it runs one program at a time, one step at a time.

    with no_races():
        out = forward(q, k)

On a GPU the programs of a grid run in any order and at once, and so do the threads of one program. Every access to
memory of every launch in the block is written down. AssertionError, with the lines of the kernel, where

- a program writes what another one reads or writes, unless both do so atomically;
- a program reads or writes in one tile what it writes in another tile, with no `tl.debug_barrier()` between: different
  threads hold an element of different tiles. The same tile twice is in order, because the same threads hold it;
- two elements of one stored tile have one address and different values;
- an address or a number is no multiple of what `tl.multiple_of` promises the compiler.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np

PACKAGES = ("triton", "numpy", "tests.interpret.races")


@dataclass
class Access:
    """One load or store of one program."""

    program: int
    stretch: int  # how many barriers of the program came before
    line: str
    tile: int  # equal for the same addresses in the same shape
    addresses: np.ndarray  # those that the mask lets through, in order
    size: int  # bytes of an element
    writes: bool
    atomic: bool


class _Watch:
    def __init__(self) -> None:
        self.accesses: list[Access] = []
        self.faults: list[str] = []
        self.program = -1
        self.stretch = 0

    def begin_program(self) -> None:
        self.program += 1
        self.stretch = 0

    def note(self, pointers: Any, mask: Any, writes: bool, atomic: bool = False, values: Any = None) -> None:
        at = pointers.data
        live = np.broadcast_to(mask.data, at.shape).ravel()
        addresses = at.ravel()[live]
        if not len(addresses):
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        tile = hash((at.shape, at.tobytes()))
        line = _line()
        if writes and not atomic:
            self._check_repeats(addresses, np.broadcast_to(values.data, at.shape).ravel()[live], line)
        self.accesses.append(Access(self.program, self.stretch, line, tile, np.unique(addresses), size, writes, atomic))

    def _check_repeats(self, addresses: np.ndarray, values: np.ndarray, line: str) -> None:
        order = np.argsort(addresses, kind="stable")
        addresses, values = addresses[order], np.ascontiguousarray(values[order])
        content = values.view(np.uint8).reshape(len(values), -1)
        if ((addresses[1:] == addresses[:-1]) & (content[1:] != content[:-1]).any(1)).any():
            self.faults.append(f"{line}: one store writes different values to one address")

    def promise(self, handle: Any, name: str, values: Any) -> None:
        if name == "tt.divisibility" and handle.data.size and (handle.data.ravel()[:1] % values[0]).any():
            self.faults.append(f"{_line()}: {handle.data.ravel()[0]} is no multiple of {values[0]}")


def _line() -> str:
    """The kernel's line that the interpreter is at."""
    frame: Any = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(PACKAGES):
        frame = frame.f_back
    module = frame.f_globals.get("__name__", "").removeprefix("engine.kernels.")
    return f"{module}:{frame.f_lineno}"


def faults(accesses: list[Access]) -> list[str]:
    """What of one launch's accesses depends on the order of programs or threads."""
    written = [a for a in accesses if a.writes]
    if not written:
        return []
    # most loads are of inputs, which lie elsewhere
    low, high = min(a.addresses[0] for a in written), max(a.addresses[-1] + a.size for a in written)
    accesses = [a for a in accesses if a.addresses[-1] + a.size > low and a.addresses[0] < high]
    unit = min(a.size for a in accesses)
    cells = [_cells(a, unit) for a in accesses]
    number = np.repeat(np.arange(len(accesses)), [len(c) for c in cells])
    cell = np.concatenate(cells)
    among = np.isin(cell, np.concatenate([c for c, a in zip(cells, accesses, strict=True) if a.writes]))
    cell, number = cell[among], number[among]

    program, stretch, tile, writes, atomic = (
        np.array([getattr(a, name) for a in accesses])[number]
        for name in ("program", "stretch", "tile", "writes", "atomic")
    )
    found = []
    for bad in (
        _mixed((cell,), program, writes, ~atomic),
        _mixed((cell, stretch, program), tile, writes, ~atomic),
    ):
        if bad is not None:
            at = cell == bad[0]
            if len(bad) > 1:
                at &= (stretch == bad[1]) & (program == bad[2])
            found.append(_told([accesses[n] for n in np.unique(number[at])], len(bad) == 1))
    return found


def _cells(access: Access, unit: int) -> np.ndarray:
    """The addresses of all parts of `unit` bytes."""
    if access.size == unit:
        return access.addresses
    return (access.addresses[:, None] + np.arange(0, access.size, unit, dtype=np.uint64)).ravel()


def _mixed(key: tuple[np.ndarray, ...], value: np.ndarray, *needed: np.ndarray) -> tuple | None:
    """A key with more than one value, and with each of `needed` somewhere; or None."""
    order = np.lexsort(key[::-1])
    key = tuple(k[order] for k in key)
    new = np.concatenate([[True], np.logical_or.reduce([k[1:] != k[:-1] for k in key])])
    starts = np.flatnonzero(new)
    bad = np.minimum.reduceat(value[order], starts) != np.maximum.reduceat(value[order], starts)
    for condition in needed:
        bad &= np.logical_or.reduceat(condition[order], starts)
    first = np.flatnonzero(bad)
    return tuple(k[starts[first[0]]] for k in key) if len(first) else None


def _told(accesses: list[Access], programs: bool) -> str:
    what = sorted({f"{'written' if a.writes else 'read'} at {a.line}" for a in accesses})
    between = "between programs" if programs else "between threads of a program, no barrier between"
    return f"a race {between}: one address is {', '.join(what)}"


@contextmanager
def no_races() -> Iterator[None]:
    """See the module's text. Within it launches take about a tenth longer."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

    watches: list[_Watch] = []
    told: dict[str, None] = {}

    def watched(name: str, note: Any) -> Any:
        original = getattr(InterpreterBuilder, name)

        def call(self: Any, *args: Any) -> Any:
            if watches:
                note(watches[-1], *args)
            return original(self, *args)

        return mock.patch.object(InterpreterBuilder, name, call)

    run, promise = GridExecutor.__call__, TensorHandle.set_attr

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        watches.append(_Watch())
        try:
            run(self, *args, **kwargs)
            for fault in watches[-1].faults + faults(watches[-1].accesses):
                told[f"{self.fn.__name__}: {fault}"] = None
        finally:
            watches.pop()

    def set_attr(self: Any, name: str, values: Any) -> None:
        if watches:
            watches[-1].promise(self, name, values)
        promise(self, name, values)

    def barrier(watch: _Watch) -> None:
        watch.stretch += 1

    with (
        mock.patch.object(GridExecutor, "__call__", launch),
        mock.patch.object(TensorHandle, "set_attr", set_attr),
        watched("set_grid_idx", lambda watch, *index: watch.begin_program()),
        watched("create_barrier", barrier),
        watched("create_masked_load", lambda watch, at, mask, *rest: watch.note(at, mask, writes=False)),
        watched("create_masked_store", lambda watch, at, value, mask, *rest: watch.note(at, mask, True, values=value)),
        watched("create_atomic_rmw", lambda watch, op, at, value, mask, *rest: watch.note(at, mask, True, atomic=True)),
    ):
        yield
    assert not told, "\n".join(told)
