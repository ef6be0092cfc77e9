"""What users hand to an estimate: columns, which of them are categories, groups of rows, and missing entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.samples import Columns, as_codes, as_numbers, check_finite, check_index, columns_of, position, split, width

LEAST_SAMPLES = 50
LEAST_GROUPS = 20
FEW_GROUPS = 40  # flagged
LEAST_PER_CATEGORY = 5  # rows, on average
MISSING = ("raise", "drop")

Discrete = bool | str | int | Sequence[str | int] | Mapping[str, Any] | None
"""Which columns are categories: names of columns or sides, numbers of columns by side, or all."""


@dataclass
class Side:
    """One argument as numbers.

    Attributes:
        values: [N, d] float64; categories are numbered from 0.
        discrete: [d] bool, the columns that are categories.
        labels: names of the columns; None where they have none.
    """

    values: Tensor
    discrete: Tensor
    labels: list[str] | None = None

    @property
    def width(self) -> int:
        return self.values.shape[1]

    @property
    def wholly_discrete(self) -> bool:
        return bool(self.discrete.all())


def varying_columns(side: Side) -> Side:
    """Without the columns that are constant."""
    kept = (side.values != side.values[:1]).any(0)
    labels = None if side.labels is None else [label for label, keep in zip(side.labels, kept, strict=True) if keep]
    return Side(side.values[:, kept], side.discrete[kept], labels)


@dataclass
class Arguments:
    """All arguments of an estimate.

    Attributes:
        sides: by name, such as "x" and "y".
        group: [N] int64, the group of each row, from 0 without gaps; None without groups.
        dropped: rows left out because an entry was missing.
    """

    sides: dict[str, Side]
    group: Tensor | None
    dropped: int

    @property
    def groups(self) -> int | None:
        return None if self.group is None else int(self.group.max()) + 1


def read_inputs(
    where: str, arguments: dict[str, Any], discrete: Discrete, groups: Any, missing: str, true_means: Sequence[str]
) -> Arguments:
    """Convert and check the arguments of an estimate.

    Args:
        where: the caller, for errors.
        arguments: by name; row i of all is one sample.
        discrete: see `estimate_mi`.
        groups: [N], names or numbers of groups; None for rows that are independent.
        missing: "raise" or "drop".
        true_means: the sides of which all columns are categories with `discrete=True`.
    """
    if missing not in MISSING:
        raise EstimatorError(where, f"missing {missing!r}", f"one of {', '.join(MISSING)}", "Choose one of these.")
    looked = {name: columns_of(name, values) for name, values in arguments.items()}
    check_index(where, [*looked.values(), columns_of("groups", groups)])
    chosen = _chosen(where, looked, discrete, true_means)
    sides = {name: _side(where, columns, chosen[name]) for name, columns in looked.items()}
    _check_rows(where, {name: len(side.values) for name, side in sides.items()})
    group = None if groups is None else _groups(where, groups, len(next(iter(sides.values())).values))

    dropped = 0
    if missing == "drop":
        kept = ~torch.stack([side.values.isnan().any(1) for side in sides.values()]).any(0)
        if group is not None:
            kept &= ~group.isnan()
        dropped = int((~kept).sum())
        if dropped:
            for side in sides.values():
                side.values = side.values[kept]
            group = None if group is None else group[kept]
    for name, side in sides.items():
        check_finite(where, name, side.values, side.labels)
    _check_count(where, len(next(iter(sides.values())).values), dropped)
    for side in sides.values():  # a value that was dropped leaves no gap
        for column in side.discrete.nonzero()[:, 0].tolist():
            side.values[:, column] = side.values[:, column].unique(return_inverse=True)[1].double()
    for name, side in sides.items():
        _check_categories(where, name, side)
    return Arguments(sides, None if group is None else _numbered_groups(where, group), dropped)


def generator_of(where: str, seed: Any) -> torch.Generator:
    """A generator with a seed.

    Raises:
        EstimatorError: the seed is no integer of 64 bits.
    """
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63:
        raise EstimatorError(where, f"seed = {seed!r}", "an integer below 2**63", "Change seed.")
    return torch.Generator().manual_seed(int(seed))


def _check_rows(where: str, rows: dict[str, int]) -> None:
    if len(set(rows.values())) == 1:
        return
    names = list(rows)
    if len(names) == 2:
        found = f"{rows[names[0]]} rows of {names[0]} and {rows[names[1]]} of {names[1]}"
        raise EstimatorError(where, found, "as many of both", "Pair the samples up.")
    counts = ", ".join(str(rows[name]) for name in names[:-1]) + f" and {rows[names[-1]]}"
    raise EstimatorError(
        where, f"{counts} rows of {', '.join(names)}", "as many of each", "Give rows of the same samples."
    )


def _check_count(where: str, rows: int, dropped: int) -> None:
    if rows < LEAST_SAMPLES:
        left = f" after {dropped} with missing entries were dropped" if dropped else ""
        raise EstimatorError(where, f"{rows} samples{left}", f"at least {LEAST_SAMPLES}", "Give more samples.")


def _check_categories(where: str, name: str, side: Side) -> None:
    """Refuse categories of so few rows that they are names of rows."""
    for column in side.discrete.nonzero()[:, 0].tolist():
        count = int(side.values[:, column].max()) + 1
        if count > len(side.values) / LEAST_PER_CATEGORY:
            label = repr(side.labels[column]) if side.labels else column
            raise EstimatorError(
                where,
                f"a discrete {name} of {count} categories in {len(side.values)} rows, column {label}",
                f"{LEAST_PER_CATEGORY} rows per category or more",
                "Merge categories, or leave the column out of discrete.",
            )


# -- categories -------------------------------------------------------------------------------------------------------


def _side(where: str, columns: Columns, discrete: set[int]) -> Side:
    if not discrete:
        try:
            values = as_numbers(where, columns.name, columns.given)
        except EstimatorError:
            for i, column in enumerate(columns.columns or []):  # one of them is named, if it is to blame
                as_numbers(where, f"column {columns.column_name(i)} of {columns.name}", column)
            raise
        return Side(values, torch.zeros(values.shape[1], dtype=torch.bool), columns.labels)
    parts = []
    for i, column in enumerate(split(where, columns)):
        name = f"column {columns.column_name(i)} of {columns.name}"
        parts.append(as_codes(where, name, column) if i in discrete else as_numbers(where, name, column)[:, 0])
    return Side(torch.stack(parts, 1), torch.tensor([i in discrete for i in range(len(parts))]), columns.labels)


def _chosen(
    where: str, looked: dict[str, Columns], discrete: Discrete, true_means: Sequence[str]
) -> dict[str, set[int]]:
    """Numbers of the columns that are categories, for each side. Those whose type says so always are."""
    chosen = {name: set(columns.categorical) for name, columns in looked.items()}
    if isinstance(discrete, bool) or discrete is None:
        for name in true_means if discrete else ():
            chosen[name] = set(range(width(where, looked[name])))
    elif isinstance(discrete, Mapping):
        for name, wanted in discrete.items():
            if name not in looked:
                raise _unknown(where, f"discrete names {name!r}", looked)
            chosen[name] |= _of_side(where, looked[name], wanted)
    else:
        for entry in _entries(where, discrete):
            for name, numbers in _by_name(where, looked, entry).items():
                chosen[name] |= numbers
    return chosen


def _of_side(where: str, columns: Columns, wanted: Any) -> set[int]:
    count = width(where, columns)
    if isinstance(wanted, bool):
        return set(range(count)) if wanted else set()
    numbers = set()
    for entry in _entries(where, wanted):
        if isinstance(entry, str) and columns.labels and entry in columns.labels:
            numbers |= {i for i, label in enumerate(columns.labels) if label == entry}
        elif (number := position(where, entry, columns.labels, count)) is not None:
            numbers.add(number)
        else:
            known = ", ".join(map(repr, columns.labels)) if columns.labels else f"0 to {count - 1}"
            raise EstimatorError(
                where, f"discrete column {entry!r} of {columns.name}", f"one of {known}", "Name a column that is there."
            )
    return numbers


def _entries(where: str, wanted: Any) -> list[Any]:
    if isinstance(wanted, (str, Integral)):
        return [wanted]
    try:
        return list(wanted)
    except TypeError:
        raise EstimatorError(
            where, f"discrete {wanted!r}", "names or numbers of columns", 'Write discrete=["job"] or {"x": [0]}.'
        ) from None


def _by_name(where: str, looked: dict[str, Columns], entry: Any) -> dict[str, set[int]]:
    """The columns of a name, on whatever side, or all columns of the side of that name."""
    if not isinstance(entry, str):
        raise EstimatorError(
            where,
            f"discrete {entry!r}",
            "names of columns or sides; numbers with their side",
            f'Write discrete={{"{next(iter(looked))}": [{entry!r}]}}.',
        )
    found = {
        name: {i for i, label in enumerate(columns.labels or []) if label == entry} for name, columns in looked.items()
    }
    found = {name: numbers for name, numbers in found.items() if numbers}
    if entry in looked:
        whole = set(range(width(where, looked[entry])))
        if found and found != {entry: whole}:
            raise EstimatorError(
                where,
                f"discrete {entry!r}, which is a side and a column of {', '.join(found)}",
                "one meaning",
                f'Write discrete={{"{entry}": True}} for the side, or {{"{next(iter(found))}": ["{entry}"]}}.',
            )
        return {entry: whole}
    if not found:
        raise _unknown(where, f"discrete column {entry!r}", looked)
    return found


def _unknown(where: str, found: str, looked: dict[str, Columns]) -> EstimatorError:
    labels = [label for columns in looked.values() for label in columns.labels or []]
    known = ", ".join([*looked, *map(repr, dict.fromkeys(labels))])
    return EstimatorError(where, found, f"one of {known}", "Name a column or a side that is there.")


# -- groups -----------------------------------------------------------------------------------------------------------


def _groups(where: str, groups: Any, rows: int) -> Tensor:
    columns = split(where, columns_of("groups", groups))
    if len(columns) != 1 or len(columns[0]) != rows:
        raise EstimatorError(
            where,
            f"groups of {len(columns[0])} rows and {len(columns)} columns",
            f"one entry for each of {rows} rows",
            "Give the subject or recording of each row.",
        )
    return as_codes(where, "groups", columns[0])


def _numbered_groups(where: str, group: Tensor) -> Tensor:
    if missing := int(group.isnan().sum()):
        first = int(group.isnan().nonzero()[0, 0])
        raise EstimatorError(
            where,
            f"{missing} rows without a group, the first in row {first}",
            "a group for each row",
            'Name their groups; missing="drop" leaves these rows out.',
        )
    number = group.unique(return_inverse=True)[1]
    count = int(number.max()) + 1
    if count < LEAST_GROUPS:
        raise EstimatorError(
            where,
            f"{count} groups",
            f"at least {LEAST_GROUPS}, as only groups are independent",
            "Give rows of more groups.",
        )
    return number
