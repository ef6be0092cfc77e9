"""Runs on several ranks: the files of one process, one writer, errors of any rank, restarts, the command line."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from engine import checkpoint, load_config, trainer
from engine.cli import main
from engine.errors import EngineError
from engine.loaders.make_data import make_data
from tests.loaders import writers
from tests.small_runs import make_text_encoder, small_config

QUICK = [
    "data.modalities=audio-vision", "batch_size=16", "epochs=4", "model.dropout=[0,0,0,0]", "model.d_common=16",
    "objective.hidden=16", "objective.embed=8", "train.optimizer=sgd", "train.lr=0.01", "train.clip_norm=1.0",
    "train.amp=off",
    "output.progress=false", "output.report=false", "output.tensorboard=false", "threads=1", "device=cpu",
]  # fmt: skip
TIMES = {"seconds", "waiting_seconds", "wall_seconds"}
PATIENCE_S = 600
"""For processes that end by themselves; one that waits for its group would wait for `train.timeout`, 1800 s."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "mosi", "mosi", 60, "declarelab")


def numbers(record):
    return {k: v for k, v in record.items() if k not in TIMES}


def content(out: Path) -> dict:
    state, meta = checkpoint.load(out / "last.safetensors")
    return {
        "history": [numbers(json.loads(line)) for line in (out / "history.jsonl").read_text().splitlines()],
        "weights": {k: state[k] for k in ("model", "objective", "average")} | {"bank": state["bank"]["rows"]},
        "predictions": {s: (out / f"predictions_{s}.csv").read_text().splitlines() for s in ("valid", "test")},
        "epoch": meta["epoch"],
    }


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def assert_same_run(found: Path, expected: Path, tolerance=1e-5):
    found, expected = content(found), content(expected)
    close(found["weights"], expected["weights"], tolerance)
    for one, other in zip(found["history"], expected["history"], strict=True):
        close({k: one[k] for k in ("train", "epoch")}, {k: other[k] for k in ("train", "epoch")}, tolerance)
        for split in ("valid", "test"):
            assert one[split].keys() == other[split].keys()
            # of a model that still predicts nearly a constant the correlation is a quotient of rounding errors
            keys = one[split].keys() - {"corr"}
            close({k: one[split][k] for k in keys}, {k: other[split][k] for k in keys}, tolerance)
    for split, lines in found["predictions"].items():
        assert [line.split(",")[0] for line in lines] == [line.split(",")[0] for line in expected["predictions"][split]]
        assert len(lines) > 5


def trained(rank, size, settings, out):
    """A run in the pool's process group. Returns what this rank was told of it."""
    result = trainer.train(load_config("mosi", settings), out)
    return {k: v for k, v in result.metrics.items() if k in ("best_epoch", "valid", "test")}


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_run_is_that_of_one_process(ranks, data, tmp_path, size):
    settings = [*QUICK, f"data.path={data}"]
    alone = trained(0, 1, settings, tmp_path / "one")
    together = ranks(size).run(trained, settings, str(tmp_path / "many"))
    assert all(one == together[0] for one in together)
    close({k: v for k, v in together[0]["valid"].items() if k != "corr"},
          {k: v for k, v in alone["valid"].items() if k != "corr"})  # fmt: skip
    assert_same_run(tmp_path / "many", tmp_path / "one")
    assert sorted(os.listdir(tmp_path / "many")) == sorted(os.listdir(tmp_path / "one"))


def text_run(rank, size, out, path, encoder):
    config = small_config(Path(path), Path(encoder))
    config.train.lr, config.train.optimizer, config.train.average = 1e-2, "sgd", 0.9
    config.model.dropout, config.model.modality_dropout = [0.0] * 4, 0.0
    config.epochs, config.threads, config.output.features = 2, 1, True
    config.batch_size, config.train.amp = 8, "off"
    trainer.train(config, out)


