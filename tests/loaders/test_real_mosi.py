"""Real MOSI in the formats users have: all give the same samples."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import DataConfig
from engine.loaders import open_dataset
from engine.loaders.inspect import inspect_path

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
    for name in ("declarelab", "mmsa", "misa"):
        subprocess.run(
            [sys.executable, str(WRITER), str(root / name), "--format", name], check=True, capture_output=True
        )
    return root


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
    for name in ("declarelab", "mmsa", "misa"):
        report = inspect_path(folders / name)
        assert report.problems == []
        assert report.splits["train"]["samples"] == 1284
