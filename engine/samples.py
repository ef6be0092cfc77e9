"""Samples of users (arrays, data frames, tensors, lists) as tensors. Data that cannot be read safely is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import EstimatorError

EXACT_INTEGERS = 2**53  # from which float64 leaves out integers
LEAST_SHARED_LABELS = 2  # rows of an index from which its order is compared


@dataclass
class Columns:
    """Columns as users gave them, before anything is converted.

    Attributes:
        name: of the argument, for errors.
        given: the argument.
        labels: names of the columns; None where they have none.
        columns: what each column holds; None where the argument is one block of numbers.
        categorical: numbers of the columns whose type says that they are categories.
        index: labels of the rows of a data frame or series; None for everything else.
    """

    name: str
    given: Any
    labels: list[str] | None = None
    columns: list[Any] | None = None
    categorical: tuple[int, ...] = ()
    index: Any = None

    def column_name(self, column: int) -> str:
        return repr(self.labels[column]) if self.labels else str(column)


def as_samples(where: str, name: str, values: Any) -> Tensor:
    """Rows of samples as a new float64 tensor [N, d] on the CPU, d >= 1.

    float32 would lose the differences between values that lie far from 0.

    Args:
        where: the caller, for errors.
        name: of the argument, for errors.
        values: [N, d] or [N] of numbers: an array of any byte order and strides, a DataFrame or Series (rows by
            position, whatever their index), a tensor on any device, or sequences of numbers.

    Raises:
        EstimatorError: text, dates, complex numbers or other objects, other shapes, entries that are missing or not
            finite.

    Example:
        >>> as_samples("estimate_mi", "x", [1, 2, 3]).shape
        torch.Size([3, 1])
    """
    samples = as_numbers(where, name, values)
    check_finite(where, name, samples)
    return samples


def as_numbers(where: str, name: str, values: Any) -> Tensor:
    """The same as `as_samples`, where entries may be missing (NaN) or infinite."""
    samples = torch.from_numpy(_numbers(where, name, values))
    samples = samples[:, None] if samples.dim() == 1 else samples
    if samples.dim() != 2 or samples.shape[1] == 0:
        raise EstimatorError(
            where, f"{name} {list(samples.shape)}", "[N, d] or [N], d >= 1", "Flatten what is not the sample."
        )
    return samples


def check_finite(where: str, name: str, samples: Tensor, labels: Sequence[str] | None = None) -> None:
    """Refuse entries that are missing or infinite, and name the first one's row and column, both from 0."""
    wrong = (~samples.isfinite()).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        label = repr(labels[column]) if labels else column
        raise EstimatorError(
            where,
            f"{len(wrong)} non-finite entries in {name}, the first ({samples[row, column].item()}) in row {row}, "
            f"column {label}",
            "finite samples",
            'Remove or replace them; missing="drop" leaves out rows with missing entries.',
        )


def columns_of(name: str, values: Any) -> Columns:
    """Look at an argument without converting it."""
    if _is_pandas(values):
        if hasattr(values, "columns"):
            columns = [values.iloc[:, i] for i in range(values.shape[1])]
            labels = [str(label) for label in values.columns]
        else:
            columns, labels = [values], None if values.name is None else [str(values.name)]
        categorical = tuple(i for i, column in enumerate(columns) if str(column.dtype) == "category")
        return Columns(name, values, labels, columns, categorical, values.index)
    labels = getattr(values, "columns", None)  # data frames of other libraries
    if isinstance(labels, (list, tuple)) and hasattr(values, "__array__"):
        array = np.asarray(values)
        if array.ndim == 2 and array.shape[1] == len(labels):
            return Columns(name, array, [str(label) for label in labels])
    return Columns(name, values)


def width(where: str, columns: Columns) -> int:
    """The number of columns."""
    if columns.columns is not None:
        return len(columns.columns)
    array = _object_array(where, columns.name, columns.given)
    return 1 if array.ndim == 1 else array.shape[1] if array.ndim == 2 else 0