def test_a_run_with_a_text_encoder(ranks, tmp_path):
    encoder = make_text_encoder(tmp_path / "bert", dropout=0.0)
    writers.write_declarelab(tmp_path / "data", writers.samples(sizes={"train": 21, "valid": 6, "test": 9}))
    place = str(tmp_path / "data"), str(encoder)
    text_run(0, 1, str(tmp_path / "one"), *place)
    ranks(2).run(text_run, str(tmp_path / "two"), *place)
    assert_same_run(tmp_path / "two", tmp_path / "one")
    one, two = (load_file(tmp_path / n / "features_train.safetensors") for n in ("one", "two"))
    close(two, one)


def resumed(rank, size, settings, out):
    first = trainer.train(load_config("mosi", [*settings, "epochs=2"]), out).metrics["best_epoch"]
    return first, trainer.train(load_config("mosi", settings), out, resume=True).metrics["best_epoch"]


def test_resuming_on_ranks_is_bit_equal(ranks, data, tmp_path):
    settings = [*QUICK, f"data.path={data}", "model.dropout=[0.2,0.2,0.2,0.2]", "train.optimizer=adam"]
    ranks(2).run(trained, settings, str(tmp_path / "whole"))
    ranks(2).run(resumed, settings, str(tmp_path / "parts"))
    assert_same_run(tmp_path / "parts", tmp_path / "whole", 0)


def test_another_number_of_ranks_goes_on(ranks, data, tmp_path):
    settings = [*QUICK, f"data.path={data}"]
    trained(0, 1, settings, tmp_path / "one")
    trained(0, 1, [*settings, "epochs=2"], tmp_path / "grown")
    with pytest.warns(UserWarning, match="ranks 1, not 2") as _:
        ranks(2).run(grown, settings, str(tmp_path / "grown"))
        trainer.train(load_config("mosi", [*settings, "epochs=5"]), tmp_path / "grown", resume=True)
    grown_run, one = content(tmp_path / "grown"), content(tmp_path / "one")
    close([r["train"] for r in grown_run["history"][:4]], [r["train"] for r in one["history"]])


def grown(rank, size, settings, out):
    trainer.train(load_config("mosi", settings), out, resume=True)


def refused(rank, size, settings, out):
    try:
        trainer.train(load_config("mosi", settings), out)
    except EngineError as problem:
        return str(problem)


def test_a_batch_that_cannot_be_shared(ranks, data, tmp_path):
    messages = ranks(4).run(refused, [*QUICK, f"data.path={data}", "batch_size=18"], str(tmp_path / "run"))
    assert messages[0] == (
        "batch_size: found 18, which 4 ranks cannot share evenly; expected a multiple of 4: it counts the rows of all "
        "ranks together. Set batch_size=16 or 20."
    )
    assert messages[1:] == [f"rank 0: {messages[0]}"] * 3
    assert not (tmp_path / "run").exists()


# -- processes of their own ------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys
from engine.cli import main
from engine.errors import EstimatorError
from engine.training.rank_step import StepOnRanks

how, *arguments = sys.argv[1:]
plain, steps = StepOnRanks.stage2, 0

def stage2(self, *a, **k):
    global steps
    steps += 1
    if os.environ["RANK"] == "1" and steps == 8:  # the third epoch has begun
        if how == "raise":
            raise EstimatorError("here", "a bad number", "a good one", "Mend it.")
        if how == "kill" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, *a, **k)

