"""The table in docs/formats.md of what happens to unusual files, made of real runs.

python -m tests.loaders.test_what_happens      # writes the table anew
"""

import csv
import io
import pickle
import re
import struct
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.config import DataConfig
from engine.errors import DataError
from engine.loaders import open_dataset
from tests.loaders import writers
from tests.loaders.test_every_frame import padded_at
from tests.loaders.test_text import small_tokenizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "formats.md"
BEGIN, END = "<!-- made by tests/loaders/test_what_happens.py -->", "<!-- end -->"
NONE = "–"

MADE = {
    "declarelab": writers.declarelab,
    "declarelab (MOSEI)": lambda data: writers.declarelab(data, ids="mosei"),
    "mmsa": writers.mmsa,
    "tuples": writers.tuples,
    "magbert": writers.magbert,
    "sdk": lambda data: writers.sdk(data),
    "avec2019": writers.avec2019,
}
"""Families that are pickles -> what makes their content."""
FAMILIES = [*MADE, "csd", "manifest"]
DICTS = ("declarelab", "declarelab (MOSEI)", "mmsa")

Data = dict[str, list[writers.Sample]]
Run = tuple[Path, Data] | None


def fresh(family: str) -> Data:
    return writers.interviews() if family == "avec2019" else writers.samples()


def write(folder: Path, family: str, data: Data, content: dict | None = None, dump: Callable = writers.dump) -> Path:
    """A file of the family. `content`: what to pickle instead of what the family's writer makes of `data`."""
    if family == "csd":
        return writers.write_csd(folder, data)
    if family == "manifest":
        return writers.write_manifest(folder, data)
    path = folder / "x.pkl"
    dump(MADE[family](data) if content is None else content, path)
    if family.startswith("declarelab"):
        writers.write_csv(folder / "label.csv", table(family, data))
    return path


def table(family: str, data: Data) -> list[dict]:
    """Rows of the label CSV; MOSEI's clips have names of their own, so that texts are joined by position."""
    rows = writers.label_rows(data)
    return rows if family == "declarelab" else [{**r, "clip_id": f"c{r['clip_id']}"} for r in rows]


# -- situations: a file, and the samples that it must give --


def other_side(folder: Path, family: str, data: Data) -> Run:
    if family == "tuples":
        content = writers.tuples(data)
        for rows in content.values():
            for i, ((words, vision, audio, *rest), label, name) in enumerate(rows):
                vision, audio = (writers.pad([x], 12, "left")[0] for x in (vision, audio))
                rows[i] = ((words, vision, audio, *rest), label, name)
        return write(folder, family, data, content), data
    if family not in DICTS:
        return None
    side = "left" if family == "mmsa" else "right"
    return write(folder, family, data, padded_at(MADE[family](data), data, side)), data


def missing_text(folder: Path, family: str, data: Data) -> Run:
    sample = data["train"][1]
    sample.text = ""
    if family == "avec2019":
        sample.audio, sample.vision = sample.audio[:1], sample.vision[:1]
        sample.more = {k: v[:1] for k, v in sample.more.items()}
    path = write(folder, family, data)
    if family == "csd":  # a segment without words is left out
        del data["train"][1]
    return path, data


def missing_modality(folder: Path, family: str, data: Data) -> Run:
    sample = data["train"][1]
    sample.vision = np.zeros_like(sample.vision) if family != "manifest" else sample.vision[:0]
    path = write(folder, family, data)
    sample.vision = np.zeros((1, sample.vision.shape[1]), np.float32)
    return path, data


def shared_arrays(folder: Path, family: str, data: Data) -> Run:
    if family == "csd":
        return None
    if family in DICTS:
        for rows in data.values():
            for s in rows:
                s.vision = s.audio
        content = MADE[family](data)
        for split in content.values():
            split["vision"] = split["audio"]
        return write(folder, family, data, content), data
    first = data["train"][0]
    for s in data["train"]:
        s.vision = first.vision
        if family == "avec2019":
            s.text, s.audio, s.more = first.text, first.audio, first.more
    path = write(folder, family, data)
    if family == "manifest":
        text = (path / "manifest.csv").read_text()
        ids = "|".join(s.id for s in data["train"])
        (path / "manifest.csv").write_text(re.sub(rf"vision/({ids})\.npy", f"vision/{first.id}.npy", text))
    return path, data


def extra_keys(folder: Path, family: str, data: Data) -> Run:
    if family == "csd":
        path = write(folder, family, data)
        (path / "phones.csd").write_bytes((path / "words.csd").read_bytes())
        return path, data
    if family == "manifest":
        path = write(folder, family, data)
        lines = (path / "manifest.csv").read_text().splitlines()
        (path / "manifest.csv").write_text("\n".join([f"{lines[0]},speaker", *(f"{line},a" for line in lines[1:])]))
        return path, data
    content = MADE[family](data)
    if family in DICTS:
        for split in content.values():
            split["speaker"] = ["a"] * len(split["id"])
    content["holdout"] = content["test"]
    return write(folder, family, data, content), data


def numpy_names(old: str, new: str) -> Callable:
    """A writer of pickles in which numpy's modules have the names of another version."""

    def dump(content: object, path: Path) -> None:
        raw = pickle.dumps(content, 2)
        assert f"cnumpy.{old}.".encode() in raw or f"cnumpy.{new}.".encode() in raw
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw.replace(f"cnumpy.{old}.".encode(), f"cnumpy.{new}.".encode()))

    return dump


