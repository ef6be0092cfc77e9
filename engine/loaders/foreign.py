"""Kinds of files that are not read, told by their first bytes, with what a user can do about each."""

from __future__ import annotations

import mmap
import re

_PARQUET = "Read it with pandas, save each clip's frames with numpy.save, and list the clips in a manifest.csv."
_ARRAYS = "Load it, save each clip's frames with numpy.save, and list the clips in a manifest.csv."
_UNPACK = "Unpack it first."

_HEADS = (
    ((b"<!doctype", b"<html", b"<head", b"<?xml"), "a web page, not the data",
     "Download the file itself (the link led to a page)."),
    ((b"version https://git-lfs",), "a Git LFS pointer, not the data", "Fetch the real file with `git lfs pull`."),
    ((b"\x1f\x8b",), "a gzip archive", _UNPACK),
    ((b"\xfd7zxz",), "an xz archive", _UNPACK),
    ((b"7z\xbc\xaf",), "a 7z archive", _UNPACK),
    ((b"matlab 7.3", b"matlab 5.0"), "a MATLAB file", _ARRAYS),
    ((b"sqlite format 3",), "an SQLite database", _PARQUET),
    ((b"%pdf",), "a PDF", "Give the data itself."),
    ((b"\x89hdf",), "an HDF5 file", "Give one of the formats that docs/formats.md lists."),
    ((b"\x93numpy",), "a single .npy array", "List the arrays of all clips in a manifest.csv, and give its folder."),
)  # fmt: skip

_BINARY = (
    ((b"bzh",), "a bzip2 archive", _UNPACK),
    ((b"rar!",), "a rar archive", _UNPACK),
    ((b"par1",), "a Parquet file", _PARQUET),
    ((b"arrow1", b"fea1"), "a Feather or Arrow file", _PARQUET),
    ((b"riff", b"id3", b"ogg", b"flac"), "a recording, not features", "Extract features from it first."),
)  # fmt: skip
"""Kinds whose first letters may also begin a CSV, as in `par1,par2`."""

_ZIPS = (
    ((b".npy",), "an .npz archive", _ARRAYS),
    ((b"[content_types].xml", b"xl/", b"_rels/"), "an Excel workbook", "Save its sheet as CSV."),
)

_TEXTS = {".json": "JSON", ".jsonl": "JSON lines", ".tsv": "tab-separated text", ".txt": "plain text",
          ".yaml": "YAML", ".yml": "YAML", ".md": "text", ".arff": "ARFF"}  # fmt: skip


def known_file(data: mmap.mmap | bytes) -> tuple[str, str] | None:
    """What a file is and what to do, for kinds that no reader takes; else None.

    >>> known_file(b"PAR1")[0]
    'a Parquet file'
    """
    head = bytes(data[:128])
    start = head.lstrip().lower()
    if start.startswith(b"pk\x03\x04"):
        name = start[30 : 30 + int.from_bytes(head[26:28], "little")]
        for marks, found, do in _ZIPS:
            if any(mark in name for mark in marks):
                return found, do
        return "a zip archive or a torch.save file", "Unpack it, or save its contents as numpy arrays in a pickle."
    is_text = len(head) > 4 and not re.search(rb"[\0-\x08\x0e-\x1f\x7f]", head)
    if head[4:8] == b"ftyp" and not is_text:
        return "a video, not features", "Extract features from it first."
    heads = _HEADS if is_text else (*_HEADS, *_BINARY)
    return next(((found, do) for marks, found, do in heads if start.startswith(marks)), None)


def known_text(suffix: str) -> tuple[str, str] | None:
    """As `known_file`, by the ending of a name, for files of text that are no pickle.

    >>> known_text(".json")[0]
    'JSON (.json)'
    """
    if (name := _TEXTS.get(suffix.lower())) is None:
        return None
    return f"{name} ({suffix})", "List the clips in a manifest.csv with a .npy or .csv file each: docs/formats.md."
