"""The examples of docs/data.md run as printed."""

import json
import re
from pathlib import Path

from engine.config import DataConfig
from engine.loaders import formats, open_dataset
from tests.loaders import writers
from tests.loaders.test_text import small_tokenizer

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
USE, OWN = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def test_open_and_load(tmp_path, monkeypatch):
    writers.write_declarelab(tmp_path, writers.samples())
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(USE, scope)
    assert len(scope["batch"]) == 7


def test_a_format_of_ones_own(tmp_path):
    data = writers.samples()
    path = tmp_path / "data.jsonl"
    with path.open("w") as file:
        for split, rows in data.items():
            for s in rows:
                row = {"split": split, "id": s.id, "text": s.text, "label": s.label}
                print(json.dumps({**row, "audio": s.audio.tolist(), "vision": s.vision.tolist()}), file=file)
    before = dict(formats._FORMATS)
    try:
        exec(OWN, {})
        opened = open_dataset(path, DataConfig(), str(small_tokenizer(tmp_path / "encoder")))
    finally:
        formats._FORMATS.clear()
        formats._FORMATS.update(before)
    assert opened.report.format == "lines"
    assert opened.splits["test"].ids == [s.id for s in data["test"]]


def test_the_page_names_every_format_and_rule():
    for name in ("DeclareLab", "MMSA", "MMIM", "MISA", "recorded", "all_zero", "sum_zero"):
        assert name in PAGE
