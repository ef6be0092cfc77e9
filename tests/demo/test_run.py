import json
from types import SimpleNamespace

import pytest

from engine.demo import run as demo
from engine.demo import run_demo
from engine.errors import ConfigError


@pytest.fixture
def quick(monkeypatch):
    """The demo without its two costly parts; what they were called with is kept."""
    calls = SimpleNamespace()

    def compare(seed, on_term):
        on_term("I(T;A)")
        calls.seed = seed
        return [
            {"name": "I(T;A)", "true": 0.367, "estimates": {"infonce": 0.341}, "ceiling": 4.85},
            {"name": "I(A;C|T)", "true": 0.396, "estimates": {"ldr": 0.407}, "ceiling": None},
        ]

    def train(config, out):
        calls.config = config
        calls.truth_was_there = (out / "truth.json").exists()
        history = [
            {"epoch": 0, "valid": {"mae": 1.1}},
            {
                "epoch": 1,
                "valid": {
                    "mae": 0.9,
                    "information": {"I(F;T)": 0.5, "comp": 0.25},
                    "bank": {"I(F;T)": 0.678, "I(A;C|T)": 0.123},
                },
            },
        ]
        (out / "history.jsonl").write_text("".join(json.dumps(h) + "\n" for h in history))
        return SimpleNamespace(metrics={"best_epoch": 1, "test": {"mae": 0.7654}})

    monkeypatch.setattr(demo, "compare_with_truth", compare)
    monkeypatch.setattr(demo, "train", train)
    return calls


def test_run_writes_truth_before_training_and_prints_the_tables(quick, tmp_path, capsys):
    run_demo(tmp_path / "run", ["epochs=3", "seed=5"])
    assert quick.truth_was_there and quick.seed == quick.config.seed == 5 and quick.config.epochs == 3
    assert quick.config.preset == "demo"
    assert quick.config.data.path == str(tmp_path / "run/data/unaligned_50.pkl")
    truth = json.loads((tmp_path / "run/truth.json").read_text())
    assert truth["latents"][0]["estimates"] == {"infonce": 0.341} and truth["seed"] == 5
    printed = capsys.readouterr().out
    for shown in (
        "0.367",
        "0.341",
        "0.407",
        "I(F;T)",
        "0.50",
        "0.765",
        "0.678",
        "noise",
        "cannot be told from 0",
        f"{truth['test_mae']['mean_baseline_mae']:.3f}",
    ):
        assert shown in printed, shown


def test_demo_makes_its_own_data(quick, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.path"):
        run_demo(tmp_path, ["data.path=elsewhere.pkl"])
    with pytest.raises(ConfigError, match="no_such"):
        run_demo(tmp_path, ["no_such=1"])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_whole_demo(tmp_path):
    """Estimators near the truth, and a model that clearly beats predicting the mean, in the files users get."""
    run_demo(tmp_path / "run", ["output.progress=false"])
    truth = json.loads((tmp_path / "run/truth.json").read_text())
    for row in truth["latents"]:
        for name, value in row["estimates"].items():
            # a lower bound's critic, trained on 8,000 rows, stays a little below the truth
            assert abs(value - row["true"]) < 0.06, (row["name"], name)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    baseline = truth["test_mae"]["mean_baseline_mae"]
    assert metrics["test"]["mae"] < 0.75 * baseline
    assert metrics["test"]["corr"] > 0.6
    history = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    assert len(history[-1]["valid"]["information"]) == 8
    report = (tmp_path / "run/report.html").read_text()
    assert "I(T;A|C)" in report
