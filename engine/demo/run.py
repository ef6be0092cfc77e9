"""The demo: data of known information, estimators against the truth, a trained model, a report."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from engine.config import Config, load_config
from engine.demo.generator import write_demo_files
from engine.demo.information import compare_with_truth
from engine.errors import ConfigError
from engine.files import user_path, write_json
from engine.objective.readings import print_rows
from engine.run_folder import TRUTH, Checksums
from engine.trainer import train
from engine.training.parts import choose_device


def run_demo(out: str | Path, overrides: Iterable[str] = ()) -> None:
    """Generate demo data, check the estimators against their truth, train the `demo` preset, and show what came out.

    Writes the data into `out`/data and a run folder into `out`; its truth.json holds true and estimated information of
    the raw latents (nats) and the test MAE of simple predictors. Everything follows from the config's seed.

    Args:
        out: the run folder, empty or new.
        overrides: `key=value` settings of the training; `data.path` is the demo's own.

    Raises:
        EngineError: a setting or an output folder that cannot be used.
    """
    out, overrides, console = user_path(out), list(overrides), Console()
    config = demo_config(overrides)
    paths = write_demo_files(out / "data", seed=config.seed)
    config.data.path = str(paths["data"])
    truth = json.loads(paths["truth"].read_text(encoding="utf-8"))
    console.print(f"data: {paths['data']}", highlight=False, soft_wrap=True)

    with console.status("estimators on the raw latents") as status:
        truth["latents"] = compare_with_truth(
            config.seed, on_term=lambda name: status.update(f"estimators on the raw latents: {name}")
        )
    with Checksums(out).writing(TRUTH):
        write_json(out / TRUTH, truth)
    console.print(information_table(truth["latents"]))

    result = train(config, out)
    history = [json.loads(line) for line in (out / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    console.print(terms_table(history))
    print_rows(console, history, result.metrics["best_epoch"])
    console.print(error_table(truth["test_mae"], result.metrics["test"]["mae"]))


def demo_config(overrides: Iterable[str] = ()) -> Config:
    """The demo's settings, with all of them checked that can be without its data.

    Raises:
        ConfigError: a setting that is wrong, or that the demo does not have.
    """
    config = load_config("demo", overrides)
    if config.data.path:
        raise ConfigError("data.path", config.data.path, "no path: the demo makes its data", "Use engine train.")
    choose_device(config.resolve().device)
    return config


def information_table(rows: list[dict[str, Any]]) -> Table:
    """True information of the raw latents beside what estimators read, nats."""
    names = list(dict.fromkeys(name for row in rows for name in row["estimates"]))
    table = Table(title="Raw latents: true information and estimates (nats)", title_justify="left")
    table.add_column("term", no_wrap=True)
    for name in ["true", *names]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row["name"], *(_number(v, 3) for v in (row["true"], *(row["estimates"].get(n) for n in names))))
    return table


def terms_table(history: list[dict[str, Any]]) -> Table:
    """The model's information terms and MAE on valid, one row per epoch. The first epoch has no terms yet."""
    names = list(history[-1]["valid"].get("information", {}))
    # Ten columns in 80 characters: no vertical lines, one space between.
    title = "Model: information terms on valid over the epochs (nats)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ["epoch", *names, "MAE"]:
        table.add_column(name, justify="right", no_wrap=True)
    for record in history:
        terms = record["valid"].get("information", {})
        table.add_row(
            str(record["epoch"]), *(_number(terms.get(n), 2) for n in names), _number(record["valid"]["mae"], 3)
        )
    return table


def error_table(baselines: dict[str, float], model: float) -> Table:
    """The model's test MAE among predictors that know nothing, one modality's latent, or all."""
    table = Table(title="Test MAE (labels in [-3, 3])", title_justify="left")
    table.add_column("predictor")
    table.add_column("MAE", justify="right")
    for text, value in (
        ("mean of the training labels", baselines["mean_baseline_mae"]),
        ("median of the training labels", baselines["median_baseline_mae"]),
        ("best possible from the text latent alone", baselines["best_from_text_latent"]),
        ("[bold]the trained model", model),
        ("best possible from all latents", baselines["best_from_all_latents"]),
    ):
        table.add_row(text, _number(value, 3))
    return table


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
