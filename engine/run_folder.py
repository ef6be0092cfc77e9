"""The files of a run folder: their names, who may write them, and whether they are still what was written.

`checksums.json` holds the length and CRC-32 of the folder's files, and a CRC-32 of itself. `best.safetensors`,
`last.safetensors` and `previous.safetensors` carry their own (see `engine.checkpoint`).
"""

from __future__ import annotations

import contextlib
import json
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, OutputError
from engine.files import lock, output_error, parse_json, read_text, sweep_folder, write_json
from engine.vocabulary import SPLITS

CONFIG, METRICS, METRICS_CSV, HISTORY = "config.yaml", "metrics.json", "metrics.csv", "history.jsonl"
BEST, LAST, PREVIOUS = "best.safetensors", "last.safetensors", "previous.safetensors"
NORMALIZER, TRUTH, REPORT = "normalizer.safetensors", "truth.json", "report.html"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
CHECKSUMS, LOCK = "checksums.json", ".lock"
DIVERGED, TENSORBOARD = "diverged.json", "tensorboard"

PREDICTIONS = tuple(f"predictions_{split}.csv" for split in SPLITS)
FEATURES = tuple(f"features_{split}.safetensors" for split in SPLITS)
PROFILE = ("profile/shares.txt", "profile/shares.json", "profile/trace.json")
FILES = (
    CONFIG, METRICS, METRICS_CSV, HISTORY, BEST, LAST, PREVIOUS, NORMALIZER, TRUTH, REPORT, CHECKSUMS, DIVERGED,
    *TOKENIZER, *PREDICTIONS, *FEATURES, *PROFILE,
)  # fmt: skip
"""Every file that a run writes, TensorBoard's excepted."""
LARGEST = 1 << 27
"""Longest text file that is read, in bytes. A history has about 3,000 per epoch."""
MARKS = (CONFIG, METRICS, HISTORY, LAST, BEST)
"""A folder with any of these files holds a run."""
PLAN, STARTS = "plan.json", "starts.jsonl"
"""A folder with both of these files holds a sweep or a tuning."""


def require_no_sweep(folder: Path) -> None:
    """Refuse the folder of a sweep or a tuning for a run, which would replace its report.

    Raises:
        OutputError: it is one.
    """
    if all((folder / name).exists() for name in (PLAN, STARTS)) and not any((folder / mark).exists() for mark in MARKS):
        raise OutputError(str(folder), "a sweep or a tuning", "an empty or new folder", "Choose another --out.")


def require_kind(folder: Path, seeds: bool) -> None:
    """Refuse the folder of a single run for the runs of several seeds, and the other way round.

    Their files would lie among each other. A folder that holds both already may go on.

    Args:
        seeds: whether runs of several seeds, seed0 and so on, are to be written into `folder`.

    Raises:
        OutputError: it is of the other kind.
    """
    of_seeds = [run for run in folder.glob("seed[0-9]*") if run.is_dir()]
    # the name config.yaml may be that of a user's own file
    single, several = (
        any((run / mark).exists() for run in runs for mark in MARKS if mark != CONFIG) for runs in ([folder], of_seeds)
    )
    if single and not several and seeds:
        raise OutputError(
            str(folder), "another run, of one seed", "an empty or new folder",
            "Choose another --out, or drop seeds= and go on with --resume.",
        )  # fmt: skip
    if several and not single and not seeds:
        raise OutputError(
            str(folder), "runs of several seeds", "an empty or new folder",
            "Choose another --out, or name the seeds to go on with them (--resume seeds=...).",
        )  # fmt: skip


def require_no_run_file(path: Path) -> None:
    """Refuse to replace a file of a run, which would no longer match its checksum.

    Raises:
        OutputError: it is one.
    """
    if path.name in FILES and path.exists() and any((path.parent / mark).exists() for mark in MARKS):
        raise OutputError(str(path), "a file of a run", "a name outside the run's own files", "Choose another name.")


