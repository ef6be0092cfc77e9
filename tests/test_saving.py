"""Epochs that end before the checkpoint before them is written: they are left to the next one, and nothing is lost."""

import signal
import threading

import pytest

from engine import checkpoint, trainer
from engine.errors import EngineError
from engine.training import saving
from engine.training.phases import Phases, in_words
from engine.training.run import TrainingRun
from tests.kills.content import content, differing
from tests.small_runs import changed, history

EPOCHS = 6


@pytest.fixture
def settings(config):
    return changed(config, epochs=EPOCHS, train={"lr": 2e-3})


class SlowDisk:
    """Writing the checkpoint of epoch `slow` lasts until epoch `until` has been computed."""

    def __init__(self, monkeypatch, slow, until, fails_in=None):
        self.slow, self.written, self.go_on = slow, [], threading.Event()
        save, epoch_of = checkpoint.Snapshot.save, TrainingRun._epoch
        monkeypatch.setattr(saving, "LARGE", 0)

        def slow_save(snapshot, path, meta=None, previous=None):
            if path.name == "last.safetensors" and meta["epoch"] == slow and "within" not in meta:
                assert self.go_on.wait(60)
            save(snapshot, path, meta, previous)
            self.written.append((path.name, meta["epoch"]))

        def epoch(run, number, *rest):
            if number == fails_in:
                self.go_on.set()
                raise EngineError("epoch", "a problem of the test", "none", "Go on.")
            found = epoch_of(run, number, *rest)
            if number == until:
                self.go_on.set()
            if run.saving is not None and not slow < number < (until or EPOCHS):  # the disk is fast then
                run.saving.result()
            return found

        monkeypatch.setattr(checkpoint.Snapshot, "save", slow_save)
        monkeypatch.setattr(TrainingRun, "_epoch", epoch)

    def epochs(self, name):
        return [epoch for file, epoch in self.written if file == name]


def best_so_far(out):
    maes = [record["valid"]["mae"] for record in history(out)]
    return [epoch for epoch, mae in enumerate(maes) if mae == min(maes[: epoch + 1])]


def test_a_slow_disk_does_not_hold_up_the_training_and_the_folder_ends_the_same(settings, tmp_path, monkeypatch):
    trainer.train(settings, tmp_path / "fast")
    with monkeypatch.context() as patch:
        disk = SlowDisk(patch, slow=0, until=4)
        trainer.train(settings, tmp_path / "slow")
    assert disk.epochs("last.safetensors") == [0, 4, 5]  # 1 to 3 ended while 0 was being written
    best = best_so_far(tmp_path / "slow")
    postponed = [epoch for epoch in best if 1 <= epoch <= 4]
    written = [epoch for epoch in best if epoch in (0, 5)] + postponed[-1:]
    assert len(postponed) > 1 and disk.epochs("best.safetensors") == sorted(written)
    found, expected = (content(tmp_path / name) for name in ("slow", "fast"))
    for run in (found, expected):
        run.pop("previous.safetensors")  # that of another epoch
    assert not differing(found, expected)


def test_a_postponed_best_model_is_written_before_later_epochs_count(settings, tmp_path, monkeypatch):
    """Its weights are nowhere else."""
    disk = SlowDisk(monkeypatch, slow=0, until=4)
    trainer.train(settings, tmp_path / "run")
    best = [epoch for epoch in best_so_far(tmp_path / "run") if 1 <= epoch <= 4][-1]
    order = [name for name, epoch in disk.written if epoch in (best, 4) and epoch]
    assert order == (["best.safetensors", "last.safetensors"] if best < 4 else ["last.safetensors", "best.safetensors"])


def test_a_run_that_fails_with_postponed_epochs_goes_on_from_what_is_written(settings, tmp_path, monkeypatch):
    trainer.train(settings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        disk = SlowDisk(patch, slow=1, until=None, fails_in=4)
        with pytest.raises(EngineError, match="a problem of the test"):
            trainer.train(settings, tmp_path / "run")
    assert disk.epochs("last.safetensors") == [0, 1] and len(history(tmp_path / "run")) == 2
    trainer.train(settings, tmp_path / "run", resume=True)
    assert not differing(content(tmp_path / "run"), content(tmp_path / "whole"))


@pytest.fixture
def interrupts():
    """SIGINT raises KeyboardInterrupt, as in a terminal. A shell's background processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_while_an_epoch_is_evaluated_saves_that_epoch(settings, tmp_path, monkeypatch, interrupts):
    trainer.train(settings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        disk, evaluation = SlowDisk(patch, slow=1, until=3), TrainingRun._step_schedules

        def signalled(run, record):
            if record["epoch"] == 3:
                signal.raise_signal(signal.SIGINT)
            evaluation(run, record)

        patch.setattr(TrainingRun, "_step_schedules", signalled)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(settings, tmp_path / "run")
    assert disk.epochs("last.safetensors") == [0, 1, 3] and len(history(tmp_path / "run")) == 4
    assert "within" not in checkpoint.load_meta(tmp_path / "run/last.safetensors")
    trainer.train(settings, tmp_path / "run", resume=True)
    assert not differing(content(tmp_path / "run"), content(tmp_path / "whole"))


def test_small_checkpoints_and_runs_with_callbacks_save_every_epoch(settings, tmp_path, monkeypatch):
    class Reads:
        def on_start(self, first_epoch, epochs, batches):
            self.seen = []

        def on_batch(self, stage, number):
            pass

        def on_epoch(self, record, improved):
            self.seen.append(checkpoint.load_meta(tmp_path / "run/last.safetensors")["epoch"])

        def on_end(self):
            pass

    callback = Reads()
    monkeypatch.setattr(saving, "LARGE", 0)
    trainer.train(settings, tmp_path / "run", callbacks=[callback])
    assert callback.seen == list(range(EPOCHS))
    monkeypatch.undo()
    delayed, save = [], checkpoint.Snapshot.save

    def slow(snapshot, path, meta=None, previous=None):
        threading.Event().wait(0.05)
        delayed.append(path.name)
        save(snapshot, path, meta, previous)

    monkeypatch.setattr(checkpoint.Snapshot, "save", slow)
    trainer.train(settings, tmp_path / "small")
    assert delayed.count("last.safetensors") == EPOCHS


def test_the_phases_of_a_run_add_up_to_its_time(settings, tmp_path):
    metrics = trainer.train(changed(settings, epochs=2), tmp_path / "run").metrics
    timings = metrics["timings"]
    assert {"data", "model", "training", "evaluation", "readings", "saving", "other"} <= timings.keys()
    epochs = history(tmp_path / "run")
    whole = sum(r["seconds"] for r in epochs)
    assert whole / 2 < timings["training"] <= whole
    inside = timings["training"] + timings["evaluation"] + timings["readings"]
    assert inside <= 1.02 * sum(r["wall_seconds"] for r in epochs)
    assert metrics["wall_s"] <= sum(timings.values()) <= metrics["wall_s"] + 300


def test_time_within_a_phase_counts_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("engine.training.phases.time.perf_counter", lambda: now[0])
    phases = Phases()
    now[0] += 1
    with phases.of("training"):
        now[0] += 2
        with phases.of("saving"):
            now[0] += 4
        with pytest.raises(ValueError), phases.of("saving"):
            now[0] += 8
            raise ValueError
        now[0] += 16
    now[0] += 32
    assert phases.seconds() == {"other": 33, "training": 18, "saving": 12}
    assert in_words(64, phases.seconds()) == "time: 64.0 s (training 18.0, saving 12.0, other 34.0)"
