"""Run folders: damage is noticed, a run that is stopped at any moment goes on, and one process writes at a time."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import checkpoint, run_folder, trainer
from engine.cli import main
from engine.config import Config, load_config
from engine.errors import CheckpointError, ConfigError, DataError, EngineError, OutputError
from engine.report import read_run, render
from engine.run_folder import Checksums, file_sum, owned, verify
from engine.training import parts
from engine.training.run import TrainingRun
from tests.loaders import writers
from tests.small_runs import SIZES, changed, history, small_config, timeless


@pytest.mark.parametrize("path", ["seed_backup/metrics.json", "config.yaml", "seed0"])
def test_files_of_ones_own_are_no_run(tmp_path, path):
    """A copy of some seed's run, a settings file, and a file that is named like a folder."""
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text("{}", encoding="utf-8")
    for seeds in (False, True):
        run_folder.require_kind(tmp_path, seeds)
    (tmp_path / "seed12").mkdir()
    (tmp_path / "seed12/metrics.json").write_text("{}", encoding="utf-8")
    run_folder.require_kind(tmp_path, seeds=True)
    with pytest.raises(OutputError, match="runs of several seeds"):
        run_folder.require_kind(tmp_path, seeds=False)


@pytest.fixture(scope="module")
def trained(data, text_encoder, tmp_path_factory) -> Path:
    """A finished run of three epochs with every file that a run can have but TensorBoard's."""
    out = tmp_path_factory.mktemp("trained") / "run"
    trainer.train(changed(small_config(data, text_encoder), output={"features": True, "report": True}), out)
    return out


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(trained, tmp_path / "run")


