"""Folders that users have half-way: lists of splits that do not match, aligned .csd files, names of their own."""

import json
import pickle
import re
import warnings

import numpy as np
import pytest

from engine.config import DataConfig
from engine.errors import DataError
from engine.loaders import formats, open_dataset
from engine.loaders.formats import Choice, read
from engine.loaders.formats.checks import nearest
from engine.loaders.formats.registry import without_effect
from engine.loaders.inspect import inspect_path
from tests.loaders import writers
from tests.loaders.test_text import small_tokenizer


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("h5py", reason="needs the extra csd")
    return writers.write_csd(tmp_path / "csd", writers.samples(3))


def test_videos_without_labels_are_counted(folder):
    splits = json.loads((folder / "splits.json").read_text())
    splits["test"] += ["gone_1", "gone_2"]
    splits["train"] += ["gone_3"]
    (folder / "splits.json").write_text(json.dumps(splits))
    notes = read(folder, "recorded")[1].notes
    assert "3 videos of the splits have no labels and are left out (train 1, test 2)" in notes


def test_a_video_in_two_splits_of_a_table(folder):
    splits = json.loads((folder / "splits.json").read_text())
    (folder / "splits.json").unlink()
    rows = [f"{video},{split}" for split, videos in splits.items() for video in videos]
    (folder / "folds.csv").write_text("video_id,mode\n" + "\n".join(rows))
    assert set(read(folder, "recorded")[1].splits) == {"train", "valid", "test"}
    twice = splits["train"][0]
    (folder / "folds.csv").write_text("video_id,mode\n" + "\n".join([*rows, f"{twice},test"]))
    with pytest.raises(DataError, match=rf"folds\.csv: found video {twice} in train and in test"):
        read(folder, "recorded")


def test_files_after_the_sdks_align(folder):
    import h5py

    with h5py.File(folder / "labels.csd", "r+") as file:
        videos = next(iter(file.values()))["data"]
        for name in list(videos):
            videos.move(name, f"{name}[0]")
    with pytest.raises(DataError, match=r"as after the SDK's align: give the files from before"):
        read(folder, "recorded")


def test_times_of_labels_in_milliseconds(folder):
    import h5py

    with h5py.File(folder / "labels.csd", "r+") as file:
        for video in next(iter(file.values()))["data"].values():
            video["intervals"][...] *= 1000
    with pytest.raises(DataError, match=r"no word in any of \d segments; .* Compare the times of words and labels"):
        read(folder, "recorded")


def manifest(path, header: str, label: str = "0.5"):
    path.mkdir()
    np.save(path / "a.npy", np.ones((2, 3), np.float32))
    rows = [f"c{i},{split},{label},hi,a.npy,a.npy" for i, split in enumerate(("train", "valid", "test"))]
    (path / "manifest.csv").write_text("\n".join([header, *rows]))
    return path


@pytest.mark.parametrize(
    ("header", "label", "found"),
    [
        ("ID,Split,Label,Text,Audio,Vision", "1", "expected a column id. Rename 'ID' to 'id'."),
        ("id,split,label,Text,audio,vision", "1", "expected a column text. Rename 'Text' to 'text'."),
        ("file,set,emotion,said,sound,face", "1", "the columns id, split, label, text, audio and vision. Rename"),
        ("id,split,label,text,audio,vision", "happy", "found label 'happy'; expected a finite number"),
        ("id,split,label,text,audio,vision", "happy", "number classes 0, 1, 2, ..."),
    ],
)
def test_names_of_ones_own(tmp_path, header, label, found):
    (problem,) = inspect_path(manifest(tmp_path / "in", header, label)).problems
    assert found in problem


def test_three_tables_in_place_of_a_manifest(tmp_path):
    folder = manifest(tmp_path / "in", "id,split,label,text,audio,vision")
    (folder / "manifest.csv").rename(folder / "train.csv")
    with pytest.raises(DataError, match=r"found no manifest\.csv, but train\.csv; .* one manifest\.csv with"):
        inspect_path(folder)
    assert list(inspect_path(folder / "train.csv").splits) == ["train", "valid", "test"]


