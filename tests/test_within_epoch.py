"""Checkpoints within an epoch: a run that goes on from any batch ends as one that was not stopped."""

import copy
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from engine import checkpoint, trainer
from engine.config import ObjectiveConfig
from engine.config.sections import TrainConfig
from engine.errors import CheckpointError, ConfigError
from engine.objective import CMI, MI, Objective
from engine.step import TwoStageStep
from engine.step.averages import Average
from engine.step.bank import FeatureBank
from engine.step.position import Position
from engine.stopping import Stopped, StopSignals
from engine.training import parts, resuming, within_epochs
from engine.training.random_state import random_state, set_random_state
from tests.kills.content import content, differing
from tests.small_runs import AS_IN_A_TERMINAL, changed, history, small_config
from tests.test_run_folder import Stop

# -- the step --

SAMPLES, BATCH = 22, 4


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 1)

    def forward(self, x):
        hidden = nn.functional.dropout(self.one(x).tanh(), 0.3, self.training)
        return self.two(hidden), {"X": x[:, :3], "H": hidden}


class Batches:
    """Batches whose order depends on the pass; `read` counts those that were made."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(SAMPLES, 6, generator=generator), torch.randn(SAMPLES, 1, generator=generator)
        self.passes, self.first, self.read = 0, 0, 0

    def __len__(self):
        return -(-SAMPLES // BATCH)

    def go_to(self, passes, batch):
        self.passes, self.first = passes, batch

    def __iter__(self):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.passes))
        first, self.first, self.passes = self.first, 0, self.passes + 1
        for rows in order.split(BATCH)[first:]:
            self.read += 1
            yield self.x[rows], self.y[rows], rows


def make_step(graphs):
    torch.manual_seed(0)
    model = Small()
    objective = Objective(
        [0.1 * MI("H", "C"), 0.1 * CMI("H", "C", given="X")],
        dims={"X": 3, "H": 5, "C": 1},
        settings=ObjectiveConfig(bound="mine", hidden=8, embed=4),
    )
    return TwoStageStep(
        model,
        objective,
        nn.functional.mse_loss,
        torch.optim.Adam(model.parameters(), 0.01, fused=True),
        torch.optim.Adam(objective.parameters(), 0.01, fused=True),
        clip_norm=0.5,
        average=0.9,
        generator=torch.Generator().manual_seed(5),
        graphs=graphs,
    )


def state_of(step):
    return {
        "model": step.model.state_dict(),
        "objective": step.objective.state_dict(),
        "main": step.main_optimizer.state_dict(),
        "estimators": step.estimator_optimizer.state_dict(),
        "average": step.average.state_dict(),
        "generator": step.generator.get_state(),
        "rng": random_state(),
    }


def load_step(step, state):
    step.model.load_state_dict(state["model"])
    step.objective.load_state_dict(state["objective"])
    step.main_optimizer.load_state_dict(state["main"])
    step.estimator_optimizer.load_state_dict(state["estimators"])
    step.average.load_state_dict(state["average"])
    step.generator.set_state(state["generator"])
    set_random_state(state["rng"])


def equal(a, b):
    """Whether two nests agree bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b if not hasattr(a, "shape") else (a == b).all()


def epoch(step, loader, bank, features, on_batch=lambda *_: None, position=None):
    result, bank = step.train_epoch(
        loader, SAMPLES, bank, batch_size=BATCH, stage1_features=features, stage1_n=2, on_batch=on_batch,
        position=position,
    )  # fmt: skip
    return {"result": vars(result), "bank": bank.state_dict(), **state_of(step)}


