"""Files, splits and keys that are not read are named once; paths with ~; users without a home directory."""

import os
import pickle
import pwd
from pathlib import Path

import numpy as np
import pytest

from engine.config import DataConfig, load_config
from engine.errors import DataError
from engine.files import cache_home, user_path, write_text
from engine.kernels import build
from engine.loaders import DataWarning, open_dataset
from engine.loaders.convert import convert
from engine.loaders.inspect import inspect_path
from engine.loaders.store import open_store
from tests.loaders import writers
from tests.loaders.test_text import small_tokenizer
from tests.warned import user_warnings

CONFIG = DataConfig()


@pytest.fixture
def data():
    return writers.samples()


@pytest.fixture
def tokenizer(tmp_path):
    return str(small_tokenizer(tmp_path / "encoder"))


def assert_same_frames(opened, data):
    for name, rows in data.items():
        stored = opened.splits[name]._data
        assert stored.ids == [s.id for s in rows]
        assert all(np.array_equal(stored.audio[i], s.audio) for i, s in enumerate(rows))
        assert all(np.array_equal(stored.vision[i], s.vision) for i, s in enumerate(rows))


def told(path, tokenizer, *parts):
    """Open a data set: exactly one warning of what was skipped, with `parts`; inspect and the store say the same."""
    with pytest.warns(DataWarning) as caught:
        opened = open_dataset(path, CONFIG, tokenizer)
    (line,) = user_warnings(caught)
    for part in parts:
        assert part in line, (part, line)
    of_files = [note for note in inspect_path(path).notes if not note.startswith("sets of labels")]
    assert opened.report.notes == of_files
    folder = path if path.is_dir() else path.parent
    store = convert(path, folder / "kept.safetensors", tokenizer)
    assert open_store(store).meta["notes"] == opened.report.notes
    store.unlink()
    return opened


@pytest.mark.parametrize("kind", ["one pickle", "a file a split", "a manifest"])
def test_hidden_companions_are_named_and_skipped(tmp_path, data, tokenizer, kind):
    folder = tmp_path / "in"
    if kind == "one pickle":
        writers.dump(writers.mmsa(data), folder / "x.pkl")
    elif kind == "a file a split":
        writers.write_tuples(folder, data)
    else:
        writers.write_manifest(folder, data)
    for name in (".DS_Store", "._x.pkl", "._train.pkl", "._dev.pkl", "._label.csv", "._a.npy", "Thumbs.db"):
        (folder / name).write_bytes(b"\x00\x05\x16\x07\x00" * 20)
    assert_same_frames(told(folder, tokenizer, "skipped files", "._x.pkl", ".DS_Store", "Thumbs.db"), data)


def test_a_hidden_csv_is_no_label_csv(tmp_path, data, tokenizer):
    path = writers.write_declarelab(tmp_path / "in", data)
    rows = [{**r, "text": "wrong"} for r in writers.label_rows(data)]
    writers.write_csv(path.parent / "._mosi_data_noalign.csv", rows)
    opened = open_dataset(path, CONFIG, tokenizer)
    assert opened.splits["train"].text == [s.text for s in data["train"]]


def test_a_hidden_file_that_is_named_is_read(tmp_path, data, tokenizer):
    path = writers.dump(writers.mmsa(data), tmp_path / "in" / ".x.pkl")
    assert_same_frames(open_dataset(path, CONFIG, tokenizer), data)


@pytest.mark.parametrize("family", ["mmsa", "declarelab", "tuples", "magbert"])
def test_extra_splits_are_named_and_skipped(tmp_path, data, tokenizer, family):
    content = getattr(writers, family)(data)
    content["holdout"] = content["test"]
    content["meta"] = {"made": "today"}
    path = writers.dump(content, tmp_path / "in" / "x.pkl")
    writers.write_csv(path.parent / "label.csv", writers.label_rows(data))
    opened = told(path, tokenizer, "splits that are not read: holdout, meta")
    assert_same_frames(opened, data)


@pytest.mark.parametrize("family", ["mmsa", "declarelab"])
def test_extra_keys_are_named_and_skipped(tmp_path, data, tokenizer, family):
    content = getattr(writers, family)(data)
    for split in content:
        content[split]["speaker"] = ["a"] * len(content[split]["id"])
    content["test"][b"zzz"] = 1
    path = writers.dump(content, tmp_path / "in" / "x.pkl")
    writers.write_csv(path.parent / "label.csv", writers.label_rows(data))
    assert_same_frames(told(path, tokenizer, "keys that are not read: speaker, zzz (test)"), data)


def test_a_key_that_is_nearly_one_that_is_read_is_an_error(tmp_path, data, tokenizer):
    content = writers.mmsa(data)
    content["valid"]["zzz"] = 1
    content["valid"]["audio_len"] = content["valid"].pop("audio_lengths")
    path = writers.dump(content, tmp_path / "x.pkl")
    with pytest.raises(DataError, match=r"x\.pkl, valid: found an unknown key 'audio_len'.*'audio_lengths'"):
        open_dataset(path, CONFIG, tokenizer)


def test_extra_columns_and_splits_of_a_manifest(tmp_path, data, tokenizer):
    folder = writers.write_manifest(tmp_path / "in", data)
    lines = (folder / "manifest.csv").read_text().splitlines()
    rows = [f"{line},b" for line in lines[1:]]
    rows.append("other,unlabelled,,some words,,,b")
    (folder / "manifest.csv").write_text("\n".join([lines[0] + ",speaker", *rows]))
    with pytest.warns(DataWarning) as caught:
        opened = open_dataset(folder, CONFIG, tokenizer)
    assert [text.partition(": ")[2] for text in user_warnings(caught)] == [
        "splits that are not read: unlabelled",
        "columns that are not read: speaker",
    ]
    assert_same_frames(opened, data)