def test_nearest_does_not_mind_capitals():
    assert nearest("id", ["Nothing", "ID"]) == ["ID"]
    assert nearest("lables", ["labels", "id"]) == ["labels"]


@pytest.mark.parametrize(
    ("choice", "told"),
    [({"audio_features": "egemaps"}, ["data.audio_features=egemaps has no effect"]), ({"label_column": 0}, []),
     ({"label_column": 2, "align": "segments"}, ["data.label_column=2 has no effect"])],
)  # fmt: skip
def test_choices_that_do_nothing_are_told(tmp_path, choice, told):
    """A manifest has one set of features and one label."""
    folder = manifest(tmp_path / "in", "id,split,label,text,audio,vision")
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        open_dataset(folder, DataConfig(**choice), small_tokenizer(tmp_path / "words"))
    lines = [str(one.message) for one in met if "no effect" in str(one.message)]
    assert len(lines) == len(told) and all(part in line for part, line in zip(told, lines, strict=True))


def test_every_reader_says_what_it_heeds():
    for reader in formats.formats():
        assert set(reader.choices) <= set(vars(Choice())), reader.name
        assert without_effect(reader, Choice()) == []


def told(path) -> str:
    with pytest.warns() as warned:
        open_dataset(path, DataConfig(modalities=["audio", "vision"]))
    return "\n".join(str(w.message) for w in warned)


def test_recorded_lengths_that_hold_the_padding(tmp_path):
    content = writers.mmsa(writers.samples())
    for split in content.values():
        split["audio_lengths"] = [writers.AUDIO_CAP] * len(split["id"])  # of the padded array
    path = writers.dump(content, tmp_path / "unaligned_50.pkl")
    said = told(path)
    assert re.search(r"audio: \d+ of 14 sequences end in frames of zeros \(train \d, valid \d, test \d\)", said)
    assert "data.length_rule=all_zero" in said and "vision:" not in said and "NaN" not in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = open_dataset(path, DataConfig(modalities=["audio", "vision"], length_rule="all_zero"))
    lengths = [len(sample.audio) for sample in writers.samples()["train"]]
    assert right.splits["train"].lengths("audio").tolist() == lengths


def test_tuples_whose_lengths_hold_the_padding(tmp_path):
    folder = writers.write_tuples(tmp_path / "in", writers.samples())
    for file in folder.glob("*.pkl"):
        rows = []
        for (words, visual, acoustic, spoken, *_), label, name in pickle.loads(file.read_bytes()):
            padded = writers.pad([visual], writers.VISION_CAP, "right")[0]
            inner = (words, padded, acoustic, spoken, len(padded), len(acoustic))
            rows.append((inner, label, name))
        writers.dump(rows, file)
    assert "If they are padding, cut them off before the sequences are saved" in told(folder)


@pytest.mark.parametrize("rule", ["recorded", "all_zero"])
def test_zeros_that_no_length_rule_removes(tmp_path, rule):
    """A manifest has no lengths; and zeros at the side without padding are frames by every rule."""
    data = writers.samples()
    for rows in data.values():
        for sample in rows:
            sample.audio = np.pad(sample.audio[:4], ((3, 0), (0, 0)))
    content = writers.mmsa(data)
    for split in content.values():
        split["audio"] = np.pad(split["audio"], ((0, 0), (0, 8), (0, 0)))  # at the right, as is usual
        split["audio_lengths"] = [7] * len(split["id"])
    mmsa = writers.dump(content, tmp_path / "unaligned_50.pkl")
    for rows in data.values():
        rows[0].audio = rows[0].audio[:-1]  # of another length
    for path in (mmsa, writers.write_manifest(tmp_path / "in", data)):
        (note,) = [note for note in inspect_path(path, rule).notes if note.startswith("audio: ")]
        assert "sequences begin in frames of zeros" in note
        assert note.endswith("If they are padding, cut them off before the sequences are saved")


