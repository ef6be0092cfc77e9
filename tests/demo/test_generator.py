import csv
import hashlib
import io
import json
import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file

from engine.demo.generator import (
    AUDIO,
    MISSING_SHARE,
    VISION,
    label_of,
    make_utterances,
    topic_of,
    write_demo_files,
)
from engine.errors import OutputError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    paths = write_demo_files(tmp_path_factory.mktemp("demo"))
    return paths, pickle.loads(paths["data"].read_bytes())


@pytest.fixture(scope="module")
def many():
    return make_utterances(3000, seed=3)


def digests(folder, **options):
    return {
        k: hashlib.sha256(p.read_bytes()).hexdigest()
        for k, p in write_demo_files(folder, 60, 20, 20, **options).items()
    }


def test_equal_seeds_write_equal_bytes(tmp_path):
    first = digests(tmp_path / "a", seed=1)
    assert digests(tmp_path / "b", seed=1) == first
    other = digests(tmp_path / "c", seed=2)
    assert all(other[k] != first[k] for k in first)


class PlainUnpickler(pickle.Unpickler):
    """Only what numpy arrays need, as any safe reader of these files would allow."""

    def find_class(self, module, name):
        if (module, name) in {
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def test_pickle_is_plain_and_of_mmsa_layout(written):
    data = PlainUnpickler(io.BytesIO(written[0]["data"].read_bytes())).load()
    assert list(data) == ["train", "valid", "test"]
    for split, n in (("train", 600), ("valid", 150), ("test", 150)):
        d = data[split]
        assert d["raw_text"].shape == d["id"].shape == d["regression_labels"].shape == d["annotations"].shape == (n,)
        assert d["regression_labels"].dtype == d["audio"].dtype == d["vision"].dtype == np.float32
        assert d["audio"].shape[::2] == (n, AUDIO.width) and d["vision"].shape[::2] == (n, VISION.width)
        assert all(i.count("$_$") == 1 for i in d["id"]) and len(set(d["id"])) == n
        assert {0.0, 1.0, 2.0} == set(d["classification_labels"])
        for name in ("audio", "vision"):
            frames = np.abs(d[name]).sum(-1) > 0
            lengths = np.array(d[f"{name}_lengths"])
            assert lengths.min() >= 1 and lengths.max() == d[name].shape[1]
            for row, length in zip(frames, lengths, strict=True):
                assert not row[length:].any()  # right padding
                assert row[:length].all() or (length == 1 and not row.any())


def test_files_agree(written):
    paths, data = written
    rows = list(csv.DictReader(paths["labels"].open(encoding="utf-8")))
    joined = [
        (s, i, t, y)
        for s, d in data.items()
        for i, t, y in zip(d["id"], d["raw_text"], d["regression_labels"], strict=True)
    ]
    assert len(rows) == len(joined) == 900
    for row, (split, i, text, y) in zip(rows, joined, strict=True):
        assert (row["mode"], f"{row['video_id']}$_${row['clip_id']}", row["text"]) == (split, i, text)
        assert float(row["label"]) == pytest.approx(y)
    latents = load_file(paths["latents"])
    assert {k: v.shape for k, v in latents.items()} == {
        "T": (900, 3), "A": (900, 3), "V": (900, 3), "C": (900, 1), "text_value": (900,)
    }  # fmt: skip
    assert np.allclose(label_of(latents["C"][:, 0]), [y for *_, y in joined], atol=0.21)


def test_labels_look_like_sentiment(many):
    labels = np.array([u.label for u in many[0]])
    assert labels.min() == -3 and labels.max() == 3
    assert np.allclose(labels / 0.2, np.round(labels / 0.2))
    assert abs(labels.mean()) < 0.1 and 1.2 < labels.std() < 1.6
    assert (np.abs(labels) == 3).mean() < 0.1 and 0.02 < (labels == 0).mean() < 0.1
    assert len(set(np.round(labels * 5))) == 31


def test_missing_share(many):
    utterances, _ = many
    for name in ("audio", "vision"):
        missing = sum(getattr(u, name) is None for u in utterances)
        expected = MISSING_SHARE * len(utterances)
        assert abs(missing - expected) < 4 * np.sqrt(expected)
        assert missing > 0


def test_lengths_follow_the_words(many):
    words = np.array([len(u.text.split()) for u in many[0]])
    for name, model in (("audio", AUDIO), ("vision", VISION)):
        length = np.array([len(s) if (s := getattr(u, name)) is not None else -1 for u in many[0]])
        there = length > 0
        assert np.abs(length[there] - words[there] * model.frames_per_word).max() <= 2.5


def test_sequences_are_smooth_and_carry_their_latent(many):
    """Projecting the mean frame back on W recovers the latent up to the fluctuation; neighbouring frames are alike."""
    utterances, latents = many
    for name, key, model in (("audio", "A", AUDIO), ("vision", "V", VISION)):
        there = [i for i, u in enumerate(utterances) if getattr(u, name) is not None]
        means = np.stack([getattr(utterances[i], name).mean(0) for i in there])
        recovered = means @ model.mixing().T / model.width
        for d in range(3):
            assert np.corrcoef(recovered[:, d], latents[key][there, d])[0, 1] > 0.9
        centred = [
            (s := getattr(utterances[i], name)) - s.mean(0)
            for i in there[:500]
            if len(getattr(utterances[i], name)) > 20
        ]
        lagged = sum((c[1:] * c[:-1]).sum() for c in centred) / sum((c**2).sum() for c in centred)
        assert 0.3 < lagged < model.memory


def test_sarcasm_lowers_the_label_by_a_known_amount(many):
    """Regressing the label latent on what there is gives back the weights of the covariance model."""
    _, latents = many
    from engine.demo.latents import LatentModel

    model = LatentModel()
    weights = model.label / np.linalg.norm(model.label)
    x = np.concatenate([latents[k] for k in "TAV"], axis=1)
    fitted = np.linalg.lstsq(x, latents["C"][:, 0], rcond=None)[0]
    assert fitted[5] == pytest.approx(weights[2], abs=0.02) and weights[2] < 0
    assert fitted[8] == pytest.approx(weights[3], abs=0.02)


def test_audio_and_vision_add_to_the_text(written):
    """Linear regression: the sentence's own value leaves half of the label, all three modalities most of it."""
    from sklearn.linear_model import RidgeCV

    paths, data = written
    value = load_file(paths["latents"])["text_value"]
    y = np.concatenate([d["regression_labels"] for d in data.values()])
    means = [
        np.concatenate([[x[:k].mean(0) for x, k in zip(d[m], d[f"{m}_lengths"], strict=True)] for d in data.values()])
        for m in ("audio", "vision")
    ]

    def mae(x):
        return np.abs(RidgeCV().fit(x[:600], y[:600]).predict(x[750:]) - y[750:]).mean()

    truth = json.loads(paths["truth"].read_text())["test_mae"]
    text, everything = mae(value[:, None]), mae(np.column_stack([value, *means]))
    assert everything < 0.6 * text < 0.6 * truth["mean_baseline_mae"]
    assert truth["best_from_all_latents"] < everything
    assert truth["best_from_text_latent"] == pytest.approx(text, abs=0.1)


def test_truth_file(written):
    paths, data = written
    truth = json.loads(paths["truth"].read_text())
    assert {row["name"] for row in truth["latents"]} >= {"I(T;A)", "I(A;C|T)", "I(T;V|C)"}
    assert all(row["true"] > 0 for row in truth["latents"]) and len(truth["latents"]) == 8
    train, test = data["train"]["regression_labels"], data["test"]["regression_labels"]
    assert truth["test_mae"]["mean_baseline_mae"] == pytest.approx(np.abs(test - train.mean()).mean(), abs=1e-5)
    assert truth["test_mae"]["median_baseline_mae"] == pytest.approx(np.abs(test - np.median(train)).mean(), abs=1e-5)


def test_topics_are_octiles():
    drawn = np.random.default_rng(0).standard_normal(8000)
    counts = np.bincount([topic_of(x) for x in drawn], minlength=8)
    assert len(counts) == 8 and np.abs(counts - 1000).max() < 130


def test_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="folder"):
        write_demo_files(tmp_path / "file", 4, 2, 2)


def test_loaders_read_it(written):
    """The engine's own reader takes the file as MMSA's and counts the missing modalities."""
    from engine.loaders.formats import read

    paths, data = written
    _, raw = read(paths["data"], "recorded")
    train = raw.splits["train"]
    assert train.text == list(data["train"]["raw_text"])
    assert np.array_equal(train.label[:, 0], data["train"]["regression_labels"])
    assert train.ids[0] == "demo000_0"
