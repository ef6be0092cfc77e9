"""Frames in CSV files, as extractors and spreadsheets write them: the right numbers, or one line on what is wrong."""

import csv
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from engine.errors import DataError
from engine.loaders.formats.frames import ColumnNames, _checked, read_frames
from engine.loaders.inspect import inspect_path
from engine.loaders.safe_pickle import load

ROWS = [[0.5, -1e-3, 3.0], [1e10, 0.1, -0.25]]


def written(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "clip.csv"
    path.write_bytes(text.encode(encoding))
    return path


def lines(separator: str, header: str = "", ends: str = "\n") -> str:
    body = ends.join(separator.join(map(repr, row)) for row in ROWS) + ends
    return header.replace(",", separator) + ends + body if header else body


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("header", ["", "a,b,c", "0,1,2"])
@pytest.mark.parametrize("separator", [",", ";", "\t", ", ", " ", "   "])
def test_separators_headers_and_line_ends(tmp_path, separator, header, ends):
    found = read_frames(written(tmp_path, lines(separator, header, ends)), "x")
    assert found.values.tolist() == ROWS and found.values.dtype == np.float64
    assert found.columns == (["a", "b", "c"] if header == "a,b,c" else [])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_encodings(tmp_path, encoding):
    assert read_frames(written(tmp_path, lines(",", "a,b,c"), encoding), "x").values.tolist() == ROWS


def test_the_quick_way_and_the_checked_one_agree(tmp_path):
    numbers = np.random.default_rng(0).normal(size=(50, 7)) * 10.0 ** np.arange(-3, 4)
    path = tmp_path / "clip.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(numbers.tolist())
    assert np.array_equal(read_frames(path, "x").values, numbers)
    assert np.array_equal(_checked(path.read_text(), ",", "x", 0, None, False), numbers)


def test_opensmile(tmp_path):
    """Semicolons, the recording's name in front."""
    text = "name;frameTime;loudness\n'unknown';0.0;0.5\n'unknown';0.01;0.75\n"
    found = read_frames(written(tmp_path, text), "x")
    assert found.values.tolist() == [[0.0, 0.5], [0.01, 0.75]]
    assert (found.columns, found.left_out) == (["frameTime", "loudness"], "name")
    names = ColumnNames()
    names.add(found, "x")
    names.add(found, "y")
    assert names.notes("audio") == [
        "audio: the column name is text and is left out (2 files)",
        "audio: columns read as features: frameTime; name those that are no features in data.skip_columns, or remove "
        "them from the files",
    ]


@pytest.mark.parametrize(
    "header", ["e0,e1", "E1,E2", "a,1e", "2024-05-01,b", "par1,par2", "fea1,fea2", "ID3,é", "abc,ftyp"]
)
def test_names_that_look_like_numbers_or_other_kinds_of_files(tmp_path, header):
    found = read_frames(written(tmp_path, f"{header}\n1,2\n"), "x")
    assert (found.values.tolist(), found.columns) == ([[1.0, 2.0]], header.split(","))


@pytest.mark.parametrize("text", ["", "\n\n", "a,b\n"])
def test_no_frames(tmp_path, text):
    assert read_frames(written(tmp_path, text), "x").values.shape == (0, 0)


@pytest.mark.parametrize(
    ("text", "found", "do"),
    [
        ("a;b\n0,5;1\n", "line 2: found a cell that is not a number ('0,5', column 1)", "decimal points"),
        ("a\n0,5\n", "line 2: found 2 cells; expected 1 as the header has", ""),
        ("a,b\n1,2\n1_5,2\n", "line 3: found a cell that is not a number ('1_5', column 1)", ""),
        ("a,b\n1,2\n,2\n", "line 3: found an empty cell (column 1)", "Write nan"),
        ("1,2\n1,2,3\n", "line 2: found 3 cells; expected 2 as in the first row", ""),
        ("a,b\n1,2\nx,2\n", "line 3: found a cell that is not a number ('x', column 1)", ""),
        ("speaker;b\nme;2\n", "line 2: found a cell that is not a number ('me', column 1)", ""),
        ("sep=;\na;b\n1;x\n", "line 3: found a cell that is not a number ('x', column 2)", ""),
        ("1 2\n3\n", "line 1: found a cell that is not a number ('1 2', column 1)", ""),
        ("1;2\n3\n", "line 1: found a cell that is not a number ('1;2', column 1)", ""),
        ("ab\0c\n1\n", "clip.csv: found bytes that are no text", ""),
        ("PAR1", "clip.csv: found a Parquet file; expected a .npy or .csv file", "numpy.save"),
    ],
)
def test_what_is_wrong(tmp_path, text, found, do):
    path = written(tmp_path, text)
    with pytest.raises(DataError, match=re.escape(found)) as error:
        read_frames(path, "x")
    assert do in str(error.value) and "\n" not in str(error.value)


def folder(path: Path, headers: list[str]) -> Path:
    rows = ["id,split,label,text,audio,vision"]
    path.mkdir()
    for i, header in enumerate(headers):
        (path / f"a{i}.csv").write_text(f"{header}\n1,2\n")
        np.save(path / f"v{i}.npy", np.ones((2, 3), np.float32))
        rows.append(f"c{i},{('train', 'valid', 'test')[i % 3]},0.5,hi,a{i}.csv,v{i}.npy")
    (path / "manifest.csv").write_text("\n".join(rows))
    return path


def test_columns_in_another_order(tmp_path):
    """Features would change places from clip to clip, and nothing would tell."""
    report = inspect_path(folder(tmp_path / "in", ["a,b", "a,b", "b,a"]))
    (problem,) = report.problems
    assert "a2.csv: found the columns in another order ('b' as column 1); expected 'a' there, as in" in problem
    assert "(id c0), audio: a0.csv" in problem


def test_other_column_names_are_told(tmp_path):
    report = inspect_path(folder(tmp_path / "in", ["a,b", "a,c", "a,b"]))
    assert not report.problems
    assert any(note.startswith("audio: 1 files have other column names than") for note in report.notes)
    assert not any("column names" in n for n in inspect_path(folder(tmp_path / "same", ["a,b"] * 3)).notes)


@pytest.mark.parametrize(
    ("content", "name", "found"),
    [
        (b"PAR1" + b"\0" * 90, "x.parquet", "a Parquet file"),
        (b"PK\x03\x04" + b"\0" * 22 + b"\x05\0\0\0" + b"a.npy", "x.npz", "an .npz archive"),
        (b"PK\x03\x04" + b"\0" * 22 + b"\x13\0\0\0" + b"[Content_Types].xml", "x.xlsx", "an Excel workbook"),
        (b"PK\x03\x04" + b"\0" * 22 + b"\x08\0\0\0" + b"data.pkl", "x.pt", "a zip archive or a torch.save file"),
        (b"\x93NUMPY\x01\0", "x.npy", "a single .npy array"),
        (b'{"a": 1}', "x.json", "JSON (.json)"),
        (b"a\tb\n", "x.tsv", "tab-separated text (.tsv)"),
        (b"\0\0\0\x20ftypisom", "x.mp4", "a video, not features"),
        (b"MATLAB 5.0 MAT-file", "x.mat", "a MATLAB file"),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path, content, name, found):
    (tmp_path / name).write_bytes(content)
    (problem,) = inspect_path(tmp_path / name).problems
    assert f"{name}: found {found}; expected a pickle" in problem


def test_a_pickle_of_any_name(tmp_path):
    (tmp_path / "x.txt").write_bytes(pickle.dumps([1, 2]))
    assert load(tmp_path / "x.txt") == [1, 2]
