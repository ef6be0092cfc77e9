"""AVEC2019: one random word a sentence, drawn anew each epoch, the same for the same seed, fixed at evaluation."""

import numpy as np
import pytest
import torch

from engine.config import DataConfig, load_config
from engine.loaders import DataWarning, open_dataset
from engine.loaders.convert import convert
from engine.loaders.text import draw_words
from engine.trainer import evaluate, train
from tests.loaders import writers
from tests.loaders.test_text import small_tokenizer


@pytest.fixture
def folder(tmp_path):
    return writers.write_split_files(tmp_path / "avec", writers.avec2019(writers.interviews()), valid="dev")


@pytest.fixture
def tokenizer(tmp_path):
    return str(small_tokenizer(tmp_path / "encoder"))


def test_one_word_of_every_sentence():
    texts = ["the film was\nnot good", "very", "but i\n\nliked it", ""]
    seen = set()
    for epoch in range(200):
        drawn = draw_words(texts, 0, epoch)
        for words, text in zip(drawn, texts, strict=True):
            lines = [line.split() for line in text.split("\n") if line]
            assert len(words.split()) == len(lines)
            assert all(w in line for w, line in zip(words.split(), lines, strict=True))
        seen.add(drawn[0])
    assert len(seen) == 6  # every combination of 3 and 2 words
    assert draw_words(texts, 3, 4) == draw_words(texts, 3, 4)
    assert draw_words(texts, 3, 4)[:2] == draw_words(texts[:2], 3, 4)  # a sample's draw is its own
    assert any(draw_words(texts, 3, e) != draw_words(texts, 4, e) for e in range(9))


def tokens(loader, epoch):
    loader.set_epoch(epoch)
    batches = list(loader)
    order = torch.cat([b.index for b in batches]).argsort()
    rows = [row[mask.bool()].tolist() for b in batches for row, mask in zip(b.token_ids, b.token_mask, strict=True)]
    return [rows[i] for i in order]


@pytest.mark.parametrize("store", [False, True])
def test_batches(tmp_path, folder, tokenizer, store):
    path = convert(folder, tmp_path / "store", tokenizer) if store else folder
    opened = open_dataset(path, DataConfig(time_len=100), tokenizer)
    again = open_dataset(path, DataConfig(time_len=100), tokenizer)
    training = opened.loader("train", 3, shuffle=True, seed=5, draw_words=True)
    first, second = tokens(training, 0), tokens(training, 1)
    assert first != second
    other = again.loader("train", 2, shuffle=True, seed=5, draw_words=True)  # another batch size, another process
    assert (tokens(other, 0), tokens(other, 1)) == (first, second)
    assert tokens(again.loader("train", 3, shuffle=True, seed=6, draw_words=True), 0) != first
    fixed = opened.loader("train", 3, seed=5)
    assert tokens(fixed, 0) == tokens(fixed, 9) == tokens(again.loader("train", 7, seed=8), 1)
    sentences = [s.text.split("\n") for s in writers.interviews()["train"]]
    assert [len(t) - 2 for t in first] == [len(s) for s in sentences]


@pytest.mark.parametrize("kind", ["torch", "dali"])
def test_every_loader_draws_the_same_words(folder, tokenizer, kind):
    if kind == "dali":
        pytest.importorskip("nvidia.dali", reason="needs the extra dali")
    opened = open_dataset(folder, DataConfig(time_len=100), tokenizer)
    options = {"batch_size": 3, "shuffle": True, "seed": 5, "draw_words": True}
    a, b = (opened.loader("train", kind=k, **options) for k in ("resident", kind))
    for epoch in (0, 1, 0):
        assert tokens(a, epoch) == tokens(b, epoch)


def test_frames_are_cut_to_time_len_before_the_encoders(folder, tokenizer):
    data = DataConfig(time_len=3, normalize_audio="none")
    lost = sum(max(len(s.audio) - 3, 0) for rows in writers.interviews().values() for s in rows)
    with pytest.warns(DataWarning, match=f"audio: {lost} frames beyond data.time_len=3 left out"):
        split = open_dataset(folder, data, tokenizer).splits["train"]
    for i, s in enumerate(writers.interviews()["train"]):
        assert np.array_equal(split.audio[i], s.audio[:3])
        assert len(split.vision[i]) == min(3, len(s.vision))


@pytest.mark.parametrize("mode", ["fast", "faithful"])
def test_the_preset_trains(tmp_path, mode, text_encoder):
    """The published recipe on small files: CCC loss, selection by CCC, errors in points of PHQ-8."""
    sizes = {"train": 12, "valid": 6, "test": 6}
    folder = writers.write_split_files(tmp_path / "avec", writers.avec2019(writers.interviews(0, sizes)), valid="dev")
    overrides = [
        f"data.path={folder}", f"mode={mode}", f"text_encoder={text_encoder}", "epochs=2",
        "batch_size=6", "data.time_len=10", "text.freeze=all", "model.d_common=16",
        "model.cubemlp.d_hiddens=5-3-16=5-3-16", "model.cubemlp.d_outs=5-3-16=5-3-16", "output.report=false",
        "output.tensorboard=false", "output.progress=false",
    ]  # fmt: skip
    config = load_config("avec2019", overrides)
    assert config.train.loss == "CCC"
    result = train(config, tmp_path / "run").metrics
    assert set(result["test"]) >= {"ccc", "rmse_phq", "mae_phq"}
    assert 0 <= result["test"]["mae_phq"] <= result["test"]["rmse_phq"] <= 25
    assert evaluate(tmp_path / "run", folder)["ccc"] == pytest.approx(result["test"]["ccc"], abs=1e-6)
    again = train(config, tmp_path / "again").metrics
    assert again["test"] == result["test"] and again["valid"] == result["valid"]
