"""Files are complete or absent, and a failure is one line."""

import errno
import json
import os
import stat
import zipfile
from pathlib import Path

import pytest

from engine.errors import EngineError, OutputError, printable
from engine.files import (
    append_text,
    atomic_file,
    atomic_path,
    is_compressed,
    output_error,
    parse_json,
    read_text,
    sweep_folder,
    write_json,
    write_text,
)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_folders_are_made_and_nothing_else_is_left(tmp_path):
    write_text(tmp_path / "a" / "b" / "c.txt", "σ\n")
    assert (tmp_path / "a" / "b" / "c.txt").read_text(encoding="utf-8") == "σ\n"
    assert names(tmp_path / "a" / "b") == ["c.txt"]


def test_a_failure_keeps_the_old_file_and_passes_through(tmp_path):
    path = tmp_path / "x.json"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.json"]


def test_an_interrupt_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_disk_full_while_writing(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_text(path, "old")

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError) as caught:
        write_text(path, "new")
    monkeypatch.undo()
    assert "no space left" in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.json"]


def test_disk_full_only_noticed_by_fsync(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="no space left"):
        write_text(tmp_path / "x", "new")
    assert names(tmp_path) == []


def test_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a file where a folder is needed"):
        write_text(tmp_path / "file" / "metrics.json", "")
    with pytest.raises(OutputError, match="a file where a folder is needed"):
        write_text(tmp_path / "file" / "run" / "metrics.json", "")


