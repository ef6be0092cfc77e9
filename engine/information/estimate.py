"""The result of an estimate: a value, an interval, and reasons to doubt them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.files import atomic_path, write_text

SIGMAS = 1.96  # standard errors from an estimate to the ends of its interval

ADVICE = {
    "saturated": "The estimate is near what this many samples can show. Believe 'at least', or give more samples.",
    "not converged": "The critic was still improving when training ended. Raise steps.",
    "overfitted": "The critic misses what many columns share on few rows. Give more rows or fewer columns.",
    "heavy tails": "Some columns have extreme values. They were read by rank; check that they are no mistakes.",
    "repeated rows": "Rows occur more than once, so held-out rows are not new. Pass their groups, or remove copies.",
    "discrete columns": "Some columns have few distinct values. Ranks of ties carry less than categories do.",
    "constant columns": "Some columns never change. They carry no information and were left out.",
    "below zero": "The raw reading was negative. Information is not, so 0 is given; the readings keep the raw number.",
    "few groups": "Fewer than 40 groups are independent. The interval rests on little; give more groups if you can.",
    "rare categories": "Some categories have fewer than 5 rows. They were read as one category.",
    "noise": "The estimate is no larger than what shuffled samples give. Treat it as 0.",
}


@dataclass(frozen=True, eq=False)
class Estimate(Mapping[str, Any]):
    """An estimate of information in nats. `float(estimate)` is its value; `estimate["value"]` works as well.

    Attributes:
        value: the estimate, nats, never negative.
        interval: (low, high) in nats. It is meant to contain the truth in 95 of 100 cases. Both ends allow for the
            sampling error, and the upper end also for what the critic may have failed to learn.
        standard_error: sampling error of the value alone, nats.
        method: the method that made the value, such as "gaussian" or "gaussian + separate network".
        readings: other readings, such as on training rows or by the Gaussian alone, nats. They are not clipped and may
            be negative.
        flags: reasons to doubt the value, each a key of `ADVICE`.
        ceiling: the most that the method can read with this many rows, nats; None where there is no such limit.
        samples: number of rows.
        pointwise: [samples] float64, the contribution of each row, from a critic that has not seen it; None where the
            method has none. Its mean is the held-out reading before any correction.
        history: one record per check of the training: {"step", "training", "held_out", ...} in nats. It is empty for
            methods that train nothing.
        dropped: rows that were left out because an entry was missing.
        groups: number of groups of rows; None where rows were independent.

    Example:
        >>> import numpy, engine
        >>> x, noise = numpy.random.default_rng(0).normal(size=(2, 500))
        >>> estimate = engine.estimate_mi(x, x + noise)
        >>> estimate.method, estimate.flags, estimate.interval[0] < float(estimate) < estimate.interval[1]
        ('neighbours', (), True)
    """

    value: float
    interval: tuple[float, float]
    standard_error: float
    method: str
    readings: dict[str, float]
    samples: int
    flags: tuple[str, ...] = ()
    ceiling: float | None = None
    pointwise: Tensor | None = field(default=None, repr=False)
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)
    dropped: int = 0
    groups: int | None = None

    @property
    def advice(self) -> list[str]:
        """One line for each flag."""
        return [f"{flag}: {ADVICE.get(flag, 'a flag of another version')}" for flag in self.flags]

    def to_dict(self) -> dict[str, Any]:
        """All fields except the pointwise values, ready for JSON."""
        return {name: _plain(getattr(self, name)) for name in _FIELDS} | {"advice": self.advice}

    def to_json(self, path: str | Path | None = None) -> str:
        """The same as a JSON text, which is written to `path` if one is given. Numbers that are not finite are null.

        Raises:
            OutputError: the file cannot be written.

        Example:
            >>> import engine
            >>> from engine.information.estimate import Estimate
            >>> Estimate.from_json(Estimate(0.5, (0.4, 0.6), 0.05, "counts", {}, 100).to_json()).interval
            (0.4, 0.6)
        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        if path is not None:
            write_text(path, text + "\n")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> Estimate:
        """The estimate of a JSON text, or of a file: a `Path`, or a text that does not begin with a brace.

        The pointwise values are not kept in JSON; they are None.

        Raises:
            EstimatorError: no JSON of an estimate.
        """
        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        where = "Estimate.from_json" if is_text else str(source)
        try:
            record = json.loads(str(source) if is_text else Path(source).read_text(encoding="utf-8"))
            readings = {name: math.nan if v is None else float(v) for name, v in record["readings"].items()}
            low, high = map(float, record["interval"])
            ceiling, groups = record["ceiling"], record.get("groups")
            return cls(
                value=float(record["value"]),
                interval=(low, high),
                standard_error=float(record["standard_error"]),
                method=str(record["method"]),
                readings=readings,
                samples=int(record["samples"]),
                flags=tuple(map(str, record["flags"])),
                ceiling=None if ceiling is None else float(ceiling),
                history=[dict(check) for check in record["history"]],
                dropped=int(record.get("dropped", 0)),
                groups=None if groups is None else int(groups),
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as problem:
            raise EstimatorError(
                where, f"no estimate ({problem!r})", "JSON of Estimate.to_json", "Give its text or the file's path."
            ) from None

    def plot(self, path: str | Path) -> Path:
        """Draw training and held-out readings over the steps, the value and its interval; needs matplotlib.

        Args:
            path: of the picture; its ending chooses the format (.svg, .png, .pdf).

        Raises:
            EstimatorError: matplotlib is not installed.
            OutputError: the picture cannot be written.
        """
        figure, axes = new_figure("plot", 6, 3.2)
        for name, style in (("training", ":"), ("held_out", "-")):
            points = [(r["step"], r[name]) for r in self.history if r.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=name.replace("_", "-"))
        axes.axhspan(*self.interval, alpha=0.15, label="interval")
        axes.axhline(self.value, color="black", linewidth=1, label=f"estimate {self.value:.3f}")
        if self.ceiling is not None and self.ceiling < 2 * self.interval[1]:
            axes.axhline(self.ceiling, color="grey", linestyle="--", linewidth=1, label="ceiling")
        axes.set(xlabel="training step", ylabel="nats", title=self.method)
        axes.legend(frameon=False)
        return save_figure(figure, path)

    def __float__(self) -> float:
        return self.value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Estimate):
            return NotImplemented
        if (self.pointwise is None) != (other.pointwise is None):
            return False
        same = self.pointwise is None or torch.equal(self.pointwise, other.pointwise)
        return same and self.to_dict() == other.to_dict()

    def __str__(self) -> str:
        low, high = self.interval
        flags = f" ({', '.join(self.flags)})" if self.flags else ""
        return f"{self.value:.3f} nats, 95 % interval {low:.3f} to {high:.3f}{flags}"

    def __getitem__(self, name: str) -> Any:
        if name in self.readings:
            return self.readings[name]
        if name in _FIELDS or name == "pointwise":
            return getattr(self, name)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter([*_FIELDS, "pointwise", *self.readings])

    def __len__(self) -> int:
        return len(_FIELDS) + 1 + len(self.readings)


_FIELDS = (
    "value", "interval", "standard_error", "method", "readings", "samples", "flags", "ceiling", "history", "dropped",
    "groups",
)  # fmt: skip


def value_flags(raw: float, lowest: float, error: float) -> list[str]:
    """The flags of a value that may be none: of the raw reading, and of the lowest value that is thought likely."""
    said = {"below zero": raw < 0, "noise": lowest <= SIGMAS * error}
    return [flag for flag, is_so in said.items() if is_so]


def new_figure(where: str, width: float, height: float) -> tuple[Any, Any]:
    """A figure of matplotlib of this size in inches, and its axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise EstimatorError(
            where, "no matplotlib", "matplotlib to be installed", "Run pip install matplotlib."
        ) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure in the format of the path's ending, whole or not at all."""
    ending = Path(path).suffix.lstrip(".") or "svg"
    known = figure.canvas.get_supported_filetypes()
    if ending.lower() not in known:
        raise EstimatorError(
            str(path), f"a picture .{ending}", f"one of {', '.join(sorted(known))}", "Change its ending."
        )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=ending)
    return Path(path)


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
