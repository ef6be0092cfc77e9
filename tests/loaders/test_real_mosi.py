"""Real MOSI in the formats users have: all give the same samples."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import DataConfig
from engine.loaders import open_dataset, safe_pickle
from engine.loaders.convert import convert
from engine.loaders.formats import read
from engine.loaders.inspect import inspect_path
from engine.loaders.store import open_store

ROOT = Path(__file__).resolve().parents[2]
MOSI = Path(os.environ.get("ENGINE_MOSI", ROOT.parent / "shared" / "data" / "mosi"))
WRITER = MOSI.parent.parent / "tools" / "mosi_files.py"

pytestmark = pytest.mark.skipif(
    not (MOSI / "mosi_utterances.npz").is_file() or not WRITER.is_file(),
    reason=f"needs real MOSI at {MOSI} (ENGINE_MOSI) and its writer at {WRITER}",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("mosi")
    for name in ("declarelab", "mmsa", "misa", "sdk"):
        subprocess.run(
            [sys.executable, str(WRITER), str(root / name), "--format", name], check=True, capture_output=True
        )
    yield root
    shutil.rmtree(root)  # 260 MB


@pytest.fixture(scope="module")
def opened(folders):
    with pytest.warns(UserWarning, match="samples without vision"):
        return {
            n: open_dataset(folders / n, DataConfig(length_rule="recorded"), "minilm")
            for n in ("declarelab", "mmsa", "misa")
        }


def test_splits_are_the_official_ones(opened):
    for dataset in opened.values():
        assert {n: len(s) for n, s in dataset.splits.items()} == {"train": 1284, "valid": 229, "test": 686}
        assert (dataset.audio_dim, dataset.vision_dim) == (73, 100)


@pytest.mark.parametrize("other", ["mmsa", "misa"])
def test_formats_give_identical_samples(opened, other):
    for name, ours in opened["declarelab"].splits.items():
        theirs = opened[other].splits[name]
        assert ours.ids == theirs.ids
        assert torch.equal(ours.label, theirs.label)
        for part in ("audio", "vision", "tokens"):
            a, b = getattr(ours, part), getattr(theirs, part)
            assert np.array_equal(a.offsets, b.offsets)
            assert np.array_equal(a.values, b.values)


def test_batches_are_equal_too(opened):
    loaders = [opened[n].loader("train", 32, shuffle=True, seed=1, pad_tokens_to=40) for n in ("declarelab", "mmsa")]
    for a, b in zip(*loaders, strict=True):
        assert a.ids == b.ids
        for part in ("label", "token_ids", "token_mask", "audio", "audio_length", "vision", "vision_length"):
            assert torch.equal(getattr(a, part), getattr(b, part))


def test_missing_vision_is_what_the_writer_left_out(opened):
    raw = dict(np.load(MOSI / "mosi_utterances.npz"))
    report = opened["declarelab"].report
    assert sum(m["vision"] for m in report.missing.values()) > 0
    assert sum(m["audio"] for m in report.missing.values()) == 0
    clean = {str(i) for i in raw["id"][raw["feature_split"] == "test"]}
    for split in opened["mmsa"].splits.values():
        ragged = split.vision
        for i, sample in enumerate(split.ids):
            if sample in clean:
                assert ragged[i].any()  # its own vector is there


def test_statistics(opened):
    values = opened["declarelab"].splits["train"].audio.values
    assert np.abs(values).max() <= 5
    assert np.allclose(values.mean(0), 0, atol=0.1)


def test_inspect_finds_no_problem(folders):
    for name in ("declarelab", "mmsa", "misa", "sdk"):
        report = inspect_path(folders / name)
        assert report.problems == []
        assert report.splits["train"]["samples"] == 1284


# What the published code of each family makes of a file, in plain numpy: id, words, label, audio, vision.


def finite(frames):
    frames = np.nan_to_num(np.asarray(frames, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    # the model counts frames that are not zero, and makes a length of 0 one
    return frames if frames.any() else np.zeros((1, frames.shape[1]), np.float32)


def reference_declarelab(folder, split):
    """Length = padded length - frames whose features sum to 0; the last frames; text by (video, clip) from the CSV."""
    part = safe_pickle.load(folder / "mosi_data_noalign.pkl")[split]
    with (folder / "MOSI-label.csv").open(newline="") as file:
        text = {f"{r['video_id']}_{r['clip_id']}": r["text"] for r in csv.DictReader(file)}
    for i, name in enumerate(part["id"]):
        frames = []
        for key in ("audio", "vision"):
            x = part[key][i]
            length = len(x) - int((x.sum(1) == 0).sum())
            frames.append(finite(x[len(x) - length :]))
        name = name[0].decode()
        yield name, text[name], part["labels"][i].item(), *frames


def reference_mmsa(folder, split):
    """The first recorded-length frames."""
    part = safe_pickle.load(folder / "unaligned_50.pkl")[split]
    for i, name in enumerate(part["id"]):
        frames = [finite(part[k][i][: part[f"{k}_lengths"][i]]) for k in ("audio", "vision")]
        yield name.replace("$_$", "_"), str(part["raw_text"][i]), float(part["regression_labels"][i]), *frames


def reference_misa(folder, split):
    for (_, vision, audio, words), label, name in safe_pickle.load(
        folder / f"{'dev' if split == 'valid' else split}.pkl"
    ):
        yield name, " ".join(words), label.item(), finite(audio), finite(vision)


def reference_sdk(folder, split):
    for (text, audio, vision), label, _, _, name in safe_pickle.load(folder / f"mosi_{split}.pkl"):
        yield name, " ".join(text[0]), label, finite(audio[0]), finite(vision[0])


REFERENCES = {
    "declarelab": (reference_declarelab, "sum_zero"),
    "mmsa": (reference_mmsa, "recorded"),
    "misa": (reference_misa, "recorded"),
    "sdk": (reference_sdk, "recorded"),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_readers_have_the_semantics_of_the_published_code(folders, name):
    reference, rule = REFERENCES[name]
    raw = read(folders / name, rule)[1]
    for split, got in raw.splits.items():
        rows = list(reference(folders / name, split))
        assert got.ids == [r[0] for r in rows]
        assert [t.split() for t in got.text] == [r[1].split() for r in rows]
        assert np.array_equal(got.label[:, 0], np.array([r[2] for r in rows], np.float32))
        for part, column in ((got.audio, 3), (got.vision, 4)):
            assert all(np.array_equal(part.ragged[i], r[column]) for i, r in enumerate(rows))


@pytest.mark.parametrize("name", REFERENCES)
def test_the_store_holds_what_was_read(folders, tmp_path, name):
    raw = read(folders / name, "recorded")[1]
    stored = open_store(convert(folders / name, tmp_path / "store", "minilm"))
    for split, want in raw.splits.items():
        got = stored.splits[split]
        assert (got.ids, got.text) == (want.ids, want.text)
        assert np.array_equal(got.label, want.label)
        for part in ("audio", "vision"):
            assert np.array_equal(getattr(got, part).values, getattr(want, part).ragged.values)
            assert np.array_equal(getattr(got, part).offsets, getattr(want, part).ragged.offsets)