def test_padding_with_nan(tmp_path):
    content = writers.mmsa_fet(writers.samples())
    for split in content.values():
        split.pop("vision_lengths", None)
        split["vision"][(split["vision"] == 0).all(-1)] = np.nan
    assert "padding is zeros, not NaN" in told(writers.dump(content, tmp_path / "unaligned_50.pkl"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_small_split_is_padded_like_the_others(tmp_path, side):
    """Eight sequences tell that zeros are padding. Three could not tell it by themselves."""
    data = writers.samples(sizes={"train": 12, "valid": 3, "test": 9})
    lengths = [len(sample.audio) for sample in data["valid"]]
    for rows in data.values():
        for sample in rows:
            sample.audio = writers.pad([sample.audio], writers.AUDIO_CAP, side)[0]
            sample.vision = sample.vision[:1].repeat(9, 0)  # all of one length, without padding
    folder = writers.write_manifest(tmp_path / "in", data)
    said = told(folder)
    assert "(train, valid, test), where manifest files have none" in said and "vision" not in said
    opened = open_dataset(folder, DataConfig(modalities=["audio", "vision"]))
    assert opened.splits["valid"].lengths("audio").tolist() == lengths
    pooled = open_dataset(folder, DataConfig(modalities=["audio", "vision"], pool_audio=4))
    assert pooled.splits["valid"].lengths("audio").tolist() == [-(-n // 4) for n in lengths]
    assert any("(train, valid, test)" in note for note in inspect_path(folder).notes)


def test_a_small_split_of_another_length_keeps_its_frames(tmp_path):
    """Its sequences are not padded to the length of the others, so its frames of zeros are real."""
    data = writers.samples(sizes={"train": 12, "valid": 2, "test": 9})
    for name, rows in data.items():
        for sample in rows:
            sample.audio = writers.pad([sample.audio[:4]], 6 if name == "valid" else writers.AUDIO_CAP, "right")[0]
    folder = writers.write_manifest(tmp_path / "in", data)
    assert "(train, test), where manifest files have none" in told(folder)
    opened = open_dataset(folder, DataConfig(modalities=["audio", "vision"]))
    assert opened.splits["valid"].lengths("audio").tolist() == [6, 6]


def test_missing_sequences_do_not_tell_padding(tmp_path):
    """Of nine sequences, three that are not missing are too few. All padded ones would be taken for frames."""
    data = writers.samples(sizes={"train": 12, "valid": 9, "test": 9})
    lengths = [len(sample.audio) if row < 3 else 1 for row, sample in enumerate(data["valid"])]
    for name, rows in data.items():
        for row, sample in enumerate(rows):
            sample.audio = writers.pad([sample.audio], writers.AUDIO_CAP, "right")[0]
            if name == "valid" and row >= 3:
                sample.audio = sample.audio[:0]
    folder = writers.write_manifest(tmp_path / "in", data)
    assert "(train, valid, test), where manifest files have none" in told(folder)
    opened = open_dataset(folder, DataConfig(modalities=["audio", "vision"]))
    assert opened.splits["valid"].lengths("audio").tolist() == lengths


def test_files_that_are_still_packed(tmp_path):
    (tmp_path / "mosi_data_noalign.pkl.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "MOSI-label.csv").write_text("video_id,clip_id,text,label\n")
    with pytest.raises(DataError, match=r"packed files \(mosi_data_noalign\.pkl\.gz\); .* Unpack them first\."):
        open_dataset(tmp_path, DataConfig())


def test_a_folder_without_a_data_set_is_listed(tmp_path):
    (tmp_path / "manifest.tsv").write_text("id\tsplit\n")
    with pytest.raises(DataError, match=r"no pickle, \.csd or manifest\.csv, but manifest\.tsv; expected one data set"):
        open_dataset(tmp_path, DataConfig())


def test_a_label_csv_whose_columns_are_misspelt(tmp_path):
    writers.write_declarelab(tmp_path, writers.samples())
    path = tmp_path / "MOSI-label.csv"
    path.write_text(path.read_text().replace("video_id", "Video_ID").replace("text", "texts"))
    with pytest.raises(DataError, match=r"Rename 'Video_ID' to 'video_id'\. Rename 'texts' to 'text'\."):
        read(tmp_path, "recorded")


@pytest.mark.parametrize(("wrong", "found"), [(-1, "-1 in row 2"), (1.5, "1.5 in row 2"), (np.nan, "nan in row 2")])
def test_a_recorded_length_that_is_none(tmp_path, wrong, found):
    content = writers.mmsa(writers.samples())
    content["train"]["audio_lengths"][2] = wrong
    with pytest.raises(DataError, match=rf"train/audio_lengths: found {found}; expected 7 whole numbers"):
        read(writers.dump(content, tmp_path / "x.pkl"), "recorded")


def test_a_modality_under_another_name(tmp_path):
    """It is not taken for one that was not extracted."""
    content = writers.mmsa(writers.samples())
    for split in content.values():
        split["acoustic"] = split.pop("audio")
    path = writers.dump(content, tmp_path / "x.pkl")
    found = r"Rename 'acoustic' to 'audio' if it is that; else remove the key, or leave audio out of data\.modalities\."
    with pytest.raises(DataError, match=found):
        read(path, "recorded")
    without = read(path, "recorded", choice=Choice(modalities=("text", "vision")))[1]
    assert without.notes == ["keys that are not read: acoustic"]
    assert open_dataset(path, DataConfig(modalities=["vision"])).splits["train"].lengths("vision").min() > 0
    for split in content.values():
        del split["acoustic"]
    notes = read(writers.dump(content, path), "recorded")[1].notes
    assert "the file has no audio: it is missing in every sample" in notes


@pytest.mark.parametrize("make", [tuple, np.array])
def test_tuples_whose_ids_name_video_start_and_end(tmp_path, make):
    """A video has several segments, so its name is no id. MulT's files of MOSEI have such rows."""
    content, wanted = {}, {}
    for split, rows in writers.tuples(writers.samples()).items():
        names = [make((name.rsplit("_", 1)[0].encode(), b"0.5", str(i).encode())) for i, (*_, name) in enumerate(rows)]
        content[split] = [(inner, label, name) for (inner, label, _), name in zip(rows, names, strict=True)]
        wanted[split] = [f"{name.rsplit('_', 1)[0]}_0.5_{i}" for i, (*_, name) in enumerate(rows)]
    path = writers.dump(content, tmp_path / "mosei.pkl")
    assert {s: split.ids for s, split in read(path, "recorded")[1].splits.items()} == wanted
    assert inspect_path(path).problems == []


def test_tuples_whose_words_are_numbers(tmp_path):
    content = writers.magbert(writers.samples())
    inner, label, name = content["train"][0]
    content["train"][0] = (([1, 2], *inner[1:]), label, name)
    with pytest.raises(DataError, match=r"found actual_words of type list of int; expected a list of words"):
        read(writers.dump(content, tmp_path / "mosi.pkl"), "recorded")


def test_which_of_two_label_csvs_is_read(tmp_path):
    writers.write_declarelab(tmp_path, writers.samples())
    table = (tmp_path / "MOSI-label.csv").read_text()
    (tmp_path / "translated.csv").write_text(table.replace("film", "filme"))
    source, raw = read(tmp_path, "recorded")
    assert "texts are from MOSI-label.csv, of MOSI-label.csv, translated.csv: its name is most similar" in source.notes
    assert not any("filme" in text for text in raw.splits["train"].text)
