"""Commands of `engine` in forked children: what is slow to import is imported once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 300  # seconds that a child may take


@dataclass
class Ended:
    """How a child ended: its exit code, negative where a signal killed it, its output, and seconds of computing."""

    code: int
    output: str
    seconds: float = 0.0

    @property
    def one_line(self) -> str:
        return " ".join(line for line in self.output.splitlines() if line.startswith(("error:", "interrupted")))


class Child:
    """`engine WORDS` in a process group of its own.

    Args:
        words: its command line.
        log: file for what it writes.
        before: called in the child before it begins.
    """

    def __init__(self, words: Sequence[str], log: Path, before: Callable[[], None] = lambda: None):
        self.log = log
        sys.stdout.flush()
        log.touch()
        self._listening, tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(words, before, tell)
        os.close(tell)
        os.setpgid(self.pid, self.pid)

    def _run(self, words: Sequence[str], before: Callable[[], None], tell: int) -> None:
        from engine import cli

        stop_signals, code = cli.stop_signals, 1

        @contextlib.contextmanager
        def told() -> Iterator[None]:
            with stop_signals():
                os.close(tell)
                yield
            # the work is done, and what is left of the process is a moment
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1))

        try:
            os.setpgid(0, 0)
            file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            before()
            cli.stop_signals = told
            code = cli.main(list(words))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait_until_it_works(self) -> None:
        """Wait until it handles signals, or has ended."""
        os.read(self._listening, 1)

    def wait(self) -> Ended:
        deadline = time.monotonic() + PATIENCE
        while not (found := os.wait4(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"{self.log}: still running after {PATIENCE} s")
            time.sleep(0.002)
        os.close(self._listening)
        used = found[2].ru_utime + found[2].ru_stime
        return Ended(os.waitstatus_to_exitcode(found[1]), self.log.read_text(encoding="utf-8"), used)

    def compute(self, seconds: float) -> None:
        """Wait until it has computed for so long, however busy the machine is, or has ended."""
        while os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            if (int(state[11]) + int(state[12])) / os.sysconf("SC_CLK_TCK") >= seconds:
                return
            time.sleep(0.001)

    def left_alone(self, patience: float = 120.0) -> bool:
        """Whether all processes that it started end, too."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.05)
        return False


class Renames:
    """Stands in for `os.replace` in a child: counts the calls, and kills the process at one of them.

    Args:
        at: number of the call, from 1; 0 kills at none.
        after: kill after the file has its new name, instead of before.
        names: file that gets the new name of every call.
    """

    def __init__(self, at: int = 0, after: bool = False, names: Path | None = None):
        self.at, self.after, self.names, self.calls = at, after, names, 0

    def __call__(self) -> None:
        """In the child, before it begins."""
        self.replace = os.replace
        os.replace = self._replace

    def _replace(self, old: str | Path, new: str | Path) -> None:
        self.calls += 1
        if self.names is not None:
            with self.names.open("a") as file:
                file.write(f"{Path(new).name}\n")
        here = self.calls == self.at
        if here and not self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            self.replace(old, new)  # there may be nothing to rename
        finally:
            if here:
                os.kill(os.getpid(), signal.SIGKILL)


class Steps:
    """Notes in a file, in a child, every batch that is done: a line "epoch batch", before anything is saved of it.

    Args:
        log: the file.
        kill_in_write: kill the process while it writes this tensor of its checkpoints, from 1; 0: do not.
        kill_after: kill it after so many batches; 0: do not.
    """

    def __init__(self, log: Path, kill_in_write: int = 0, kill_after: int = 0):
        self.log, self.kill_in_write, self.kill_after, self.written, self.done = log, kill_in_write, kill_after, 0, 0

    def __call__(self) -> None:
        """In the child, before it begins."""
        from engine import checkpoint
        from engine.training.run import TrainingRun

        file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.train_epoch, self.bytes = TrainingRun._train_epoch, checkpoint._bytes

        def train_epoch(run, epoch, bank, on_batch):
            def noted(stage, number):
                os.write(file, f"{epoch} {run.position.total}\n".encode())
                self.done += 1
                on_batch(stage, number)
                if self.done == self.kill_after:
                    os.kill(os.getpid(), signal.SIGKILL)

            return self.train_epoch(run, epoch, bank, noted)

        TrainingRun._train_epoch = train_epoch
        save = checkpoint.write_tensors

        def write_tensors(*arguments):
            checkpoint._bytes = self._counted
            try:
                save(*arguments)
            finally:
                checkpoint._bytes = self.bytes

        checkpoint.write_tensors = write_tensors

    def _counted(self, tensor):
        self.written += 1
        if self.written == self.kill_in_write:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.bytes(tensor)

    def read(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []
