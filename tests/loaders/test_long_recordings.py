"""Interviews of minutes in a manifest, as users of AVEC2019 have them: many files, long files, long texts."""

import csv
import os
import resource
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import checks, load_config
from engine.config import DataConfig
from engine.errors import ConfigError, DataError
from engine.loaders import open_dataset, progress
from engine.loaders.convert import convert
from engine.loaders.formats import Choice, csd
from engine.loaders.inspect import inspect_path
from engine.loaders.pooling import pooled
from engine.loaders.ragged import from_sequences
from engine.loaders.spool import SMALL, spooled
from engine.loaders.store import open_store

SPLITS = ["train"] * 6 + ["valid"] * 2 + ["test"] * 2


def interviews(folder: Path, frames: int = 30, words: int = 4) -> list[np.ndarray]:
    """A manifest of 10 interviews with openSMILE's and OpenFace's columns. Returns the audio without `frameTime`."""
    rng = np.random.default_rng(0)
    audio = [rng.normal(size=(frames + i, 3)).round(3) for i in range(len(SPLITS))]
    with (folder / "manifest.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "split", "label", "text", "audio", "vision"])
        for i, (split, values) in enumerate(zip(SPLITS, audio, strict=True)):
            below = folder / f"{300 + i}_P" / "features"
            below.mkdir(parents=True)
            rows = [f"'unknown';{t / 100:.2f};" + ";".join(map(str, row)) for t, row in enumerate(values.tolist())]
            (below / "egemaps.csv").write_text("name;frameTime;Loudness;F0;HNR\n" + "\n".join(rows) + "\n")
            (below / "openface.csv").write_text("frame, AU01_r\n" + "".join(f"{t}, {t % 3}\n" for t in range(9)))
            where = below.relative_to(folder)
            table.writerow(
                [300 + i, split, 0.1 * (i % 5), "good " * words, where / "egemaps.csv", where / "openface.csv"]
            )
    return audio


def test_more_files_than_file_handles(tmp_path):
    """Every array once had a handle of its own, and a thousand of them ended the conversion."""
    (tmp_path / "audio").mkdir()
    rows, arrays = ["id,split,label,text,audio,vision"], []
    for i in range(150):
        arrays.append(np.full((SMALL // 32 + i, 10), i + 1, "<f4" if i % 2 else ">f8"))
        np.save(tmp_path / "audio" / f"{i}.npy", arrays[-1])
        rows.append(f"{i:03d},{('train', 'valid', 'test')[max(0, i - 147)]},0.5,good,audio/{i}.npy,")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = max(map(int, os.listdir("/dev/fd")))  # by whatever ran before
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 75, limits[1]))
    try:
        store = open_store(convert(tmp_path, tmp_path / "x.safetensors"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    train = store.splits["train"]
    assert train.ids[:2] == ["000", "001"]  # ids are text, never numbers
    for i, frames in enumerate(train.audio.pieces()):
        np.testing.assert_array_equal(frames, arrays[i].astype(np.float32))


def test_checksums_name_the_files_that_were_read(tmp_path):
    """Files of one name in two folders are two files, and files that no row names are not the data."""
    interviews(tmp_path)
    (tmp_path / "notes.csv").write_text("a\n1\n")
    (tmp_path / "300_P" / "densenet.csv").write_text("1\n")
    sums = open_store(convert(tmp_path, tmp_path / "store")).meta["sha256"]
    read = {f"{300 + i}_P/features/{name}.csv" for i in range(10) for name in ("egemaps", "openface")}
    assert sums.keys() == {"manifest.csv", *read}


@pytest.mark.parametrize("spool", [False, True])
def test_pooling_is_the_mean_of_successive_frames(tmp_path, spool):
    rng = np.random.default_rng(1)
    arrays = [rng.normal(size=(n, 2)).astype(np.float32) for n in (1, 4, 7)] + [np.zeros((0, 2), np.float32)]
    with spooled(tmp_path if spool else None):
        part = pooled(from_sequences(arrays, list("abcd"), "x"), 4)
    for frames, given in zip(part.ragged.pieces(), arrays, strict=True):
        wanted = [given[i : i + 4].astype(np.float64).mean(0) for i in range(0, len(given), 4)] or [np.zeros(2)]
        np.testing.assert_allclose(frames, wanted, rtol=1e-6)
    assert part.missing == [3]


def test_pooled_and_skipped_columns_in_a_data_set(tmp_path):
    audio = interviews(tmp_path)
    raw = DataConfig(normalize_audio="none", normalize_vision="none")
    config = raw.model_copy(update={"pool_audio": 10, "skip_columns": ["frametime", "frame", "nothing"]})
    with pytest.warns() as told:
        data = open_dataset(tmp_path, config)
    assert data.audio_dim == 3 and data.vision_dim == 1
    for frames, given in zip(data.splits["train"].audio.pieces(), audio, strict=False):
        wanted = [given[i : i + 10].mean(0) for i in range(0, len(given), 10)]
        np.testing.assert_allclose(frames, wanted, rtol=1e-5, atol=1e-7)
    lines = "\n".join(str(w.message) for w in told)
    assert "audio: the mean of every 10 frames is one step (data.pool_audio)" in lines
    assert "audio: the column frameTime is skipped (10 files)" in lines
    assert "vision: the column frame is skipped (10 files)" in lines
    assert "no file has the columns nothing of data.skip_columns" in lines
    with pytest.warns():  # other settings are other data, not those in the cache
        assert open_dataset(tmp_path, raw).audio_dim == 4


def test_a_store_that_was_made_with_other_steps_is_told(tmp_path):
    interviews(tmp_path)
    store = convert(tmp_path, tmp_path / "store", choice=Choice(pool_audio=5, skip_columns=("frame",)))
    with pytest.warns(match="the store was made with pool_audio 5, not 3"):
        open_dataset(store, DataConfig(pool_audio=3, skip_columns=["frame"]))


def test_tokens_beyond_time_len_are_counted(tmp_path):
    """A transcript of minutes has thousands of tokens, of which a model reads the first."""
    interviews(tmp_path, words=50)  # 52 tokens with the two special ones
    with pytest.warns(match=r"text: 120 tokens beyond data.time_len=40 left out, of 10 texts \(train 72, valid 24, "):
        open_dataset(tmp_path, DataConfig(time_len=40))
    with pytest.warns() as told:
        open_dataset(tmp_path, DataConfig(time_len=52))
    assert not any("tokens beyond" in str(w.message) for w in told)


@pytest.mark.parametrize("most, warned", [(49, True), (50, False)])  # 3 of 52 tokens are 5.8 %, 2 are 3.8 %
def test_few_tokens_beyond_time_len_are_counted_in_the_log(tmp_path, caplog, most, warned):
    """The usual data sets have a few long texts. A warning at every command would tell the user nothing."""
    interviews(tmp_path, words=50)
    with pytest.warns() as told, caplog.at_level("INFO", "engine"):
        open_dataset(tmp_path, DataConfig(time_len=most))
    line = f"text: {10 * (52 - most)} tokens beyond data.time_len={most} left out, of 10 texts"
    assert any(line in str(w.message) for w in told) == warned
    assert (line in caplog.text) != warned


def test_long_sequences_are_refused_or_told(tmp_path, monkeypatch):
    interviews(tmp_path, frames=900)
    config = load_config("avec2019", ["batch_size=6", "data.time_len=40"])
    with pytest.warns():
        data = open_dataset(tmp_path, config.data)
    cpu = torch.device("cpu")
    with pytest.warns(
        match=r"audio: half of the training sequences have 902 frames or more. .* only the first 40 .*pool_audio=23$"
    ):
        checks.long_sequences(config, data, cpu)
    monkeypatch.setattr(checks, "_memory_of", lambda device: 100 << 20)
    with pytest.raises(ConfigError, match=r"data.pool_audio: .* 902 frames .* data.pool_audio=23"):
        checks.long_sequences(config, data, cpu)
    audio, vision = (int(data.splits["train"].lengths(m).max()) for m in ("audio", "vision"))
    need = 4 * 6 * config.model.d_common * (24 * (audio + vision) + 15 * audio)  # of float32, a batch of six
    monkeypatch.setattr(checks, "_memory_of", lambda device: 0.95 * need)  # the median is near the longest
    with pytest.raises(ConfigError, match="a batch of 6 takes"):
        checks.long_sequences(config, data, cpu)
    monkeypatch.setattr(checks, "_memory_of", lambda device: need)
    checks_without_warnings(load_config("mmim-mosi", ["batch_size=6"]), data)  # whose model sees all frames
    config.data.pool_audio = 10  # the 902 frames are means of ten already
    with pytest.warns(match="data.pool_audio=226$"):
        checks.long_sequences(config, data, cpu)
    short = load_config("avec2019", ["data.time_len=100"])
    monkeypatch.setattr(checks, "_memory_of", lambda device: None)
    checks_without_warnings(short, data)


def checks_without_warnings(config, data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checks.long_sequences(config, data, torch.device("cpu"))


def test_folders_of_interviews_are_known(tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "train_split.csv").write_text("Participant_ID,PHQ_Score\n300,4\n")
    with pytest.raises(DataError, match=r"the interviews of E-DAIC .* manifest.csv .* section AVEC2019"):
        inspect_path(tmp_path)


def test_interviews_as_the_page_on_formats_reads_them(tmp_path, monkeypatch):
    """The page's own lines, on files of E-DAIC's layout."""
    (tmp_path / "E-DAIC" / "labels").mkdir(parents=True)
    number = 300
    for split, count in (("train", 4), ("dev", 2), ("test", 2)):
        rows = ["Participant_ID,Gender,PHQ_Binary,PHQ_Score,PCL-C (PTSD),PTSD Severity"]
        for name in range(number, number + count):
            folder = tmp_path / "E-DAIC" / f"{name}_P"
            (folder / "features").mkdir(parents=True)
            lines = "".join(f"'unknown';{t / 100:.2f};{t % 5};1\n" for t in range(700))
            egemaps = folder / "features" / f"{name}_OpenSMILE2.3.0_egemaps.csv"
            egemaps.write_text(f"name;frameTime;Loudness_sma3;F0\n{lines}")
            lines = "".join(f"{t + 1}, {t / 30:.3f}, 0.98, 1, {t % 3}\n" for t in range(210))
            openface = folder / "features" / f"{name}_OpenFace2.1.0_Pose_gaze_AUs.csv"
            openface.write_text(f"frame, timestamp, confidence, success, AU01_r\n{lines}")
            said = "Start_Time,End_Time,Text,Confidence\n1.0,2.0,so i am,0.9\n3.0,4.0,good,0.9\n"
            (folder / f"{name}_Transcript.csv").write_text(said)
            rows.append(f"{name},female,0,{name - 300},0,20.0")
        (tmp_path / "E-DAIC" / "labels" / f"{split}_split.csv").write_text("\n".join(rows) + "\n")
        number += count
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    code = page.split("**E-DAIC.**")[1].split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/formats.md", "exec"), {})
    skip = ["frameTime", "frame", "timestamp", "confidence", "success"]
    config = DataConfig(dataset="avec2019", pool_audio=300, pool_vision=90, skip_columns=skip, normalize_audio="none")
    assert DataConfig(skip_columns=", ".join(skip)).skip_columns == skip  # as `engine convert` is given them
    with pytest.warns():
        data = open_dataset(tmp_path / "E-DAIC", config)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 4, "valid": 2, "test": 2}
    train = data.splits["train"]
    assert (train.ids[1], train.text[1]) == ("301", "so i am good")
    np.testing.assert_allclose(train.label[:, 0], np.arange(4) / 25, rtol=1e-6)
    assert (data.audio_dim, data.vision_dim) == (2, 1)
    assert train.audio[0].tolist() == [[2, 1]] * 3  # 300, 300 and 100 frames
    assert train.lengths("vision").tolist() == [3] * 4


def test_inspect_leaves_nothing_behind(tmp_path):
    interviews(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    report = inspect_path(tmp_path)
    assert report.problems == [] and report.splits["train"]["audio"]["dim"] == 4
    assert sorted(tmp_path.rglob("*")) == before


def test_progress_is_told_ever_more_rarely(monkeypatch, capsys):
    clock = iter(range(0, 1000, 3))  # each item takes three seconds
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    assert list(progress.with_progress(range(40), "reading audio", "files")) == list(range(40))
    seconds = [int(line.split()[-2]) for line in capsys.readouterr().err.splitlines()]
    assert seconds[:4] == [6, 18, 39, 81]  # at least 5 s, then 10, 20, 40 more


@pytest.mark.parametrize("in_order", [True, False])
def test_means_of_words(in_order):
    """Every word's row is the mean of the frames that overlap it, whatever order the frames have."""
    rng = np.random.default_rng(2)
    starts = np.arange(200) * 0.01
    order = np.arange(200) if in_order else rng.permutation(200)
    intervals = np.stack([starts, starts + 0.01], 1)[order]
    features = rng.normal(size=(200, 3)).astype(np.float32)[order]
    words = np.array([[0.0, 0.015], [0.5, 0.7], [5.0, 6.0], [1.995, 3.0]])
    used = np.zeros(200, bool)
    rows = csd._mean_by_word(intervals, features, words, used)
    for row, (start, end) in zip(rows, words.tolist(), strict=True):
        over = [i for i, (a, b) in enumerate(intervals.tolist()) if a < end - 1e-6 and b > start + 1e-6]
        wanted = features[over].astype(np.float64).mean(0) if over else np.zeros(3)
        np.testing.assert_allclose(row, wanted, rtol=1e-6)
    assert used.sum() == 2 + 20 + 1
