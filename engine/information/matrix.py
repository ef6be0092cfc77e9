"""The information of every pair of columns of a table."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.errors import EstimatorError
from engine.files import write_text
from engine.information.alone import alone
from engine.information.cmi import estimate_cmi
from engine.information.columns import FEW_VALUES
from engine.information.estimate import Estimate, new_figure, save_figure
from engine.information.mi import estimate_mi
from engine.samples import as_codes, as_numbers, check_index, columns_of, position, split

WHERE = "mi_matrix"
Blocks = Mapping[str, Sequence[str | int] | str | int]


@dataclass(frozen=True, eq=False)
class MIMatrix:
    """Information of every pair of d columns or blocks of columns, in nats.

    Attributes:
        names: of the d columns or blocks.
        values: [d, d] float64, symmetric. The diagonal is NaN: what a continuous column tells about itself is infinite.
        low, high: [d, d] float64, the ends of the intervals, as in `Estimate.interval`.
        estimates: {(name, name): Estimate} of each pair, in the order of `names`.
        given: names of the columns that the information is conditional on; empty for I(X;Y).

    An interval holds the truth of its own pair in 95 of 100 cases. With d(d-1)/2 pairs some miss it by chance, and the
    largest value of a matrix is too high on average.
    """

    names: list[str]
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    estimates: dict[tuple[str, str], Estimate] = field(repr=False)
    given: list[str] = field(default_factory=list)

    def flags(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """The flags of the pairs that have any."""
        return {pair: estimate.flags for pair, estimate in self.estimates.items() if estimate.flags}

    def to_frame(self) -> Any:
        """`values` as a pandas DataFrame; needs pandas."""
        try:
            import pandas
        except ImportError:
            raise EstimatorError(
                "MIMatrix.to_frame", "no pandas", "pandas to be installed", "Run pip install pandas."
            ) from None
        return pandas.DataFrame(self.values, index=self.names, columns=self.names)

    def to_dict(self) -> dict[str, Any]:
        """Names, values, ends of the intervals, flags, and what they are conditional on, ready for JSON."""

        def plain(matrix: np.ndarray) -> list[list[float | None]]:
            return [[None if math.isnan(v) else v for v in row] for row in matrix.tolist()]

        return {
            "names": self.names,
            "given": self.given,
            "values": plain(self.values),
            "low": plain(self.low),
            "high": plain(self.high),
            "flags": [{"pair": list(pair), "flags": list(flags)} for pair, flags in self.flags().items()],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The same as a JSON text, which is written to `path` if one is given.

        Raises:
            OutputError: the file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        if path is not None:
            write_text(path, text + "\n")
        return text

    def plot(self, path: str | Path) -> Path:
        """Draw the matrix as a heat map, with the values up to 20 columns; needs matplotlib.

        Args:
            path: of the picture; its ending chooses the format (.svg, .png, .pdf).

        Raises:
            EstimatorError: matplotlib is not installed.
            OutputError: the picture cannot be written.
        """
        count = len(self.names)
        figure, axes = new_figure("MIMatrix.plot", 0.5 * count + 2.5, 0.45 * count + 2)
        image = axes.imshow(self.values, vmin=0, cmap="viridis")
        figure.colorbar(image, ax=axes, label="nats")
        axes.set_xticks(range(count), self.names, rotation=90)
        axes.set_yticks(range(count), self.names)
        middle = np.nanmax(self.values, initial=0.0) / 2
        for i, j in combinations(range(count), 2) if count <= 20 else ():
            color = "white" if self.values[i, j] < middle else "black"
            for row, column in ((i, j), (j, i)):
                text = f"{self.values[i, j]:.2f}"
                axes.text(column, row, text, ha="center", va="center", color=color, fontsize=7)
        axes.set_title("I(row; column" + (f" | {', '.join(self.given)}" if self.given else "") + ")")
        return save_figure(figure, path)

    def __str__(self) -> str:
        wide = max(6, *map(len, self.names))
        rows = [" " * wide + "".join(f" {name:>{wide}}" for name in self.names)]
        for name, row in zip(self.names, self.values, strict=True):
            rows.append(f"{name:>{wide}}" + "".join(f" {'-' if math.isnan(v) else f'{v:.3f}':>{wide}}" for v in row))
        return "\n".join(rows)


@alone
def mi_matrix(
    frame: Any,
    *,
    columns: Blocks | Sequence[str | int] | None = None,
    given: str | int | Sequence[str | int] | None = None,
    discrete: str | bool | Sequence[str | int] = "auto",
    groups: Any = None,
    missing: str = "raise",
    seed: int = 0,
    **settings: Any,
) -> MIMatrix:
    """Estimate the information of every pair of columns of a table, in nats.

    Args:
        frame: [N, d], a DataFrame or an array. At least 50 rows.
        columns: which columns, by name or number, or blocks of columns by name: {"audio": ["pitch", "energy"]}. None
            for all columns but those of `given`.
        given: columns to be conditional on; each entry is then I(X;Y|Z) by `estimate_cmi`, which takes seconds a pair.
        discrete: "auto" reads columns of text, of pandas' categorical type and of at most 10 distinct values as
            categories. Or True, False, or the names or numbers of the columns.
        groups, missing: see `estimate_mi`. With missing="drop" each pair keeps all rows in which it is complete.
        seed: of every pair.
        settings: other settings of `estimate_mi`, or of `estimate_cmi` with `given`, such as `steps`.

    Returns:
        `MIMatrix`. Each entry is what `estimate_mi` gives for the pair. Pairs of single columns take hundredths of a
        second for 1,000 rows. Blocks of several columns train networks, which takes seconds a pair.

    Raises:
        EstimatorError: as `estimate_mi`; a column that is not there or is named twice; fewer than two columns or
            blocks.

    Example:
        >>> import numpy, engine
        >>> x, y, noise = numpy.random.default_rng(0).normal(size=(3, 500))
        >>> matrix = engine.mi_matrix(numpy.stack([x, y, x + noise], 1))
        >>> bool(matrix.values[0, 2] > 0.2 > matrix.values[0, 1])
        True
    """
    check_index(WHERE, [columns_of("frame", frame), columns_of("groups", groups)])
    known = inspect.signature(estimate_mi).parameters
    if given is None and (unknown := [name for name in settings if name not in known or name in ("x", "y")]):
        listed = [name for name in known if name not in ("x", "y")]
        raise EstimatorError(WHERE, f"the setting {unknown[0]!r}", f"one of {', '.join(listed)}", "Check its name.")
    table = _Table(frame, discrete)
    z = [] if given is None else table.numbers([given] if isinstance(given, (str, int)) else given)
    blocks = table.blocks(columns, z)
    names, count = list(blocks), len(blocks)
    used = [i for part in blocks.values() for i in part] + z
    if twice := {table.names[i] for i in used if used.count(i) > 1}:
        raise EstimatorError(
            WHERE,
            f"column {', '.join(sorted(twice))} twice among columns and given",
            "each column once",
            "Leave it out where it is not needed: what a column tells about itself is no question.",
        )
    if count < 2:
        raise EstimatorError(WHERE, f"{count} columns", "two columns or blocks, or more", "Name more columns.")
    values, low, high = (np.full((count, count), math.nan) for _ in range(3))
    estimates = {}
    options = {"groups": groups, "missing": missing, "seed": seed} | settings
    for i, j in combinations(range(count), 2):
        x, y = blocks[names[i]], blocks[names[j]]
        try:
            estimate = table.estimate({"x": x, "y": y} | ({"z": z} if z else {}), options)
        except EstimatorError as problem:
            where = f"{WHERE}, {names[i]} and {names[j]}"
            raise EstimatorError(where, problem.found, problem.expected, problem.do) from None
        estimates[names[i], names[j]] = estimate
        for at in ((i, j), (j, i)):
            values[at], (low[at], high[at]) = estimate.value, estimate.interval
    return MIMatrix(names, values, low, high, estimates, [table.names[i] for i in z])


class _Table:
    """Columns as float64 with NaN for missing entries, their names, and which of them are categories."""

    def __init__(self, frame: Any, discrete: str | bool | Sequence[str | int]):
        given = columns_of("frame", frame)
        parts = split(WHERE, given)
        if not parts:
            raise EstimatorError(WHERE, "a table without columns", "two columns or more", "Give a table with columns.")
        self.names = given.labels or [str(i) for i in range(len(parts))]
        self.labelled = given.labels is not None
        if len(set(self.names)) < len(self.names):
            raise EstimatorError(WHERE, "several columns of one name", "names that differ", "Rename columns.")
        chosen = set(given.categorical)
        if discrete is True:
            chosen = set(range(len(parts)))
        elif discrete == "auto":
            chosen |= {i for i, part in enumerate(parts) if _has_few_values(part)}
        elif discrete is not False:
            chosen |= set(self.numbers([discrete] if isinstance(discrete, (str, int)) else discrete))
        self.discrete = chosen
        read = [
            as_codes(WHERE, name, part) if i in chosen else as_numbers(WHERE, f"column {name}", part)[:, 0]
            for i, (name, part) in enumerate(zip(self.names, parts, strict=True))
        ]
        self.values = torch.stack(read, 1)

    def numbers(self, wanted: Sequence[str | int]) -> list[int]:
        """Numbers of columns that are named or numbered."""
        found: list[int] = []
        try:
            entries = list(wanted)
        except TypeError:
            raise EstimatorError(
                WHERE, f"{wanted!r} for columns"[:80], "names or numbers of columns", "Write a list of them."
            ) from None
        for entry in entries:
            if entry in self.names:
                found.append(self.names.index(str(entry)))
            elif (number := position(WHERE, entry, self.names, len(self.names))) is not None:
                found.append(number)
            else:
                known = ", ".join(self.names)
                raise EstimatorError(WHERE, f"column {entry!r}", f"one of {known}", "Name a column that is there.")
        return found

    def blocks(self, columns: Blocks | Sequence[str | int] | None, given: list[int]) -> dict[str, list[int]]:
        """{name: numbers of its columns} of what the matrix has rows for."""
        if columns is None:
            return {name: [i] for i, name in enumerate(self.names) if i not in given}
        if isinstance(columns, Mapping):
            return {
                str(name): self.numbers([part] if isinstance(part, (str, int)) else part)
                for name, part in columns.items()
            }
        return {self.names[i]: [i] for i in self.numbers(columns)}

    def estimate(self, sides: dict[str, list[int]], options: dict[str, Any]) -> Estimate:
        discrete = {name: [at for at, i in enumerate(part) if i in self.discrete] for name, part in sides.items()}
        samples = {name: self.values[:, part] for name, part in sides.items()}
        estimator = estimate_cmi if "z" in sides else estimate_mi
        return estimator(**samples, discrete=discrete, **options)


def _has_few_values(values: Any) -> bool:
    """Whether a column is text, or has so few distinct values that they are read as categories."""
    kind = getattr(getattr(values, "dtype", None), "kind", "O")
    codes = as_codes(WHERE, "frame", values)
    count = int(codes.nan_to_num(nan=-1).max()) + 1
    is_text = kind in "OUS" and not _is_number_column(values)
    return is_text or count <= FEW_VALUES


def _is_number_column(values: Any) -> bool:
    try:
        as_numbers(WHERE, "frame", values)
    except EstimatorError:
        return False
    return True
