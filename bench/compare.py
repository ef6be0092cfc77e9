"""The engine of this working tree against that of another commit, on the same suites, in alternating rounds.

Each engine runs in its own process, which is idle while the other one is timed. Both run the present suites: the other
process imports `engine` from a git worktree of the other commit and `bench` from here.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench import machine

DEFAULT = ("gru", "knn", "critics", "streaming_infonce", "concat_critic", "cubemlp", "loader_throughput")
ROUNDS, QUICK_ROUNDS = 7, 3
SIDES = ("here", "base")


class WorkerError(RuntimeError):
    """A suite does not run on one of the two engines."""


class Worker:
    """One engine, timed on request."""

    def __init__(self, name: str, root: Path, quick: bool, threads: int):
        command = [sys.executable, "-m", "bench", "serve", name, "--threads", str(threads)]
        command += ["--quick"] if quick else []
        environment = os.environ | {"PYTHONPATH": str(root)}
        self.process = subprocess.Popen(
            command, cwd=root, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def wait_until_ready(self) -> Path:
        """The place of this worker's engine. Raises WorkerError if the suite does not run on it."""
        return Path(self._answer()["engine"])

    def measure(self) -> float:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._answer()["number"]

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict:
        while line := self.process.stdout.readline():
            if line.startswith("{"):  # libraries may print as well
                answer = json.loads(line)
                if "error" in answer:
                    raise WorkerError(answer["error"])
                return answer
        raise WorkerError(f"ended with status {self.process.wait()}")


def serve(name: str, quick: bool) -> int:
    """Build and warm the engine's side of a suite, then answer every line of standard input with one measurement."""
    try:
        import engine
        from bench import runner

        setting = runner.Setting(quick)
        runner.check_gate(name, setting)
        work = runner.load_suite(name).build("engine", setting)
        calls = runner.warm(work, setting)
    except Exception as cause:
        print(json.dumps({"error": f"{type(cause).__name__}: {cause}"}), flush=True)
        return 1
    try:
        print(json.dumps({"engine": str(Path(engine.__file__).parent)}), flush=True)
        for _ in sys.stdin:
            print(json.dumps({"number": runner.measure(work, calls, setting)}), flush=True)
    finally:
        work.close()
    return 0


@contextlib.contextmanager
def roots(base: str) -> Iterator[dict[str, Path]]:
    """Folders to import from: {"here", "base"}, each with an `engine` and the present `bench`."""
    git = ["git", "-C", str(machine.ROOT)]
    with tempfile.TemporaryDirectory(prefix="bench-compare-") as name:
        folder = Path(name)
        tree = folder / "worktree"
        subprocess.run([*git, "worktree", "add", "--detach", "--quiet", str(tree), base], check=True)
        try:
            folders = {}
            for side, source in (("here", machine.ROOT), ("base", tree)):
                folders[side] = folder / side
                folders[side].mkdir()
                (folders[side] / "engine").symlink_to(source / "engine")
                (folders[side] / "bench").symlink_to(machine.ROOT / "bench")
            yield folders
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)


def compare(
    base: str, names: Sequence[str], quick: bool, rounds: int | None, threads: int, say: Callable[[str], None]
) -> int:
    """Print one line of JSON per suite: the base's time over this tree's (above 1: faster here), and both medians."""
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    with roots(base) as places:
        for name in names or DEFAULT:
            workers: dict[str, Worker] = {}
            try:
                for side in SIDES:
                    say(f"{name}: preparing {side}")
                    workers[side] = Worker(name, places[side], quick, threads)
                    workers[side].wait_until_ready()
                numbers: dict[str, list[float]] = {side: [] for side in SIDES}
                for number in range(rounds):
                    for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                        numbers[side].append(workers[side].measure())
            except WorkerError as problem:
                print(json.dumps({"name": name, "error": str(problem)}), flush=True)
                continue
            finally:
                for worker in workers.values():
                    worker.close()
            medians = {side: statistics.median(n) for side, n in numbers.items()}
            paired = [b / a for a, b in zip(numbers["here"], numbers["base"], strict=True)]
            line = {"name": name, "ratio": medians["base"] / medians["here"], "paired": sorted(paired), **medians}
            line |= {"base_ref": base, "commit": machine.commit(), "rounds": rounds, "quick": quick}
            print(json.dumps(line), flush=True)
    return 0
