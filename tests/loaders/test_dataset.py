"""Batches: padding, order, tokens, statistics, missing modalities."""

import warnings

import numpy as np
import pytest
import torch

from engine.config import DataConfig
from engine.errors import DataError
from engine.loaders import DataWarning, Normalizer, open_dataset
from tests.loaders import writers
from tests.loaders.test_text import small_tokenizer
from tests.warned import user_warnings

PLAIN = DataConfig(normalize_audio="none", normalize_vision="none", time_len=6)


@pytest.fixture
def tokenizer(tmp_path):
    return str(small_tokenizer(tmp_path / "encoder"))


@pytest.fixture
def data():
    return writers.samples()


@pytest.fixture
def path(tmp_path, data):
    return writers.dump(writers.mmsa(data, features=6), tmp_path / "data" / "x.pkl")


def test_batches_hold_the_samples_right_padded(path, data, tokenizer):
    opened = open_dataset(path, PLAIN, tokenizer)
    assert (opened.audio_dim, opened.vision_dim, opened.text_dim) == (writers.AUDIO, writers.VISION, 0)
    seen = 0
    for batch in opened.loader("train", 3):
        assert batch.audio.dtype == batch.vision.dtype == batch.label.dtype == torch.float32
        assert batch.audio.shape[1] == batch.audio_length.max()
        assert batch.text is None
        for i, row in enumerate(batch.index.tolist()):
            s = data["train"][row]
            assert batch.ids[i] == s.id
            assert batch.label[i].tolist() == [np.float32(s.label)]
            n = int(batch.audio_length[i])
            assert np.array_equal(batch.audio[i, :n], s.audio)
            assert not batch.audio[i, n:].any()
            assert np.array_equal(batch.vision[i, : batch.vision_length[i]], s.vision)
            seen += 1
    assert seen == len(data["train"])


def test_tokens_keep_their_ends_when_cut(path, data, tokenizer):
    opened = open_dataset(path, PLAIN, tokenizer)
    (batch,) = opened.loader("train", 99)
    lengths = batch.token_mask.sum(1).tolist()
    for i, s in enumerate(data["train"]):
        words = [4 + writers.WORDS.index(w) for w in s.text.split()]
        want = [2, *words[:4], 3]
        assert lengths[i] == len(want)
        assert batch.token_ids[i].tolist() == want + [1] * (batch.token_ids.shape[1] - len(want))  # 1 is the pad id
        assert batch.token_mask[i].tolist() == [1] * len(want) + [0] * (batch.token_ids.shape[1] - len(want))
    assert batch.token_ids.dtype == batch.token_mask.dtype == torch.int64
    assert any(len(s.text.split()) > 4 for s in data["train"])


def test_cutting_equals_transformers(tmp_path):
    from transformers import AutoTokenizer

    from engine.loaders.text import packaged_minilm

    data = writers.samples()
    data["train"][0].text = "unbelievably long-winded, naïve " * 9
    path = writers.dump(writers.mmsa(data), tmp_path / "x.pkl")
    (batch,) = open_dataset(path, PLAIN, "minilm").loader("train", 99, pad_tokens_to=6)
    theirs = AutoTokenizer.from_pretrained(str(packaged_minilm()))(
        [s.text for s in data["train"]], padding="max_length", truncation=True, max_length=6, return_tensors="pt"
    )
    assert torch.equal(batch.token_ids, theirs["input_ids"])
    assert torch.equal(batch.token_mask, theirs["attention_mask"])


def test_pad_tokens_to(path, tokenizer):
    opened = open_dataset(path, PLAIN, tokenizer)
    for batch in opened.loader("train", 3, pad_tokens_to=6):
        assert batch.token_ids.shape[1] == batch.token_mask.shape[1] == 6
    widths = {b.token_ids.shape[1] for b in opened.loader("train", 1)}
    assert widths == {int(b.token_mask.sum()) for b in opened.loader("train", 1)}
    assert len(widths) > 1


def test_precomputed_text_features(path, tokenizer):
    opened = open_dataset(path, PLAIN, "features")
    assert opened.text_dim == 6
    (batch,) = opened.loader("valid", 9)
    want = writers.mmsa(writers.samples(), features=6)["valid"]["text"]
    assert batch.token_ids is None
    assert batch.text.shape[2] == 6
    assert batch.text.shape[1] == batch.token_mask.sum(1).max() <= 6
    for i, n in enumerate(batch.token_mask.sum(1).tolist()):
        assert np.array_equal(batch.text[i, :n], want[i, :n])
        assert not batch.text[i, n:].any()
    (wide,) = opened.loader("valid", 9, pad_tokens_to=8)
    assert wide.text.shape[1] == wide.token_mask.shape[1] == 8


