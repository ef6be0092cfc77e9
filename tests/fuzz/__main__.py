"""Fuzz a reader of data, or config, run or report:  python -m tests.fuzz READER --runs N [--corpus DIR] [--seed S]

Guided by coverage where atheris is installed (pip install 'engine[fuzz]'), else mutations are drawn blindly. Inputs
that found something are kept in DIR (default: fuzz-READER) as finding-*; --replay FILE runs one of them.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

PATIENCE = 30  # seconds an execution may take
MEMORY_MB = 3000


def mutated(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    """A blind mutation of `data`."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(len(out) + 1))
        match rng.integers(6):
            case 0 if at < len(out):
                out[at] ^= 1 << int(rng.integers(8))
            case 1 if at < len(out):
                out[at] = int(rng.integers(256))
            case 2:
                out[at:at] = rng.bytes(int(rng.integers(1, 9)))
            case 3:
                del out[at : at + int(rng.integers(1, 9))]
            case 4:
                other = others[rng.integers(len(others))]
                start = int(rng.integers(len(other) + 1))
                out[at : at + 8] = other[start : start + int(rng.integers(1, 64))]
            case 5:
                del out[at:]
    return bytes(out)


class Session:
    """Executions of one target, counted, with the findings told apart by where they come from."""

    def __init__(self, target, corpus: Path, runs: int):
        self.target, self.corpus, self.runs = target, corpus, runs
        self.count, self.findings, self.start = 0, {}, time.perf_counter()

    def one(self, data: bytes) -> None:
        from tests.fuzz.targets import clean, execute

        finding = execute(self.target, data)
        self.count += 1
        if finding is not None and finding.partition(": ")[0] not in self.findings:
            self.findings[finding.partition(": ")[0]] = finding
            (self.corpus / f"finding-{len(self.findings)}").write_bytes(data)
            print(f"finding: {finding}", flush=True)
        if self.count == self.runs:
            self.report()
            clean()  # atheris ends the process without asking Python

    def report(self) -> None:
        rate = self.count / (time.perf_counter() - self.start)
        print(f"{self.target.name}: {self.count} executions, {len(self.findings)} findings, {rate:.0f}/s", flush=True)


def main() -> None:
    # Coverage needs the readers' modules to be instrumented while they are imported.
    try:
        import atheris
    except ImportError:
        atheris = None
    if atheris is not None:
        with atheris.instrument_imports(include=["engine.loaders", "engine.config", "engine.report"]):
            from tests.fuzz.folders import TARGETS as FOLDERS
            from tests.fuzz.targets import TARGETS, execute
    else:
        from tests.fuzz.folders import TARGETS as FOLDERS
        from tests.fuzz.targets import TARGETS, execute
    targets = TARGETS | FOLDERS

    form = argparse.RawTextHelpFormatter
    p = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__, formatter_class=form)
    p.add_argument("reader", choices=targets)
    p.add_argument("--runs", type=int, default=100_000)
    p.add_argument("--corpus", type=Path)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--replay", type=Path, help="run one input and say what it finds")
    p.add_argument("--blind", action="store_true", help="without atheris")
    a = p.parse_args()
    target = targets[a.reader]()
    if a.replay:
        print(execute(target, a.replay.read_bytes()) or "no finding")
        return
    corpus = a.corpus or Path(f"fuzz-{a.reader}")
    corpus.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(target.seeds()):
        (corpus / f"seed-{i}").write_bytes(seed)
    session = Session(target, corpus, a.runs)
    if atheris is not None and not a.blind:
        options = [f"-atheris_runs={a.runs}", f"-timeout={PATIENCE}", f"-rss_limit_mb={MEMORY_MB}",
                   f"-seed={a.seed + 1}",
                   "-max_len=16384", "-print_final_stats=0", "-verbosity=0", f"-artifact_prefix={corpus}/"]  # fmt: skip
        atheris.Setup([sys.argv[0], *options, str(corpus)], session.one)
        atheris.Fuzz()
        return
    blind(session, a.seed)
    os._exit(1 if session.findings else 0)


def blind(session: Session, seed: int) -> None:
    """Mutations of the seeds, drawn from `seed`."""
    faulthandler.enable()
    seeds, rng = session.target.seeds(), np.random.default_rng(seed)
    for _ in range(session.runs):
        if hasattr(signal, "alarm"):  # no handler: an execution that hangs ends the process, with a traceback
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
        session.one(mutated(seeds[rng.integers(len(seeds))], rng, seeds))
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
