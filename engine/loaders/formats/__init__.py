"""Readers of the formats users have: one module per format. The content decides which one reads a file, never its name.

A new format is an object with the attributes of `Format`, given to `register_format`.
"""

from engine.loaders.formats.checks import SPLIT_ALIASES, SPLITS
from engine.loaders.formats.registry import (
    Format,
    RawDataset,
    RawSplit,
    choose_format,
    describe,
    formats,
    read,
    register_format,
    remarks,
)
from engine.loaders.formats.source import Choice, DataFiles, csv_files, find_source

__all__ = [
    "SPLITS", "SPLIT_ALIASES", "Choice", "DataFiles", "Format", "RawDataset", "RawSplit", "choose_format", "csv_files",
    "describe", "find_source", "formats", "read", "register_format", "remarks",
]  # fmt: skip


def _register_own() -> None:
    from engine.loaders.formats import csd, declarelab, manifest, mmsa, rows, tuples

    for reader in (
        declarelab.DeclareLab(),
        mmsa.MMSA(),
        tuples.Tuples(),
        tuples.MAGBert(),
        rows.SDKRows(),
        rows.AVEC2019(),
        csd.CSD(),
        manifest.Manifest(),
    ):
        register_format(reader)


_register_own()
