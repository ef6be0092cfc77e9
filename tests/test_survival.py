"""Runs go on: without a terminal, with a full disk, after a divergence, on other hardware."""

import io
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from engine import checkpoint, metrics, trainer
from engine.callbacks import OpenEnded, TensorBoardCallback
from engine.cli import main
from engine.config import load_config
from engine.errors import CheckpointError, ConfigError, DataError, EstimatorError, OutputError
from engine.run_folder import owned
from engine.training.records import Selection
from engine.training.run import TrainingRun
from tests.kills.content import content, curves, differing
from tests.small_runs import changed, history
from tests.test_run_folder import Stop, flip
from tests.warned import user_warnings

# -- saving beside the next epoch --


def test_a_snapshot_does_not_follow_what_it_was_taken_of(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    state = {"weight": weight, "tied": weight, "row": weight[1], "turned": weight.t(), "of": {"epoch": 3, "rate": 0.5}}
    expected = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
    snapshot = checkpoint.Snapshot(state)
    weight.zero_()
    state["of"]["epoch"] = 4
    snapshot.save(tmp_path / "x.safetensors", {"epoch": 3})
    found, meta = checkpoint.load(tmp_path / "x.safetensors")
    assert meta == {"epoch": 3} and found["of"] == {"epoch": 3, "rate": 0.5}
    for name in ("weight", "tied", "row", "turned"):
        assert torch.equal(found[name], expected[name]), name


def test_what_saving_fails_of_ends_the_run(config, tmp_path, monkeypatch):
    """One epoch later at most, and with the error of the thread that saves."""
    save, epochs = checkpoint.Snapshot.save, []

    def full(self, path, meta=None, previous=None):
        epochs.append((path.name, meta["epoch"]))
        if meta["epoch"] == 1:
            raise OutputError(str(path), "no space left on the device", "room for the file", "Free some space.")
        save(self, path, meta, previous)

    monkeypatch.setattr(checkpoint.Snapshot, "save", full)
    with pytest.raises(OutputError, match=r"last\.safetensors: found no space left"):
        trainer.train(changed(config, epochs=9), tmp_path / "run")
    assert max(epoch for _, epoch in epochs) == 1
    monkeypatch.undo()
    trainer.train(changed(config, epochs=3), tmp_path / "whole")
    trainer.train(changed(config, epochs=3), tmp_path / "run", resume=True)
    assert differing(content(tmp_path / "run"), content(tmp_path / "whole")) == []


def test_callbacks_find_the_epoch_saved(config, tmp_path):
    class Look(Stop):
        def on_epoch(self, record, improved):
            assert checkpoint.load(tmp_path / "run/last.safetensors")[1]["epoch"] == record["epoch"]
            assert len(history(tmp_path / "run")) == record["epoch"] + 1

    trainer.train(config, tmp_path / "run", callbacks=[Look()])


# -- going on --


def test_a_restart_is_said(config, tmp_path):
    with pytest.warns(UserWarning, match=r"run: no epoch to go on from: the run begins at epoch 0"):
        trainer.train(changed(config, epochs=1), tmp_path / "run", resume=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train(changed(config, epochs=2), tmp_path / "run", resume=True)


def test_a_damaged_best_model_is_said_at_once(config, tmp_path, monkeypatch):
    monkeypatch.setattr(Selection, "better", lambda self, a, b, split: False)  # the first epoch stays the best
    run, said = tmp_path / "run", r"best\.safetensors not of epoch 0, the best by validation, whose weights are gone"
    trainer.train(changed(config, epochs=2), run)
    flip(run / "best.safetensors", -1)

    class Look(Stop):
        def on_start(self, first_epoch, epochs, batches):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match=said):
        trainer.train(config, run, resume=True, callbacks=[Look()])
    with pytest.warns(UserWarning, match=said):
        trainer.train(config, run, resume=True)
    with pytest.raises(CheckpointError, match=r"best\.safetensors: found contents that do not match"):
        trainer.load_run(run)


def test_fewer_epochs_than_a_run_has(config, tmp_path):
    trainer.train_seeds(changed(config, epochs=2), tmp_path / "runs", [0])
    before = content(tmp_path / "runs")
    fewer = changed(config, epochs=1)
    with pytest.raises(ConfigError, match=r"epochs=1: found 2 finished epochs in .*seed0"):
        trainer.train(fewer, tmp_path / "runs/seed0", resume=True)
    with pytest.raises(ConfigError, match=r"epochs=1: found 2 finished epochs"):
        trainer.train_seeds(fewer, tmp_path / "runs", [0], resume=True)
    assert differing(content(tmp_path / "runs"), before) == []


def test_other_threads_are_said(config, tmp_path):
    threads = torch.get_num_threads()
    other = threads % 2 + 1
    try:
        trainer.train(changed(config, epochs=1, threads=threads), tmp_path / "run")
        with pytest.warns(
            UserWarning, match=rf"threads {other}, not {threads}: it will not end bit-equal to one that was not interru"
        ):
            trainer.train(changed(config, epochs=2, threads=other), tmp_path / "run", resume=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainer.train(changed(config, epochs=3, threads=other), tmp_path / "run", resume=True)
    finally:
        torch.set_num_threads(threads)


def test_seeds_have_one_owner(config, tmp_path):
    with owned(tmp_path / "runs"), pytest.raises(OutputError, match="another process is writing"):
        trainer.train_seeds(config, tmp_path / "runs", [0])
    trainer.train_seeds(changed(config, epochs=1), tmp_path / "runs", [0])
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["seed0", "summary.csv", "summary.json"]


class Diverge:
    """Every epoch from `at` on fails as one with infinite weights would; the learning rates of the others are kept."""

    def __init__(self, monkeypatch, at, error):
        self.at, self.error, self.rates, self.epoch = at, error, {}, TrainingRun._epoch
        monkeypatch.setattr(TrainingRun, "_epoch", lambda *a: self(*a))

    def __call__(self, run, epoch, bank, on_batch):
        if epoch >= self.at:
            raise self.error
        self.rates[epoch] = [g["lr"] for o in run.parts.optimizers.values() for g in o.param_groups]
        return self.epoch(run, epoch, bank, on_batch)


NAN = DataError(metrics.PREDICTIONS, "3 of 6 not finite", "finite numbers", "Training has diverged: lower train.lr.")


@pytest.mark.parametrize("schedule", [{"milestones": [1, 3], "rate": 0.1}, {"kind": "plateau", "patience": 0}])
def test_a_diverged_run_goes_on_with_a_lower_rate(config, data, tmp_path, monkeypatch, schedule):
    settings = changed(config, epochs=4, train={"lr": 1e-2, "schedule": schedule})
    diverge = Diverge(monkeypatch, 2, NAN)
    with pytest.raises(
        DataError, match=r"lower train\.lr\. The run in .*run can go on after epoch 1 that way: with --r"
    ):
        trainer.train(settings, tmp_path / "run")
    diverge.at = 9
    trainer.train(settings, tmp_path / "same", resume=False)
    before = dict(diverge.rates)
    lower = changed(settings, train={"lr": 1e-3})
    with pytest.raises(ConfigError, match=r"train\.mi_lr_rate=0\.5, not 1"):
        trainer.train(changed(settings, train={"mi_lr_rate": 0.5}), tmp_path / "run", resume=True)
    trainer.train(lower, tmp_path / "run", resume=True)
    assert [r["epoch"] for r in history(tmp_path / "run")] == [0, 1, 2, 3]
    if "milestones" in schedule:  # the schedule goes on, on a tenth of its rates
        for epoch in (2, 3):
            assert diverge.rates[epoch] == pytest.approx([0.1 * rate for rate in before[epoch]], rel=1e-12)
    assert diverge.rates[2][0] == pytest.approx(0.1 * before[2][0], rel=1e-12)
    assert trainer.evaluate(tmp_path / "run", data)["mae"] > 0  # its best may be of the higher rate
    assert load_config(tmp_path / "run/config.yaml").train.lr == 1e-3
    with pytest.raises(ConfigError, match=r"train\.lr=0\.01, not 0\.001"):
        trainer.train(changed(settings, epochs=5), tmp_path / "run", resume=True)


def test_what_else_a_divergence_allows(config, tmp_path, monkeypatch):
    Diverge(monkeypatch, 1, EstimatorError("objective term", "an estimate of nan", "finite estimates", "Mend it."))
    with pytest.raises(EstimatorError, match=r"Mend it\. The run in .*another objective\.on_degenerate or train\.cli"):
        trainer.train(config, tmp_path / "run")
    (found,) = json.loads((tmp_path / "run/diverged.json").read_text())
    assert found["epoch"] == 0 and "an estimate of nan" in found["problem"]
    monkeypatch.undo()
    milder = changed(config, train={"clip_norm": 1.0}, objective={"on_degenerate": "skip"})
    trainer.train(milder, tmp_path / "run", resume=True)
    assert len(history(tmp_path / "run")) == 3


def test_other_errors_allow_nothing(config, tmp_path, monkeypatch):
    Diverge(monkeypatch, 1, DataError("x.pkl", "a later time of writing", "the file as it was", "Start again."))
    with pytest.raises(DataError, match=r"Start again\.$"):
        trainer.train(config, tmp_path / "run")
    assert not (tmp_path / "run/diverged.json").exists()
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"train\.lr=0\.001, not 0\.01"):
        trainer.train(changed(config, train={"lr": 1e-3}), tmp_path / "run", resume=True)


# -- TensorBoard --


def expected_curves(run: Path) -> dict:
    found = {}
    for record in history(run):
        for split in ("train", "valid", "test"):
            for name, value in record[split].items():
                for term, nats in value.items() if isinstance(value, dict) else [("", value)]:
                    tag = f"{name}/{term}/{split}" if term else f"{name}/{split}"
                    found[tag, record["epoch"]] = math.nan if nats is None else nats
        for optimizer in ("main", "estimators"):
            found[f"lr/{optimizer}", record["epoch"]] = record[f"lr_{optimizer}"]
    return found


def test_a_resumed_run_goes_on_with_weights_that_a_callback_changed(config, tmp_path):
    class Reweigh(Stop):
        def on_batch(self, stage, number):
            if stage == "stage1":  # in epoch 1, the first that has one
                run.parts.objective.set_weights({e.name: 5.0 for e in run.parts.objective.expressions})

    ends = []
    for stop in (None, 1):
        run = TrainingRun(config, tmp_path / f"stopped at {stop}", callbacks=[Reweigh(epoch=stop)])
        if stop is None:
            run.fit(False)
        else:
            with pytest.raises(KeyboardInterrupt):
                run.fit(False)
            trainer.train(config, run.out, resume=True)
        ends.append(history(run.out)[-1])
    assert ends[1]["train"] == ends[0]["train"] and ends[1]["valid"] == ends[0]["valid"]


def assert_complete(run: Path) -> None:
    found, expected = curves(run), expected_curves(run)
    assert found.keys() == expected.keys()
    for key, values in found.items():
        assert values == pytest.approx([expected[key]], rel=1e-6, nan_ok=True), key
    (file,) = (run / "tensorboard").glob("events*")
    assert file.name.endswith(".engine")


def test_curves_are_whole_after_any_stop(config, tmp_path):
    settings, run = changed(config, output={"tensorboard": True}), tmp_path / "run"
    mine = run / "tensorboard/events.out.tfevents.1.mine"
    for epoch in (0, 1):  # stopped before TensorBoard has heard of the epoch
        with pytest.raises(KeyboardInterrupt):
            trainer.train(settings, run, resume=epoch > 0, callbacks=[Stop(epoch=epoch)])
        assert max((step for _, step in curves(run)), default=-1) == epoch - 1
        mine.touch()
    trainer.train(settings, run, resume=True)
    assert mine.exists()
    mine.unlink()
    assert_complete(run)
    trainer.train(settings, run, resume=True)
    assert_complete(run)


def test_a_full_disk_for_curves_does_not_end_a_run(config, tmp_path, monkeypatch):
    real, run = Path.open, tmp_path / "run"

    def full(self, *a, **k):
        return real(Path("/dev/full") if "tfevents" in self.name else self, *a, **k)

    monkeypatch.setattr(Path, "open", full)
    settings = changed(config, output={"tensorboard": True})
    with pytest.warns(
        UserWarning, match=r"tensorboard: No space left on device: TensorBoard's curves end here"
    ) as told:
        trainer.train(settings, run)
    assert sum("TensorBoard" in str(warning.message) for warning in told) == 1
    assert len(history(run)) == 3
    monkeypatch.undo()
    trainer.train(settings, run, resume=True)
    assert_complete(run)


def test_curves_begin_when_the_run_did(tmp_path):
    past = [{"epoch": e, "wall_seconds": 100.0, "train": {}, "valid": {}, "test": {}, "lr_main": 1.0} for e in range(3)]
    board = TensorBoardCallback(tmp_path, [record | {"lr_estimators": 0.5} for record in past])
    board.on_start(3, 4, {})
    board.on_end()
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (file,) = tmp_path.iterdir()
    times = {e.step: e.wall_time for e in EventFileLoader(str(file)).Load() if e.summary.value}
    assert [times[2] - times[e] for e in (0, 1)] == pytest.approx([200, 100], abs=1)


# -- closed streams --


class Broken(io.StringIO):
    """Takes a number of writes."""

    def __init__(self, writes: int):
        super().__init__()
        self.writes = writes

    def write(self, text):
        self.writes -= 1
        if self.writes < 0:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


def test_a_stream_that_breaks_is_let_go():
    stream = Broken(2)
    out = OpenEnded(stream, "standard output")
    with pytest.warns(UserWarning, match="standard output: Broken pipe: the rest of it is lost") as told:
        for word in ("a", "b", "c", "d"):
            out.write(word)
            out.flush()
    assert stream.getvalue() == "ab" and len(user_warnings(told)) == 1


WAITING = """
import os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
from engine.cli import main
from engine.training.run import TrainingRun
train_epoch = TrainingRun._train_epoch
def after_its_reader(run, epoch, *more):
    if epoch:
        sys.stdin.read()
    return train_epoch(run, epoch, *more)
TrainingRun._train_epoch = after_its_reader
sys.exit(main(sys.argv[1:]))
"""
"""Goes on after its first epoch once its standard input is closed."""


@pytest.fixture
def words(config, tmp_path) -> list[str]:
    changed(config, epochs=2, output={"progress": True}).save(tmp_path / "mine.yaml")
    return ["train", "--config", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "run")]


