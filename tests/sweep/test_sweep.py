"""`engine sweep`: the right numbers, ranked on valid; failures beside results; what goes on after an interruption."""

import csv
import json
import re
import signal
import statistics
import sys
from pathlib import Path

import pytest

import engine
from engine.cli import main
from engine.config import load_config
from engine.errors import ConfigError, EngineError, OutputError
from engine.sweeps.pool import Job, Pool
from tests.sweep.runs import QUICK, SWEEP, Started, all_end

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def metrics_of(out: Path, name: str, seed: int) -> dict:
    return json.loads((out / "runs" / name / f"seed{seed}" / "metrics.json").read_text())


def test_means_and_ranks_are_those_of_the_runs(whole_sweep: tuple[Path, str]):
    out, printed = whole_sweep
    content = json.loads((out / "sweep.json").read_text())
    assert content["ranked_by"] == {"split": "valid", "metric": "mae", "higher_is_better": False}
    means = {}
    for row in content["settings"]:
        values = [metrics_of(out, row["name"], seed)["valid"]["mae"] for seed in (0, 1)]
        means[row["name"]] = statistics.mean(values)
        assert row["valid"]["mae"]["mean"] == pytest.approx(statistics.mean(values), abs=1e-12)
        assert row["valid"]["mae"]["std"] == pytest.approx(statistics.stdev(values), abs=1e-12)
        assert row["valid"]["mae"]["runs"] == 2 and not row["failed"]
    assert set(means) == {"train.lr=0.001", "train.lr=0.01"}
    ranked = sorted(means, key=means.__getitem__)
    assert [row["name"] for row in content["settings"]] == ranked
    assert content["chosen"]["name"] == ranked[0]
    test = [metrics_of(out, ranked[0], seed)["test"]["mae"] for seed in (0, 1)]
    assert content["chosen"]["test"]["mae"]["mean"] == pytest.approx(statistics.mean(test), abs=1e-12)
    with (out / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["setting"] for row in rows] == ranked and [row["rank"] for row in rows] == ["1", "2"]
    assert float(rows[1]["valid mae mean"]) == pytest.approx(means[ranked[1]], abs=1e-12)
    assert f"chosen on valid: {ranked[0]}, test mae {statistics.mean(test):.4f}" in printed
    assert "[4/4] " in printed and re.search(r"\[1/4\] train.lr=\S+ seed \d: valid mae .* left", printed)


def test_the_runs_are_those_that_engine_train_makes(whole_sweep: tuple[Path, str], data: Path, tmp_path: Path):
    out, _ = whole_sweep
    config = load_config("mosi", [*QUICK, "train.lr=1e-2", "epochs=2", "seed=1", "threads=1", "output.progress=false"])
    config.data.path = str(data)
    own, swept = engine.train(config, tmp_path / "run").metrics, metrics_of(out, "train.lr=0.01", 1)
    assert (own["valid"], own["test"], own["best_epoch"]) == (swept["valid"], swept["test"], swept["best_epoch"])


def test_the_report_shows_test_numbers_of_the_chosen_settings_only(whole_sweep: tuple[Path, str]):
    out, _ = whole_sweep
    page = (out / "report.html").read_text()
    said = (out / "sweep.json").read_text()
    chosen, other = (row["name"] for row in json.loads(said)["settings"])
    shown, hidden = (
        f"{statistics.mean(metrics_of(out, name, seed)['test']['mae'] for seed in (0, 1)):.4f}"
        for name in (chosen, other)
    )
    of_others = {f"{float(number):.4f}" for number in re.findall(r"\d+\.\d+", said)}  # may be the same by chance
    assert shown in page and (hidden not in page or hidden in of_others)
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/\S+", "", page)
    assert "test" not in json.dumps(json.loads((out / "sweep.json").read_text())["settings"])


@LINUX
def test_a_sweep_that_is_killed_twice_goes_on(whole_sweep: tuple[Path, str], data: Path, tmp_path: Path):
    """kill -9 of the command: its processes end with it, and the same command ends as an uninterrupted one does."""
    out = tmp_path / "sweep"
    moments = (("runs/*/*/last.safetensors", 1), ("runs/*/*/config.yaml", 3))  # a run has an epoch; two have ended
    for moment in moments:
        begun = Started("sweep", data, out, *SWEEP, "--jobs", "1", hold=moment)
        begun.wait()
        children = begun.stop(signal.SIGKILL)
        begun.end()
        assert children and all_end(children)
    code, output = Started("sweep", data, out, *SWEEP, "--jobs", "1").end()
    assert code == 0 and "finished before" in output, output
    assert (out / "sweep.json").read_bytes() == (whole_sweep[0] / "sweep.json").read_bytes()
    assert "started 3 times, interrupted 2" in (out / "report.html").read_text()


@LINUX
def test_ctrl_c_ends_the_runs_too(data: Path, tmp_path: Path):
    begun = Started("sweep", data, tmp_path / "sweep", *SWEEP, "--jobs", "1", hold=("runs/*/*/config.yaml", 1))
    begun.wait()
    children = begun.stop(signal.SIGINT)
    code, output = begun.end()
    assert code == 130 and "interrupted: the runs that have finished are kept" in output and "Traceback" not in output
    assert children and all_end(children)


