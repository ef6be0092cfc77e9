"""The store: what goes in comes out, mapped, checked, atomic, and made anew when its source changes."""

import errno
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

import engine
from engine.config import DataConfig
from engine.errors import DataError
from engine.loaders import DataWarning, cache, open_dataset, safe_pickle
from engine.loaders import convert as convert_module
from engine.loaders import store as store_module
from engine.loaders.content import SplitData
from engine.loaders.convert import convert
from engine.loaders.ragged import Ragged
from engine.loaders.store import is_store, open_store, verify_store, write_store
from tests.loaders import writers
from tests.loaders.test_loaders import KINDS, of
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

    monkeypatch.setattr(safe_pickle, "load", fail)
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


def test_source_is_read_again_when_readers_have_changed(tmp_path, source, tokenizer, monkeypatch):
    named = convert(source, tmp_path / "named", tokenizer)
    open_dataset(source, CONFIG, tokenizer)
    (made,) = source.parent.glob("*.safetensors")
    before = open_store(made).meta["fingerprint"]
    monkeypatch.setattr(convert_module, "READERS", convert_module.READERS + 1)
    open_dataset(source, CONFIG, tokenizer)
    assert list(source.parent.glob("*.safetensors")) == [made]  # replaced, not added
    assert open_store(made).meta["fingerprint"] != before
    assert len(open_dataset(named, CONFIG, tokenizer).splits["train"]) == 7  # a store that was asked for stays


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
    real = cache.is_writable
    monkeypatch.setattr(cache, "is_writable", lambda folder: folder != source.parent and real(folder))
    open_dataset(source, CONFIG, tokenizer)
    assert list(source.parent.iterdir()) == [source]
    assert len(list((tmp_path / "cache" / "engine").glob("*.safetensors"))) == 1


def test_nowhere_to_keep_it_reads_into_memory(source, tokenizer, monkeypatch):
    monkeypatch.setattr(cache, "is_writable", lambda _: False)
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
    with pytest.warns(DataWarning, match="made by length rule all_zero, not sum_zero"):
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
    with pytest.warns(DataWarning, match="could not be kept"):
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
    split.audio = Ragged(split.audio.values, split.audio.offsets + 1)
    path = write_store(tmp_path / "y", data)
    with pytest.raises(DataError, match="offsets of valid/audio"):
        open_store(path).splits["valid"]


def test_later_version(tmp_path, source, tokenizer):
    data = open_store(convert(source, tmp_path / "x", tokenizer))
    data.meta["version"] = 99
    with pytest.raises(DataError, match=r"store version 99 \(engine .*\); expected version 2\. Update engine"):
        open_store(write_store(tmp_path / "y", data))
    data.meta["version"] = 0
    with pytest.raises(DataError, match=r"store version 0.*Convert the data again"):
        open_store(write_store(tmp_path / "y", data))


# -- precision, provenance, vocabularies --


def test_float16(tmp_path, source, tokenizer):
    whole = convert(source, tmp_path / "a", tokenizer)
    half = convert(source, tmp_path / "b", tokenizer, dtype="float16")
    again = convert(half, tmp_path / "c", tokenizer)  # keeps it
    assert half.stat().st_size < whole.stat().st_size
    assert verify_store(half) == verify_store(again) == []
    expected = open_store(whole).splits["train"].audio.values.astype(np.float16)
    for path in (half, again):
        found = open_store(path).splits["train"]
        assert found.audio.values.dtype == np.float16 and found.label.dtype == np.float32
        assert np.array_equal(found.audio.values, expected)
    a, b = (open_dataset(p, CONFIG, tokenizer).splits["train"].audio.values for p in (whole, half))
    assert np.allclose(a, b, atol=5e-3) and b.dtype == np.float32


def test_float16_refuses_what_it_cannot_hold(tmp_path, tokenizer):
    data = writers.samples()
    data["valid"][1].vision[0, 0] = 1e5
    path = writers.dump(writers.mmsa(data), tmp_path / "x.pkl")
    with pytest.raises(DataError, match=r"valid/vision/values: found values beyond .*Convert to fp32"):
        convert(path, tmp_path / "store", tokenizer, dtype="float16")
    assert not is_store(tmp_path / "store")


def test_provenance(tmp_path, source, tokenizer):
    meta = open_store(convert(source, tmp_path / "a", tokenizer)).meta
    assert meta["sha256"] == {"data.pkl": hashlib.sha256(source.read_bytes()).hexdigest()}
    assert meta["engine"] == engine.__version__
    again = convert(tmp_path / "a", tmp_path / "b", tokenizer)
    assert open_store(again).meta["sha256"] == meta["sha256"]


def test_tokens_outside_the_vocabulary(tmp_path, source, tokenizer):
    data = open_store(convert(source, tmp_path / "x", tokenizer))
    split = data.splits["valid"]
    split.tokens = Ragged(split.tokens.values + 100, split.tokens.offsets)
    with pytest.raises(DataError, match=r"valid/tokens: found token 1\d\d; expected 0 to 14"):
        open_dataset(write_store(tmp_path / "y", data), CONFIG, tokenizer)


def test_stores_of_different_vocabularies(tmp_path, source, tokenizer):
    """Each is tokenised anew for the encoder in use; without texts that cannot be."""
    other = str(small_tokenizer(tmp_path / "other", writers.WORDS[::-1]))
    mine, theirs = (convert(source, tmp_path / n, t) for n, t in (("a", tokenizer), ("b", other)))
    tokens = [open_dataset(p, CONFIG, tokenizer).splits["train"].tokens.values for p in (mine, theirs)]
    assert np.array_equal(*tokens)
    for path in (mine, theirs):
        data = open_store(path)
        for split in data.splits.values():
            split.text = None
        write_store(path.with_name("bare.safetensors"), data)
    assert len(open_dataset(mine.with_name("bare.safetensors"), CONFIG, tokenizer).splits["train"]) == 7
    with pytest.raises(DataError, match=r"tokens of another vocabulary .* and no texts; expected those of"):
        open_dataset(theirs.with_name("bare.safetensors"), CONFIG, tokenizer)