def position(where: str, entry: Any, labels: Sequence[str] | None, count: int) -> int | None:
    """The number of the column that an integer names, by the column's name or by its number.

    Returns:
        From 0; None if there is no such column, or if the entry is no integer.

    Raises:
        EstimatorError: the integer is the name of one column and the number of another.

    Example:
        >>> position("estimate_mi", -1, ["a", "b"], 2), position("estimate_mi", 10, ["10", "20"], 2)
        (1, 0)
    """
    if not isinstance(entry, Integral) or isinstance(entry, bool):
        return None
    number = int(entry) % count if -count <= entry < count else None
    if not labels or str(entry) not in labels:
        return number
    named = labels.index(str(entry))
    if number not in (None, named):
        raise EstimatorError(
            where,
            f"column {entry}, the name of one column and the number of another",
            "one meaning",
            f'Write "{entry}" for the name.',
        )
    return named


def split(where: str, columns: Columns) -> list[Any]:
    """Each column by itself."""
    if columns.columns is not None:
        return columns.columns
    array = _object_array(where, columns.name, columns.given)
    if array.ndim not in (1, 2) or 0 in array.shape:
        raise EstimatorError(
            where, f"{columns.name} {list(array.shape)}", "[N, d] or [N], d >= 1", "Flatten what is not the sample."
        )
    return [array] if array.ndim == 1 else [array[:, i] for i in range(array.shape[1])]


def as_codes(where: str, name: str, values: Any) -> Tensor:
    """The number of each entry's value, [N] float64 from 0 in sorted order; NaN where an entry is missing.

    Args:
        values: numbers, text, or other objects that can be compared or written out, [N].

    Example:
        >>> as_codes("estimate_mi", "y", ["sad", "glad", None, "sad"])
        tensor([1., 0., nan, 1.], dtype=torch.float64)
    """
    entries = [_entry(entry) for entry in _object_array(where, name, values).ravel().tolist()]
    distinct = {entry for entry in entries if entry is not None}
    try:
        ordered = sorted(distinct)
    except TypeError:
        ordered = sorted(distinct, key=lambda entry: (type(entry).__name__, str(entry)))
    number = {entry: float(i) for i, entry in enumerate(ordered)}
    return torch.tensor([number.get(entry, float("nan")) for entry in entries], dtype=torch.float64)


def _entry(entry: Any) -> Any:
    """None where an entry is missing: None, NaN, NaT, pandas' NA."""
    if entry is None or type(entry).__name__ in ("NAType", "NaTType", "MaskedConstant"):
        return None
    try:
        if entry != entry:
            return None
        hash(entry)
    except (TypeError, ValueError):
        return str(entry)
    return entry


def _object_array(where: str, name: str, values: Any) -> np.ndarray:
    """The entries as they are; for lists of text and numbers an array of objects."""
    if isinstance(values, Tensor):
        return _array(where, name, values)
    if _is_sparse(values):
        raise _no_numbers(where, name, type(values).__name__)
    if isinstance(values, np.ma.MaskedArray):
        return values.astype(object).filled(None)
    if isinstance(values, (list, tuple)):
        values = [_array(where, name, v) if isinstance(v, Tensor) else v for v in values]
        try:
            return np.asarray(values, dtype=object)
        except ValueError as error:
            raise _no_numbers(where, name, f"{type(values).__name__} ({error})") from None
    return np.asarray(values)


