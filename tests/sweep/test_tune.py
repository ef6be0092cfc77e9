"""`engine tune`: the search, what it never reads, and studies that go on as if nothing had interrupted them."""

import json
import re
import signal
import sqlite3
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import engine
from engine.cli import main
from engine.config import load_config
from engine.errors import ConfigError, DataError
from engine.sweeps.space import Choice, Range, Space
from engine.sweeps.study import Study, new_owner
from tests.sweep.runs import PROJECT, QUICK, TUNE, Started, all_end

optuna = pytest.importorskip("optuna", reason="needs the extra tune")
SPACE: Space = {
    "train.lr": Range(1e-4, 1e-2, log=True),
    "train.stage1_n": Range(1, 4, whole=True),
    "batch_size": Choice((8, 16)),
}
PLAN = {"kind": "tuning", "space": {key: one.plain() for key, one in SPACE.items()}}


def study(folder: Path, owner: str = "me", plan: dict = PLAN, **options: object) -> Study:
    return Study(folder, SPACE, plan, owner, 0, False, "median", 1, **options)


def drawn(one: Study, total: int) -> Any:
    """A new trial with its values."""
    trial = one.new(total)
    one.values(trial)
    return trial


def loss(values: dict) -> float:
    return abs(values["train.lr"] - 3e-3) * 100 + values["train.stage1_n"] * 0.1 + values["batch_size"] * 0.01


def search(folder: Path, stops: tuple[int, ...] = (), total: int = 14) -> list[tuple[dict, float | None]]:
    """A search of a known function. At the trials in `stops` the program ends: before or after the values are drawn."""
    one = study(folder)
    for number in range(total):
        trial = one.new(total)
        if number in stops:
            if number % 2:
                one.values(trial)
            one = study(folder)
            (trial,) = one.stopped()
        values = one.values(trial)
        one.finish(trial, loss(values), 0)
    assert one.new(total) is None
    return [(t.values, t.value) for t in one.trials()]


def test_an_interrupted_search_draws_what_an_uninterrupted_one_draws(tmp_path: Path):
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    whole.mkdir()
    parts.mkdir()
    expected = search(whole)
    assert search(parts, stops=(0, 3, 6, 11, 12, 13)) == expected
    assert len({values["train.lr"] for values, _ in expected}) == 14  # none is drawn twice
    for values, value in expected:
        assert 1e-4 <= values["train.lr"] <= 1e-2 and values["train.stage1_n"] in (1, 2, 3, 4)
        assert values["batch_size"] in (8, 16) and value == loss(values)
    best = min(expected, key=lambda pair: pair[1] or 0)
    found = study(whole).best()
    assert found is not None and (found.values, found.value) == best


def test_no_trial_stays_running(tmp_path: Path):
    one = study(tmp_path)
    lost = [drawn(one, 5), drawn(one, 5), one.new(5)]
    one.finish(lost[1], 1.0, 0)
    again = study(tmp_path)
    stopped = again.stopped()
    assert [trial.number for trial in stopped] == [0, 2]
    for trial in stopped:
        again.values(trial)
        again.finish(trial, 2.0, 0)
    assert [trial.state for trial in again.trials()] == ["finished"] * 3
    assert not study(tmp_path).stopped()
    assert [again.new(5).number for _ in range(2)] == [3, 4] and again.new(5) is None  # five in all


def test_the_median_rule_prunes(tmp_path: Path):
    """Five trials with medians 1.0 at every epoch; epoch 0 is never judged, and the last one is not asked."""
    one = study(tmp_path)
    for base in (0.8, 0.9, 1.0, 1.1, 1.2):
        trial = drawn(one, 9)
        assert all(one.report(trial, epoch, base, last=epoch == 2) for epoch in range(3))
        one.finish(trial, base, 0)
    trial = drawn(one, 9)
    assert one.report(trial, 0, 5.0, last=False)
    assert not one.report(trial, 1, 1.01, last=False)
    assert one.report(trial, 1, 1.01, last=True)
    one.prune(trial)
    trial = drawn(one, 9)
    assert one.report(trial, 0, 5.0, last=False) and one.report(trial, 1, 0.99, last=False)
    assert one.trials()[5].state == "pruned" and one.trials()[5].epochs == {0: 5.0, 1: 1.01}