# -- files that change while they are in use --


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["cut off", "emptied", "overwritten", "longer"])
def test_store_changed_while_in_use(tmp_path, source, tokenizer, kind, change):
    path = convert(source, tmp_path / "x", tokenizer)
    loader = open_dataset(path, CONFIG, tokenizer).loader("train", 2, **of(kind))
    size = path.stat().st_size
    if change == "overwritten":
        with path.open("r+b") as file:
            file.seek(size - 100)
            file.write(b"x" * 50)
        os.utime(path, ns=(0, 0))
    else:
        os.truncate(path, {"cut off": size // 2, "emptied": 0, "longer": size + 1}[change])
    with pytest.raises(DataError, match="a store that was written to while in use"):
        list(loader)


@pytest.mark.parametrize("kind", KINDS)
def test_store_replaced_while_in_use(tmp_path, source, tokenizer, kind):
    path = convert(source, tmp_path / "x", tokenizer)
    opened = open_dataset(path, CONFIG, tokenizer)
    expected = [b.audio for b in opened.loader("train", 2, kind="resident")]
    again = open_dataset(path, CONFIG, tokenizer)
    other = writers.dump(writers.mmsa(writers.samples(seed=5)), tmp_path / "other.pkl")
    convert(other, path, tokenizer)
    found = [b.audio for b in again.loader("train", 2, **of(kind))]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert open_store(path).splits["train"].label[0, 0] != opened.splits["train"].label[0, 0]


def test_resident_frames_need_the_store_no_more(tmp_path, source, tokenizer):
    path = convert(source, tmp_path / "x", tokenizer)
    loader = open_dataset(path, CONFIG, tokenizer).loader("train", 2, kind="resident")
    before = list(loader)
    os.truncate(path, 10)
    assert all(torch.equal(a.audio, b.audio) for a, b in zip(loader, before, strict=True))


def test_verify_a_store_that_is_being_written_to(tmp_path, source, tokenizer, monkeypatch):
    path = convert(source, tmp_path / "x", tokenizer)
    real = store_module._File.tensor

    def cut(self, key):
        os.truncate(path, 4096)
        return real(self, key)

    monkeypatch.setattr(store_module._File, "tensor", cut)
    monkeypatch.setattr(store_module, "_pieces", lambda *_: iter([b""]))
    with pytest.raises(DataError, match="written to while in use"):
        verify_store(path)


def test_splits_travel_to_other_processes(tmp_path, source, tokenizer):
    """Processes that are spawned, not forked, open the store themselves."""
    path = convert(source, tmp_path / "x", tokenizer)
    opened = open_dataset(path, CONFIG, tokenizer)
    _ = opened.splits["train"].audio  # a copy in memory does not travel
    sent = pickle.dumps(opened.splits["train"])
    assert len(sent) < 20_000
    rows = np.array([2, 0])
    for key in ("audio", "vision"):
        found, expected = (s.rows(key, rows) for s in (pickle.loads(sent), opened.splits["train"]))
        assert [f.tolist() for f in found] == [e.tolist() for e in expected]
    in_memory = pickle.loads(
        pickle.dumps(SplitData(["a"], None, np.zeros((1, 1)), *[Ragged.join([], np.float32, 2)] * 2))
    )
    assert in_memory.ids == ["a"]


# -- conversions that are interrupted, or find no room --


def drive(*arguments, timeout=500):
    """tests/loaders/conversion.py in a process of its own; what it found."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.loaders.conversion", *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_kills(tmp_path, count):
    found = drive("kill", tmp_path, count)
    assert found["killed"] == count
    assert found["corrupt"] == []
    assert found["left"] == []


def test_killed_conversions(tmp_path):
    check_kills(tmp_path, 6)


@pytest.mark.slow
def test_fifty_killed_conversions(tmp_path):
    check_kills(tmp_path, 50)


def check_cuts(tmp_path, count):
    found = drive("cut", tmp_path, count)
    assert found["wrong"] == [], "a bus error ends a process with exit code -7"
    assert found["error"] + found["whole"] == count


def test_a_source_that_is_cut_while_it_is_converted(tmp_path):
    check_cuts(tmp_path, 4)


@pytest.mark.slow
def test_forty_cut_sources(tmp_path):
    check_cuts(tmp_path, 40)


def test_no_room_at_any_point(tmp_path):
    """A limit on the size of files, as a full disk would, stops the spool or the store at some byte."""
    for found in drive("limit", tmp_path, 1000, 200_000, 1_200_000):
        assert "a file larger than this process may write" in found["error"]
        assert "Free space or name another place" in found["error"]
        assert found["left"] == []


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_of_a_conversion(tmp_path):
    """Far below the 1.5 times of the largest split that is promised: blocks of samples, whatever the file's size."""
    found = drive("memory", tmp_path)
    assert found["peak"] < 1.5 * found["ragged"]
    assert found["peak"] < 0.5 * found["pickle"]


@pytest.mark.parametrize("meta", ["[" * 100_000, '{"version": 1e999, "counts": {}}', "[1]", "9" * 5000])
def test_a_description_of_another_form(tmp_path, meta):
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "x.safetensors", {"engine_store": meta})
    with pytest.raises(DataError) as error:
        open_store(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)
