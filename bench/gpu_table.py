"""The GPU table of the README and the plots, from what `python -m bench.gpu` wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Entry = Mapping[str, Any]
MARKERS = ("<!-- gpu:start -->", "<!-- gpu:end -->")
SIDES = {
    "eager": "eager torch", "baseline": "eager torch", "torch": "torch", "compile": "torch.compile",
    "cce": "cut-cross-entropy", "liger": "Liger", "uncaptured": "without graphs",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A row of the table.

    Attributes:
        where: keys and values that an entry must have.
        figure: the entry's key; "best" is the shorter of the graph's time and the eager one.
        floor, aim: the worst acceptable figure and the goal. Less is better, unless `more`.
        scale: factor that turns the figure into `unit`.
    """

    title: str
    where: Mapping[str, Any]
    figure: str
    unit: str
    floor: float
    aim: float
    more: bool = False
    scale: float = 1.0


def _part(title: str, row: str, precision: str, floor: float, aim: float) -> Line:
    return Line(f"{title}, {precision}", {"row": row, "precision": precision}, "best", "ms", floor, aim)


def _infonce(rows: int, width: int, precision: str, floor: float, aim: float) -> Line:
    title = f"InfoNCE {precision}, B={rows:,}, d={width}, forward and backward"
    return Line(title, {"row": "infonce", "B": rows, "d": width, "precision": precision}, "best", "ms", floor, aim)


LINES = (
    Line("MOSI-shaped epoch, mode fast, B=32, MiniLM, AMP", {"row": "epoch_fast"}, "seconds", "s", 0.40, 0.15),
    Line("share of that epoch in which the GPU is busy", {"row": "epoch_fast"}, "busy", "%", 0.8, 0.95, True, 100),
    Line("stage 2, a batch", {"row": "stage2_fast"}, "wall_ms", "ms", 5.5, 2.0),
    Line("stage 1, a batch", {"row": "stage1_fast"}, "wall_ms", "ms", 1.0, 0.30),
    Line("product rows, a batch", {"row": "draw_fast"}, "wall_ms", "ms", 0.2, 0.05),
    Line("launches of stage 2", {"row": "stage2_fast"}, "launches", "", 700, 400),
    Line("launches of stage 1", {"row": "stage1_fast"}, "launches", "", 120, 60),
    Line("launches of the product rows", {"row": "draw_fast"}, "launches", "", 20, 5),
    Line("MOSEI-shaped epoch, 16,326 samples, B=128", {"row": "epoch_mosei"}, "seconds", "s", 4.0, 1.5),
    Line("8 epochs of MOSI, whole command, kernels compiled before", {"row": "command_kept"}, "seconds", "s", 20, 8),
    _infonce(16384, 128, "bf16", 1.1, 0.7),
    _infonce(16384, 512, "bf16", 2.6, 1.7),
    _infonce(16384, 768, "bf16", 3.6, 2.4),
    _infonce(65536, 128, "bf16", 16, 9),
    _infonce(16384, 128, "tf32", 2.4, 1.4),
    _infonce(16384, 128, "fp32", 5.0, 3.0),
    _part("concat critic + InfoNCE, B=256", "concat_critic", "tf32", 1.0, 0.45),
    _part("concat critic + InfoNCE, B=256", "concat_critic", "bf16", 0.6, 0.25),
    _part("CubeMLP, B=128", "cubemlp", "tf32", 0.8, 0.4),
    _part("CubeMLP, B=128", "cubemlp", "bf16", 0.6, 0.3),
    Line(
        "five critics + InfoNCE, B=128, as a graph", {"row": "five_critics", "precision": "fp32"}, "graph_ms", "ms",
        0.15, 0.08,
    ),
)  # fmt: skip


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """{group: content} of the files that `bench.gpu` wrote into a folder."""
    contents = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    groups = {n: c for n, c in contents.items() if isinstance(c, dict) and "entries" in c and "machine" in c}
    return {n: c for n, c in groups.items() if not n.endswith("_spoilt")}


def entries(results: Mapping[str, Mapping[str, Any]]) -> list[Entry]:
    return [entry for content in results.values() for entry in content["entries"]]


def value(entry: Entry, figure: str) -> float | None:
    if figure == "best":
        times = [entry[key] for key in ("ms", "graph_ms") if key in entry]
        return min(times) if times else None
    return entry.get(figure)