def check_index(where: str, arguments: Sequence[Columns]) -> None:
    """Refuse data frames whose rows have the same labels in another order: paired by position, they would be mixed up.

    Indexes that hold other labels are no objection. Rows pair by position.
    """
    indexed = [columns for columns in arguments if columns.index is not None]
    for first, second in combinations(indexed, 2):
        a, b = first.index.tolist(), second.index.tolist()
        if len(a) != len(b) or len(a) < LEAST_SHARED_LABELS or a == b or set(a) != set(b):
            continue
        row = next(i for i, (left, right) in enumerate(zip(a, b, strict=True)) if left != right)
        raise EstimatorError(
            where,
            f"an index of {first.name} and of {second.name} with the same labels in another order (row {row}: "
            f"{a[row]!r} and {b[row]!r})",
            "rows in one order, as they are paired by position",
            f"Pass {second.name}.loc[{first.name}.index], or arrays (.to_numpy()) if the positions are right.",
        )


def _is_pandas(values: Any) -> bool:
    return hasattr(values, "iloc") and hasattr(values, "index")


def _is_sparse(values: Any) -> bool:
    """Sparse matrices of SciPy and its like, sparse tensors."""
    if isinstance(values, Tensor):
        return values.layout != torch.strided
    return hasattr(values, "tocsr") or hasattr(values, "todense")


def _numbers(where: str, name: str, values: Any) -> np.ndarray:
    """A new float64 array of the numbers in `values`."""
    if isinstance(values, (list, tuple)) and any(isinstance(v, Tensor) for v in values):
        values = [_array(where, name, v) if isinstance(v, Tensor) else v for v in values]
    if isinstance(values, Tensor):
        values = _array(where, name, values)
    if _is_sparse(values):
        raise _no_numbers(where, name, type(values).__name__)
    try:
        if isinstance(values, np.ma.MaskedArray):
            values = values.astype(np.float64).filled(np.nan)
        array = np.asarray(values)
        if array.dtype.kind == "O":  # such as a data frame's columns of several types, or with missing entries
            texts = [v for v in array.ravel() if isinstance(v, (str, bytes))]
            array = array if texts or array.ndim == 0 else _without_na(array).astype(np.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _no_numbers(where, name, f"{type(values).__name__} ({error})") from None
    if array.dtype.kind == "O" and array.ndim == 0:
        raise _no_numbers(where, name, type(values).__name__)
    if array.dtype.kind not in "biuf":
        raise _no_numbers(where, name, f"{type(values).__name__} with entries of type {array.dtype}")
    numbers = np.array(array, dtype=np.float64, order="C")
    large = array.dtype.kind in "iu" and array.size and np.abs(numbers).max() >= EXACT_INTEGERS
    if large and len(np.unique(numbers)) < len(np.unique(array)):
        raise EstimatorError(
            where,
            f"{name} with integers of 2**53 or more that float64 cannot tell apart",
            "numbers that stay different in float64",
            "Subtract an offset first, or name columns of categories in discrete=.",
        )
    return numbers


def _without_na(array: np.ndarray) -> np.ndarray:
    """NaN for pandas' NA, which cannot be converted."""
    if any(type(v).__name__ == "NAType" for v in array.ravel()):
        array = np.where(np.vectorize(lambda v: type(v).__name__ == "NAType", otypes=[bool])(array), np.nan, array)
    return array


def _array(where: str, name: str, tensor: Tensor) -> np.ndarray:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex():
        raise _no_numbers(where, name, f"a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device}")
    return tensor.detach().to("cpu", torch.float64).numpy()


def _no_numbers(where: str, name: str, given: str) -> EstimatorError:
    do = "Number categories; convert text first."
    if "sparse" in given or given.startswith(("csr", "csc", "coo", "dia_", "bsr", "lil", "dok")):
        do = "Make it dense with .toarray() or .to_dense(), or take fewer columns."
    elif "datetime" in given or "timedelta" in given or "Timestamp" in given:
        do = "Turn dates into numbers first, such as days since a start."
    elif "entries of type <U" in given or "entries of type |S" in given or "type object" in given:
        do = "Name columns of text or categories in discrete=, or turn them into numbers."
    return EstimatorError(where, f"{name}: {given}", "an array of real numbers, [N, d] or [N]", do)