def test_nan_is_a_failure_and_never_the_best(tmp_path: Path):
    one = study(tmp_path)
    one.finish(drawn(one, 3), float("nan"), 0)
    one.finish(drawn(one, 3), 2.0, 0)
    one.fail(drawn(one, 3), "train.lr: found ...")
    assert [(t.state, t.problem) for t in one.trials()] == [
        ("failed", "the valid metric is NaN"), ("finished", ""), ("failed", "train.lr: found ..."),
    ]  # fmt: skip
    best = one.best()
    assert best is not None and best.number == 1


def test_machines_share_a_storage(tmp_path: Path):
    """Each goes on with its own trials; the count is that of all; a machine that is gone is given up."""
    url = f"sqlite:///{tmp_path}/shared.db"
    here, there = (study(tmp_path, owner, storage=url) for owner in ("here", "there"))
    mine, theirs = drawn(here, 3), drawn(there, 3)
    assert [t.number for t in study(tmp_path, "here", storage=url).stopped()] == [mine.number]
    assert here.others()
    here.finish(mine, 1.0, 0)
    assert here.new(3) is not None and here.new(3) is None
    with sqlite3.connect(tmp_path / "shared.db") as database:
        database.execute("UPDATE trial_heartbeats SET heartbeat = '2020-01-01' WHERE trial_id = ?", (theirs._trial_id,))
    assert here.new(3) is not None  # instead of the lost one
    assert not here.others()
    assert [t.state for t in here.trials()] == ["finished", "lost", "running", "running"]
    with pytest.raises(ConfigError, match="another tuning"):
        study(tmp_path, "third", {**PLAN, "space": {"train.lr": [1, 2]}}, storage=url)
    log = study(tmp_path, "here", storage=str(tmp_path / "journal.log"))
    log.finish(drawn(log, 1), 1.0, 0)
    assert log.new(1) is None


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///", "sqlite:///:memory:"])
def test_a_storage_that_ends_with_the_command_is_refused(url: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="--storage: found SQLite in memory"):
        study(tmp_path, storage=url)


