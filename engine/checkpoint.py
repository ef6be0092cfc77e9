"""Checkpoints: safetensors for the tensors, JSON for everything else, no pickle.

A state is a tree of dicts, lists and tuples whose leaves are tensors, NumPy arrays, numbers, strings, booleans and
None: what `state_dict()` of modules, optimisers and schedulers, `torch.get_rng_state()` and `numpy.random.get_state()`
return. The tree comes back as it was: dtypes, the types of keys (an optimiser's state is keyed by int) and non-finite
floats included.
The file is one safetensors file, readable by any other tool; tensor names are the path of keys joined by `/`.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.errors import CheckpointError
from engine.files import atomic_file, parse_json, user_path

FORMAT = "engine-checkpoint"
VERSION = 1
TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64", torch.uint32: "U32",
    torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL", torch.complex64: "C64",
}  # fmt: skip
"""dtype -> its name in a safetensors file."""
DAMAGED = "The file is damaged: use a copy of it."
HEADER_BYTES = 1 << 25
"""Bytes that the header of a checkpoint may have; that of a large model has 1e6."""

_DAMAGE = (KeyError, ValueError, TypeError, IndexError, AttributeError, OverflowError, RecursionError, RuntimeError)


def save(
    path: str | Path, state: dict[Any, Any], meta: dict[str, Any] | None = None, previous: Path | None = None
) -> None:
    """Write a checkpoint atomically: after any failure the file that was there before is still whole.

    Args:
        path: file to write; by convention `*.safetensors`.
        state: tree of dicts, lists and tuples with tensors and plain values as leaves. Tensors are saved from
            any device, in their own dtype. Tensors that share memory are each written in full.
        meta: what describes the checkpoint (epoch, widths, …): plain values that JSON holds.
        previous: where to move the checkpoint that was at `path`; None: it is removed.

    Raises:
        OutputError: the folder cannot be written to, or the disk is full.
        TypeError: the tree holds something else. That is a programming error, so it is no `EngineError`.
    """
    Snapshot(state, copies=False).save(path, meta, previous)


class Snapshot:
    """A checkpoint's state, on the CPU and ready to be written.

    Args:
        state: as of the function `save`.
        copies: whether to copy the tensors, so that training can go on while another thread writes.
    """

    def __init__(self, state: dict[Any, Any], copies: bool = True):
        encoder = _Encoder(copies)
        self.tree, self.tensors = json.dumps(encoder.tree(state)), encoder.tensors

    def save(self, path: str | Path, meta: dict[str, Any] | None = None, previous: Path | None = None) -> None:
        """Write it to a file, as the function `save` does."""
        about = json.dumps(meta or {})
        header = {
            "format": FORMAT,
            "version": str(VERSION),
            "state": self.tree,
            "meta": about,
            "checksum": _checksum(self.tree, about, self.tensors),
        }
        write_tensors(path, self.tensors, header, previous)


def write_tensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str], previous: Path | None = None
) -> None:
    """Write tensors on the CPU as a safetensors file, atomically.

    safetensors would write a temporary file of its own, which stays behind if the process is killed.

    Args:
        previous: as in `save`.

    Raises:
        OutputError: the folder cannot be written to, or the disk is full.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    order, end = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)), 0  # each aligned to its size
    for name in order:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": TYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path, previous) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(_bytes(tensors[name]))


def _bytes(tensor: Tensor) -> memoryview | bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""


def load(path: str | Path) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Read a checkpoint written by `save`: `(state, meta)`. Tensors are on the CPU, independent of the file.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, of another format, or of another format version.
    """
    path = user_path(path)
    header, tensors = _read(path)
    try:
        intact = header["checksum"] == _checksum(header["state"], header["meta"], tensors)
        state, meta = _decode(parse_json(header["state"]), tensors), parse_json(header["meta"])
        intact = intact and isinstance(state, dict) and isinstance(meta, dict)
    except _DAMAGE:
        intact = False
    if not intact:
        raise CheckpointError(
            str(path),
            "contents that do not match their checksum",
            "the bytes that were written",
            DAMAGED,
        )
    return state, meta


def load_meta(path: str | Path) -> dict[str, Any]:
    """Only the `meta` of a checkpoint, without its tensors, and so without comparing its checksum.

    Raises:
        CheckpointError: as `load`, as far as the file's header tells.
    """
    header, _ = _read(user_path(path), tensors=False)
    damaged = CheckpointError(
        str(path), "a damaged header", "the bytes that were written", "Use another copy of the file."
    )
    try:
        meta = parse_json(header["meta"])
    except (KeyError, ValueError) as cause:
        raise damaged from cause
    if not isinstance(meta, dict):
        raise damaged
    return meta


def _read(path: Path, tensors: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    """A file's metadata and, if asked for, its tensors."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(
            str(path),
            "a folder" if path.is_dir() else "neither a file nor a folder" if path.exists() else "no such file",
            "a checkpoint file",
            "Name a checkpoint such as RUN/best.safetensors.",
        )
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if HEADER_BYTES < length <= path.stat().st_size:
            raise CheckpointError(
                str(path), f"a header of {length} bytes", f"at most {HEADER_BYTES}",
                "Name best.safetensors or last.safetensors of a run folder.",
            )  # fmt: skip
        with safe_open(path, framework="pt", device="cpu") as opened:
            header = opened.metadata() or {}
            _check_format(path, header)
            # A clone leaves the file's memory map: later writes to the file cannot reach the tensors.
            return header, {name: opened.get_tensor(name).clone() for name in opened.keys() if tensors}
    except SafetensorError as cause:
        raise _unreadable(path, cause) from cause
    except OSError as cause:
        raise CheckpointError(
            str(path), cause.strerror or str(cause), "a readable file", "Check the file and its permissions."
        ) from cause


