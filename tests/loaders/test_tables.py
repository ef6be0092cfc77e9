"""CSV tables as spreadsheets and pandas leave them."""

import csv
import io

import numpy as np
import pytest

from engine.errors import DataError
from engine.loaders.formats import read
from engine.loaders.formats.tables import csv_header, number, plain_number, read_table
from tests.loaders import writers

ROWS = [["video_id", "clip_id", "text"], ["a", "1", "so, so; good"], ["b", "2", 'caf\u00e9\nand "more"']]
WRITTEN = {
    "utf8": (",", "utf-8"),
    "bom": (",", "utf-8-sig"),
    "semicolons": (";", "utf-8-sig"),
    "tabs": ("\t", "utf-8"),
    "excel_unicode_text": ("\t", "utf-16"),
    "utf16_without_mark": (";", "utf-16-le"),
    "utf16_big_endian": (",", "utf-16-be"),
}


def table(delimiter: str, rows=ROWS, end="\r\n") -> str:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=end).writerows(rows)
    return text.getvalue()


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("mark", [False, True])
def test_every_encoding_and_separator(tmp_path, kind, mark):
    delimiter, encoding = WRITTEN[kind]
    text = (f"sep={delimiter}\r\n" if mark else "") + table(delimiter) + delimiter * 2 + "\r\n"
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    assert csv_header(tmp_path / "t.csv") == ROWS[0]
    found = read_table(tmp_path / "t.csv", "a table", ROWS[0])
    assert [list(row.values()) for _, row in found.rows] == ROWS[1:], "the blank row is left out"
    assert found.rows[0][0] == 2 + mark


def test_text_in_another_encoding(tmp_path):
    (tmp_path / "t.csv").write_bytes(table(",").encode("latin1"))
    with pytest.raises(DataError, match=r"t\.csv: found no UTF-8 at byte 51; .*Save it as UTF-8"):
        read_table(tmp_path / "t.csv", "a table", ROWS[0])
    assert len(read_table(tmp_path / "t.csv", "a table", ROWS[0], "replace").rows) == 2


def test_labels():
    assert [number(cell, "x") for cell in ("1.5", " -0.2 ", "1e-1", "\u22122")] == [1.5, -0.2, 0.1, -2.0]
    for cell in ("1_5", "", "x", "1,234.5", "inf", "nan", "1e300"):
        with pytest.raises(DataError, match="expected a finite number"):
            number(cell, "x")
    with pytest.raises(DataError, match=r"x: found label '-0,5', with a decimal comma; .*Save the file with decimal"):
        number("-0,5", "x")


def test_whole_numbers_have_one_spelling():
    assert {plain_number(t) for t in ("1", "01", "1.0", "1E+00", " 1")} == {"1"}
    assert [plain_number(t) for t in ("1.5", "1_0", "a1", "nan", "")] == ["1.5", "1_0", "a1", "nan", ""]


CLIPS = {"padded": "{:02d}", "float": "{:.1f}", "scientific": "{:.2E}"}


@pytest.mark.parametrize("spelling", CLIPS)
@pytest.mark.parametrize("kind", ["utf8", "semicolons", "excel_unicode_text"])
def test_a_label_csv_that_a_spreadsheet_saved(tmp_path, spelling, kind):
    data = writers.samples()
    writers.write_declarelab(tmp_path, data)
    rows = [{**r, "clip_id": CLIPS[spelling].format(int(r["clip_id"]))} for r in writers.label_rows(data)][::-1]
    delimiter, encoding = WRITTEN[kind]
    text = table(delimiter, [list(rows[0]), *(list(r.values()) for r in rows)])
    (tmp_path / "MOSI-label.csv").write_bytes(text.encode(encoding))
    raw = read(tmp_path, "recorded")[1]
    for split, items in data.items():
        assert raw.splits[split].text == [s.text for s in items]
    assert raw.notes == [
        "MOSI-label.csv writes clip numbers otherwise than the ids do (1.0 or 01 for 1): matched as numbers"
    ]


def test_clips_that_only_their_spelling_tells_apart_are_not_matched_as_numbers(tmp_path):
    data = writers.samples()
    data["train"][0].id, data["train"][1].id = "v_1", "v_01"
    writers.write_declarelab(tmp_path, data)
    assert read(tmp_path, "recorded")[1].splits["train"].text == [s.text for s in data["train"]]
    rows = [{**r, "clip_id": str(int(r["clip_id"]))} for r in writers.label_rows(data)]
    writers.write_csv(tmp_path / "MOSI-label.csv", rows)
    with pytest.raises(DataError, match=r"v, 1\) a second time|id v_01, which MOSI-label.csv does not have"):
        read(tmp_path, "recorded")


@pytest.mark.parametrize("kind", ["semicolons", "tabs", "excel_unicode_text"])
def test_a_manifest_that_a_spreadsheet_saved(tmp_path, kind):
    data = writers.samples()
    folder = writers.write_manifest(tmp_path, data)
    with (folder / "manifest.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    delimiter, encoding = WRITTEN[kind]
    (folder / "manifest.csv").write_bytes(table(delimiter, rows).encode(encoding))
    raw = read(folder, "recorded")[1]
    for split, items in data.items():
        assert raw.splits[split].text == [s.text for s in items]
        assert np.array_equal(raw.splits[split].label[:, 0], np.array([s.label for s in items], np.float32))
    label = rows[0].index("label")
    for row in rows[1:]:
        row[label] = row[label].replace(".", ",")
    (folder / "manifest.csv").write_bytes(table(delimiter, rows).encode(encoding))
    with pytest.raises(DataError, match=r"line 2: found label '[-\d,]+', with a decimal comma"):
        read(folder, "recorded")
