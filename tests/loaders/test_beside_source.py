"""A store in the folder of the files that it was made from."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine.config import DataConfig
from engine.errors import DataError
from engine.loaders import convert as convert_module
from engine.loaders import open_dataset
from engine.loaders.convert import convert, open_current
from engine.loaders.inspect import inspect_path
from engine.loaders.store import open_store, write_store
from tests.loaders import writers
from tests.loaders.test_text import small_tokenizer

CONFIG = DataConfig(length_rule="recorded")


@pytest.fixture
def source(tmp_path):
    return writers.dump(writers.mmsa(writers.samples(), features=6), tmp_path / "in" / "data.pkl")


@pytest.fixture
def tokenizer(tmp_path):
    return str(small_tokenizer(tmp_path / "encoder"))


def with_label(source: Path, label: float) -> None:
    """Write the first label of a pickle anew."""
    content = pickle.loads(source.read_bytes())
    content["train"]["regression_labels"][0] = label
    writers.dump(content, source)


def later(path: Path) -> None:
    """Give a file a time after every store's."""
    os.utime(path, (2**32, 2**32))


@pytest.fixture
def hashed(monkeypatch):
    """Names of the source files that have been hashed."""
    names, real = [], convert_module._sha256
    monkeypatch.setattr(convert_module, "_sha256", lambda path: names.append(path.name) or real(path))
    return names


def test_a_store_in_the_folder_of_its_files(tmp_path, source, tokenizer):
    folder = source.parent.rename(tmp_path / "my data")
    source = folder / source.name
    convert(folder, folder, tokenizer)
    with_label(source, -3)
    later(source)
    stale = (
        r"my data: found data\.pkl, which has changed since store\.safetensors was made from it; expected the "
        r"files that it was made from\. Convert again, with the same options "
        r"\(engine convert '(.*)/my data' '\1/my data' \.\.\.\), or name the store itself to read it as it is\."
    )
    with pytest.raises(DataError, match=stale):
        open_dataset(folder, CONFIG, tokenizer)
    with pytest.raises(DataError, match=stale):
        convert(folder, tmp_path / "other.safetensors", tokenizer)
    assert "has changed since" in inspect_path(folder).problems[0]
    assert open_dataset(folder / "store.safetensors", CONFIG, tokenizer).splits["train"].label[0] > -3
    os.utime(source)  # now, before the new store's time
    convert(folder, folder, tokenizer)  # as the error says
    assert open_dataset(folder, CONFIG, tokenizer).splits["train"].label[0] == -3
    source.unlink()
    assert inspect_path(folder).problems == []
    with pytest.raises(DataError, match="source and destination the same"):
        convert(folder, folder, tokenizer)


def test_other_csv_files_beside_a_store_do_not_matter(tmp_path, source, tokenizer):
    notes, gone = source.with_name("notes.csv"), source.with_name("predictions.csv")
    for path in (notes, gone):
        path.write_text("a,b\n")
    convert(source.parent, source.parent, tokenizer)
    notes.write_text("a,c\n")
    later(notes)
    gone.unlink()
    assert open_current(source.parent).meta["sha256"].keys() == {"data.pkl"}


def test_the_label_csv_of_a_store_matters(tmp_path, tokenizer):
    data = writers.samples()
    writers.write_declarelab(tmp_path, data)
    (tmp_path / "notes.csv").write_text("a,b\n")
    convert(tmp_path, tmp_path, tokenizer)
    labels = tmp_path / "MOSI-label.csv"
    assert {n for n in open_current(tmp_path).meta["sha256"] if n.endswith(".csv")} == {labels.name}
    rows = writers.label_rows(data)
    rows[0]["text"] = "another text"
    writers.write_csv(labels, rows)
    later(labels)
    with pytest.raises(DataError, match=r"MOSI-label\.csv, which has changed since"):
        open_current(tmp_path)


def test_the_folds_csv_of_a_store_matters(tmp_path, tokenizer):
    folder = writers.write_csd(tmp_path / "data", writers.samples())
    splits, folds = folder / "splits.json", folder / "folds.csv"
    rows = [{"video_id": v, "mode": s} for s, videos in json.loads(splits.read_text()).items() for v in videos]
    splits.unlink()
    writers.write_csv(folds, rows)
    (folder / "notes.csv").write_text("a,b\n")
    convert(folder, folder, tokenizer)
    assert {n for n in open_current(folder).meta["sha256"] if n.endswith(".csv")} == {"folds.csv"}
    writers.write_csv(folds, rows[::-1])
    later(folds)
    with pytest.raises(DataError, match=r"folds\.csv, which has changed since"):
        open_current(folder)


def manifest(folder: Path) -> Path:
    """A folder of arrays with a store; its folder of arrays."""
    arrays = folder / "arrays"
    arrays.mkdir(parents=True)
    rows = ["id,split,label,audio,vision,text"]
    for i, split in enumerate(writers.SPLITS):
        for kind in ("audio", "vision"):
            np.save(arrays / f"{kind}{i}.npy", np.full((3, 2), i + 1, np.float32))
        rows.append(f"{i},{split},{i - 1},arrays/audio{i}.npy,arrays/vision{i}.npy,good")
    (folder / "manifest.csv").write_text("\n".join(rows))
    return arrays


def test_arrays_that_were_removed_after_conversion(tmp_path, tokenizer):
    arrays = manifest(tmp_path / "data")
    convert(tmp_path / "data", tmp_path / "data", tokenizer)
    shutil.rmtree(arrays)
    assert len(open_dataset(tmp_path / "data", CONFIG, tokenizer).splits["train"]) == 1


def test_only_source_files_with_a_later_time_are_hashed(tmp_path, tokenizer, hashed, monkeypatch):
    data, copy = tmp_path / "data", tmp_path / "copy"
    manifest(data)
    convert(data, data, tokenizer)
    assert len(hashed) == 7  # the manifest and six arrays
    hashed.clear()
    shutil.copytree(data, copy)  # keeps times
    (copy / "more.csv").write_text("a,b\n")
    np.save(copy / "arrays" / "more.npy", np.zeros(2))
    monkeypatch.chdir(tmp_path)
    for path in (copy, Path("copy")):
        open_current(path)
    assert hashed == []
    later(copy / "arrays" / "audio1.npy")
    open_current(copy)
    assert hashed == ["audio1.npy"]
    np.save(copy / "arrays" / "audio1.npy", np.zeros((3, 2), np.float32))
    later(copy / "arrays" / "audio1.npy")
    with pytest.raises(DataError, match=r"found arrays/audio1\.npy, which has changed since"):
        open_current(copy)


@pytest.mark.parametrize("sums", [None, {}, {"data.pkl\0": "0", "x" * 5000: "0", ".": "0", "gone.pkl": "0"}])
def test_sums_that_name_nothing_to_compare(source, tokenizer, sums):
    data = open_store(convert(source.parent, source.parent, tokenizer))
    data.meta.pop("sha256")
    if sums is not None:
        data.meta["sha256"] = sums
    write_store(source.parent, data)
    later(source)
    assert len(open_current(source.parent).splits["train"]) == 7
