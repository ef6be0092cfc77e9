"""`engine inspect` names format, splits, widths, lengths, labels, and whatever is wrong."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from engine.loaders.convert import convert
from engine.loaders.inspect import InspectReport, inspect_path
from tests.loaders import writers
from tests.loaders.test_store import damage
from tests.loaders.test_text import small_tokenizer


def text(report):
    console = Console(file=io.StringIO(), width=160)
    console.print(report.render())
    return console.file.getvalue()


@pytest.fixture
def data():
    data = writers.samples()
    data["train"][0].audio[0, 0] = np.nan
    data["train"][1].vision = np.zeros((1, writers.VISION), np.float32)
    data["train"][2].vision = np.ones((3, writers.VISION), np.float32)
    data["train"][2].vision[1] = 0  # a zero frame inside
    return data


@pytest.mark.parametrize("family", ["declarelab", "mmsa", "tuples"])
def test_counts_and_statistics(tmp_path, data, family):
    if family == "declarelab":
        path = writers.write_declarelab(tmp_path, data)
    elif family == "mmsa":
        path = writers.dump(writers.mmsa(data), tmp_path / "x.pkl")
    else:
        path = writers.write_tuples(tmp_path, data)
    report = inspect_path(path)
    assert family in report.format
    assert report.problems == []
    assert list(report.splits) == list(writers.SPLITS)
    train = report.splits["train"]
    assert train["samples"] == 7
    assert train["audio"]["dim"] == writers.AUDIO
    assert train["audio"]["dtype"] == "float32"
    assert (train["audio"]["nonfinite"], train["audio"]["missing"]) == (1, 0)
    assert (train["vision"]["nonfinite"], train["vision"]["missing"], train["vision"]["zero_frames"]) == (0, 1, 1)
    lengths = [len(s.audio) for s in data["train"]]
    assert train["audio"]["length"] == {"min": min(lengths), "median": np.median(lengths), "max": max(lengths)}
    labels = np.array([s.label for s in data["train"]], np.float32)
    assert train["label"]["min"] == labels.min()
    assert sum(train["label"]["counts"]) == 7
    assert train["label"]["counts"] == np.histogram(labels, np.arange(-3.5, 4))[0].tolist()
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    shown = text(report)
    for part in (family, "train", "valid", "test", "no problems"):
        assert part in shown


def test_layout_is_shown_where_reading_fails(tmp_path, data):
    content = writers.mmsa(data)
    del content["valid"]["id"]
    report = inspect_path(writers.dump(content, tmp_path / "x.pkl"))
    assert report.layout["train"]["audio"] == "float32 [7, 9, 5]"
    assert report.splits == {}
    assert len(report.problems) == 1
    assert "float32 [7, 9, 5]" in text(report)
    assert "problem:" in text(report)


def test_all_duplicates_are_listed(tmp_path, data):
    data["test"][0].id = data["test"][1].id = data["train"][0].id
    report = inspect_path(writers.dump(writers.mmsa(data), tmp_path / "x.pkl"))
    assert report.duplicates == [data["train"][0].id]
    assert len(report.problems) == 2
    assert report.splits["test"]["samples"] == 4


def test_files_that_are_no_data(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"<html>")
    report = inspect_path(path)
    assert report.format == "unknown"
    assert "web page" in report.problems[0]
    assert "web page" in text(report)


def test_label_scales_other_than_sentiment(tmp_path, data):
    content = writers.mmsa(data)
    content["train"]["regression_labels"] = np.arange(7.0) * 10
    label = inspect_path(writers.dump(content, tmp_path / "x.pkl")).splits["train"]["label"]
    assert (label["edges"][0], label["edges"][-1]) == (0, 60)
    assert sum(label["counts"]) == 7


def test_store_says_what_its_source_said(tmp_path, data):
    source = writers.dump(writers.mmsa(data), tmp_path / "x.pkl")
    foreign = inspect_path(source)
    path = convert(source, tmp_path / "store", str(small_tokenizer(tmp_path / "encoder")))
    report = inspect_path(tmp_path / "store")
    assert "made from mmsa: x.pkl" in report.format
    assert report.problems == []
    for name, split in foreign.splits.items():
        for key, value in split.items():
            assert report.splits[name][key] == value
    assert report.splits["train"]["tokens"]["length"]["min"] >= 3
    assert "tokens" in text(report)
    damage(path, -1)
    assert inspect_path(path).problems == []  # checksums are compared when asked for
    assert "checksum" in inspect_path(path, verify=True).problems[0]
    path.write_bytes(path.read_bytes()[:50])
    assert "damaged store" in inspect_path(path).problems[0]


def test_names_from_a_file_are_text_and_nothing_else():
    """No markup of rich, and nothing that acts on the terminal."""
    hostile = "[/red]\x1b]0;owned\x07\u202e"
    report = InspectReport(hostile, hostile, {hostile: 5}, layout={hostile: {hostile: hostile}}, notes=[hostile],
                           duplicates=[hostile], problems=[hostile])  # fmt: skip
    out = io.StringIO()
    Console(file=out, width=400, force_terminal=False).print(report.render())
    shown = "[/red]\\x1b]0;owned\\x07\\u202e"
    assert out.getvalue().count(shown) == 9
    assert "\x1b" not in out.getvalue() and "\u202e" not in out.getvalue()


def test_chinese_texts_and_labels_of_sims(tmp_path, data):
    """Chinese has no blanks, and SIMS has eleven labels in [-1, 1]."""
    content = writers.mmsa(data)
    content["train"]["raw_text"] = ["我很喜欢", "这部 movie 很好!"] + ["好"] * 5
    content["train"]["regression_labels"] = np.array([-1, -0.8, -0.8, 0, 0.2, 0.6, 1])
    content["train"]["regression_labels_T"] = np.zeros(7)
    report = inspect_path(writers.dump(content, tmp_path / "x.pkl"))
    train = report.splits["train"]
    assert (train["text"]["length"]["max"], train["text"]["length"]["min"]) == (6, 1)  # 这 部 movie 很 好 !
    assert train["label"]["counts"] == [1, 2, 0, 0, 0, 1, 1, 0, 1, 0, 1]
    assert any("regression_labels_T; data.label_key chooses" in note for note in report.notes)