def test_another_sweep_in_the_folder_is_refused(whole_sweep: tuple[Path, str], data: Path):
    out, _ = whole_sweep
    before = (out / "sweep.json").read_bytes()
    config = load_config("mosi", [*QUICK, "epochs=2", "threads=1"])
    config.data.path = str(data)
    grid = {"train.lr": [1e-3, 1e-2]}
    for change, message in (
        ({"space": {"train.lr": [1e-3, 5e-3]}}, r"train.lr=0.005 .* not nothing"),
        ({"seeds": [0, 1, 2]}, r"seeds \[0, 1, 2\], not \[0, 1\]"),
        (
            {"config": load_config(None, [*QUICK, f"data.path={data}", "epochs=3", "threads=1"])},
            "settings.epochs 3, not 2",
        ),
    ):
        with pytest.raises(ConfigError, match=f"found another sweep .*{message}"):
            engine.sweep(**{"config": config, "out": out, "space": grid, "seeds": [0, 1], **change})
    assert (out / "sweep.json").read_bytes() == before


def test_a_failed_run_is_named_and_the_others_go_on(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--preset", "mosi", "--data", str(data), "--out", str(tmp_path / "out"), *QUICK, "epochs=1", "--jobs", "1"]
    (tmp_path / "space.yaml").write_text("settings:\n  good: {}\n  bad: {train.lr: 1.0e+38, train.clip_value: none}\n")
    assert main(["sweep", *words, "--space", str(tmp_path / "space.yaml")]) == 2
    printed = capsys.readouterr()
    assert re.search(r"error: .*found 1 of 2 runs failed; bad seed 0: ", printed.err)
    assert "chosen on valid: good" in printed.out and "1 failed" in printed.out
    content = json.loads((tmp_path / "out/sweep.json").read_text())
    assert [row["name"] for row in content["settings"]] == ["good", "bad"]
    error = content["settings"][1]["failed"]["0"]
    assert "not finite" in error or "non-finite" in error or "nan" in error.lower(), error
    assert "\n" not in error and "bad" in (tmp_path / "out/report.html").read_text()


def test_a_process_that_dies_is_a_failed_run(tmp_path: Path):
    """What ends a process from outside, such as a machine out of memory, is told as that run's error."""
    config = load_config("mosi", [*QUICK, f"data.path={tmp_path / 'absent'}"])
    job = Job("one", tmp_path / "run", config, tmp_path / "log.txt")
    with Pool(1) as pool:
        pool.start(job)
        worker = pool.places[0]
        assert worker is not None and pool.busy and not pool.free
        worker.process.kill()
        (event,) = pool.events()
        assert event.kind == "failed" and "SIGKILL" in event.content["error"] and pool.free
        pool.start(job)  # in a new process
        (event,) = pool.events()
    assert event.kind == "failed" and "absent" in event.content["error"] and "found" in event.content["error"]


def test_what_is_wrong_is_told_before_the_first_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def fails(*words: str) -> str:
        assert main(["sweep", "--preset", "mosi", "--out", str(tmp_path / "out"), *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    assert "--data: found no data" in fails("train.lr=1,2")
    known = ("--data", str(data), *QUICK)
    assert "Did you mean train.lr" in fails(*known, "train.lrr=1,2")
    assert "train.lr: found x; expected a number" in fails(*known, "train.lr=0.1,x")
    assert "seeds: found '3-1'" in fails(*known, "seeds=3-1")
    space = tmp_path / "space.yaml"
    space.write_text("grid: {train.lr: [1, 2]}\nseeds: 0-1\n")
    assert "train.lr: found values in" in fails(*known, "--space", str(space), "train.lr=1,2")
    assert "seeds: found seeds in" in fails(*known, "--space", str(space), "seeds=0-2")
    space.write_text("grids: {train.lr: [1, 2]}")
    assert "the key 'grids'; expected seeds, grid or settings" in fails(*known, "--space", str(space))
    space.write_text("grid: [1, 2]")
    assert "grid: found [1, 2]; expected a mapping" in fails(*known, "--space", str(space))
    assert not (tmp_path / "out").exists()


def test_a_task_that_only_this_process_knows_is_refused(data: Path, tmp_path: Path):
    from engine.task import Task, register_task

    class Own(Task):
        name = "known-here-only"

    register_task(Own())
    config = load_config(None, [f"data.path={data}"], task="known-here-only")
    with pytest.raises(EngineError, match="which only this process knows; expected module:attribute"):
        engine.sweep(config, tmp_path / "out")


def test_a_run_in_the_folder_of_a_sweep_is_refused(
    whole_sweep: tuple[Path, str], data: Path, capsys: pytest.CaptureFixture[str]
):
    folder = whole_sweep[0]
    before = (folder / "report.html").read_bytes()
    for more in ([], ["--resume"]):
        assert main(["train", "--preset", "mosi", "--data", str(data), "--out", str(folder), *QUICK, *more]) == 2
        assert "found a sweep or a tuning; expected an empty or new folder" in capsys.readouterr().err
    with pytest.raises(OutputError, match="found a sweep or a tuning"):
        engine.train(load_config("mosi", [*QUICK, f"data.path={data}"]), folder)
    assert (folder / "report.html").read_bytes() == before and not (folder / "config.yaml").exists()
