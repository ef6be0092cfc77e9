"""The report's charts: small inline SVG, so that the page works without JavaScript, offline and on paper.

Colours come from the page's style sheet by class name; `data-chart` carries what the page's script shows on hover.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import printable

Value = float | None

MOST = 1e150  # the square of a larger one is infinite


def escape(text: object) -> str:
    """Printable text made safe for element content and for attributes in either kind of quotes."""
    return html.escape(printable(text), quote=True)


def number(value: Any, digits: int = 3) -> str:
    """A number as text: `digits` after the point, fewer for large numbers, an en dash for none.

    >>> number(0.12345), number(1234.5), number(None)
    ('0.123', '1234', '–')
    """
    if not is_finite(value):
        return "–"
    size = abs(value)
    if size >= 1e6 or 0 < size < 10.0**-digits / 2:
        return f"{value:.2e}".replace("-", "−")
    places = max(0, digits - max(0, int(math.log10(size)))) if size >= 10 else digits
    return f"{value:.{places}f}".replace("-", "−")


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About `count` round numbers within [low, high]."""
    raw = (high - low) / max(count, 1)
    if not raw > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    step = max(1.0, round(step)) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass
class Frame:
    """Maps data to the SVG's units."""

    x0: float
    x1: float
    y0: float
    y1: float
    width: int = 270
    height: int = 165
    left: int = 40
    right: int = 12
    top: int = 10
    bottom: int = 26

    def x(self, value: float) -> float:
        return self.left + (value - self.x0) / (self.x1 - self.x0) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        return (
            self.height - self.bottom - (value - self.y0) / (self.y1 - self.y0) * (self.height - self.top - self.bottom)
        )

    def axes(self, x_ticks: Iterable[float], y_ticks: Iterable[float], x_label: str = "", y_label: str = "") -> str:
        right, base = self.width - self.right, self.height - self.bottom
        parts = []
        for value in y_ticks:
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{self.left} {y:.1f}H{right}"/>')
            parts.append(
                f'<text class="tick" x="{self.left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_tick(value)}</text>'
            )
        for value in x_ticks:
            x = self.x(value)
            parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 15}" text-anchor="middle">{_tick(value)}</text>')
        parts.append(f'<path class="axis" d="M{self.left} {base}H{right}"/>')
        if x_label:
            x = (self.left + right) / 2
            parts.append(
                f'<text class="name" x="{x:.0f}" y="{self.height - 3}" text-anchor="middle">{escape(x_label)}</text>'
            )
        if y_label:
            y = (self.top + base) / 2
            parts.append(
                f'<text class="name" transform="translate(11 {y:.0f}) rotate(-90)" text-anchor="middle">'
                f"{escape(y_label)}</text>"
            )
        return "".join(parts)


def _tick(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _span(values: Sequence[float], pad: float = 0.06) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * pad if high > low else max(abs(high) * 0.1, 0.05)
    return low - room, high + room


def _svg(frame: Frame, label: str, body: str, data: dict[str, Any], css: str = "small") -> str:
    hover = escape(json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
    return (
        f'<svg class="{css}" viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{escape(label)}" '
        f'data-chart="{hover}">{body}</svg>'
    )


def lines(
    label: str,
    epochs: Sequence[int],
    series: dict[str, Sequence[Value]],
    mark: int | None = None,
    ceilings: dict[str, float] | None = None,
) -> str | None:
    """Curves over epochs; the series' names are their classes (train, valid, test). None if there is nothing to draw.

    Args:
        series: {name: one value per epoch}; the curve is broken where a value is None or not finite.
        mark: the epoch to mark with a vertical line.
        ceilings: {name: what the curves cannot exceed}. A ceiling is drawn if a curve comes at least half as high.
    """
    clean = {name: [v if v is not None and math.isfinite(v) else None for v in vs] for name, vs in series.items()}
    clean = {name: values for name, values in clean.items() if any(v is not None for v in values)}
    if not clean:
        return None
    present = [v for values in clean.values() for v in values if v is not None]
    ceilings = {name: at for name, at in (ceilings or {}).items() if max(present) > at / 2}
    low, high = _span([*present, *ceilings.values()])
    first, last = min(epochs), max(epochs)
    side = 0.5 if first == last else 0.02 * (last - first)
    frame = Frame(first - side, last + side, low, high)
    body = [frame.axes(ticks(first, last, 6, whole=True), ticks(low, high, 4))]
    if mark is not None and first <= mark <= last:
        x = frame.x(mark)
        body.append(f'<path class="mark" d="M{x:.1f} {frame.top}V{frame.height - frame.bottom}"/>')
    for name, at in ceilings.items():
        y, right = frame.y(at), frame.width - frame.right
        body.append(f'<path class="ceiling" d="M{frame.left} {y:.1f}H{right}"/>')
        body.append(f'<text class="tick" x="{right}" y="{y - 4:.1f}" text-anchor="end">{escape(name)}</text>')
    for name, values in clean.items():
        path, pen = [], "M"
        for epoch, value in zip(epochs, values, strict=True):
            if value is None:
                pen = "M"
                continue
            path.append(f"{pen}{frame.x(epoch):.1f} {frame.y(value):.1f}")
            pen = "L"
        body.append(f'<path class="line {name}" d="{"".join(path)}"/>')
        # A value without neighbours leaves no stroke, so it gets a dot; short curves get dots throughout.
        alone = [
            i
            for i, v in enumerate(values)
            if v is not None
            and (len(epochs) <= 12 or all(values[j] is None for j in (i - 1, i + 1) if 0 <= j < len(values)))
        ]
        dots = "".join(f"M{frame.x(epochs[i]):.1f} {frame.y(values[i]):.1f}h0" for i in alone)
        if dots:
            body.append(f'<path class="dot {name}" d="{dots}"/>')
    data = {
        "kind": "lines",
        "x": [round(frame.x(epoch), 1) for epoch in epochs],
        "head": [f"epoch {epoch}" for epoch in epochs],
        "series": [
            {
                "name": name,
                "text": [number(v, 4) for v in values],
                "y": [None if v is None else round(frame.y(v), 1) for v in values],
            }
            for name, values in clean.items()
        ],
    }
    return _svg(frame, label, "".join(body), data)


def scatter(
    label: str,
    x: NDArray[np.floating],
    y: NDArray[np.floating],
    group: NDArray[np.integer],
    texts: Sequence[str],
    x_label: str = "",
    y_label: str = "",
    square: tuple[float, float] | None = None,
    ticked: bool = True,
) -> str:
    """Dots coloured by group (classes g0, g1, ...).

    Args:
        x, y, group, texts: [N]; texts are shown on hover.
        square: the common range of both axes, drawn with the diagonal where x = y.
        ticked: whether the axes carry numbers.
    """
    side = 440 if square else 240
    if square:
        frame = Frame(*square, *square, width=side, height=side, left=44, bottom=38)
    else:
        edge = 10
        frame = Frame(
            *_span(x.tolist(), 0), *_span(y.tolist(), 0), side, side, left=edge, right=edge, top=edge, bottom=edge
        )
    body = []
    if ticked:
        marks = ticks(frame.x0, frame.x1, 6)
        body.append(frame.axes(marks, marks, x_label, y_label))
    else:
        body.append(f'<rect class="frame" x="1" y="1" width="{side - 2}" height="{side - 2}" rx="8"/>')
    if square:
        low, high = square
        body.append(
            f'<path class="mark" d="M{frame.x(low):.1f} {frame.y(low):.1f}L{frame.x(high):.1f} {frame.y(high):.1f}"/>'
        )
    px = [round(frame.x(v), 1) for v in x.tolist()]
    py = [round(frame.y(v), 1) for v in y.tolist()]
    size = "big" if len(px) <= 150 else "mid" if len(px) <= 700 else "tiny"
    for g in np.unique(group):
        dots = "".join(f"M{px[i]:g} {py[i]:g}h0" for i in np.flatnonzero(group == g))
        body.append(f'<path class="dots {size} g{int(g)}" d="{dots}"/>')
    return _svg(
        frame,
        label,
        "".join(body),
        {"kind": "points", "x": px, "y": py, "text": list(texts)},
        "wide" if square else "small",
    )


Point = tuple[float, float, str, int]
"""x, y, what is shown on hover, and group (the class g0, g1, ...)."""


def points(
    label: str,
    dots: Sequence[Point],
    x_label: str,
    log: bool = False,
    names: Sequence[str] = (),
    best: Sequence[tuple[float, float]] = (),
) -> str:
    """Dots in a frame with numbered axes.

    Args:
        log: the x axis is logarithmic.
        names: names of the places 0, 1, ... of the x axis, where it has no numbers.
        best: corners of a line through the best values so far.
    """
    dots = [dot for dot in dots if is_finite(dot[0]) and is_finite(dot[1])]
    if not dots:
        return ""
    xs = [math.log10(dot[0]) if log else dot[0] for dot in dots]
    ys = [dot[1] for dot in dots]
    low, high = _span(ys)
    x0, x1 = (-0.5, len(names) - 0.5) if names else _span(xs)
    frame = Frame(x0, x1, low, high, left=46, bottom=40)
    body = [frame.axes([], ticks(low, high, 4), x_label), _place_ticks(frame, log, names)]
    if best:
        corners = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in best)
        body.append(f'<path class="line test" d="M{corners}"/>')
    px = [round(frame.x(x), 1) for x in xs]
    py = [round(frame.y(y), 1) for y in ys]
    body += [
        f'<path class="dots mid g{group}" d="M{x:g} {y:g}h0"/>'
        for x, y, (_, _, _, group) in zip(px, py, dots, strict=True)
    ]
    return _svg(frame, label, "".join(body), {"kind": "points", "x": px, "y": py, "text": [dot[2] for dot in dots]})


def _place_ticks(frame: Frame, log: bool, names: Sequence[str]) -> str:
    base = frame.height - frame.bottom
    if names:
        marks = [(float(i), name if len(name) <= 12 else f"{name[:11]}…") for i, name in enumerate(names)]
        marks = marks[:: max(1, len(marks) // 5)]
    elif log:
        span_log = frame.x1 - frame.x0
        factors = (1,) if span_log > 2 else (1, 3) if span_log > 1 else (1, 2, 5)
        values = [f * 10.0**p for p in range(math.floor(frame.x0), math.ceil(frame.x1) + 1) for f in factors]
        marks = [(math.log10(v), f"{v:g}") for v in values if frame.x0 <= math.log10(v) <= frame.x1]
    else:
        marks = [(v, number(v, 3) if v != int(v) else f"{v:g}") for v in ticks(frame.x0, frame.x1, 5)]
    return "".join(
        f'<text class="tick" x="{frame.x(x):.1f}" y="{base + 15}" text-anchor="middle">{escape(text)}</text>'
        for x, text in marks
    )


SHAPES = ("circle", "square", "triangle", "diamond", "cross", "plus", "down", "ring")


def shape(index: int, x: float, y: float, r: float = 5) -> str:
    """One of eight markers told apart by form as well as by colour (classes m0 .. m7)."""
    kind = SHAPES[index % len(SHAPES)]
    css = f"m m{index % len(SHAPES)}"
    if kind in ("circle", "ring"):
        return (
            f'<circle class="{css}{" open" if kind == "ring" else ""}" cx="{x:.1f}" cy="{y:.1f}" r="{r * 0.92:.1f}"/>'
        )
    if kind in ("cross", "plus"):
        a = r * 0.8 if kind == "cross" else r
        d = (
            f"M{-a:g} {-a:g}L{a:g} {a:g}M{-a:g} {a:g}L{a:g} {-a:g}"
            if kind == "cross"
            else f"M{-a:g} 0H{a:g}M0 {-a:g}V{a:g}"
        )
        css += " open"
    else:
        a = r * 0.85
        d = {
            "square": f"M{-a:g} {-a:g}H{a:g}V{a:g}H{-a:g}Z",
            "triangle": f"M0 {-r:g}L{r:g} {a:g}H{-r:g}Z",
            "diamond": f"M0 {-1.2 * r:g}L{1.2 * r:g} 0L0 {1.2 * r:g}L{-1.2 * r:g} 0Z",
            "down": f"M0 {r:g}L{r:g} {-a:g}H{-r:g}Z",
        }[kind]
    return f'<path class="{css}" transform="translate({x:.1f} {y:.1f})" d="{d}"/>'


def truth(latents: Sequence[dict[str, Any]], estimators: Sequence[str]) -> str | None:
    """Estimates beside the true information, one row per latent. A bar is the truth, a dashed bar the ceiling."""
    rows = [row for row in latents if is_finite(row.get("true"))]
    if not rows:
        return None
    values = [0.0]
    for row in rows:
        values += [row["true"], row.get("ceiling"), *row["estimates"].values()]
    low, high = _span([v for v in values if is_finite(v)], 0.04)
    left = 20 + round(6.6 * max(len(str(row["name"])) for row in rows))
    step = 34
    width = 500
    frame = Frame(low, high, 0, 1, width, 16 + step * len(rows) + 40, left=min(left, 220), right=16, top=8, bottom=40)
    base = frame.height - frame.bottom
    body = []
    for value in ticks(low, high, 7):
        x = frame.x(value)
        body.append(f'<path class="grid" d="M{x:.1f} {frame.top}V{base}"/>')
        body.append(f'<text class="tick" x="{x:.1f}" y="{base + 15}" text-anchor="middle">{_tick(value)}</text>')
    middle = (frame.left + width - frame.right) / 2
    body.append(f'<text class="name" x="{middle:.0f}" y="{frame.height - 5}" text-anchor="middle">nats</text>')
    points: dict[str, list] = {"x": [], "y": [], "text": []}
    for i, row in enumerate(rows):
        y = frame.top + 8 + step * (i + 0.5)
        name = escape(row["name"])
        body.append(f'<text class="label" x="{frame.left - 10}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
        body.append(f'<path class="grid" d="M{frame.left} {y:.1f}H{width - frame.right}"/>')
        if is_finite(row.get("ceiling")):
            body.append(f'<path class="ceiling" d="M{frame.x(row["ceiling"]):.1f} {y - 13:.1f}v26"/>')
        body.append(f'<path class="true" d="M{frame.x(row["true"]):.1f} {y - 12:.1f}v24"/>')
        shown = [("true", row["true"], None)]
        shown += [(e, row["estimates"].get(e), k) for k, e in enumerate(estimators)]
        for estimator, value, k in shown:
            if not is_finite(value):
                continue
            x = frame.x(value)
            if k is not None:
                # Spread vertically, so that estimators that agree stay visible.
                y_k = y + (k - (len(estimators) - 1) / 2) * min(4.0, 18 / max(len(estimators), 1))
                body.append(shape(k, x, y_k))
            points["x"].append(round(x, 1))
            points["y"].append(round(y if k is None else y_k, 1))
            points["text"].append(f"{row['name']}\n{estimator} {number(value)} nats")
    return _svg(frame, "estimates beside the true information", "".join(body), {"kind": "points", **points}, "widest")


def is_finite(value: Any) -> bool:
    """Whether a value is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MOST
