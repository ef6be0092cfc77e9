"""One hostile file, one command, one forked process: what it did, how long it took and how much memory.

A process is forked, because starting Python with torch takes seconds. It calls `engine.cli.main` with the words that a
user would write.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from engine import trainer
from engine.cli import main
from engine.config import Config
from tests.loaders import writers
from tests.small_runs import small_config

SECONDS, MEGABYTES = 60, 4096  # of processor time, which a busy machine does not lengthen, and of memory
WAIT = 300  # seconds of the clock, for what waits without working
MARK = "executed"  # the file that foreign code would make, in the folder of its case
ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
TOLD = re.compile(r"^(warning|problem|note): |problem: |duplicate ids", re.MULTILINE)
SIZES = {"train": 8, "valid": 3, "test": 4}


@dataclass
class Case:
    """A hostile or broken input.

    Attributes:
        make: writes it into a new folder and returns the words after `engine`.
        accepted: why it is right that nothing is said about it; "" where it has to be refused or told.
    """

    name: str
    make: Callable[[Path], list[str]]
    accepted: str = ""


@dataclass
class Outcome:
    """`seconds`: of processor time.

    `faults`: those that were met of executed, slow, large, traceback, terminal, script and lines.
    """

    case: Case
    code: int
    seconds: float
    megabytes: float
    output: str
    faults: list[str]

    @property
    def silent(self) -> bool:
        """Whether the input was taken without a word."""
        return self.code == 0 and not self.faults and not TOLD.search(self.output)


@cache
def place() -> Path:
    """A folder for all that is made here, removed at the end."""
    kept = tempfile.TemporaryDirectory(prefix="hostile-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    owner = os.getpid()
    finish = kept._finalizer.detach()[2]  # forked children must not remove it
    import atexit

    atexit.register(lambda: finish and os.getpid() == owner and shutil.rmtree(kept.name, ignore_errors=True))
    return Path(kept.name)


@cache
def encoder() -> Path:
    """A tiny BERT with a tokeniser for the words of `data`, as a model folder."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = place() / "tiny_bert"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *writers.WORDS]
    (folder / "words.txt").write_text("\n".join(words), encoding="utf-8")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    BertTokenizerFast(str(folder / "words.txt")).save_pretrained(folder)
    return folder


@cache
def data() -> Path:
    """A small data set, converted once."""
    folder = place() / "data"
    folder.mkdir()
    writers.write_declarelab(folder, writers.samples(sizes=SIZES))
    return folder


@cache
def settings() -> Config:
    """Settings of a run of a second."""
    config = small_config(data(), encoder())
    config.epochs = 1
    return config


@cache
def run() -> Path:
    """A finished run with features, predictions and a report."""
    config = settings().model_copy(deep=True)
    config.output.features = config.output.report = True
    trainer.train(config, place() / "run")
    return place() / "run"


def execute(case: Case, seconds: float = SECONDS) -> Outcome:
    """Make the input in a new folder and run its command in a forked process."""
    folder = Path(tempfile.mkdtemp(dir=place()))
    words = case.make(folder)
    start, peak, killed = time.perf_counter(), 0.0, ""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _run(words, folder)
    shared = _resident(child)  # it begins with its parent's memory, which does not count
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        peak = max(peak, _resident(child) - shared)
        waited = time.perf_counter() - start > WAIT
        killed = "large" if peak > MEGABYTES else "slow" if waited or _processor(child) > seconds else ""
        if killed:
            os.killpg(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
        time.sleep(0.01)
    elapsed, code = usage.ru_utime + usage.ru_stime, os.waitstatus_to_exitcode(status)
    out, err = ((folder / name).read_text("utf-8", "replace") for name in (".out", ".err"))
    faults = [killed] if killed else []
    faults += ["executed"] * (folder / MARK).exists()
    faults += ["traceback"] * ("Traceback (most recent" in err or (code not in (0, 2) and not killed))
    faults += ["terminal"] * bool(ACTING.search(out + err))
    faults += ["script"] * any("<script>alert" in p.read_text("utf-8", "replace") for p in folder.rglob("report.html"))
    lines = [line for line in err.splitlines() if not line.startswith(("warning: ", "note: "))]
    faults += ["lines"] * (not killed and (len(lines) != 1 or not lines[0].startswith("error: ")) and code == 2)
    page = "".join(p.read_text("utf-8", "replace") for p in folder.rglob("report.html"))
    told = "\nnote: the page tells what it lacks" if re.search("Not in this run folder|cannot be read", page) else ""
    shutil.rmtree(folder, ignore_errors=True)
    return Outcome(case, code, elapsed, max(peak, usage.ru_maxrss / 1024 - shared), out + err + told, faults)


def _run(words: list[str], folder: Path) -> None:
    """The child: never returns."""
    code = 70
    try:
        os.setsid()
        for number, name in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _resident(process: int) -> float:
    """MiB of a process's memory."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    except (OSError, IndexError):
        return 0.0


def _processor(process: int) -> float:
    """Seconds that a process has worked."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return 0.0


@contextmanager
def warm() -> Iterator[None]:
    """What the forked processes share is made first."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run()
        yield
    finally:
        torch.set_num_threads(threads)