class Checksums:
    """The checksums of a folder's files, kept in `checksums.json`.

    While a file is being written its sum is `None`. So a process that is killed at any moment leaves no wrong sum.

    Raises:
        CheckpointError: the file is there and damaged.
    """

    def __init__(self, folder: Path):
        self.folder, self.sums = folder, _read(folder) or {}

    @contextlib.contextmanager
    def writing(self, *names: str) -> Iterator[None]:
        """A context in which the files `names` are written. The block may put a sum that it knows into `sums`."""
        self.sums |= dict.fromkeys(names)
        self._write()
        yield
        for name in names:
            if not (self.folder / name).is_file():
                del self.sums[name]
            elif self.sums[name] is None:
                self.sums[name] = file_sum(self.folder / name)
        self._write()

    def hold(self, name: str) -> bool:
        """Whether a file exists and matches its checksum. A file without a checksum counts as matching."""
        path = self.folder / name
        if not path.is_file() or self.sums.get(name, 0) is None:
            return False
        return name not in self.sums or tuple(self.sums[name]) == file_sum(path)

    def _write(self) -> None:
        write_json(self.folder / CHECKSUMS, {"files": self.sums, "checksum": _sum_of_sums(self.sums)})


def file_sum(path: Path) -> tuple[int, int]:
    """Bytes of a file and their CRC-32."""
    size, crc = 0, 0
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return size, crc


def verify(folder: Path, *names: str) -> None:
    """Compare files with their checksums. Missing files are skipped.

    Warns about a folder without checksums, as older versions wrote it, and about files whose writing was interrupted.

    Raises:
        CheckpointError: a file, or checksums.json itself, is not what was written.
    """
    there = [name for name in names if (folder / name).is_file()]
    sums, before = _read(folder), None
    while (wrong := _wrong(folder, sums or {}, there)) and sums != before:
        sums, before = _read(folder), sums  # a run that goes on may have written in between
    if wrong:
        raise CheckpointError(
            str(folder / wrong[0]),
            "contents that do not match their checksum",
            "the bytes that the run wrote",
            "The file is damaged or was edited: put the original back.",
        )
    if sums is None:
        warnings.warn(
            f"{folder}: no {CHECKSUMS}, as in a run of an older version: damage to its files goes unnoticed",
            stacklevel=2,
        )
    elif unknown := [name for name in there if sums.get(name, 0) is None]:
        warnings.warn(
            f"{folder}: {', '.join(unknown)}: a run was writing these files: damage to them goes unnoticed until "
            "it goes on",
            stacklevel=2,
        )


def _wrong(folder: Path, sums: dict[str, Any], names: list[str]) -> list[str]:
    return [name for name in names if sums.get(name) is not None and tuple(sums[name]) != file_sum(folder / name)]


def _read(folder: Path) -> dict[str, Any] | None:
    """{file name: [bytes, CRC-32], or None while it is written}. None if the folder has no checksums."""
    path = folder / CHECKSUMS
    try:
        content = parse_json(read_text(path, LARGEST))
        intact = content["checksum"] == _sum_of_sums(content["files"]) and _are_sums(content["files"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        intact = False
    if not intact:
        raise CheckpointError(
            str(path),
            "contents that do not match their checksum",
            "the bytes that the run wrote",
            "The file is damaged: put the original back, or delete it to read the run unverified.",
        )
    return content["files"]


def _are_sums(sums: Any) -> bool:
    """Whether `sums` has the form that `Checksums` writes."""
    return isinstance(sums, dict) and all(
        s is None or (isinstance(s, list) and len(s) == 2 and all(type(n) is int for n in s)) for s in sums.values()
    )


def _sum_of_sums(sums: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(sums).encode())


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Lock a run folder for this process. The folder is made if it is missing; leftovers of killed runs are removed.

    The system releases the lock when the process ends, however it ends.

    Raises:
        OutputError: another process writes into it, or it cannot be made or written to.
    """
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = lock(folder / LOCK)
    except BlockingIOError as cause:
        raise OutputError(
            str(folder),
            "a run that another process is writing",
            "a folder that no other process writes into",
            "Wait for it to end, or choose another --out.",
        ) from cause
    except OSError as cause:
        raise output_error(folder, cause) from cause
    try:
        with file:
            sweep_folder(folder)
            try:
                yield
            finally:
                (folder / LOCK).unlink(missing_ok=True)
    finally:
        if new:
            with contextlib.suppress(OSError):  # it holds a run
                folder.rmdir()
