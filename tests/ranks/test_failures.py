"""One rank that fails ends all of them promptly, in few lines; warnings of one rank are seen."""

import contextlib
import io
import re
import socket
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine import load_config, trainer
from engine.cli import main
from engine.errors import EngineError
from engine.kernels import infonce
from engine.loaders.make_data import make_data
from engine.process_group import rank_device
from engine.ranks import Ranks
from engine.training.rank_step import StepOnRanks
from tests.ranks.test_run import QUICK, ended, torchrun, train_command
from tests.warned import user_warnings

SCRIPT = """
import os, signal, sys
from engine.cli import main
from engine.training.rank_step import StepOnRanks

how, who, *arguments = sys.argv[1:]
mine, plain, steps = who in ("all", os.environ["RANK"]), StepOnRanks.stage2, 0

def stage2(self, *a, **k):
    global steps
    steps += 1
    if mine and steps == 2:
        if how == "value":
            raise ValueError("user code of rank " + os.environ["RANK"])
        if how == "exit":
            sys.exit(3)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, *a, **k)

StepOnRanks.stage2 = stage2
if how == "data" and mine:
    arguments[arguments.index("--data") + 1] = "elsewhere"
sys.exit(main(arguments))
"""


AGAIN = """
import os
from engine.ranks import joined

for attempt in range(3):
    try:
        with joined("cpu", 300) as ranks, ranks.failing_together():
            if ranks.gather(attempt) == [attempt] * 2 and attempt == 0:
                assert os.environ["RANK"] == "0", "mine"
                ranks.barrier()
            print(f"[{ranks.rank} has {ranks.tell(10 + attempt)}]", flush=True)
    except Exception as error:
        print(f"[{os.environ['RANK']}: {error}]", flush=True)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "mosi", "mosi", 60, "declarelab")


@pytest.fixture
def script(tmp_path) -> Path:
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def errors_of(text: str) -> list[str]:
    return [line.split("]: ")[-1] for line in text.splitlines() if "error: " in line or "Error: user" in line]


def test_an_error_of_all_ranks_is_shown_once(script, data, tmp_path):
    done = torchrun(str(script), "value", "all", *train_command(data, tmp_path / "run"))
    assert done.returncode == 1
    assert len(errors_of(done.stderr)) == 1 and "ValueError: user code of rank" in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()  # no epoch was finished


def test_ranks_meet_again_after_a_failure(tmp_path):
    (tmp_path / "again.py").write_text(AGAIN)
    # torchrun then keeps one store for all groups of the processes, with the addresses of the first one
    done = torchrun("--rdzv-backend=static", str(tmp_path / "again.py"))
    # torchrun takes away Python's buffers: a line of one process may end after the next line of the other
    said = sorted(re.findall(r"\[(\d) has (\d+)\]", done.stdout))
    assert said == [(rank, value) for rank in "01" for value in ("11", "12")], done.stdout + done.stderr
    assert "[1: mine]" in done.stdout and "[0: rank 1: AssertionError: mine]" in done.stdout


def test_an_error_before_the_ranks_meet_is_told(script, data, tmp_path):
    (code, first), (other_code, other) = ended(script, ["data", "1"], train_command(data, tmp_path / "run"))
    message = "--data elsewhere: found no such file or folder; expected existing data. Check the path."
    assert (code, other_code) == (2, 2)
    assert errors_of(other) == [f"error: {message}"] and errors_of(first) == [f"error: rank 1: {message}"]
    assert "Traceback" not in first + other and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others(script, data, tmp_path):
    (code, first), (other_code, _) = ended(script, ["kill", "1"], train_command(data, tmp_path / "run"))
    assert (code, other_code) == (2, -9)
    assert errors_of(first) == [
        "error: another rank: it has ended without a message. See the log of what started the ranks"
    ]
    assert "Traceback" not in first and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_rank_that_leaves_is_named(script, data, tmp_path):
    (code, first), (other_code, _) = ended(script, ["exit", "1"], train_command(data, tmp_path / "run"))
    assert (code, other_code) == (2, 3)
    assert errors_of(first) == ["error: rank 1: SystemExit: 3"] and "Traceback" not in first


def warned(rank, size, settings, out):
    """The warnings that this rank showed of a run with warnings of all ranks and of one."""
    plain = StepOnRanks.stage2

    def stage2(self, *a, **k):
        warnings.warn("of all ranks", stacklevel=1)
        if rank:
            warnings.warn(f"a bad sample on {rank}", stacklevel=1)
        return plain(self, *a, **k)

    StepOnRanks.stage2 = stage2
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            shown = warnings.showwarning
            trainer.train(load_config("mosi", settings), out)
            assert warnings.showwarning is shown
        return user_warnings(seen)
    finally:
        StepOnRanks.stage2 = plain


def test_warnings_of_one_rank_are_shown_once_with_its_name(ranks, data, tmp_path):
    settings = [*QUICK, f"data.path={data}", "epochs=2", "batch_size=20"]
    first, *others = ranks(4).run(warned, settings, str(tmp_path / "run"))
    assert "of all ranks" in first and not any("bad sample" in text for text in first)
    for rank, texts in enumerate(others, 1):
        assert texts == [f"rank {rank}: a bad sample on {rank}"]


def test_what_starts_processes_of_its_own_is_refused_on_ranks(monkeypatch, tmp_path):
    import engine

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(EngineError, match=r"engine\.sweep: found WORLD_SIZE=2: it would run on every rank"):
        engine.sweep(load_config("mosi"), tmp_path / "sweep")
    with pytest.raises(EngineError, match=r"engine\.tune: found WORLD_SIZE=2"):
        engine.tune(load_config("mosi"), tmp_path / "tune", {"train.lr": [1e-3, 1e-2]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"RANK": "3"}, "found RANK=3 and WORLD_SIZE=2; expected numbers with RANK < WORLD_SIZE"),
        ({"RANK": "0", "MASTER_PORT": "port"}, "invalid literal for int() with base 10: 'port'"),
        (
            {"RANK": "0"},
            "address already in use; expected all ranks to meet at MASTER_ADDR. Choose another MASTER_PORT",
        ),
    ],
)
def test_an_environment_that_cannot_work_is_one_line(monkeypatch, capsys, data, tmp_path, variables, found):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "LOCAL_RANK": "0",
        } | variables
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert main([*train_command(data, tmp_path / "run"), "train.timeout=5"]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert found in line and not (tmp_path / "run").exists()


def test_fewer_gpus_than_ranks(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(EngineError, match="device: found LOCAL_RANK=1 and 1 GPUs; expected a GPU for every rank"):
        rank_device("auto")


def a_batch_more_on_rank_1(rank, size):
    """What a rank says that has more batches than another one, which leaves."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=300))
    q = torch.eye(4)
    infonce(q, q, gather=True, group=group)
    if rank == 0:
        dist.destroy_process_group(group)
        del group
        return "left"
    try:
        infonce(q, q, gather=True, group=group)
    except EngineError as error:
        return str(error)


