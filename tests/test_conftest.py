"""Where the tests' own files go."""

import tempfile

import pytest

from tests import conftest

LITTLE, ENOUGH = conftest.LEAST_ROOM - 1, conftest.LEAST_ROOM


@pytest.mark.parametrize(
    "disk, memory, place",
    [(ENOUGH, ENOUGH, "disk"), (LITTLE, ENOUGH, "memory"), (LITTLE, LITTLE, "disk"), (ENOUGH, LITTLE, "disk")],
)
def test_files_go_to_memory_where_the_disk_is_nearly_full(monkeypatch, tmp_path, disk, memory, place):
    free = {tmp_path / "disk": disk, tmp_path / "memory": memory}
    for folder in free:
        folder.mkdir()
    monkeypatch.setattr(conftest, "_free", free.get)
    monkeypatch.setattr(conftest, "MEMORY", tmp_path / "memory")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "disk"))
    conftest._find_room()
    assert tempfile.gettempdir() == str(tmp_path / place)
