"""The store: what goes in comes out, mapped, checked, atomic, and made anew when its source changes."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from engine.config import DataConfig
from engine.errors import DataError
from engine.loaders import dataset as dataset_module
from engine.loaders import formats, open_dataset
from engine.loaders.convert import convert
from engine.loaders.store import is_store, open_store, verify_store, write_store
from tests.loaders import writers
from tests.loaders.test_text import small_tokenizer

CONFIG = DataConfig(length_rule="recorded")


@pytest.fixture
def source(tmp_path):
    return writers.dump(writers.mmsa(writers.samples(), features=6), tmp_path / "in" / "data.pkl")


@pytest.fixture
def tokenizer(tmp_path):
    return str(small_tokenizer(tmp_path / "encoder"))


def test_round_trip(tmp_path, source, tokenizer):
    path = convert(source, tmp_path / "out.safetensors", tokenizer)
    data = open_store(path)
    assert path == tmp_path / "out.safetensors"
    assert list(data.splits) == list(writers.SPLITS)
    for name, rows in writers.samples().items():
        got = data.splits[name]
        assert got.ids == [s.id for s in rows]
        assert got.text == [s.text for s in rows]
        assert np.array_equal(got.label[:, 0], np.array([s.label for s in rows], np.float32))
        for i, s in enumerate(rows):
            assert np.array_equal(got.audio[i], s.audio)
            assert np.array_equal(got.vision[i], s.vision)
            assert got.tokens[i].tolist() == [2, *(4 + writers.WORDS.index(w) for w in s.text.split()), 3]
        assert got.features is None
    assert data.meta["format"] == "mmsa"
    assert data.meta["source"] == "data.pkl"
    assert verify_store(path) == []


def test_any_safetensors_reader_can_read_it(tmp_path, source, tokenizer):
    path = convert(source, tmp_path / "store", tokenizer)
    assert path == tmp_path / "store" / "store.safetensors"
    assert is_store(tmp_path / "store")
    with safe_open(str(path), framework="numpy") as file:
        values = file.get_tensor("train/audio/values")
    assert np.array_equal(values, np.concatenate([s.audio for s in writers.samples()["train"]]))


def test_splits_are_read_when_asked_for(tmp_path, source, tokenizer):
    data = open_store(convert(source, tmp_path / "x", tokenizer))
    assert data.splits._read == {}
    data.splits["valid"]
    assert list(data.splits._read) == ["valid"]


def test_text_features_are_kept_only_when_asked_for(tmp_path, source, tokenizer):
    kept = open_store(convert(source, tmp_path / "a", "features")).splits["train"]
    assert kept.features.dim == 6
    assert kept.tokens is None
    assert kept.text is not None


def test_convert_is_deterministic(tmp_path, source, tokenizer):
    a, b = (convert(source, tmp_path / n, tokenizer).read_bytes() for n in "ab")
    assert a == b


def test_first_use_makes_a_store_beside_the_source(source, tokenizer, monkeypatch):
    open_dataset(source, CONFIG, tokenizer)
    made = list(source.parent.glob("data.engine-*.safetensors"))
    assert len(made) == 1

    def fail(*_):
        raise AssertionError("the source was read again")

    monkeypatch.setattr(formats.safe_pickle, "load", fail)
    open_dataset(source, CONFIG, tokenizer)


def test_changed_source_or_rule_is_read_again(source, tokenizer):
    open_dataset(source, CONFIG, tokenizer)
    changed = writers.samples(seed=5)
    writers.dump(writers.mmsa(changed), source)
    assert open_dataset(source, CONFIG, tokenizer).splits["test"].ids == [s.id for s in changed["test"]]
    assert open_dataset(source, CONFIG, tokenizer).splits["test"].text == [s.text for s in changed["test"]]
    assert len(list(source.parent.glob("*.safetensors"))) == 1  # replaced, not added
    open_dataset(source, DataConfig(length_rule="sum_zero"), tokenizer)
    assert len(list(source.parent.glob("*.safetensors"))) == 2


def test_changed_csv_is_read_again(tmp_path, tokenizer):
    data = writers.samples()
    path = writers.write_declarelab(tmp_path, data)
    open_dataset(path, CONFIG, tokenizer)
    rows = writers.label_rows(data)
    rows[0]["text"] = "another text"
    writers.write_csv(tmp_path / "MOSI-label.csv", rows)
    assert open_dataset(path, CONFIG, tokenizer).splits["train"].text[0] == "another text"


def test_damaged_cache_is_made_again(source, tokenizer):
    open_dataset(source, CONFIG, tokenizer)
    (made,) = source.parent.glob("*.safetensors")
    made.write_bytes(made.read_bytes()[:100])
    assert len(open_dataset(source, CONFIG, tokenizer).splits["train"]) == 7
    assert verify_store(made) == []


def test_unwritable_folder_uses_the_users_cache(tmp_path, source, tokenizer, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = dataset_module.is_writable
    monkeypatch.setattr(dataset_module, "is_writable", lambda folder: folder != source.parent and real(folder))
    open_dataset(source, CONFIG, tokenizer)
    assert list(source.parent.iterdir()) == [source]
    assert len(list((tmp_path / "cache" / "engine").glob("*.safetensors"))) == 1


def test_nowhere_to_keep_it_reads_into_memory(source, tokenizer, monkeypatch):
    monkeypatch.setattr(dataset_module, "is_writable", lambda _: False)
    assert len(open_dataset(source, CONFIG, tokenizer).splits["train"]) == 7
    assert list(source.parent.iterdir()) == [source]


def test_another_tokeniser_tokenises_anew(tmp_path, source, tokenizer):
    path = convert(source, tmp_path / "x", tokenizer)
    other = str(small_tokenizer(tmp_path / "other", writers.WORDS[::-1]))
    a, b = (open_dataset(path, CONFIG, name).splits["train"].tokens for name in (tokenizer, other))
    assert not np.array_equal(a.values, b.values)
    again = convert(path, tmp_path / "y", other)
    assert np.array_equal(open_store(again).splits["train"].tokens.values, b.values)


def test_store_of_another_rule_is_told(tmp_path, source, tokenizer):
    path = convert(source, tmp_path / "x", tokenizer, "all_zero")
    with pytest.warns(dataset_module.DataWarning, match="made by length rule all_zero, not sum_zero"):
        open_dataset(path, DataConfig(length_rule="sum_zero"), tokenizer)
    with pytest.raises(DataError, match="a store made by length rule all_zero; expected rule sum_zero"):
        convert(path, tmp_path / "y", tokenizer, "sum_zero")
    with pytest.raises(DataError, match="source and destination the same"):
        convert(path, tmp_path / "x", tokenizer)


def no_space(monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)


def test_no_space_leaves_nothing(tmp_path, source, tokenizer, monkeypatch):
    no_space(monkeypatch)
    with pytest.raises(DataError, match="no space left"):
        convert(source, tmp_path / "out" / "x.safetensors", tokenizer)
    assert list((tmp_path / "out").iterdir()) == []


def test_no_space_for_the_cache_is_a_note(source, tokenizer, monkeypatch):
    no_space(monkeypatch)
    with pytest.warns(dataset_module.DataWarning, match="could not be kept"):
        opened = open_dataset(source, CONFIG, tokenizer)
    assert len(opened.splits["train"]) == 7
    assert list(source.parent.iterdir()) == [source]


def test_unwritable_destination(tmp_path, source, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="expected a folder"):
        convert(source, tmp_path / "file" / "x.safetensors", tokenizer)


def damage(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def test_checksums_find_a_flipped_bit(tmp_path, source, tokenizer):
    path = convert(source, tmp_path / "x", tokenizer)
    damage(path, -1)
    assert len(verify_store(path)) == 1


def test_truncated_store_and_other_safetensors(tmp_path, source, tokenizer):
    path = convert(source, tmp_path / "x.safetensors", tokenizer)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match="damaged store"):
        open_store(path)
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(2)}, path)
    with pytest.raises(DataError, match="safetensors file of another kind"):
        open_dataset(path, CONFIG, tokenizer)


def test_inconsistent_offsets_are_damage(tmp_path, source, tokenizer):
    data = open_store(convert(source, tmp_path / "x", tokenizer))
    split = data.splits["valid"]
    split.audio.offsets = split.audio.offsets + 1
    path = write_store(tmp_path / "y", data)
    with pytest.raises(DataError, match="offsets of valid/audio"):
        open_store(path).splits["valid"]


def test_later_version(tmp_path, source, tokenizer):
    data = open_store(convert(source, tmp_path / "x", tokenizer))
    data.meta["version"] = 99
    with pytest.raises(DataError, match="store version 99; expected version 1"):
        open_store(write_store(tmp_path / "y", data))