def test_a_storage_that_is_refused_leaves_the_folder_free(data: Path, tmp_path: Path):
    config = load_config("mosi", [*QUICK, f"data.path={data}"])
    with pytest.raises(DataError, match="--storage: found"):
        engine.tune(config, tmp_path / "out", {"batch_size": [8, 16]}, storage="nonsense")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "wrong, found",
    [
        ({"trials": "x"}, "trials: found x"),
        ({"trials": 2.5}, r"trials: found 2\.5"),
        ({"jobs": "x"}, "jobs: found x"),
        ({"seeds": 5}, "seeds: found 5"),
        ({"seeds": [[0]]}, r"seeds: found \[\[0\]\]"),
        ({"seeds": "0-4"}, "seeds: found 0-4"),
    ],
)
def test_numbers_that_are_none_are_refused(wrong: dict, found: str, data: Path, tmp_path: Path):
    config = load_config("mosi", [*QUICK, f"data.path={data}"])
    with pytest.raises(ConfigError, match=found):
        engine.tune(config, tmp_path / "out", {"batch_size": [8, 16]}, **wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////absent/folder/x.db", "mysql+nodriver://a:secret@b/c"])
def test_a_wrong_storage_is_one_line(url: str, tmp_path: Path):
    with pytest.raises(DataError, match=r"--storage: found .*expected a storage of Optuna") as problem:
        study(tmp_path, storage=url)
    assert "\n" not in str(problem.value) and "secret" not in str(problem.value)


def test_a_damaged_or_foreign_study_is_one_line(tmp_path: Path):
    (tmp_path / "study.db").write_bytes(b"SQLite format 3\0" + b"x" * 4000)
    with pytest.raises(DataError, match=r"study\.db: found DatabaseError"):
        study(tmp_path)
    (tmp_path / "study.db").unlink()
    other = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db", study_name="engine")
    other.optimize(lambda trial: trial.suggest_float("x", 0, 1), 1)
    with pytest.raises(ConfigError, match="a study 'engine' of another program"):
        study(tmp_path)


def test_values_of_strangers_are_not_believed(tmp_path: Path):
    """A database whose trials have values outside the space: they are named, and none of them is the best."""
    one = study(tmp_path)
    one.finish(drawn(one, 3), 0.5, 0)
    with sqlite3.connect(tmp_path / "study.db") as database:
        foreign = json.dumps({"name": "CategoricalDistribution", "attributes": {"choices": ["<script>"]}})
        change = "UPDATE trial_params SET distribution_json = ?, param_value = 0 WHERE param_name = 'batch_size'"
        database.execute(change, (foreign,))
    (trial,) = study(tmp_path).trials()
    assert trial.state == "failed" and "not of the search space" in trial.problem and "batch_size" not in trial.values
    assert study(tmp_path).best() is None


# -- the command --


def test_the_best_settings_are_those_of_the_best_valid_metric(whole_tuning: tuple[Path, str], data: Path):
    out, printed = whole_tuning
    content = json.loads((out / "tune.json").read_text())
    values = {}
    for trial in content["trials"]:
        folder = out / "trials" / f"trial-{trial['trial']:04d}"
        metrics = json.loads((folder / "metrics.json").read_text())
        assert trial["state"] == "finished" and trial["value"] == metrics["valid"]["mae"]
        history = [json.loads(line)["valid"]["mae"] for line in (folder / "history.jsonl").read_text().splitlines()]
        assert list(trial["epochs"].values()) == history and min(history) == trial["value"]
        values[trial["trial"]] = trial["value"]
        config = load_config(folder / "config.yaml")
        assert (config.train.lr, config.batch_size) == tuple(trial["settings"].values())
        assert (folder / "best.safetensors").exists() == (trial["trial"] == content["best"]["trial"])
        assert not (folder / "last.safetensors").exists()
    assert len(values) == 4 and content["best"]["trial"] == min(values, key=values.__getitem__)
    best = load_config(out / "best.yaml")
    assert (best.train.lr, best.batch_size) == tuple(content["best"]["settings"].values())
    assert best.threads is None and best.output.progress and best.data.path == str(data.resolve())
    seeds = content["seeds"]["settings"][0]["runs"]
    # The trial's own seed is 0: the same run, trained twice.
    assert seeds["0"]["valid"]["mae"] == content["best"]["value"]
    chosen = content["seeds"]["chosen"]
    folder = out / "runs" / chosen["name"]
    test = [json.loads((folder / f"seed{s}/metrics.json").read_text())["test"]["mae"] for s in (0, 1)]
    assert chosen["test"]["mae"]["mean"] == pytest.approx(statistics.mean(test), abs=1e-12)
    assert "4 trials: 4 finished, 0 pruned, 0 failed" in printed
    page = (out / "report.html").read_text()
    assert f"{statistics.mean(test):.4f}" in page and "No test metric was read before the best settings" in page
    assert page.count("<svg") >= 3 and "trial-0003" in page


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_tuning_that_is_killed_goes_on(whole_tuning: tuple[Path, str], data: Path, tmp_path: Path):
    """kill -9 twice: in a trial, and in the seeds. The tables equal those without it."""
    out, words = tmp_path / "tune", (*TUNE, "--jobs", "1", "--seeds", "0-1")
    moments = (("trials/trial-0001/history.jsonl", 1), ("runs/*/seed1/config.yaml", 1))
    for moment in moments:
        begun = Started("tune", data, out, *words, hold=moment)
        begun.wait()
        children = begun.stop(signal.SIGKILL)
        begun.end()
        assert children and all_end(children)
    code, output = Started("tune", data, out, *words).end()
    assert code == 0 and "4 trials ended before, 0 to go on with" in output, output
    for name in ("tune.json", "tune.csv"):
        assert (out / name).read_bytes() == (whole_tuning[0] / name).read_bytes()
    with sqlite3.connect(out / "study.db") as database:
        assert database.execute("SELECT state, count(*) FROM trials GROUP BY state").fetchall() == [("COMPLETE", 4)]


def test_trials_whose_settings_are_at_odds_fail_and_the_others_go_on(data: Path, tmp_path: Path):
    config = load_config("mosi", [*QUICK[:1], *QUICK[2:], "objective.enabled=true", "epochs=1", f"data.path={data}"])
    config.objective.k_neighbor = 2
    lines: list[str] = []
    space = {"objective.k_neighbor": [2, 8], "batch_size": [4, 32]}
    result = engine.tune(config, tmp_path / "out", space, trials=6, jobs=1, say=lines.append)
    failed = [trial for trial in result.trials if trial.state == "failed"]
    odds = [trial for trial in result.trials if trial.values == {"objective.k_neighbor": 8, "batch_size": 4}]
    assert failed == odds and failed and len(result.ended) == 6 and len(lines) >= 6
    assert all("objective.k_neighbor: found 8 with batch_size 4" in trial.problem for trial in failed)
    assert result.best is not None and result.config is not None and result.config.objective.enabled


def test_a_tuning_that_cannot_work_ends(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Each value is allowed beside the base settings, but no two of them together."""
    words = ["--preset", "mosi", "--data", str(data), "--out", str(tmp_path / "out"), *QUICK, "epochs=1"]
    words += ["objective.enabled=true", "objective.k_neighbor=8..12", "batch_size=4,6", "--jobs", "1"]
    assert main(["tune", *words]) == 2
    error = capsys.readouterr().err
    assert re.search(r"found 3 trials that failed, and none that did not: objective.k_neighbor: found \d+ with", error)


def test_what_is_wrong_is_told_before_the_first_trial(
    whole_tuning: tuple[Path, str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def fails(*words: str, out: Path = tmp_path / "out") -> str:
        assert main(["tune", "--preset", "mosi", "--data", str(data), "--out", str(out), *QUICK, *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    assert "nothing to search" in fails()
    assert "train.lr: found -1" in fails("train.lr=-1..1")
    assert "Did you mean train.lr" in fails("train.lrr=1..2")
    assert "--seeds" not in fails("train.lr=1..2", "--seeds", "x")
    assert "trials: found 0" in fails("train.lr=1..2", "--trials", "0")
    space = tmp_path / "space.yaml"
    space.write_text("train.lr: {low: !!python/name:os.system , high: 1}")
    assert str(space) in fails("--space", str(space))
    space.write_text("train.lr: {low: tiny, high: 1}")
    assert f"{space}, train.lr, low: found 'tiny'; expected a number" in fails("--space", str(space))
    assert not (tmp_path / "out").exists()
    folder = whole_tuning[0]
    assert "found another tuning (space.train.lr" in fails("epochs=2", "train.lr=1..2", "threads=1", out=folder)
    assert "storage given, not in this folder" in fails(
        "epochs=2", *TUNE[3:], "threads=1", "--storage", f"sqlite:///{tmp_path}/x.db", out=folder
    )
    assert "study other, not engine" in fails("epochs=2", *TUNE[3:], "threads=1", "--study", "other", out=folder)
    assert main(["sweep", "--preset", "mosi", "--data", str(data), "--out", str(folder), "epochs=1,2"]) == 2
    assert "found another tuning" in capsys.readouterr().err


def test_without_optuna_there_is_one_line_and_the_rest_works(data: Path, tmp_path: Path):
    code = "import sys; sys.modules['optuna'] = None; from engine.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["tune", "--preset", "mosi", "--data", str(data), "--out", str(tmp_path / "out"), "train.lr=1e-4..1e-2"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == (
        'error: engine tune: found no optuna; expected the package optuna. Install it: pip install "engine[tune]".\n'
    )
    assert new_owner() != new_owner()
