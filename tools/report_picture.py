"""One SVG of some charts of a run's report, for the README.

    python tools/report_picture.py runs/mosi/report.html docs/images/report.svg "CMU-MOSI, preset mosi, seed 0"

The charts are the report's own, without the values that it shows on hovering.
"""

import re
import sys
from html import escape, unescape
from pathlib import Path

CHARTS = ("MAE", "I(F;T)", "I(F;A)", "inv", "spec_t")  # a column of two rows each; the last place is the legend
WIDTH, HEIGHT, MARGIN, TOP = 284, 226, 12, 56


def chart(page: str, name: str) -> tuple[str, str, str]:
    """Title, subtitle and drawing of the report's first chart of that name."""
    found = re.search(rf"<h3>{re.escape(escape(name))}<.*?</svg>", page, re.DOTALL)
    if found is None:
        raise SystemExit(f"error: the report has no chart {name!r}")
    text = re.sub(r' data-chart="[^"]*"', "", found[0])
    subtitle = re.search(r"<p>(.*?)</p>", text, re.DOTALL)
    return name, unescape(subtitle[1]).partition(":")[0] if subtitle else "", text[text.index("<svg") :]


def card(place: int, title: str, subtitle: str, drawing: str) -> str:
    x, y = MARGIN + place // 2 * (WIDTH + MARGIN), TOP + place % 2 * (HEIGHT + MARGIN)
    drawing = re.sub(r'<svg class="[^"]*"', f'<svg x="{x + 7}" y="{y + 52}" width="270" height="165"', drawing, count=1)
    return (
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="10" class="card"/>'
        f'<text x="{x + 14}" y="{y + 24}" class="title">{escape(title)}</text>'
        f'<text x="{x + 14}" y="{y + 42}" class="label">{escape(subtitle)}</text>{drawing}'
    )


def scatter(page: str) -> str:
    """Predictions against labels, in the third column at full height."""
    title, _, drawing = chart(page, "Predicted against true")
    x, width, height = MARGIN + 2 * (WIDTH + MARGIN) + WIDTH + MARGIN, 2 * HEIGHT - 40, 2 * HEIGHT + MARGIN
    place = f'<svg x="{x + 14}" y="{TOP + 46}" width="{width}" height="{width}"'
    drawing = re.sub(r'<svg class="[^"]*"', place, drawing, count=1)
    return (
        f'<rect x="{x}" y="{TOP}" width="{width + 28}" height="{height}" rx="10" class="card"/>'
        f'<text x="{x + 14}" y="{TOP + 24}" class="title">{escape(title)}, test split</text>'
        f'<g class="pal-d">{drawing}</g>'
    )


def legend(place: int) -> str:
    x, y = MARGIN + place // 2 * (WIDTH + MARGIN) + 20, TOP + place % 2 * (HEIGHT + MARGIN) + 60
    rows = (("train", "train"), ("valid", "valid"), ("test", "test"))
    lines = [
        f'<path class="line {kind}" d="M{x} {y + 26 * n}h40"/>'
        f'<text x="{x + 52}" y="{y + 4 + 26 * n}" class="label">{name}</text>'
        for n, (kind, name) in enumerate(rows)
    ]
    return "".join(lines) + f'<text x="{x}" y="{y + 88}" class="label">values in nats; horizontally the epoch</text>'


def picture(page: str, title: str) -> str:
    style = page[page.index("<style") : page.index("</style>")]
    colours = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]+);", style[: style.index("@media")]))
    rules = [
        line for line in style.splitlines() if re.match(r"\.(grid|axis|mark|line|dot|train|dots|pal-d|frame)\b", line)
    ]
    rules = [rule for rule in rules if "display" not in rule]
    css = re.sub(r"var\((--[\w-]+)\)", lambda name: colours[name[1]], "\n".join(rules))
    css += (
        f"text {{ font: 11px system-ui, sans-serif; fill: {colours['--muted']} }} .label {{ font-size: 12px }}"
        f" .title {{ font-size: 14px; font-weight: 600; fill: {colours['--text']} }}"
        f" .head {{ font-size: 19px; font-weight: 600; fill: {colours['--text']} }}"
        f" .card {{ fill: {colours['--card']}; stroke: {colours['--rule']} }}"
    )
    body = "".join(card(place, *chart(page, name)) for place, name in enumerate(CHARTS))
    width, height = 3 * (WIDTH + MARGIN) + 2 * MARGIN + 2 * HEIGHT - 12, TOP + 2 * (HEIGHT + MARGIN)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
        f' aria-label="{escape(title)}">'
        f'<style>{css}</style><rect width="{width}" height="{height}" fill="{colours["--page"]}"/>'
        f'<text x="{MARGIN}" y="36" class="head">{escape(title)}</text>'
        f"{body}{legend(len(CHARTS))}{scatter(page)}</svg>\n"
    )


if __name__ == "__main__":
    report, out, title = sys.argv[1:]
    Path(out).write_text(picture(Path(report).read_text(encoding="utf-8"), title), encoding="utf-8")
