"""Several processes with a gloo process group, for tests that compare them with one process.

A test asks the fixture `ranks` for a pool of 2 or 4 processes and runs functions of its module in all of them:

    def work(rank, size, *arguments):  # at module level; may return numbers, strings, tensors, lists and dicts of them
        ...

    def test_something(ranks):
        results = ranks(2).run(work, *arguments)  # one result per rank

A pool's processes live until the last test of the folder, because starting them takes seconds. A function that fails or
takes too long ends the pool and fails the test with the rank's traceback; the next call starts a new one.
"""

from __future__ import annotations

import io
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

STARTING_S = 300.0
"""What several processes may take to start, which import torch at once beside other tests."""


class Ranks:
    """A pool of `size` processes in one gloo group, which is their default process group."""

    def __init__(self, size: int):
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        self._folder: tempfile.TemporaryDirectory | None = None

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float = 300) -> list[Any]:
        """What function(rank, size, *arguments) returns in every process, rank 0 first.

        Args:
            function: at the top level of a module that the processes can import.
            arguments: picklable.
            seconds: the time limit of all together. It begins when every process has imported the function.

        Raises:
            AssertionError: a process failed, ended or took too long.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        self._answers(STARTING_S)
        answers = self._answers(seconds)
        return [torch.load(io.BytesIO(content), weights_only=True) for _, content in answers]

    def _answers(self, seconds: float) -> list[tuple[str, Any]]:
        """The next message of every process."""
        deadline = time.monotonic() + seconds
        answers: list[tuple[str, Any] | None] = [None] * self.size
        while None in answers:
            waiting = {self._pipes[rank]: rank for rank, answer in enumerate(answers) if answer is None}
            ready = multiprocessing.connection.wait(list(waiting), max(0, deadline - time.monotonic()))
            for pipe in ready:
                answers[waiting[pipe]] = self._answer(pipe)
            failed = [(rank, a[1]) for rank, a in enumerate(answers) if a is not None and a[0] == "failed"]
            if failed or not ready:
                self.close()
                late = f"ranks {sorted(waiting.values())} took more than {seconds} s"
                raise AssertionError("\n".join(f"rank {rank}:\n{text}" for rank, text in failed) or late)
        return [answer for answer in answers if answer]

    @staticmethod
    def _answer(pipe: Any) -> tuple[str, Any]:
        try:
            return pipe.recv()
        except EOFError:
            return "failed", "the process ended"

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = rank, self.size, str(Path(self._folder.name) / "store"), theirs
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _serve(rank: int, size: int, store: str, pipe: Any) -> None:
    """The life of one process: run functions until the pipe closes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    limit = timedelta(seconds=STARTING_S)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(("begins", None))
        try:
            buffer = io.BytesIO()
            torch.save(function(rank, size, *arguments), buffer)
            pipe.send(("done", buffer.getvalue()))
        except BaseException:
            pipe.send(("failed", traceback.format_exc()))
