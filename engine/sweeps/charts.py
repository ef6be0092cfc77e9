"""The charts of a tuning's report: values over trials, and values over one setting."""

from __future__ import annotations

import math
from collections.abc import Sequence

from engine.report.charts import Frame, escape, is_finite, number, ticks
from engine.report.charts import _span as span
from engine.report.charts import _svg as svg

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
    low, high = span(ys)
    x0, x1 = (-0.5, len(names) - 0.5) if names else span(xs)
    frame = Frame(x0, x1, low, high, left=46, bottom=40)
    body = [frame.axes([], ticks(low, high, 4), x_label), _x_ticks(frame, log, names)]
    if best:
        corners = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in best)
        body.append(f'<path class="line test" d="M{corners}"/>')
    px = [round(frame.x(x), 1) for x in xs]
    py = [round(frame.y(y), 1) for y in ys]
    body += [
        f'<path class="dots mid g{group}" d="M{x:g} {y:g}h0"/>'
        for x, y, (_, _, _, group) in zip(px, py, dots, strict=True)
    ]
    return svg(frame, label, "".join(body), {"kind": "points", "x": px, "y": py, "text": [dot[2] for dot in dots]})


def _x_ticks(frame: Frame, log: bool, names: Sequence[str]) -> str:
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
