"""The accuracy comparison: the baseline's trainer writes what the engine does, and collected numbers are theirs."""

import json

import pytest

from bench import accuracy, shapes
from engine.config import load_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accuracy")
    samples = shapes.mosi(20, seed=0)
    parts = {"train": samples.part(0, 12), "valid": samples.part(12, 16), "test": samples.part(16, 20)}
    data = [f"data.path={shapes.write_store(folder, parts)}", "data.length_rule=recorded"]
    config = load_config("mosi", ["mode=faithful", *data, "epochs=2", "batch_size=6"])
    return folder, accuracy.train_baseline(config, 0, folder / "runs" / "seed0")


def test_a_baseline_run_is_selected_on_valid(run):
    folder, metrics = run
    history = [json.loads(line) for line in (folder / "runs/seed0/history.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in history] == [0, 1]
    best = min(history, key=lambda r: r["valid"]["mae"])
    assert metrics["best_epoch"] == best["epoch"]
    assert metrics["test"] == best["test"]
    assert metrics["oracle_test"]["mae"] == min(r["test"]["mae"] for r in history)
    assert json.loads((folder / "runs/seed0/metrics.json").read_text()) == metrics


def test_collected_numbers(run):
    folder, metrics = run
    collected = accuracy.collect(folder / "runs")
    assert collected["test"]["mae"]["mean"] == metrics["test"]["mae"]
    assert collected["valid_mae"]["mean"] == metrics["valid"]["mae"]
    assert list(collected["runs"]) == ["seed0"]
    assert f"{metrics['test']['mae']:.3f}" in accuracy.table({"baseline": collected})


def test_time_until_a_valid_mae():
    history = [{"seconds": 3.0, "valid": {"mae": m}} for m in (1.3, 0.95, 1.1, 0.8)]
    assert accuracy.seconds_to(history, 1.0) == 6.0
    assert accuracy.seconds_to(history, 0.8) == 12.0
    assert accuracy.seconds_to(history, 0.7) is None