def numpy_1(folder: Path, family: str, data: Data) -> Run:
    return (write(folder, family, data, dump=numpy_names("_core", "core")), data) if family in MADE else None


def numpy_2(folder: Path, family: str, data: Data) -> Run:
    return (write(folder, family, data, dump=numpy_names("core", "_core")), data) if family in MADE else None


class Python2(pickle._Pickler):
    """Writes text and bytes as Python 2 wrote its str."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_raw(self, value: str | bytes) -> None:
        raw = value.encode() if isinstance(value, str) else value
        self.write(b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_raw


def python_2(folder: Path, family: str, data: Data) -> Run:
    if family not in MADE:
        return None
    data["train"][0].text = data["train"][0].text.replace("o", "\u00f6")
    content = MADE[family](data)
    if family == "mmsa":
        for split in content.values():
            split |= {key: list(map(str, split[key])) for key in ("id", "raw_text")}

    def dump(content: object, path: Path) -> None:
        file = io.BytesIO()
        Python2(file, 2).dump(content)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core."))

    return write(folder, family, data, content, dump), data


def not_finite(folder: Path, family: str, data: Data) -> Run:
    data["train"][0].audio[0, :2] = np.nan, -np.inf
    path = write(folder, family, data)
    data["train"][0].audio[0, :2] = 0
    return path, data


def other_order(folder: Path, family: str, data: Data) -> Run:
    if family == "csd":
        return write(folder, family, {s: data[s] for s in ("test", "train", "valid")}), data
    if family == "manifest":
        path = write(folder, family, data)
        with (path / "manifest.csv").open(newline="") as file:
            writers.write_csv(path / "manifest.csv", list(csv.DictReader(file))[::-1])
        return path, {s: rows[::-1] for s, rows in data.items()}
    content = MADE[family](data)
    path = write(folder, family, data, dict(reversed(content.items())))
    if family.startswith("declarelab"):
        writers.write_csv(path.parent / "label.csv", table(family, data)[::-1])
    return path, data


SITUATIONS = {
    "padding at the other side": other_side,
    "a text is missing": missing_text,
    "a modality is missing": missing_modality,
    "shared arrays": shared_arrays,
    "extra keys, splits, files": extra_keys,
    "numpy 1 pickle": numpy_1,
    "numpy 2 pickle": numpy_2,
    "Python 2 pickle": python_2,
    "NaN, inf": not_finite,
    "other order of splits and rows of tables": other_order,
}


# -- what happens --


def outcome(folder: Path, family: str, situation: str, encoder: str) -> tuple[str, list[str]]:
    """What a run makes of a file: a word for the table, and what it says."""
    run = SITUATIONS[situation](folder, family, fresh(family))
    if run is None:
        return NONE, []
    path, expected = run
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened = open_dataset(path, DataConfig(align="segments"), encoder)
    except DataError as problem:
        return "refused", [f"found {problem.found}; expected {problem.expected}"]
    for name, rows in expected.items():
        got = opened.splits[name]._data
        assert len(got) == len(rows)
        assert got.text == [s.text for s in rows]
        assert np.array_equal(got.label[:, 0], np.array([s.label for s in rows], np.float32))
        for i, s in enumerate(rows):
            assert np.array_equal(got.audio[i], s.audio) and np.array_equal(got.vision[i], s.vision)
    said = opened.report.lines()
    return ("read, reported" if said else "read"), said


def page(folder: Path) -> str:
    """The table and what is reported, as the page has them."""
    encoder = str(small_tokenizer(folder / "encoder"))
    said: dict[tuple[str, str], str] = {}
    lines = [f"| family | {' | '.join(SITUATIONS)} |", "|---" * (len(SITUATIONS) + 1) + "|"]
    for number, family in enumerate(FAMILIES):
        cells = []
        for i, situation in enumerate(SITUATIONS):
            cell, found = outcome(folder / f"{number}-{i}", family, situation, encoder)
            cells.append(cell)
            if found:
                said.setdefault(
                    (cell, situation), f"- {situation}, {cell.removeprefix('read, ')} ({family}): {'; '.join(found)}"
                )
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "What is reported, for example:", "", *said.values()])


def test_the_table_is_what_happens(tmp_path):
    pytest.importorskip("h5py", reason="needs the extra csd")
    text = PAGE.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.split(BEGIN)[1].split(END)[0].strip() == page(tmp_path), "run python -m tests.loaders.test_what_happens"


def test_what_can_be_read_right_is_read(tmp_path):
    """Only a label CSV that has no ids and another order is refused, since its texts cannot be told apart."""
    pytest.importorskip("h5py", reason="needs the extra csd")
    rows = [line for line in PAGE.read_text(encoding="utf-8").split(BEGIN)[1].splitlines() if line.startswith("| ")]
    refused = [line.split("|")[1].strip() for line in rows for cell in line.split("|") if cell.strip() == "refused"]
    assert refused == ["declarelab (MOSEI)"]


if __name__ == "__main__":
    old = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as made:
        new = page(Path(made))
    PAGE.write_text(f"{old.split(BEGIN)[0]}{BEGIN}\n\n{new}\n\n{END}{old.split(END)[1]}", encoding="utf-8")