@pytest.mark.parametrize("graphs", ["off", "emulate"])
@pytest.mark.parametrize(("features", "batches"), [("fresh", 18), ("cached", 24), ("bank", 18)])
def test_an_epoch_goes_on_from_every_batch(features, batches, graphs, tmp_path):
    """The first epoch, without a bank, and the second; a batch of two is too small for the conditional term."""
    for first in (True, False):
        step, loader, bank = make_step(graphs), Batches(), None
        if not first:
            bank = FeatureBank.of(epoch(step, loader, None, features)["bank"])
            loader.go_to(0, 0)
        position, saved = Position(), []

        def keep(stage, number, step=step, position=position, saved=saved):
            bank = None if position.bank is None else position.bank.state_dict()
            path = tmp_path / f"{len(saved)}"
            checkpoint.save(path, {"bank": bank, "position": position.state_dict(), **state_of(step)})
            saved.append(((stage, number), checkpoint.load(path)[0]))

        expected = copy.deepcopy(epoch(step, loader, bank, features, keep, position))
        assert len(saved) == (6 if first else batches)
        for done, ((stage, number), state) in enumerate(saved, 1):
            again, rest, follows = make_step(graphs), Batches(), []
            load_step(again, state)
            there = Position()
            there.load_state_dict(state["position"])
            found = epoch(
                again, rest, FeatureBank.of(state["bank"]), features,
                lambda *at, follows=follows: follows.append(at), there,
            )  # fmt: skip
            assert equal(found, expected), (features, stage, number)
            assert follows == [at for at, _ in saved[done:]]
            if (stage, number) == ("stage2", 3):
                assert rest.read == 2  # the batches that are done were not made again


def test_a_loader_that_cannot_skip_is_read_over():
    """Its batches must come in the same order in every pass."""
    step, batches = make_step("off"), list(Batches())
    states = []

    def keep(stage, number):
        states.append(copy.deepcopy((position.state_dict(), state_of(step))))

    position = Position()
    expected = copy.deepcopy(epoch(step, batches, None, "cached", keep, position))
    again, there = make_step("off"), Position()
    load_step(again, states[2][1])
    there.load_state_dict(states[2][0])
    assert equal(epoch(again, batches, None, "cached", position=there), expected)


def test_every_epoch_needs_a_position_of_its_own():
    """With the position of a finished epoch there would be nothing left to train on."""
    step, position = make_step("off"), Position()
    _, bank = step.train_epoch(Batches(), SAMPLES, None, batch_size=BATCH, position=position)
    with pytest.raises(ConfigError, match="position: found that of an epoch that is finished"):
        step.train_epoch(Batches(), SAMPLES, bank, batch_size=BATCH, position=position)
    before = copy.deepcopy(step.model.state_dict())
    step.train_epoch(Batches(), SAMPLES, bank, batch_size=BATCH, position=Position())
    assert not torch.equal(before["one.weight"], step.model.state_dict()["one.weight"])


def test_sums_survive_a_checkpoint():
    average = Average()
    for value in (1.0, 2.5):
        average.add(("a", "b"), torch.tensor([value, -value]), 4)
    average.add_sums({"c": (3.0, 2)})
    again = Average.of(average.state_dict())
    assert again.sums() == {"c": (3.0, 2), "a": (14.0, 8), "b": (-14.0, 8)}


# -- whole runs --


class Copy(Stop):
    """Copies the run's folder before every batch but the first: what a kill there would leave."""

    def __init__(self, run: Path, to: Path):
        super().__init__()
        self.run, self.to, self.batches = run, to, 0

    def on_batch(self, stage, number):
        self.batches += 1
        if self.batches > 1:
            shutil.copytree(self.run, self.to / str(self.batches - 1))


class Count(Stop):
    batches = 0

    def on_batch(self, stage, number):
        self.batches += 1


@pytest.fixture(scope="module")
def stopped(data, text_encoder, tmp_path_factory) -> Path:
    """A run of two epochs of 4 and 16 batches, with a checkpoint after each: "run", and "1" to "19" as left there."""
    settings = changed(small_config(data, text_encoder), epochs=2, train={"checkpoint_steps": 1})
    folder = tmp_path_factory.mktemp("stopped")
    copier = Copy(folder / "run", folder)
    trainer.train(settings, folder / "run", callbacks=[copier])
    assert copier.batches == 20
    return folder


