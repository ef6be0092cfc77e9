"""The examples of docs/data.md and docs/formats.md run as printed, and the pages name what there is."""

import json
import re
import shlex
from pathlib import Path

from engine.cli import main
from engine.config import DataConfig, load_config
from engine.loaders import formats, open_dataset
from engine.loaders.formats import registry
from engine.loaders.make_data.writers import WRITERS
from tests.loaders import writers
from tests.loaders.test_text import small_tokenizer

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "data.md").read_text(encoding="utf-8")
FORMATS = (DOCS / "formats.md").read_text(encoding="utf-8")
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
    before = dict(registry._FORMATS)
    try:
        exec(OWN, {})
        opened = open_dataset(path, DataConfig(), str(small_tokenizer(tmp_path / "encoder")))
    finally:
        registry._FORMATS.clear()
        registry._FORMATS.update(before)
    assert opened.report.format == "lines"
    assert opened.splits["test"].ids == [s.id for s in data["test"]]


def test_the_page_names_every_format_and_rule():
    for name in ("DeclareLab", "MMSA", "MMIM", "MISA", "recorded", "all_zero", "sum_zero"):
        assert name in PAGE


def test_a_folder_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", FORMATS, re.S)
    exec(code, {})
    opened = open_dataset("mydata", DataConfig(), str(small_tokenizer(tmp_path / "encoder")))
    assert opened.report.format == "manifest"
    assert (len(opened.splits["train"]), opened.audio_dim, opened.vision_dim) == (8, 5, 20)


def test_every_layout_and_reader_has_its_row_and_section():
    rows = [line.split("|") for line in FORMATS.splitlines() if re.match(r"\| `\S+` \| `", line)]
    named = {row[1].strip(" `"): row[2].strip(" `") for row in rows}
    assert set(named) == set(WRITERS)
    assert set(named.values()) == {reader.name for reader in formats.formats()}
    for reader in formats.formats():
        assert f"`{reader.name}`: " in FORMATS, reader.name


def test_the_commands_of_the_page_are_understood(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    block = FORMATS.split("```bash\n")[1].split("```")[0]
    make, inspect, train = (shlex.split(line, comments=True)[1:] for line in block.strip().splitlines())
    assert main(make) == 0
    assert main(inspect) == 0
    assert "no problems" in capsys.readouterr().out
    assert train[0] == "train" and load_config("mosi", [w for w in train if "=" in w]).epochs == 2


def test_position_on_the_page_on_loaders(tmp_path):
    page = (Path(__file__).resolve().parents[2] / "docs" / "loaders.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.S)
    path = writers.dump(writers.mmsa(writers.samples()), tmp_path / "x.pkl")
    scope: dict = {"dataset": open_dataset(path, DataConfig(), str(small_tokenizer(tmp_path / "encoder")))}
    exec(example, scope)
    assert len(scope["first"]) == len(scope["rest"]) == 2
    for name in ("drop_text", "mask_vision", "max_padding", "resident", "dali", "torch", "precision"):
        assert name in page
