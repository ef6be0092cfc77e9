"""Hostile .csd files: parsed in another process, which may crash, hang or use up memory without harm to this one."""

import json
import os
import signal
import sys
import time

import numpy as np
import pytest

from engine.errors import DataError
from engine.loaders import hdf5
from engine.loaders.formats import read
from engine.loaders.hdf5 import CsdReader
from tests.loaders import writers

h5py = pytest.importorskip("h5py", reason="needs the extra csd")


@pytest.fixture
def folder(tmp_path):
    return writers.write_csd(tmp_path / "data", writers.samples())


def change(folder, edit):
    """Apply `edit(file, data group)` to COVAREP.csd."""
    with h5py.File(folder / "COVAREP.csd", "a") as file:
        edit(file, file["COVAREP"]["data"])


def refused(folder, *parts):
    with pytest.raises(DataError) as error:
        read(folder, "recorded")
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


def replaced(name, new):
    def edit(file, data):
        video = next(iter(data.values()))
        del video[name]
        new(file, video)

    return edit


def rows(video):
    return len(video["intervals"])


def secret(tmp_path):
    path = tmp_path / "secret.bin"
    path.write_bytes(np.full(1000, 7.0).tobytes())
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["x"] = np.full((200, 5), 7.0)
    return path


def test_nothing_outside_the_file_is_read(tmp_path, folder):
    path = secret(tmp_path)
    whole = (folder / "COVAREP.csd").read_bytes()
    outside = [(str(path), 0, 8000)]

    def virtual(file, video):
        layout = h5py.VirtualLayout((rows(video), 5), "f8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "x", (200, 5))[: rows(video)]
        video.create_virtual_dataset("features", layout)

    cases = {
        "ExternalLink": lambda f, v: v.__setitem__("features", h5py.ExternalLink(str(tmp_path / "secret.h5"), "/x")),
        "SoftLink": lambda f, v: v.__setitem__("features", h5py.SoftLink("/COVAREP/data")),
        "in other files": lambda f, v: v.create_dataset("features", (rows(v), 5), "f8", external=outside),
        "data of": virtual,
    }
    for found, new in cases.items():
        (folder / "COVAREP.csd").write_bytes(whole)
        change(folder, replaced("features", new))
        refused(folder, "COVAREP.csd", found, "in this file" if "data" in found or "other" in found else "this file")
    (folder / "COVAREP.csd").unlink()
    with h5py.File(folder / "COVAREP.csd", "w") as file:
        file["COVAREP"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/")
    refused(folder, "0 groups at the root")


def test_sizes_that_the_file_does_not_account_for(folder):
    whole = (folder / "COVAREP.csd").read_bytes()

    def never_written(file, video):
        del video["intervals"]
        video.create_dataset("features", (1 << 40, 5), "f4", chunks=(1 << 10, 5))
        video.create_dataset("intervals", (1 << 40, 2), "f4", chunks=(1 << 10, 2))

    change(folder, replaced("features", never_written))
    refused(folder, "COVAREP.csd", "from 0 stored")
    (folder / "COVAREP.csd").write_bytes(whole)

    def large(file, video):
        return video.create_dataset("features", data=np.zeros((1 << 20, 5)), compression=9)

    change(folder, replaced("features", large))  # not read: its intervals do not fit
    refused(folder, "COVAREP.csd", "intervals of shape")


def test_memory_of_the_child_is_limited(folder):
    def big(file, video):
        del video["intervals"]
        video.create_dataset("features", data=np.zeros((1 << 23, 5), "f4"), compression=1)  # 168 MB
        video.create_dataset("intervals", data=np.zeros((1 << 23, 2)), compression=1)  # 134 MB

    change(folder, replaced("features", big))
    with CsdReader(memory=500 << 20) as reader, pytest.raises(DataError, match=r"more data than|crashed|damaged"):
        reader.open(folder / "COVAREP.csd").video(reader.videos[0])


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (replaced("intervals", lambda f, v: None), ["nothing at", "intervals"]),
        (replaced("features", lambda f, v: v.create_group("features")), ["a Group at", "a Dataset"]),
        (replaced("features", lambda f, v: v.create_dataset("features", data=np.ones((rows(v), 2, 2)))), ["2, 2)"]),
        (replaced("features", lambda f, v: v.create_dataset("features", data=np.ones(rows(v), complex))), ["complex"]),
        (
            replaced("features", lambda f, v: v.create_dataset("features", (rows(v),), h5py.vlen_dtype(np.int32))),
            ["dtype object"],
        ),
        (replaced("intervals", lambda f, v: v.create_dataset("intervals", data=np.ones((1, 3)))), ["(start, end)"]),
        (lambda f, d: f.create_group("more"), ["2 groups at the root"]),
        (lambda f, d: [d.__delitem__(k) for k in list(d)], ["no videos"]),
        (lambda f, d: f["COVAREP"].__delitem__("data"), ["nothing at /COVAREP/data"]),
    ],
)
def test_other_layouts(folder, edit, parts):
    change(folder, edit)
    refused(folder, "COVAREP.csd", *parts)