def copied(stopped: Path, done: int, to: Path) -> Path:
    """The run as it was left after so many batches."""
    shutil.copytree(stopped / str(done), to, ignore=shutil.ignore_patterns(".lock"))
    return to


def assert_goes_on(settings, out, whole, rest):
    """Resume a run, which does the `rest` of its batches, and compare every file with the run that was not stopped."""
    count = Count()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train(settings, out, resume=True, callbacks=[count])
    assert count.batches == rest
    assert differing(content(out), content(whole)) == [], rest


@pytest.mark.parametrize("done", [1, 4, 5, 8, 9, 12, 13, 16, 17, 19])
def test_a_run_goes_on_from_its_batches(config, stopped, tmp_path, done):
    """The first and the last batch of every pass; `test_an_epoch_goes_on_from_every_batch` has those between."""
    settings = changed(config, epochs=2, train={"checkpoint_steps": 1})
    assert_goes_on(settings, copied(stopped, done, tmp_path / "run"), stopped / "run", 20 - done)


def resumed(settings, folder, at):
    """Resume a new run from some of its batches. Returns how many it has."""
    copier = Copy(folder / "run", folder / "stopped")
    trainer.train(settings, folder / "run", callbacks=[copier])
    for done in at:
        out = copied(folder / "stopped", done, folder / f"again{done}")
        assert_goes_on(settings, out, folder / "run", copier.batches - done)
    return copier.batches


def test_a_faithful_run_goes_on_from_its_batches(config, tmp_path):
    """The first and the last batch of every pass."""
    settings = changed(config, mode="faithful", epochs=2, train={"checkpoint_steps": 1})
    assert resumed(settings, tmp_path, (1, 4, 5, 8, 9, 12, 13, 15)) == 16


@pytest.mark.parametrize(
    ("more", "at"),
    [
        (
            {"train": {"stage1_features": "bank", "clip_norm": 0.3, "schedule": {"kind": "plateau", "patience": 0}}},
            (2, 4, 9, 12),
        ),
        ({"train": {"graphs": "emulate"}, "data": {"loader": "torch", "max_padding": 0.2}}, (2, 4, 9, 12)),
        (
            {
                "train": {"graphs": "emulate", "average": None, "stage1_features": "fresh", "optimizer": "sgd"},
                "data": {"augment": {"mask_audio": 0.3, "drop_text": 0.2}, "loader": "resident"},
            },
            (2, 4, 9, 12),
        ),
        # every pass of a run with workers starts processes
        ({"train": {"amp": "bf16", "stage1_n": 1}, "data": {"loader": "torch", "workers": 1}}, (4, 9)),
    ],
    ids=["bank-plateau", "emulate-torch-padding", "emulate-fresh-augment", "fp16-workers"],
)
def test_other_runs_go_on_from_some_batches(config, tmp_path, monkeypatch, more, at):
    """The last batch of a pass, and batches within each stage."""
    if "amp" in more["train"]:  # a CPU computes in float16, too, though too slowly to be offered
        monkeypatch.setattr(parts, "autocast_dtype", lambda *_: torch.float16)
        monkeypatch.setattr(torch.amp.GradScaler, "get_growth_interval", lambda self: 3)
    settings = changed(config, epochs=2, **more)
    resumed(changed(settings, train={"checkpoint_steps": 1}), tmp_path, at)


# -- signals --