def test_extra_files_and_splits_of_a_csd_folder(tmp_path, data):
    pytest.importorskip("h5py", reason="needs the extra csd")
    folder = writers.write_csd(tmp_path, data)
    (folder / "phones.csd").write_bytes((folder / "words.csd").read_bytes())
    (folder / "._words.csd").write_bytes(b"\x00\x05\x16\x07" * 20)
    splits = (folder / "splits.json").read_text()
    (folder / "splits.json").write_text(splits.replace("{", '{"held": ["x"], ', 1))
    notes = inspect_path(folder).notes
    assert "skipped files: ._words.csd" in notes
    assert "splits that are not read: held" in notes
    assert "files that are not read: phones.csd" in notes
    (folder / "transcripts.csd").write_bytes((folder / "words.csd").read_bytes())
    (problem,) = inspect_path(folder).problems
    assert "several files of words" in problem and "words.csd" in problem and "transcripts.csd" in problem


def test_keys_written_as_bytes(tmp_path, data, tokenizer):
    """As a Python 2 pickle that was read with encoding="bytes" and written again."""
    content = writers.mmsa(data)
    bare = {
        k.encode(): {
            q.encode(): [str(t).encode() for t in v] if q in ("id", "raw_text", "annotations") else v
            for q, v in split.items()
        }
        for k, split in content.items()
    }
    path = writers.dump(bare, tmp_path / "x.pkl")
    opened = open_dataset(path, CONFIG, tokenizer)
    assert_same_frames(opened, data)
    assert opened.splits["test"].text == [s.text for s in data["test"]]


def test_splits_that_are_one_object(tmp_path, data, tokenizer):
    """An array that several splits and keys share is read for each."""
    content = writers.mmsa(dict.fromkeys(writers.SPLITS, data["valid"]))
    for split in content:
        ids = [f"{split}_{i}" for i in range(3)]
        content[split] = {**content["train"], "id": ids, "vision": content["train"]["audio"]}
        content[split]["vision_lengths"] = content["train"]["audio_lengths"]
    path = writers.dump(content, tmp_path / "x.pkl")
    assert path.stat().st_size < 1.5 * len(pickle.dumps(content["train"]["audio"])) + 4000
    opened = open_dataset(path, CONFIG, tokenizer)
    for split in writers.SPLITS:
        stored = opened.splits[split]._data
        for i, s in enumerate(data["valid"]):
            assert np.array_equal(stored.audio[i], s.audio) and np.array_equal(stored.vision[i], s.audio)


# -- home directories --


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (tmp_path / "me").mkdir()
    return tmp_path / "me"


def test_paths_below_the_home_directory(home, data, capsys):
    from engine.cli import main

    encoder = small_tokenizer(home / "encoder")
    assert encoder.parent == home
    writers.dump(writers.mmsa(data), home / "data" / "x.pkl")
    assert_same_frames(open_dataset("~/data/x.pkl", CONFIG, "~/encoder"), data)
    assert convert("~/data", "~/made", "~/encoder") == home / "made" / "store.safetensors"
    assert_same_frames(open_dataset("~/made", CONFIG, "~/encoder"), data)
    assert inspect_path("~/data/x.pkl").problems == []
    assert main(["inspect", "~/data/x.pkl"]) == 0
    assert main(["make-data", "~/tried", "--shape", "mosi", "--n", "6"]) == 0
    assert (home / "tried").is_dir()
    write_text("~/notes/a.txt", "x")
    assert (home / "notes" / "a.txt").read_text() == "x"
    load_config("mosi").save(home / "mine.yaml")
    assert load_config("~/mine.yaml") == load_config(home / "mine.yaml") == load_config(Path("~/mine.yaml"))


@pytest.fixture
def homeless(monkeypatch):
    """A user id without an entry in the system's list, and no HOME."""

    def nobody(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)


def test_no_home_directory(homeless, tmp_path, data, tokenizer, monkeypatch):
    assert cache_home() is None
    assert user_path("~/x") == Path("~/x")
    path = writers.dump(writers.mmsa(data), tmp_path / "in" / "x.pkl")
    assert_same_frames(open_dataset(path, CONFIG, tokenizer), data)
    assert len(list(path.parent.glob("*.safetensors"))) == 1  # beside the source, as ever
    with pytest.raises(RuntimeError, match=r"no home directory.*XDG_CACHE_HOME"):
        build.folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_home() == tmp_path
    assert build.folder() == tmp_path / "torch_extensions" / "engine"


def test_no_home_directory_and_a_folder_without_permission(homeless, tmp_path, data, tokenizer, monkeypatch):
    from engine.loaders import cache

    path = writers.dump(writers.mmsa(data), tmp_path / "in" / "x.pkl")
    monkeypatch.setattr(cache, "is_writable", lambda folder: False)
    assert_same_frames(open_dataset(path, CONFIG, tokenizer), data)
    assert os.listdir(path.parent) == ["x.pkl"]


def test_a_home_directory_that_does_not_exist_is_not_made(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "gone"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_home() is None
    assert not (tmp_path / "gone").exists()
