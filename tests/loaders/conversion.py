"""Conversions that are killed, limited and measured, in a process without threads, which may fork.

python -m tests.loaders.conversion kill FOLDER COUNT
python -m tests.loaders.conversion cut FOLDER COUNT
python -m tests.loaders.conversion limit FOLDER BYTES...
python -m tests.loaders.conversion memory FOLDER
"""

import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np

from engine.errors import DataError
from engine.loaders.convert import convert
from engine.loaders.store import open_store, verify_store
from tests.loaders import writers
from tests.loaders.test_text import small_tokenizer


def pickle_of(folder: Path, count: int, length: int, width: int) -> Path:
    """An MMSA file of `count` training samples, padded to four times their length."""
    rng = np.random.default_rng(0)
    content = {}
    for split, n in (("train", count), ("valid", 3), ("test", 3)):
        lengths = rng.integers(length // 8, length // 4, n)
        padded = rng.normal(size=(n, length, width)).astype(np.float32)
        padded *= (np.arange(length) < lengths[:, None])[..., None]
        content[split] = {
            "raw_text": np.array(["the film was good"] * n),
            "id": np.array([f"{split}$_${i}" for i in range(n)]),
            "audio": padded,
            "vision": padded[:, :, :2],
            "regression_labels": np.zeros(n, np.float32),
        }
    return writers.dump(content, folder / "data" / "x.pkl")


def fork(work) -> int:
    """A child that does `work` and ends with its result as exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(work() or 0)
        finally:
            os._exit(99)
    return pid


def compute(pid: int, seconds: float) -> None:
    """Wait until a child has computed for so long, however busy the machine is, or has ended."""
    place = Path(f"/proc/{pid}/stat")
    if not place.exists():  # a system without it: as if nobody else were busy
        time.sleep(seconds)
        return
    while True:
        state, *numbers = place.read_text().rpartition(")")[2].split()
        if state == "Z" or (int(numbers[10]) + int(numbers[11])) / os.sysconf("SC_CLK_TCK") >= seconds:
            return
        time.sleep(0.001)


def leftovers(target: Path) -> list[str]:
    return sorted(p.name for p in target.parent.iterdir() if p != target) if target.parent.is_dir() else []


def kill(folder: Path, count: int) -> dict:
    source, tokenizer = pickle_of(folder, 600, 160, 16), str(small_tokenizer(folder / "encoder"))
    target = folder / "out" / "store.safetensors"
    expected = convert(source, folder / "whole", tokenizer).read_bytes()
    _, status, used = os.wait4(fork(lambda: convert(source, folder / "again", tokenizer) and 0), 0)
    assert status == 0
    chance, killed, runs, corrupt = random.Random(0), 0, 0, []
    while killed < count and runs < 20 * count:
        runs += 1
        target.unlink(missing_ok=True)
        pid = fork(lambda: convert(source, target, tokenizer) and 0)
        compute(pid, chance.uniform(0, used.ru_utime + used.ru_stime))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):  # it was faster
            continue
        killed += 1
        if target.exists() and (verify_store(target) or target.read_bytes() != expected):
            corrupt.append(f"run {runs}: a store that is not whole")
        pid = fork(lambda: convert(source, target, tokenizer) and 0)
        _, status = os.waitpid(pid, 0)
        if status or verify_store(target) or target.read_bytes() != expected:
            corrupt.append(f"run {runs}: the next conversion failed")
        if leftovers(target):
            corrupt.append(f"run {runs}: left {leftovers(target)}")
    return {"killed": killed, "corrupt": corrupt, "left": leftovers(target)}


def cut(folder: Path, count: int) -> dict:
    """Sources that are cut off at a random place and moment: an error in one line, or the store of the whole file."""
    whole, tokenizer = pickle_of(folder, 600, 160, 16), str(small_tokenizer(folder / "encoder"))
    target, said, size = folder / "out" / "store.safetensors", folder / "said", whole.stat().st_size
    source = folder / "cut" / whole.name
    source.parent.mkdir()
    convert(whole, folder / "first", tokenizer)
    start = time.perf_counter()
    expected = open_store(convert(whole, folder / "whole", tokenizer)).meta["checksums"]
    seconds = time.perf_counter() - start
    chance, outcomes = random.Random(0), {"error": 0, "whole": 0, "wrong": []}

    def work() -> int:
        try:
            convert(source, target, tokenizer)
        except DataError as problem:
            said.write_text(str(problem))
            return 2
        return 0

    for run in range(count):
        target.unlink(missing_ok=True)
        source.write_bytes(whole.read_bytes())
        pid = fork(work)
        time.sleep(seconds * chance.random() ** (1 + run % 4))  # the file is read early
        os.truncate(source, int(chance.uniform(0, size)))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 0 and open_store(target).meta["checksums"] == expected and not verify_store(target):
            outcomes["whole"] += 1
        elif code == 2 and str(source) in said.read_text() and not target.exists() and not leftovers(target):
            outcomes["error"] += 1
        else:
            outcomes["wrong"].append(f"run {run}: exit code {code}")
    return outcomes


def limit(folder: Path, *sizes: int) -> list[dict]:
    source, tokenizer = pickle_of(folder, 600, 160, 16), str(small_tokenizer(folder / "encoder"))
    target, outcomes = folder / "out" / "store.safetensors", []
    for size in sizes:
        said = folder / "said"

        def work(size: int = size, said: Path = said) -> int:
            descriptor = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            try:
                convert(source, target, tokenizer)
            except DataError as problem:
                os.write(descriptor, str(problem).encode()[: size - 1])
            return 0

        os.waitpid(fork(work), 0)
        outcomes.append({"error": said.read_text(), "left": leftovers(target) + [target.name] * target.exists()})
    return outcomes


def memory(folder: Path) -> dict:
    source, tokenizer = pickle_of(folder, 3000, 400, 32), str(small_tokenizer(folder / "encoder"))
    convert(pickle_of(folder / "small", 10, 40, 4), folder / "warm", tokenizer)

    def resident(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    before = resident("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")
    path = convert(source, folder / "store", tokenizer)
    peak = resident("VmHWM:") - before
    split = open_store(path).splits["train"]
    ragged = split.audio.values.nbytes + split.vision.values.nbytes
    return {"peak": peak, "ragged": ragged, "pickle": source.stat().st_size}


if __name__ == "__main__":
    command, where, *numbers = sys.argv[1:]
    work = {"kill": kill, "cut": cut, "limit": limit, "memory": memory}[command]
    print(json.dumps(work(Path(where), *map(int, numbers))))