def of_line(measured: Iterable[Entry], line: Line) -> dict[str, Entry]:
    """{side: entry} of the entries that belong to a line."""
    return {e["side"]: e for e in measured if all(e.get(k) == v for k, v in line.where.items())}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The README's table: figure, floor, aim and the other sides, or the reason why a figure is missing."""
    every = entries(results)
    rows = ["| what | measured | floor | aim | others |", "|---|---|---|---|---|"]
    for line in LINES:
        sides = of_line(every, line)
        engine = sides.get("engine", {})
        number = value(engine, line.figure)
        show = _shown(line)
        if number is None:
            why = "wrong result" if "red" in engine else "failed" if "failed" in engine else "not measured"
            measured = why
        else:
            mark = f" (plain torch for {', '.join(engine['plain'])})" if engine.get("plain") else ""
            mark += "" if _reaches(number, line.floor, line.more) else " (misses the floor)"
            measured = show(number) + mark
        others = [
            f"{SIDES.get(name, name)} {show(v)}"
            for name, side in sides.items()
            if name != "engine" and (v := value(side, line.figure)) is not None
        ]
        rows.append(f"| {line.title} | {measured} | {show(line.floor)} | {show(line.aim)} | {', '.join(others)} |")
    return "\n".join([*rows, "", *_places(results)])


def slower(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Single operations for which eager torch was faster than the engine."""
    lines, cases = [], {}
    for entry in entries(results):
        if (time := value(entry, "best")) is not None and entry["row"] in (
            "infonce", "concat_critic", "cubemlp", "five_critics", "op_update", "op_stack_sequences", "op_recurrent",
            "op_embeddings",
        ):  # fmt: skip
            case = tuple((k, entry[k]) for k in ("row", "B", "d", "precision") if k in entry)
            cases.setdefault(case, {})[entry["side"]] = time
    for case, sides in cases.items():
        if "eager" in sides and "engine" in sides and sides["engine"] > sides["eager"]:
            name = " ".join(str(v) for _, v in case)
            lines.append(f"{name}: engine {sides['engine']:.3g} ms, eager {sides['eager']:.3g} ms")
    return lines


def _shown(line: Line) -> Callable[[float], str]:
    return lambda number: f"{line.scale * number:.3g}" + (f" {line.unit}" if line.unit else "")


def _reaches(number: float, goal: float, more: bool) -> bool:
    return number >= goal if more else number <= goal


def _places(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    places = {}
    for content in results.values():
        m, v = content["machine"], content["versions"]
        where = m.get("gpu") or m["processor"]
        names = ", ".join(f"{n} {v[n]}" for n in ("torch", "triton") if n in v)
        if content.get("rehearsal"):
            places["A rehearsal without a GPU: no figure means anything."] = None
        quick = "; a quick run on small shapes, not to be reported" if content["quick"] else ""
        places[f"{where}; {names}; commit {content['commit']}; {content['date']}{quick}."] = None
    return list(places)


def draw(results: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw the times of the engine and of the other sides as bars, for every operation that has other sides."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "bench", "font.size": 9})
    from matplotlib import pyplot

    groups = []
    for line in LINES:
        sides = {n: v for n, e in of_line(entries(results), line).items() if (v := value(e, line.figure)) is not None}
        if len(sides) > 1 and "engine" in sides:
            groups.append((line.title, sides))
    if not groups:
        return []
    names = list(dict.fromkeys(name for _, sides in groups for name in sides))
    figure, axes = pyplot.subplots(figsize=(8, 0.28 * sum(len(s) + 1 for _, s in groups) + 1))
    place, ticks = 0.0, []
    for title, sides in reversed(groups):
        start = place
        for name, number in reversed(sides.items()):
            axes.barh(place, number, color=f"C{names.index(name)}", height=0.8)
            axes.text(number, place, f" {SIDES.get(name, name)} {number:.3g}", va="center", fontsize=7)
            place += 1
        ticks.append(((start + place - 1) / 2, title))
        place += 1
    axes.set(xscale="log", xlabel="ms, less is better", yticks=[t for t, _ in ticks], yticklabels=[n for _, n in ticks])
    path = folder / "operations.svg"
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return [path]