def test_a_rank_that_runs_out_of_batches_first(ranks):
    texts = ranks(2).run(a_batch_more_on_rank_1, seconds=150)  # not the 300 s of the group
    assert texts[0] == "left"
    assert texts[1].startswith("another rank: it has ended or left the process group. Give all ranks equally many")


def exchanged(rank, size):
    """What ranks give each other in types that not every backend knows; a tensor says that it is on another GPU."""
    group = Ranks(rank, size)
    save = torch.serialization.location_tag
    torch.serialization.location_tag = lambda storage: f"cuda:{rank}" if len(storage) == 24 else save(storage)
    try:
        told = group.gather({"gpu": torch.tensor([1.0 + rank] * 3, dtype=torch.float64), "cpu": torch.tensor([rank])})
    finally:
        torch.serialization.location_tag = save
    rows = [torch.full((1 + rank, 2), rank).to(dtype) for dtype in (torch.bool, torch.int16, torch.bfloat16)]
    group.barrier()
    return told, [group.join_rows(x, [1, 2]) for x in rows]


def test_every_type_is_exchanged_and_lands_on_the_own_device(ranks):
    for told, joined in ranks(2).run(exchanged):
        assert [value["gpu"].tolist() for value in told] == [[1.0] * 3, [2.0] * 3]
        assert all(value["gpu"].device.type == "cpu" for value in told)
        assert [value["cpu"].item() for value in told] == [0, 1]
        for rows in joined:
            assert torch.equal(rows, torch.tensor([[0, 0], [1, 1], [1, 1]]).to(rows.dtype))


def stuck(rank, size):
    """How a rank ends that is stuck while another one fails: the exit codes that it would have ended with."""
    group, codes, ended = Ranks(rank, size), [], threading.Event()

    def end(code):
        codes.append(code)
        ended.set()

    if rank == 1:
        with pytest.raises(ValueError, match="of rank 1"), group.failing_together():
            raise ValueError("of rank 1")
        dist.barrier()
        return codes
    with contextlib.redirect_stderr(io.StringIO()) as said:
        with group._watched(every_s=0.05, grace_s=0.05, end=end):
            dist.barrier()
            assert ended.wait(60)
        with group._watched(every_s=0.01, grace_s=60.0, end=codes.append):
            time.sleep(0.1)  # one that ends by itself in time
    return [*codes, said.getvalue()]


def test_a_rank_that_is_stuck_ends_when_another_one_fails(ranks):
    assert ranks(2).run(stuck) == [[2, "error: rank 1: ValueError: of rank 1\n"], []]


@pytest.mark.slow
def test_the_check_for_gpus_runs_on_gloo():
    done = torchrun("-m", "bench.ranks_nccl")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "exchanges of a run, and a mistake of one rank, 2 ranks, gloo: right"