def test_truncated_and_foreign_files(folder):
    path = folder / "COVAREP.csd"
    whole = path.read_bytes()
    for size in (8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(folder, "COVAREP.csd", "damaged file")
    path.write_bytes(b"not HDF5 at all")
    refused(folder)


def test_a_video_that_is_missing_from_a_file_is_a_missing_modality(folder):
    change(folder, lambda f, d: d.__delitem__("train_v_ideo0"))
    raw = read(folder, "recorded")[1]
    assert raw.splits["train"].audio.missing == [0, 1, 2]
    assert any("lacks 1 videos" in note for note in raw.notes)


def stand_in(tmp_path, monkeypatch, body):
    """A child that runs `body` in place of parsing."""
    script = tmp_path / "child.py"
    script.write_text(f"import json, os, sys, time, signal\nfor line in sys.stdin.buffer:\n    {body}\n")
    monkeypatch.setattr(hdf5, "CHILD", script)


def test_a_crash_is_one_line_and_the_next_file_is_read(tmp_path, folder, monkeypatch):
    real = hdf5.CHILD
    stand_in(tmp_path, monkeypatch, "os.kill(os.getpid(), signal.SIGSEGV)")
    with CsdReader() as reader:
        with pytest.raises(
            DataError, match=r"COVAREP\.csd: found a file that crashed the HDF5 library \(exit code -11\)"
        ):
            reader.open(folder / "COVAREP.csd")
        monkeypatch.setattr(hdf5, "CHILD", real)
        assert reader.open(folder / "COVAREP.csd").root == "COVAREP"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("time.sleep(1000)", "could not be read within 1 s"),
        (
            "sys.stdout.buffer.write(b'{\"size\": 9}\\n'); sys.stdout.flush(); time.sleep(1000)",
            "could not be read within",
        ),
        ("print('no JSON', flush=True)", "makes no sense"),
        ("print('{\"size\": 0}', flush=True)", "an answer without"),
        ('print(\'{"size": -1, "root": 1, "kind": 1, "videos": 3}\', flush=True)', "an answer without"),
    ],
)
def test_a_child_that_hangs_or_babbles(tmp_path, folder, monkeypatch, body, found):
    stand_in(tmp_path, monkeypatch, body)
    start, patience = time.monotonic(), 1 if "sleep" in body else 300
    with CsdReader(patience=patience) as reader, pytest.raises(DataError, match=found):
        reader.open(folder / "COVAREP.csd")
    assert time.monotonic() - start < 250  # not the 1000 s of the child


def test_no_process_is_left(folder):
    with CsdReader() as reader:
        reader.open(folder / "COVAREP.csd")
        pid = reader._child.pid
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_killed_child_is_told(folder):
    with CsdReader() as reader:
        reader.open(folder / "COVAREP.csd")
        os.kill(reader._child.pid, signal.SIGKILL)
        reader._child.wait()
        with pytest.raises(DataError, match=r"crashed|ended the process"):
            reader.video("train_v_ideo0")


def test_without_h5py(folder, monkeypatch):
    monkeypatch.setattr(hdf5.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install h5py"):
        read(folder, "recorded")


def test_the_child_cannot_be_misled_by_modules_beside_it(folder, tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    assert read(folder, "recorded")[1].format == "csd"
    assert json and sys  # the standard library's


def test_integers_come_whole(folder):
    large = (1 << 24) + 1  # float32 has no such number

    def integers(file, data):
        for video in data.values():
            values = video["features"][()]
            del video["features"]
            video["features"] = np.full(values.shape, large, np.int32)

    change(folder, integers)
    with CsdReader() as reader:
        covarep = reader.open(folder / "COVAREP.csd")
        assert float(covarep.video(covarep.videos[0])[1].max()) == large