def test_training_outlives_head(words, tmp_path):
    """`engine train | head -1` and `engine train >&- 2>&-`."""
    command = [sys.executable, "-c", WAITING, *words]
    read, write = os.pipe()
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    error = child.communicate()[1]  # which closes its input
    assert child.returncode == 0, error
    assert "standard output: Broken pipe" in error and "Traceback" not in error
    assert len(history(tmp_path / "run")) == 2 and (tmp_path / "run/metrics.json").exists()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_training_without_a_stream(words, tmp_path, monkeypatch, stream):
    monkeypatch.setattr(sys, stream, None)  # as Python has it where the descriptor is closed
    assert main(words) == 0
    assert len(history(tmp_path / "run")) == 2


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_training_with_a_full_disk_behind_a_stream(words, tmp_path, monkeypatch, stream):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, stream, full)
        assert main(words) == 0
    assert len(history(tmp_path / "run")) == 2


def test_a_demo_is_cleared_only_after_its_settings_are_checked(tmp_path, capsys):
    load_config("demo").save(tmp_path / "config.yaml")
    (tmp_path / "metrics.json").write_text("{}")
    for setting, said in (("data.path=x.pkl", "data.path"), ("device=cuda:99", "device"), ("epochs=x", "epochs")):
        assert main(["demo", "--out", str(tmp_path), setting]) == 2
        assert said in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "metrics.json"]


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs fork and Linux's /proc")
def test_a_sample_of_the_kills():
    """One part in 30 of `python -m tests.kills`, which does them all."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", "--share", "30"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|")[2:4] for line in done.stdout.splitlines() if line.startswith(("| `kill", "| kill"))]
    assert len(rows) == 8 and all(int(tried) > 0 and tried == right for tried, right in rows)