@contextlib.contextmanager
def taken_apart(where: str) -> Iterator[None]:
    """Around code that reads a state: one of another form is a `CheckpointError`."""
    try:
        yield
    except _DAMAGE as cause:
        raise CheckpointError(
            where, f"a state of another form ({type(cause).__name__}: {cause})", "what engine train writes",
            "Use the file as it was written.",
        ) from cause  # fmt: skip


def load_into(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load a state dict into a module, every name and shape matching; values take the module's dtype and device.

    An objective's state may also name the tensors of single estimators, as `Objective.estimator_state` and older
    checkpoints do.

    Args:
        where: how the user would name the source, for the error's first words.

    Raises:
        CheckpointError: names the first missing, unexpected or misshapen parameter, and how many there are.
    """
    module.load_state_dict(compare(module, state, where))


def compare(module: nn.Module, state: Any, where: str) -> dict[str, Tensor]:
    """`state` if `load_into` could load it; the module's own tensors may be on the meta device, which has no memory.

    Raises:
        CheckpointError: as `load_into`.
    """
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) and not v.is_complex() for v in state.values()):
        raise CheckpointError(
            where, "something else than a state", "real tensors by name", "Use a checkpoint as it was written."
        )
    own = module.state_dict()
    by_estimator = module.estimator_state() if hasattr(module, "estimator_state") else own
    if any(name in by_estimator and name not in own for name in state):
        own = by_estimator
    problems = [
        ([name for name in own if name not in state], "no parameter {name}", "a parameter of shape {own}"),
        ([name for name in state if name not in own], "a parameter {name} that the model does not have", "none"),
        (
            [name for name in own if name in state and own[name].shape != state[name].shape],
            "{name} of shape {found}",
            "shape {own}",
        ),
    ]
    for names, found, expected in problems:
        if names:
            name = names[0]
            facts = {
                "name": name,
                "own": list(own[name].shape) if name in own else None,
                "found": list(state[name].shape) if name in state else None,
            }
            more = f" ({len(names) - 1} more like it)" if len(names) > 1 else ""
            raise CheckpointError(
                where,
                found.format(**facts) + more,
                expected.format(**facts),
                "Use the config that the checkpoint was trained with.",
            )
    return state


class _Encoder:
    """Takes the tensors out of a tree: `tree(state)` is JSON-able, `tensors` holds what it refers to by name."""

    def __init__(self, copies: bool = False) -> None:
        self.copies = copies
        self.tensors: dict[str, Tensor] = {}

    def tree(self, value: Any, path: tuple[str, ...] = ()) -> Any:
        """A plain value stands for itself, anything else becomes `{kind: content}`."""
        if isinstance(value, Tensor):
            return {"tensor": self._add(value, path)}
        if isinstance(value, np.ndarray):
            return {"array": self._add(torch.from_numpy(np.array(value)), path)}
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": repr(float(value))}
        if isinstance(value, (list, tuple)):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [self.tree(item, (*path, str(i))) for i, item in enumerate(value)]}
        if isinstance(value, dict):
            if not all(isinstance(key, (str, int)) for key in value):
                raise TypeError(f"{'/'.join(path)}: keys of a checkpoint's dicts are str or int")
            kind = "counter" if isinstance(value, Counter) else "dict"  # MultiStepLR keeps its milestones in a Counter
            return {kind: [[key, self.tree(item, (*path, str(key)))] for key, item in value.items()]}
        raise TypeError(f"{'/'.join(path)}: a checkpoint cannot hold a {type(value).__name__}")

    def _add(self, tensor: Tensor, path: tuple[str, ...]) -> str:
        name = "/".join(path)
        while name in self.tensors:  # keys may themselves hold a "/"
            name += "'"
        saved = tensor.detach().cpu().contiguous()
        if self.copies and saved.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
            saved = saved.clone()
        self.tensors[name] = saved
        return name


def _decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "float":
        return float(content)
    if kind in ("dict", "counter"):
        pairs = {key: _decode(item, tensors) for key, item in content}
        return Counter(pairs) if kind == "counter" else pairs
    items = [_decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _checksum(tree: str, about: str, tensors: dict[str, Tensor]) -> str:
    """CRC-32 over everything that `load` returns: safetensors itself notices missing bytes, not changed ones."""
    crc = zlib.crc32(about.encode(), zlib.crc32(tree.encode()))
    for name in sorted(tensors):
        crc = zlib.crc32(_bytes(tensors[name]), crc)
    return f"{crc:08x}"


def _check_format(path: Path, header: dict[str, str]) -> None:
    if header.get("format") != FORMAT:
        raise CheckpointError(
            str(path),
            "a safetensors file that is not a checkpoint of this project",
            f"metadata format={FORMAT}",
            "Name best.safetensors or last.safetensors of a run folder.",
        )
    if header.get("version") != str(VERSION):
        raise CheckpointError(
            str(path),
            f"checkpoint format version {header.get('version')}",
            f"version {VERSION}",
            "Read it with the version of engine that wrote it, or upgrade engine.",
        )


def _unreadable(path: Path, cause: Exception) -> CheckpointError:
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):
        found, do = "a PyTorch pickle", "If it comes from the reference code, convert it with `engine import`."
    elif "header" in str(cause) and "not fully covered" not in str(cause):
        found, do = "a file that is not safetensors, or one cut off in its header", "Name a checkpoint of a run folder."
    else:
        found, do = (
            "a file of another length than its header tells (truncated)",
            DAMAGED,
        )
    return CheckpointError(str(path), found, "a complete safetensors checkpoint", do)