def order(loader):
    return [i for batch in loader for i in batch.index.tolist()]


def test_order(path, tokenizer):
    opened = open_dataset(path, PLAIN, tokenizer)
    count = len(opened.splits["train"])
    assert order(opened.loader("train", 2)) == list(range(count))
    loader = opened.loader("train", 2, shuffle=True, seed=3)
    first = order(loader)
    assert sorted(first) == list(range(count))
    assert first != list(range(count))
    assert order(loader) == first
    loader.set_epoch(1)
    second = order(loader)
    assert second != first
    again = opened.loader("train", 2, shuffle=True, seed=3)
    again.set_epoch(1)
    assert order(again) == second
    assert order(opened.loader("train", 2, shuffle=True, seed=9)) != first


def test_order_does_not_depend_on_or_change_global_state(path, tokenizer):
    opened = open_dataset(path, PLAIN, tokenizer)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = order(opened.loader("train", 2, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert order(opened.loader("train", 2, shuffle=True)) == first


@pytest.mark.parametrize(
    ("size", "options", "want"),
    [
        (3, {}, [3, 3, 1]),
        (3, {"drop_singleton": True}, [3, 3]),
        (3, {"drop_last": True}, [3, 3]),
        (4, {"drop_singleton": True}, [4, 3]),
        (4, {"drop_last": True}, [4]),
        (7, {"drop_last": True, "drop_singleton": True}, [7]),
    ],
)
def test_last_batch(path, tokenizer, size, options, want):
    loader = open_dataset(path, PLAIN, tokenizer).loader("train", size, **options)
    assert [len(b) for b in loader] == want
    assert len(loader) == len(want)


def test_statistics_are_of_train_and_can_be_given(tmp_path, path, data, tokenizer):
    opened = open_dataset(path, DataConfig(clip=None), tokenizer)
    train = np.concatenate([s.audio for s in data["train"]]).astype(np.float64)
    test = np.concatenate([s.audio for s in data["test"]]).astype(np.float64)
    want = (test - train.mean(0)) / train.std(0)
    assert np.allclose(opened.splits["test"].audio.values, want, atol=1e-5)
    opened.normalizer.save(tmp_path / "n.safetensors")
    other = writers.dump(writers.mmsa(writers.samples(seed=4)), tmp_path / "other" / "x.pkl")
    given = open_dataset(other, DataConfig(), tokenizer, normalizer=Normalizer.load(tmp_path / "n.safetensors"))
    raw = np.concatenate([s.audio for s in writers.samples(seed=4)["valid"]]).astype(np.float64)
    assert np.allclose(given.splits["valid"].audio.values, (raw - train.mean(0)) / train.std(0), atol=1e-5)


def test_batch_mates_change_nothing_but_padding(path, tokenizer):
    opened = open_dataset(path, DataConfig(), tokenizer)
    alone = {b.ids[0]: b for b in opened.loader("train", 1)}
    for batch in opened.loader("train", 4, shuffle=True):
        for i, name in enumerate(batch.ids):
            one = alone[name]
            n = int(one.audio_length[0])
            assert torch.equal(batch.audio[i, :n], one.audio[0])
            k = int(one.token_mask.sum())
            assert torch.equal(batch.token_ids[i, :k], one.token_ids[0])


def test_missing_and_non_finite_are_reported_once(tmp_path, data, tokenizer):
    data["train"][0].vision[:] = 0
    data["test"][1].vision = np.zeros((0, writers.VISION), np.float32)
    data["valid"][0].audio[0, 0] = -np.inf
    data["valid"][1].text = " "
    path = writers.dump(writers.mmsa(data), tmp_path / "x.pkl")
    for _ in range(2):  # the second time from the store
        with pytest.warns(DataWarning) as caught:
            opened = open_dataset(path, DataConfig(), tokenizer)
        assert [text.partition(": ")[2] for text in user_warnings(caught)] == [
            "1 NaN or infinite audio values replaced by 0 (valid 1)",
            "2 samples without vision, kept as one zero frame (train 1, test 1)",
            "1 samples without text, kept as an empty text (valid 1)",
        ]
    (batch,) = opened.loader("train", 9)
    assert batch.vision_length[0] == 1
    assert not batch.vision[0].any()
    (batch,) = opened.loader("valid", 9)
    assert batch.token_ids[1].tolist()[:2] == [2, 3]
    assert torch.isfinite(batch.audio).all()


TEXTS = {
    "list": ["fine", float("nan"), "nan", 5],
    "list_with_none": ["fine", None, "nan", 5.0],
    "object_array": np.array(["fine", np.nan, "nan", np.float64(5)], object),
    "column": np.array([["fine"], [None], ["nan"], [np.int64(5)]], object),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_cells_that_are_no_text(tmp_path, data, tokenizer, kind):
    """An empty cell is an empty text, counted; the word nan is kept and told; a number is its digits."""
    content = writers.mmsa(data)
    content["test"]["raw_text"] = TEXTS[kind]
    content["test"]["id"] = [1, 2.0, "c", b"d"]
    path = writers.dump(content, tmp_path / "x.pkl")
    with pytest.warns(DataWarning) as caught:
        opened = open_dataset(path, DataConfig(), tokenizer)
    said = [text.partition(": ")[2] for text in user_warnings(caught)]
    assert opened.splits["test"].text == ["fine", "", "nan", "5"]
    assert opened.splits["test"].ids == ["1", "2", "c", "d"]
    assert "1 samples without text, kept as an empty text (test 1)" in said
    assert any(line.startswith("1 texts are a word such as nan or None") and "(test 1)" in line for line in said)
    assert opened.report.missing["test"]["text"] == 1


def test_a_numpy_text_array_turns_nan_into_a_word(tmp_path, data, tokenizer):
    content = writers.mmsa(data)
    content["valid"]["raw_text"] = np.array(["fine", np.nan, "None"])
    path = writers.dump(content, tmp_path / "x.pkl")
    with pytest.warns(DataWarning, match=r"2 texts are a word such as nan or None.*\(valid 2\)"):
        opened = open_dataset(path, DataConfig(), tokenizer)
    assert opened.splits["valid"].text == ["fine", "nan", "None"]


def test_a_split_without_texts_is_counted(tmp_path, data, tokenizer):
    for s in data["test"]:
        s.text = ""
    path = writers.dump(writers.mmsa(data), tmp_path / "x.pkl")
    with pytest.warns(DataWarning, match=r"4 samples without text, kept as an empty text \(test 4\)"):
        opened = open_dataset(path, DataConfig(), tokenizer)
    assert opened.splits["test"].tokens.lengths.tolist() == [2] * 4


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_unknown_tokens_are_reported(tmp_path, data, tokenizer, share):
    words = ["film"] * 20
    words[: round(20 * share)] = ["\u7535\u5f71"] * round(20 * share)
    for rows in data.values():
        for s in rows:
            s.text = " ".join(words)
    path = writers.dump(writers.mmsa(data), tmp_path / "x.pkl")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = open_dataset(path, DataConfig(), tokenizer).report
    count = round(20 * share)
    assert report.unknown == {"train": (7 * count, 140), "valid": (3 * count, 60), "test": (4 * count, 80)}
    said = [str(w.message) for w in caught if "tokens are unknown" in str(w.message)]
    assert len(said) == (share > 0.1)
    if said:
        assert "50 % of the tokens are unknown to the text encoder" in said[0]
        assert "train 50 %, valid 50 %, test 50 %" in said[0] and "text_encoder" in said[0]


def test_nothing_met_warns_of_nothing(path, tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        assert open_dataset(path, DataConfig(), tokenizer).report.lines() == []


def test_classification_labels(tmp_path, data, tokenizer):
    content = writers.mmsa(data)
    for split in content.values():
        split["regression_labels"] = np.arange(len(split["id"])) % 3
    path = writers.dump(content, tmp_path / "x.pkl")
    opened = open_dataset(path, PLAIN, tokenizer)
    (batch,) = opened.loader("valid", 9, task="classification")
    assert batch.label.dtype == torch.int64
    assert batch.label.tolist() == [0, 1, 2]
    content["valid"]["regression_labels"] = np.array([0, 1.5, 1])
    writers.dump(content, path)
    with pytest.raises(DataError, match=r"row 1 .*1\.5; expected a class number"):
        open_dataset(path, PLAIN, tokenizer).loader("valid", 9, task="classification")