def flip(path: Path, at: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


# -- damage --


def test_every_damage_is_noticed(run):
    """40 flipped bits and 40 truncations over all files; what no reader notices is what no reader reads."""
    loaded, page = trainer.load_run(run), render(read_run(run))
    weights = loaded.model.state_dict()
    read = {
        "config.yaml", "metrics.json", "history.jsonl", "best.safetensors", "last.safetensors", "previous.safetensors",
        "normalizer.safetensors", "checksums.json", "predictions_valid.csv", "predictions_test.csv",
        "tokenizer.json", "tokenizer_config.json", *(f"features_{split}.safetensors" for split in SIZES),
    }  # fmt: skip
    names = sorted(path.name for path in run.iterdir())
    assert set(names) == read | {"metrics.csv", "report.html"}

    def noticed() -> bool:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                again = trainer.load_run(run)
                assert all(torch.equal(v, weights[k]) for k, v in again.model.state_dict().items())
                assert render(read_run(run)) == page
                for name in ("last", "previous"):  # what --resume reads
                    checkpoint.load(run / f"{name}.safetensors")
        except EngineError as error:
            assert "\n" not in str(error)
            return True
        return False

    assert not noticed()
    random = np.random.default_rng(0)
    for number in range(80):
        path = run / names[number % len(names)]
        whole = path.read_bytes()
        if number < 40:
            flip(path, int(random.integers(len(whole))), int(random.integers(8)))
        else:
            path.write_bytes(whole[: int(random.integers(len(whole) - 1))])
        assert noticed() == (path.name in read), (number, path.name)
        path.write_bytes(whole)


def test_a_damaged_file_is_named(run, data):
    flip(run / "normalizer.safetensors", -1)
    with pytest.raises(CheckpointError, match=r"normalizer\.safetensors: found contents that do not match"):
        trainer.evaluate(run, data)
    flip(run / "normalizer.safetensors", -1)
    lines = (run / "history.jsonl").read_bytes().splitlines(keepends=True)
    (run / "history.jsonl").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(CheckpointError, match=r"history\.jsonl: found contents that do not match"):
        read_run(run)


def test_settings_edited_in_a_run_folder_are_named(run, data, config):
    text = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(text.replace("clip: 5.0", "clip: 4.0"), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.yaml: .*\(data\.clip=4, not 5\)"):
        trainer.evaluate(run, data)
    edited = load_config(run / "config.yaml")
    with pytest.raises(ConfigError, match=r"data\.clip=4, not 5"):
        trainer.train(edited, run, resume=True)
    (run / "config.yaml").write_text(text.replace("device: auto", "device: cpu"), encoding="utf-8")
    assert trainer.evaluate(run, data) == trainer.evaluate(run, data, device="cpu")


def as_older_version(run: Path) -> None:
    """Records in the checkpoint, no checksums, no tokeniser, and neither settings nor data told."""
    for name in ("checksums.json", "previous.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (run / name).unlink()
    for name in ("best", "last"):
        state, meta = checkpoint.load(run / f"{name}.safetensors")
        if name == "last":
            state["history"] = json.dumps(history(run))
        older = {k: v for k, v in meta.items() if k not in ("settings", "data", "history")}
        checkpoint.save(run / f"{name}.safetensors", state, older)


def test_a_run_of_an_older_version_is_read_and_goes_on(config, data, tmp_path):
    trainer.train(changed(config, epochs=4), tmp_path / "whole")
    run = tmp_path / "run"
    trainer.train(changed(config, epochs=2), run)
    before = trainer.evaluate(run, data)
    as_older_version(run)
    with pytest.warns(UserWarning, match=r"no checksums\.json, as in a run of an older version") as caught:
        assert trainer.evaluate(run, data) == before
    assert sum("checksums.json" in str(warning.message) for warning in caught) == 1
    trainer.train(changed(config, epochs=4), run, resume=True)
    assert list(map(timeless, history(run))) == list(map(timeless, history(tmp_path / "whole")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_run(run)
    flip(run / "history.jsonl", 10)
    with pytest.raises(CheckpointError, match=r"history\.jsonl"):
        read_run(run)


def test_checksums_of_files_being_written(tmp_path):
    sums = Checksums(tmp_path)
    with sums.writing("a", "b"):
        (tmp_path / "a").write_text("one")
    assert json.loads((tmp_path / "checksums.json").read_text())["files"] == {"a": [3, 2053932785]}  # CRC-32 of "one"
    with pytest.raises(ZeroDivisionError), sums.writing("a"):
        (tmp_path / "a").write_text("two")
        _ = 1 / 0
    with pytest.warns(UserWarning, match=r"a: a run was writing these files"):
        verify(tmp_path, "a", "missing")
    assert not Checksums(tmp_path).hold("a")
    with sums.writing("a"):
        pass
    verify(tmp_path, "a")
    assert Checksums(tmp_path).hold("a")


def test_a_run_that_goes_on_meanwhile_is_not_taken_for_damaged(tmp_path, monkeypatch):
    sums = Checksums(tmp_path)

    def write(text):
        with sums.writing("a"):
            (tmp_path / "a").write_text(text)

    write("one")
    read, left = run_folder._read, [1]

    def slow(folder):
        found = read(folder)
        if left.pop() if left else 0:
            write("two")
        return found

    monkeypatch.setattr(run_folder, "_read", slow)
    verify(tmp_path, "a")
    (tmp_path / "a").write_text("six")
    with pytest.raises(CheckpointError, match="a: found contents"):
        verify(tmp_path, "a")


# -- stopped and gone on with --


class Stop:
    """Stands for a crash after a batch or an epoch."""

    def __init__(self, epoch=None, batch=None):
        self.epoch, self.batch = epoch, batch

    def on_start(self, first_epoch, epochs, batches): ...
    def on_end(self): ...

    def on_batch(self, stage, number):
        if self.batch is not None:
            raise KeyboardInterrupt

    def on_epoch(self, record, improved):
        if record["epoch"] == self.epoch:
            raise KeyboardInterrupt


def contents(run: Path) -> dict:
    """All that a run found out, times aside."""
    best, meta = checkpoint.load(run / "best.safetensors")
    return {
        "history": json.dumps([timeless(record) for record in history(run)]),
        "weights": {k: v.tolist() for k, v in best["model"].items()},
        "epoch": meta["epoch"],
        "test": json.loads((run / "metrics.json").read_text())["test"],
        "predictions": [(run / f"predictions_{split}.csv").read_text() for split in ("valid", "test")],
    }


def test_a_run_that_is_killed_at_any_write_goes_on(config, tmp_path, monkeypatch):
    """At every moment at which a file takes its place, whole runs are readable, and resumed ones end the same.

    The folder is copied at these moments, which is what a kill would leave there. tests/kills kills processes.
    """
    settings = changed(config, epochs=2, objective={"enabled": False})
    whole, replace, names, one_at_a_time = tmp_path / "whole", os.replace, [], threading.Lock()

    def copied(a, b):
        with contextlib.suppress(FileNotFoundError):  # another thread has just given it its name
            shutil.copy2(a, b)

    def copying(a, b):
        with one_at_a_time:
            names.append(Path(b).name)
            if whole.exists():
                to = tmp_path / f"run{len(names)}"
                shutil.copytree(whole, to, copy_function=copied, ignore=shutil.ignore_patterns(".lock"))
            replace(a, b)

    monkeypatch.setattr(os, "replace", copying)
    trainer.train(settings, whole)
    monkeypatch.undo()
    expected = contents(whole)
    assert names.count("last.safetensors") == 2 and names.count("best.safetensors") >= 1
    for at in range(1, len(names) + 1):
        run = tmp_path / f"run{at}"
        run.mkdir(exist_ok=True)
        (run / ".last.safetensors.x.part").touch()
        if (run / "metrics.json").exists():
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*a run was writing these files")
                read_run(run)
        trainer.train(settings, run, resume=True)
        assert contents(run) == expected, (at, names[at - 1])
        assert not list(run.glob(".*")), (at, names[at - 1])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainer.load_run(run)
            read_run(run)


@pytest.mark.parametrize("graphs", ["off", "emulate"])
def test_what_the_last_epoch_lacks_is_written(config, tmp_path, graphs):
    settings = changed(config, epochs=1, train={"graphs": graphs})
    run = tmp_path / "run"
    trainer.train(settings, run)
    expected = contents(run)
    for name in ("best.safetensors", "predictions_test.csv", "metrics.json"):
        (run / name).unlink()
    flip(run / "predictions_valid.csv", 40)
    trainer.train(settings, run, resume=True)
    assert contents(run) == expected


def test_the_checkpoint_before_is_used_where_the_newest_is_damaged(config, tmp_path):
    trainer.train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trainer.train(config, tmp_path / "run", callbacks=[Stop(epoch=1)])
    flip(tmp_path / "run/last.safetensors", -1)
    with pytest.warns(
        UserWarning, match=r"last\.safetensors: found contents.*from previous\.safetensors, after epoch 0"
    ):
        trainer.train(config, tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    for name in ("last", "previous"):
        flip(tmp_path / f"run/{name}.safetensors", -1)
    with pytest.raises(CheckpointError, match="checksum"):
        trainer.train(config, tmp_path / "run", resume=True)


def test_a_checkpoint_does_not_grow_with_epochs(config, tmp_path):
    sizes = {}
    for epochs in (2, 12):
        trainer.train(changed(config, epochs=epochs, objective={"enabled": False}), tmp_path / f"{epochs}")
        sizes[epochs] = (tmp_path / f"{epochs}/last.safetensors").stat().st_size
    assert abs(sizes[12] - sizes[2]) < 100
    assert file_sum(tmp_path / "12/history.jsonl")[0] > 5 * file_sum(tmp_path / "2/history.jsonl")[0]


def test_no_run_begins_anew_over_a_best_model(run, config):
    for name in ("last", "previous"):
        (run / f"{name}.safetensors").unlink()
    before = (run / "best.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"best\.safetensors without last\.safetensors"):
        trainer.train(config, run, resume=True)
    assert (run / "best.safetensors").read_bytes() == before


def test_history_that_was_changed_is_not_gone_on_from(run, config):
    flip(run / "history.jsonl", 20)
    with pytest.raises(CheckpointError, match=r"history\.jsonl: .*put the original back"):
        trainer.train(changed(config, epochs=4), run, resume=True)


def test_a_run_goes_on_with_its_own_data_only(run, config, data, tmp_path):
    shutil.copytree(data, tmp_path / "moved")
    moved = changed(config, epochs=4, data={"path": str(tmp_path / "moved")})
    trainer.train(moved, run, resume=True)
    assert len(history(run)) == 4
    samples = writers.samples(sizes=SIZES)
    samples["test"][2].label += 0.25
    writers.write_declarelab(tmp_path / "other", samples)
    other = changed(config, epochs=5, data={"path": str(tmp_path / "other")})
    with pytest.raises(DataError, match=r"other data than the run .* was trained on \(test\)"):
        trainer.train(other, run, resume=True)
    samples["train"] = samples["train"][:-1]
    writers.write_declarelab(tmp_path / "fewer", samples)
    with pytest.raises(DataError, match=r"\(test, train\)"):
        trainer.train(changed(other, data={"path": str(tmp_path / "fewer")}), run, resume=True)
    assert len(history(run)) == 4


# -- seeds --


def test_seeds_go_on_after_a_kill_in_the_first_epoch(config, tmp_path):
    settings = changed(config, epochs=2)
    trainer.train_seeds(settings, tmp_path / "whole", [0, 1])
    with pytest.raises(KeyboardInterrupt):
        trainer.train_seeds(settings, tmp_path / "runs", [0, 1], callbacks=[Stop(batch=0)])
    assert (tmp_path / "runs/seed0/config.yaml").exists()
    trainer.train_seeds(settings, tmp_path / "runs", [0, 1], resume=True)
    for seed in ("seed0", "seed1"):
        assert contents(tmp_path / "runs" / seed) == contents(tmp_path / "whole" / seed)


def test_finished_seeds_are_judged_by_their_checkpoint(config, tmp_path):
    settings = changed(config, epochs=3)
    trainer.train_seeds(settings, tmp_path / "whole", [0])
    trainer.train_seeds(changed(config, epochs=2), tmp_path / "runs", [0])
    run = tmp_path / "runs/seed0"
    with (run / "history.jsonl").open("a") as file:  # a line more than the checkpoint has epochs
        file.write("{}\n")
    trainer.train_seeds(settings, tmp_path / "runs", [0], resume=True)
    assert contents(run) == contents(tmp_path / "whole/seed0")
    expected = contents(run)
    for name in ("metrics.json", "predictions_test.csv"):
        before = (run / "last.safetensors").stat().st_mtime_ns
        (run / name).unlink()
        best = trainer.load_run(run).meta["epoch"]
        if name == "metrics.json" or best == 2:
            trainer.train_seeds(settings, tmp_path / "runs", [0], resume=True)
            assert contents(run) == expected
        assert (run / "last.safetensors").stat().st_mtime_ns == before, "no epoch was trained"
    with pytest.raises(ConfigError, match=r"train\.lr=0\.02, not 0\.01"):
        trainer.train_seeds(changed(settings, train={"lr": 2e-2}), tmp_path / "runs", [0], resume=True)


# -- one process --


def test_a_folder_has_one_owner(config, tmp_path):
    with owned(tmp_path / "run"):
        with pytest.raises(OutputError, match="another process is writing") as error:
            trainer.train(config, tmp_path / "run")
        assert "\n" not in str(error.value)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert not (tmp_path / "run").exists(), "nothing was written into it"
    with owned(tmp_path / "run"):
        (tmp_path / "run/notes.txt").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


HOLDER = """
import os, sys, time
from pathlib import Path
from engine.training import parts
from engine.training.run import TrainingRun
from engine.run_folder import owned
with owned(Path(sys.argv[1])):
    Path(sys.argv[1], ".best.safetensors.x.part").touch()
    if os.fork() == 0:  # a worker that outlives its parent
        print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_killed_owner_lets_go(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match="another process is writing"), owned(tmp_path):
            pass
        holder.kill()
        holder.wait()
        with owned(tmp_path):
            assert [path.name for path in tmp_path.iterdir()] == [".lock"], "temporary files are removed"
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_without_a_process_group_refuses(config, tmp_path, monkeypatch, rank):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for train in (trainer.train, lambda c, out: trainer.train_seeds(c, out, [0])):
        with pytest.raises(ConfigError, match=rf"RANK={rank} of WORLD_SIZE=2, and no process group"):
            train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- stopped by a signal --


@pytest.fixture
def signals_as_in_a_terminal():
    """A process in the background of a shell script ignores SIGINT, and so would its tests."""
    usual = {signal.SIGINT: signal.default_int_handler}
    usual |= dict.fromkeys((signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1), signal.SIG_DFL)
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_ends_with_what_is_kept(config, tmp_path, capsys, monkeypatch, signals_as_in_a_terminal, name):
    class Kill(Stop):
        def on_epoch(self, record, improved):
            if record["epoch"] == self.epoch:
                os.kill(os.getpid(), getattr(signal, name))

    run = tmp_path / "the run"
    changed(config, epochs=2).save(tmp_path / "mine.yaml")
    words = ["train", "--config", str(tmp_path / "mine.yaml"), "--out", str(run)]
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(TrainingRun, "_callbacks", lambda self, history: [Kill(batch=0)])
    monkeypatch.setattr(Kill, "on_batch", lambda *a: os.kill(os.getpid(), getattr(signal, name)))
    assert main(words) == 128 + getattr(signal, name)
    by = "" if name == "SIGINT" else f" by {name}"
    go_on = f"engine train --resume --out '{run}'"
    assert capsys.readouterr().err == f"interrupted{by}: kept 1 batch in {run}. Go on with: {go_on}\n"
    monkeypatch.setattr(Kill, "on_batch", lambda *a: None)
    monkeypatch.setattr(TrainingRun, "_callbacks", lambda self, history: [Kill(epoch=0)])
    assert main(["train", "--resume", "--out", str(run)]) == 128 + getattr(signal, name)
    assert capsys.readouterr().err == f"interrupted{by}: kept 1 epoch in {run}. Go on with: {go_on}\n"
    assert signal.getsignal(signal.SIGTERM) is before
    assert main(["train", "--resume", "--out", str(run)]) == 0
    assert len(history(run)) == 2


def test_a_signal_that_is_ignored_stays_so(monkeypatch, capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        monkeypatch.setattr("engine.config.load_config", lambda *a: (os.kill(os.getpid(), signal.SIGHUP), Config())[1])
        assert main(["config", "--preset", "mosi"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_names_of_a_runs_files_are_known(run):
    """What `engine demo` removes of an earlier demo."""
    assert {path.name for path in run.iterdir()} <= set(run_folder.FILES)


def changed_checkpoint(run: Path, name: str, **values) -> None:
    state, meta = checkpoint.load(run / name)
    state |= {k: v for k, v in values.items() if k in state}
    meta |= {k: v for k, v in values.items() if k not in state}
    checkpoint.save(run / name, state, meta)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"audio_dim": 10**9}, "a description of another form"),
        ({"audio_dim": 900_000}, r"audio_encoder\.\S+ of shape \[48, 5\].*expected shape \[48, 900000\]"),
        ({"audio_dim": 0}, "a state of another form"),
        ({"epoch": "1"}, "a description of another form"),
        ({"settings": [1]}, "settings: found an unknown key"),
        ({"text_encoder": None}, "a description of another form"),
        ({"model": [1]}, "something else than a state"),
        ({"objective": {"x": torch.zeros(1, dtype=torch.complex64)}}, "something else than a state"),
    ],
)
def test_a_checkpoint_that_describes_another_model_takes_no_memory(run, values, found, monkeypatch):
    """It is compared with its tensors while the model is made of none."""
    built = []
    monkeypatch.setattr(parts, "build", lambda *a, build=parts.build: built.append(build(*a)) or built[-1])
    changed_checkpoint(run, "best.safetensors", **values)
    with pytest.raises(EngineError, match=found) as error:
        trainer.load_run(run)
    assert "\n" not in str(error.value)
    own = [p for model, _ in built for name, p in model.named_parameters()]
    assert all(p.device.type == "meta" for p in own)


@pytest.mark.parametrize(
    "values",
    [{"optimizers": {"main": [1]}}, {"bank": {"rows": 5}}, {"rng": {"torch": 5}}, {"history": "x"}, {"epoch": None}],
)
def test_a_state_of_another_form_is_told(run, config, values):
    changed_checkpoint(run, "last.safetensors", **values)
    settings = changed(config, epochs=4, output={"features": True, "report": True})
    with pytest.raises(CheckpointError, match="another form") as error:
        trainer.train(settings, run, resume=True)
    assert "\n" not in str(error.value)