def test_file_name_taken_by_a_folder(tmp_path):
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(OutputError) as caught:
        write_text(tmp_path / "metrics.json", "")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["metrics.json"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a /proc file system, which nobody can write to")
def test_a_pipe_is_not_replaced(tmp_path):
    """A rename onto /dev/null would replace the device for everyone, and nobody would read from the pipe again."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("pipe", "link"):
        with pytest.raises(OutputError, match=rf"{name}: found a pipe or a device; expected the name of a file"):
            write_text(tmp_path / name, "x")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "pipe"]


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/stderr", "/dev/fd/1", "/proc/self/fd/1"])
def test_names_of_open_files_are_not_replaced(name):
    """With its output in a file, /dev/stdout is a link to a file, which root can replace."""
    with pytest.raises(OutputError, match="found a pipe or a device"):
        write_text(name, "x")


def test_unwritable_folder():
    with pytest.raises(OutputError) as caught:
        write_text("/proc/run/metrics.json", "")
    assert "/proc/run/metrics.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write into read-only folders")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(OutputError, match="cannot be written to"):
            write_text(tmp_path / "x", "")
    finally:
        tmp_path.chmod(stat.S_IRWXU)


@pytest.mark.parametrize(
    "code, words",
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "no space left"),
        (errno.EACCES, "cannot be written to"),
        (errno.EROFS, "cannot be written to"),
        (errno.ENOTDIR, "a file where a folder is needed"),
        (errno.ENAMETOOLONG, "name too long"),
    ],
)
def test_every_cause_has_a_line(code, words):
    error = output_error(Path("out/x"), OSError(code, os.strerror(code)))
    assert words in str(error).lower()
    assert str(error).startswith("out/x: found")


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "x", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_json_without_nan(tmp_path):
    write_json(tmp_path / "m.json", {"mae": float("nan"), "corr": [1.5, float("inf")], "n": (1, None)})
    assert json.loads((tmp_path / "m.json").read_text()) == {"mae": None, "corr": [1.5, None], "n": [1, None]}


def test_atomic_file_clears_away_what_killed_processes_left(tmp_path):
    path = tmp_path / "a[1].bin"
    left, others = tmp_path / ".a[1].bin.x1.part", tmp_path / ".b.bin.x1.part"
    left.touch()
    others.touch()
    with atomic_file(path) as file:
        assert not left.exists() and others.exists()
        (own,) = tmp_path.glob(".a*.part")
        with atomic_file(path) as second:  # another process: it leaves the first one's file alone
            second.write(b"second")
        assert own.exists()
        file.write(b"first")
    assert path.read_bytes() == b"first"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.bin.x1.part", "a[1].bin"]


def test_atomic_file_leaves_nothing_on_failure(tmp_path):
    path = tmp_path / "new" / "a.bin"
    with pytest.raises(ZeroDivisionError), atomic_file(path) as file:
        file.write(b"x")
        _ = 1 / 0
    assert list(path.parent.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="expected a folder"), atomic_file(tmp_path / "file" / "a.bin"):
        pass


def test_atomic_path_clears_away_what_killed_processes_left(tmp_path):
    for name in (".x.json.a.part", ".y.json.a.part"):
        (tmp_path / name).touch()
    with atomic_path(tmp_path / "x.json") as temporary:
        with atomic_path(tmp_path / "x.json") as second:
            second.write_text("second")
        assert temporary.exists()  # it is locked, so nobody takes it for a left-over
        temporary.write_text("first")
    assert names(tmp_path) == [".y.json.a.part", "x.json"]
    with atomic_path(tmp_path / "x.json"):
        sweep_folder(tmp_path)
        assert len(names(tmp_path)) == 2
    assert names(tmp_path) == ["x.json"]


def test_the_previous_file_is_kept(tmp_path):
    path, previous = tmp_path / "new", tmp_path / "old"
    for text in ("1", "2", "3"):
        with atomic_path(path, previous) as temporary:
            temporary.write_text(text)
    assert (path.read_text(), previous.read_text()) == ("3", "2")
    with pytest.raises(ZeroDivisionError), atomic_path(path, previous):
        _ = 1 / 0
    assert (path.read_text(), previous.read_text()) == ("3", "2")


def test_appending_cuts_off_what_lies_beyond(tmp_path):
    path = tmp_path / "lines"
    append_text(path, "σ1\n", at=0)
    append_text(path, "half a li", at=4)
    append_text(path, "2\n", at=4)
    assert path.read_text(encoding="utf-8") == "σ1\n2\n"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="Is a directory"):
        append_text(tmp_path / "folder", "x", at=0)


# -- what strangers wrote --


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\rb\x00\x9b", "a\\rb\\x00\\x9b"),
        ("\u202egpj\u2066\ufeff", "\\u202egpj\\u2066\\ufeff"),
        ("half \ud800", "half \\ud800"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\u00e9 \u4e2d\u6587 \u0627 \U0001f44d\u200d", "\u00e9 \u4e2d\u6587 \u0627 \U0001f44d\u200d"),
    ],
)
def test_nothing_that_is_printed_acts(text, shown):
    assert printable(text) == shown
    assert printable(printable(text)) == shown
    assert str(EngineError(text, "x", "y", "Do.")) == f"{printable(' '.join(text.split()))}: found x; expected y. Do."


def test_reading_a_strangers_text(tmp_path):
    path = tmp_path / "x"
    path.write_text("caf\u00e9", encoding="utf-8")
    assert read_text(path, 5) == "caf\u00e9"
    with pytest.raises(ValueError, match="5 bytes, more than the 4"):
        read_text(path, 4)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_text(path, 4)
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="neither a file nor a folder"):
            read_text(place, 4)
    with pytest.raises(OSError, match="a folder"):
        read_text(tmp_path, 4)


def test_json_fails_in_one_way():
    assert parse_json(b'{"a": [1]}') == {"a": [1]}
    for text, found in (
        ("[" * 100_000, "nested"),
        ('{"a":' * 100_000, "nested"),
        ("{", "property name"),
        ("", "value"),
    ):
        with pytest.raises(ValueError, match=found):
            parse_json(text)


def test_an_archive_that_holds_more_than_its_size(tmp_path):
    for name, kind in (("plain", zipfile.ZIP_STORED), ("bomb", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(tmp_path / name, "w", kind) as archive:
            archive.writestr("data", bytes(10**6))
    (tmp_path / "other").write_bytes(b"PK\x03\x04 no archive")
    assert [is_compressed(tmp_path / name) for name in ("plain", "bomb", "other", "none")] == [
        False,
        True,
        False,
        False,
    ]