@pytest.fixture
def usual_signals():
    """A process in the background of a shell script ignores SIGINT, and so would its tests."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Send(Stop):
    """Sends a signal after some batches, or twice after one."""

    def __init__(self, number, batch, times=1):
        super().__init__()
        self.number, self.at, self.times, self.seen = number, batch, times, 0

    def on_batch(self, stage, number):
        self.seen += 1
        for _ in range(self.times if self.seen == self.at else 0):
            signal.raise_signal(self.number)


def test_a_signal_in_python_saves_and_then_does_what_it_always_does(config, tmp_path, usual_signals):
    handled = []
    signal.signal(signal.SIGTERM, lambda *_: handled.append(checkpoint.load_meta(tmp_path / "run/last.safetensors")))
    with pytest.raises(Stopped) as stopped:
        trainer.train(config, tmp_path / "run", callbacks=[Send(signal.SIGTERM, 3)])
    assert stopped.value.number == signal.SIGTERM
    within = handled[0]["within"]
    assert (within["epoch"], within["stage"], within["batches"]) == (0, "stage2", 3)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(config, tmp_path / "run", resume=True, callbacks=[Send(signal.SIGINT, 3)])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    trainer.train(config, tmp_path / "run", resume=True)
    trainer.train(config, tmp_path / "whole")
    found = differing(content(tmp_path / "run"), content(tmp_path / "whole"))
    assert found == []


def test_a_second_signal_ends_at_once(config, tmp_path, usual_signals):
    with pytest.raises(KeyboardInterrupt):
        trainer.train(config, tmp_path / "run", callbacks=[Send(signal.SIGINT, 3, times=2)])
    assert not (tmp_path / "run/last.safetensors").exists()


def test_another_thread_has_no_handlers(config, tmp_path, usual_signals):
    before, seen = signal.getsignal(signal.SIGTERM), []

    class Look(Stop):
        def on_batch(self, stage, number):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(
        target=lambda: trainer.train(changed(config, epochs=1), tmp_path / "run", callbacks=[Look()])
    )
    thread.start()
    thread.join()
    assert seen and set(seen) == {before}


def test_a_signal_to_the_command_line(config, tmp_path):
    """`kill PID` while `engine train` runs, and `--resume`; tests/kills sends SIGINT and others."""
    changed(config, epochs=5000, train={"checkpoint_steps": 1}).save(tmp_path / "mine.yaml")
    out = tmp_path / "run"
    command = [sys.executable, "-m", "engine", "train", "--config", str(tmp_path / "mine.yaml"), "--out", str(out)]
    child = subprocess.Popen(
        [*AS_IN_A_TERMINAL, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not (out / "previous.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    error = child.communicate(timeout=300)[1]
    assert child.returncode == 128 + signal.SIGTERM, error
    (line,) = [line for line in error.splitlines() if line.startswith("interrupted")]
    assert re.fullmatch(
        rf"interrupted by SIGTERM: kept (\d+ epochs? and )?\d+ (batch(es)?|epochs?) in {out}\. "
        rf"Go on with: engine train --resume --out {out}", line,
    )  # fmt: skip


# -- when a checkpoint is due --


def test_minutes_and_steps(monkeypatch):
    now, saved = [0.0], []
    monkeypatch.setattr(within_epochs.time, "monotonic", lambda: now[0])

    def due(train):
        saved.clear()
        now[0] = 0.0
        return within_epochs.WithinEpochs(
            train, StopSignals(), lambda: saved.append(now[0]), lambda: saved.append("waited")
        )

    by_time = due(TrainConfig(checkpoint_minutes=0.5))
    for now[0] in (10, 29, 31, 60, 62, 91, 93):
        by_time.batch_done()
    assert saved == [31, 62, 93]
    by_steps = due(TrainConfig(checkpoint_minutes=None, checkpoint_steps=3))
    for now[0] in range(1, 8):
        by_steps.batch_done()
    assert saved == [3, "waited", 6, "waited"]
    by_steps.saved()  # the epoch's own checkpoint
    for now[0] in range(8, 11):
        by_steps.batch_done()
    assert saved[4:] == ["waited", 10, "waited"]
    never = due(TrainConfig(checkpoint_minutes=None))
    for now[0] in (1e3, 1e9):
        never.batch_done()
    assert saved == []


# -- damage --


def test_a_damaged_newest_checkpoint_is_found(config, stopped, tmp_path):
    """20 flipped bits and 20 truncations each: of the newest, and of both. History is cut where the older one was."""
    settings = changed(config, epochs=2, train={"checkpoint_steps": 1})
    whole = content(stopped / "run")
    out = copied(stopped, 5, tmp_path / "stopped/5")  # last: after a batch of epoch 1; previous: epoch 0
    last, previous = out / "last.safetensors", out / "previous.safetensors"
    assert [checkpoint.load_meta(path)["epoch"] for path in (last, previous)] == [0, 0]
    draw = random.Random(0)
    for path in (last, previous):
        intact = path.read_bytes()
        for number in range(40):
            at = draw.randrange(len(intact))
            damaged = (
                intact[:at]
                if number % 2
                else intact[:at] + bytes([intact[at] ^ (1 << draw.randrange(8))]) + intact[at + 1 :]
            )
            path.write_bytes(damaged)
            if path == last:
                with pytest.warns(
                    UserWarning, match=r"last\.safetensors: .* goes on from previous\.safetensors, after ep"
                ):
                    assert resuming.newest_checkpoint(out, settings.resolve(), {})[1]["epoch"] == 0
            else:  # the newest one is damaged already
                said = (
                    r"stopped/5: found no checkpoint that is whole \(last\.safetensors: .*; previous\.safetensors: .*\)"
                )
                with pytest.raises(CheckpointError, match=said):
                    resuming.newest_checkpoint(out, settings.resolve(), {})
        if path == previous:
            path.write_bytes(intact)
    with pytest.warns(UserWarning, match="goes on from previous"):
        trainer.train(settings, out, resume=True, callbacks=[Copy(out, tmp_path / "again")])
    assert differing(content(out), whole) == []
    # The first save after that replaced the damaged file, and left the whole one.
    assert (tmp_path / "again/1/previous.safetensors").read_bytes() == intact
    assert checkpoint.load(tmp_path / "again/1/last.safetensors")[1]["epoch"] == 0


def test_the_history_is_cut_to_the_checkpoint(config, stopped, tmp_path):
    """`previous` lies within an epoch that `last` has finished."""
    settings = changed(config, epochs=2, train={"checkpoint_steps": 1})
    out = copied(stopped, 4, tmp_path / "run")  # after the last batch of epoch 0, which is saved before epoch 1 begins
    assert checkpoint.load_meta(stopped / "5/previous.safetensors").get("within") is None
    assert len(history(out)) == 1 and "within" in checkpoint.load_meta(out / "previous.safetensors")
    flip = bytearray((out / "last.safetensors").read_bytes())
    flip[-3] ^= 4
    (out / "last.safetensors").write_bytes(flip)
    count = Count()
    with pytest.warns(UserWarning, match=r"goes on from previous\.safetensors, in epoch 0, after 4 batches"):
        trainer.train(settings, out, resume=True, callbacks=[count])
    assert count.batches == 16
    assert differing(content(out), content(stopped / "run")) == []


def test_a_run_may_not_end_within_an_epoch(config, tmp_path):
    settings = changed(config, train={"checkpoint_steps": 1})
    with pytest.raises(KeyboardInterrupt):
        trainer.train(settings, tmp_path / "run", callbacks=[StopAt(7)])
    with pytest.raises(ConfigError, match=r"epochs=1: found 1 finished epochs and a part of the next in .*epochs=2 or"):
        trainer.train(changed(settings, epochs=1), tmp_path / "run", resume=True)


class StopAt(Stop):
    def __init__(self, batch):
        super().__init__()
        self.at, self.seen = batch, 0

    def on_batch(self, stage, number):
        self.seen += 1
        if self.seen == self.at:
            raise KeyboardInterrupt
