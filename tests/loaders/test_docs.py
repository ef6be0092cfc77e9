"""The pages on data name what there is. Their code blocks run in tests/docs/test_blocks.py."""

import re
from pathlib import Path

from engine.loaders import formats
from engine.loaders.make_data.writers import WRITERS

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "data.md").read_text(encoding="utf-8")
FORMATS = (DOCS / "formats.md").read_text(encoding="utf-8")


def test_the_page_names_every_format_and_rule():
    for name in ("DeclareLab", "MMSA", "MMIM", "MISA", "recorded", "all_zero", "sum_zero"):
        assert name in PAGE


def test_every_layout_and_reader_has_its_row_and_section():
    rows = [line.split("|") for line in FORMATS.splitlines() if re.match(r"\| `\S+` \| `", line)]
    named = {row[1].strip(" `"): row[2].strip(" `") for row in rows}
    assert set(named) == set(WRITERS)
    assert set(named.values()) == {reader.name for reader in formats.formats()}
    for reader in formats.formats():
        assert f"`{reader.name}`: " in FORMATS, reader.name


def test_the_page_on_loaders_names_every_setting():
    page = (DOCS / "loaders.md").read_text(encoding="utf-8")
    for name in ("drop_text", "mask_vision", "max_padding", "resident", "dali", "torch", "precision"):
        assert name in page
