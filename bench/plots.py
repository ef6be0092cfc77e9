"""Plots of results, as SVG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = "svg"


def draw(results: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """Ratios of all suites, growth curves, and time and memory over the batch where they were measured."""
    pyplot = pyplot_for_files()
    made = []

    def keep(figure: Any, name: str) -> None:
        made.append(folder / f"{name}.{FORMAT}")
        save(pyplot, figure, made[-1])

    ratios = [
        (n, k, r[k], r["goals"][k]) for n, r in results.items() for k in r["goals"] if k.endswith("ratio") and k in r
    ]
    if ratios:
        keep(_ratios(pyplot, ratios), "ratios")
    if "growth" in results and "curve" in results["growth"]:
        keep(_growth(pyplot, results["growth"]["curve"]), "growth")
    for name in ("streaming_infonce", "concat_critic"):
        if "curve" in results.get(name, {}):
            keep(_over_batch(pyplot, results[name]["curve"], name), name)
    return made


def pyplot_for_files() -> Any:
    """matplotlib.pyplot without a display, set so that equal results give equal files."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "bench", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    from matplotlib import pyplot

    return pyplot


def save(pyplot: Any, figure: Any, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def _ratios(pyplot: Any, ratios: list[tuple[str, str, float, Mapping[str, float]]]) -> Any:
    figure, axes = pyplot.subplots(figsize=(7, 0.4 * len(ratios) + 1))
    names = [n if k == "ratio" else f"{n}, memory" for n, k, _, _ in ratios]
    places = range(len(ratios))[::-1]
    axes.barh(places, [value for *_, value, _ in ratios], color="#4477aa", height=0.6)
    for place, (*_, value, goal) in zip(places, ratios, strict=True):
        axes.plot(
            [goal["floor"]] * 2, [place - 0.4, place + 0.4], color="#cc3311", label="floor" if place == 0 else None
        )
        axes.plot([goal["aim"]] * 2, [place - 0.4, place + 0.4], color="#228833", label="aim" if place == 0 else None)
        axes.text(value, place, f" {value:.3g}×", va="center")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="baseline / engine (more is better)", yticks=list(places), yticklabels=names)
    axes.legend(loc="lower right", frameon=False)
    return figure


def _growth(pyplot: Any, curve: Mapping[str, Mapping[str, float]]) -> Any:
    figure, axes = pyplot.subplots(2, 2, figsize=(8, 5))
    for row, (kind, label) in enumerate((("n", "training samples N (B=32)"), ("b", "batch size B"))):
        points = sorted((int(k[1:]), v) for k, v in curve.items() if k[0] == kind)
        sizes = [n for n, _ in points]
        axes[row][0].plot(sizes, [1e3 * v["seconds_per_sample"] for _, v in points], "o-", color="#4477aa")
        axes[row][0].set(xscale="log", xlabel=label, ylabel="ms a sample", ylim=(0, None))
        memory = [v["extra_peak_bytes"] for _, v in points]
        if all(m is not None for m in memory):
            axes[row][1].plot(sizes, [m / 2**20 for m in memory], "o-", color="#4477aa")
        axes[row][1].set(xscale="log", xlabel=label, ylabel="extra peak memory, MiB", ylim=(0, None))
    figure.tight_layout()
    return figure


def _over_batch(pyplot: Any, curve: Mapping[str, Mapping[str, Mapping[str, float]]], name: str) -> Any:
    """`curve`: {side: {batch: {"seconds", "extra_peak_bytes"}}}."""
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.2))
    for side, points in curve.items():
        sizes = sorted(map(int, points))
        axes[0].plot(sizes, [points[str(n)]["seconds"] for n in sizes], "o-", label=side)
        axes[1].plot(sizes, [points[str(n)]["extra_peak_bytes"] / 2**20 for n in sizes], "o-", label=side)
    for axis, label in zip(axes, ("seconds, forward and backward", "extra peak memory, MiB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="batch size B", ylabel=label)
    axes[0].legend(frameon=False)
    figure.suptitle(name)
    figure.tight_layout()
    return figure
