"""Files that somebody writes to while they are read."""

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from engine.errors import DataError, OutputError
from engine.loaders import spool
from engine.loaders.spool import spooled, stable_content

SIZE = 3 * spool.SMALL


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


@pytest.mark.parametrize("spool", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_what_was_read_stays(file, tmp_path, spool, shared, monkeypatch):
    if not shared:  # a file system that cannot share bytes
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    whole = file.read_bytes()
    with spooled(tmp_path if spool else None):
        data = stable_content(file)
    assert isinstance(data, mmap.mmap if spool else bytes)
    os.truncate(file, 10)  # a mapping of the file itself would end the process here
    assert data[:] == whole
    assert [path.name for path in tmp_path.iterdir()] == ["x.pkl"]


def test_a_file_that_changes_while_it_is_copied(file, tmp_path, monkeypatch):
    copy = spool._copy

    def cut(source, target):
        os.truncate(file, SIZE - 5)
        copy(source, target)

    monkeypatch.setattr(spool, "_copy", cut)
    with spooled(tmp_path), pytest.raises(DataError, match=rf"x\.pkl: found .*\({SIZE} bytes, then {SIZE - 5}\)"):
        stable_content(file)


def test_no_space_for_the_copy(file, tmp_path, monkeypatch):
    with Path("/dev/full").open("r+b") as full, spooled(tmp_path), pytest.raises(OutputError, match="no space left"):
        monkeypatch.setattr(spool, "_unnamed", lambda folder: full)
        stable_content(file)


def test_an_empty_file(tmp_path):
    (tmp_path / "x").touch()
    with spooled(tmp_path):
        assert stable_content(tmp_path / "x") == b""