StepOnRanks.stage2 = stage2
sys.exit(main(arguments))
"""


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A port that stays bound within the context, so that nobody else is given it. A server can listen on it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def environment(**more) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    root = str(Path(__file__).parents[2])
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root, "PYTHONWARNINGS": "default"} | more


def torchrun(*arguments, size=2) -> subprocess.CompletedProcess:
    with free_port() as port:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", f"--master-port={port}"]
        return subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=PATIENCE_S, env=environment()
        )


def ended(script, how, command, size=2) -> list[tuple[int, str]]:
    """(exit code, standard error) of every rank, of ranks that nothing watches over. `how` is the script's first
    argument.
    """
    with free_port() as port, contextlib.ExitStack() as stack:
        more = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        running = []
        for rank in range(size):
            process = subprocess.Popen(
                [sys.executable, str(script), *how, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                text=True, env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **more),
            )  # fmt: skip
            running.append(stack.enter_context(process))
            stack.callback(process.kill)
        errors = [process.communicate(timeout=PATIENCE_S)[1] for process in running]
    return [(process.returncode, error) for process, error in zip(running, errors, strict=True)]


def train_command(data, out):
    return ["train", "--preset", "mosi", "--data", str(data), "--out", str(out), *QUICK]


def test_a_killed_rank_ends_with_the_same_metrics(data, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    settings = [*QUICK, f"data.path={data}"]
    trainer.train(load_config("mosi", settings), tmp_path / "one")
    run = tmp_path / "run"
    ended = torchrun("--max-restarts=3", str(tmp_path / "script.py"), "kill", *train_command(data, run))
    assert ended.returncode == 0, ended.stderr
    assert "exitcode: -9" in ended.stderr or "SIGKILL" in ended.stderr or "Signal 9" in ended.stderr, ended.stderr
    assert_same_run(run, tmp_path / "one")
    assert ended.stdout.count("metrics at the best epoch") == 1
    assert ".job" not in os.listdir(run)


def test_an_error_of_one_rank_ends_all(data, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    codes, errors = zip(*ended(tmp_path / "script.py", ["raise"], train_command(data, tmp_path / "run")), strict=True)
    assert codes == (2, 2), errors
    lines = [[line for line in e.splitlines() if line.startswith("error: ")] for e in errors]
    assert lines[1] == ["error: here: found a bad number; expected a good one. Mend it."]
    assert lines[0] == ["error: rank 1: here: found a bad number; expected a good one. Mend it."]
    assert "Traceback" not in "".join(errors)
    assert content(tmp_path / "run")["epoch"] == 1


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_without_a_group_refuses(monkeypatch, capsys, data, tmp_path, rank):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(train_command(data, tmp_path / "run")) == 2 and not (tmp_path / "run").exists()
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        f"error: environment: found RANK={rank} of WORLD_SIZE=2, and no process group: no MASTER_ADDR and no "
        "MASTER_PORT; expected torchrun's environment. Start with torchrun, or unset RANK and WORLD_SIZE to train in "
        "one process."
    )


def test_other_commands_use_rank_0_alone(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["config", "--preset", "mosi"]) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    with pytest.warns(UserWarning, match="engine config runs in one process: the other 1 that torchrun started end"):
        assert main(["config", "--preset", "mosi"]) == 0
    assert capsys.readouterr().out.startswith("preset: mosi")


def test_the_slurm_example_is_valid_shell():
    script = Path(__file__).parents[2] / "examples" / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    options = {word.split("=")[0].strip("()") for word in text.split() if word.startswith("--")}
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    of_others = "job-name nodes ntasks-per-node gpus-per-node cpus-per-task time requeue signal kill-on-bad-exit"
    of_others = {f"--{name}" for name in f"{of_others} preset data out resume".split()}
    assert options - of_others <= known


def seeds_trained(rank, size, settings, out):
    results = trainer.train_seeds(load_config("mosi", settings), out, [0, 1])
    return [(result.out.name, result.metrics["best_epoch"]) for result in results]


def test_several_seeds_on_ranks(ranks, data, tmp_path):
    settings = [*QUICK, f"data.path={data}", "epochs=2", "objective.enabled=false"]
    first, other = ranks(2).run(seeds_trained, settings, str(tmp_path / "seeds"))
    assert first == other and [name for name, _ in first] == ["seed0", "seed1"]
    assert sorted(os.listdir(tmp_path / "seeds")) == ["seed0", "seed1", "summary.csv", "summary.json"]
