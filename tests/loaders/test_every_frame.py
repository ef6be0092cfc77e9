"""No frame of a file is lost without a count, wherever its padding is and however its arrays are shared."""

import csv
import pickle
from pathlib import Path

import numpy as np
import pytest

from engine.config import DataConfig
from engine.loaders import DataWarning, open_dataset
from engine.loaders.convert import convert
from engine.loaders.formats import Choice, read
from engine.loaders.make_data.writers import WRITERS, Sample, pad
from engine.loaders.store import open_store
from tests.loaders import writers
from tests.loaders.test_text import small_tokenizer
from tests.loaders.writers import SPLITS
from tests.warned import user_warnings

RULES = ("recorded", "all_zero", "sum_zero")


@pytest.fixture
def data():
    return writers.samples()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return str(small_tokenizer(tmp_path_factory.mktemp("encoder") / "encoder"))


def padded_at(content, data, side, names=("audio", "vision")):
    """The content of an MMSA or DeclareLab file with its sequences padded at `side`."""
    for split, rows in data.items():
        for name in names:
            length = content[split][name].shape[1]
            content[split][name] = pad([getattr(s, name) for s in rows], length, side)
    return content


def assert_read(raw, data, names=("audio", "vision")):
    for split, rows in data.items():
        for name in names:
            got = getattr(raw.splits[split], name)
            assert all(np.array_equal(got.ragged[i], getattr(s, name)) for i, s in enumerate(rows))
            assert got.dropped == 0


# -- padding at the side where the family does not have it --


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lengths", [True, False])
def test_an_mmsa_file_that_is_padded_at_the_start(tmp_path, data, tokenizer, rule, lengths):
    content = padded_at(writers.mmsa(data, lengths=lengths), data, "left")
    path = writers.dump(content, tmp_path / "feature.pkl")
    assert_read(read(path, rule)[1], data)
    with pytest.warns(DataWarning) as caught:
        opened = open_dataset(path, DataConfig(length_rule=rule), tokenizer)
    assert [text.partition(": ")[2] for text in user_warnings(caught)] == [
        f"{name}: padding found at the start of sequences (train, valid, test), where mmsa files have it at the end; "
        "removed at the start"
        for name in ("audio", "vision")
    ]
    assert np.array_equal(opened.splits["train"]._data.audio[0], data["train"][0].audio)


@pytest.mark.parametrize("rule", RULES)
def test_a_mult_file_that_is_padded_at_the_end(tmp_path, data, rule):
    content = padded_at(writers.declarelab(data), data, "right")
    path = writers.dump(content, tmp_path / "mosi_data_noalign.pkl")
    writers.write_csv(tmp_path / "label.csv", writers.label_rows(data))
    raw = read(path, rule)[1]
    assert_read(raw, data)
    assert raw.splits["train"].vision.side == "right"


def test_one_modality_and_one_split_may_differ(tmp_path, data):
    content = padded_at(writers.mmsa(data), data, "left", ["vision"])
    content["test"] = writers.mmsa(data)["test"]
    raw = read(writers.dump(content, tmp_path / "x.pkl"), "recorded")[1]
    assert_read(raw, data)
    assert [raw.splits[s].vision.side for s in SPLITS] == ["left", "left", None]
    assert [raw.splits[s].audio.side for s in SPLITS] == [None, None, None]


def test_tuple_rows_that_are_padded_at_the_start(tmp_path, data):
    rows = writers.tuples(data)
    for split in rows:
        for i, ((words, vision, audio, text, vlen, alen), label, name) in enumerate(rows[split]):
            vision, audio = pad([vision], 20, "left")[0], pad([audio], 20, "left")[0]
            rows[split][i] = ((words, vision, audio, text, vlen, alen), label, name)
    raw = read(writers.dump(rows, tmp_path / "x.pkl"), "recorded")[1]
    assert_read(raw, data)
    assert raw.splits["valid"].audio.side == "left"


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_features_follow_the_attention_mask(tmp_path, data, side):
    """Encoders give padded positions values too: the mask says which are words'."""
    content = writers.mmsa(data, text_bert=True, features=6)
    rng = np.random.default_rng(0)
    counts = {}
    for split, part in content.items():
        mask = part["text_bert"][:, 1] != 0
        frames = rng.normal(size=part["text"].shape).astype(np.float32)
        if side == "left":
            mask = mask[:, ::-1]
            part["text_bert"][:, 1] = mask
        part["text"], counts[split] = frames, mask
    raw = read(writers.dump(content, tmp_path / "x.pkl"), "recorded", features=True)[1]
    for split, mask in counts.items():
        got = raw.splits[split].features
        assert all(np.array_equal(got.ragged[i], content[split]["text"][i, row]) for i, row in enumerate(mask))
        assert got.dropped == np.count_nonzero(~mask)


# -- rows that share arrays --


@pytest.mark.parametrize("kind", ["no vision", "text and labels only", "a video's features in every clip"])
def test_rows_that_share_arrays(tmp_path, tokenizer, kind):
    rng = np.random.default_rng(0)
    zeros = np.zeros((50, 47), np.float32), np.zeros((50, 74), np.float32)
    videos = [rng.normal(size=(60, 35)).astype(np.float32) for _ in range(3)]
    content, own = {}, {}
    for split, count in (("train", 300), ("dev", 50), ("test", 50)):
        own[split] = [rng.normal(size=(6, 7)).astype(np.float32) for _ in range(count)]
        content[split] = []
        for i, audio in enumerate(own[split]):
            if kind == "text and labels only" and i:
                audio = zeros[1][:, :7]
            vision = videos[i % 3] if kind.startswith("a video") else zeros[0]
            row = ([], vision, audio, ["good", "film"] * 3, 6, 6)
            content[split].append((row, np.array([[0.4]], np.float32), f"{split}_{i}"))
    path = writers.dump(content, tmp_path / "x.pkl")
    with pytest.warns(DataWarning) as caught:
        opened = open_dataset(path, DataConfig(), tokenizer)
    lines = [text.partition(": ")[2] for text in user_warnings(caught)]
    train = opened.splits["train"]._data
    assert np.array_equal(train.audio[0], own["train"][0])
    if kind.startswith("a video"):
        assert np.array_equal(train.vision[4], videos[1][:6])
        assert lines == [
            "vision: 21600 frames that are not zero left out, since they lie outside the lengths of their sequences "
            "(train 16200, valid 2700, test 2700)"
        ]
    else:
        assert "400 samples without vision, kept as one zero frame (train 300, valid 50, test 50)" in lines
        assert train.vision.values.shape == (300, 47) and not train.vision.values.any()


# -- every frame of random files --


def random_data(rng) -> dict[str, list[Sample]]:
    """Samples with frames of zeros at their ends and inside, modalities that are missing, and full sequences."""

    def frames(width, cap):
        values = rng.normal(size=(rng.choice([1, cap, rng.integers(1, cap + 1)]), width)).astype(np.float32)
        if rng.random() < 0.4:
            values[rng.random(len(values)) < 0.3] = 0
        return values * (rng.random() > 0.1)

    out, number = {}, 0
    for split, size in zip(SPLITS, (12, 5, 6), strict=True):
        out[split] = []
        for i in range(size):
            steps = int(rng.integers(2, 7))
            text = "\n".join(" ".join(rng.choice(writers.WORDS, rng.integers(1, 4))) for _ in range(steps))
            first = i == 0  # a split without one frame is refused
            audio = np.ones((3, 5), np.float32) if first else frames(5, writers.AUDIO_CAP)
            vision = np.ones((3, 4), np.float32) if first else frames(4, writers.VISION_CAP)
            more = {k: np.ones((steps, 2), np.float32) for k in ("ege", "ds", "resnet")}
            out[split].append(Sample(f"v_{number}_{i}", text, float(rng.integers(26) / 25), audio, vision, more))
            number += 1
    return out


def used(frames) -> int:
    return int(np.count_nonzero((np.asarray(frames) != 0).any(-1)))


def in_file(path: Path, layout: str) -> dict[str, tuple[int, int]]:
    """Frames of audio and vision that are not zero, as the file has them, by split."""
    if layout == "csd":
        import h5py

        totals = {}
        for split in SPLITS:
            totals[split] = []
            for stem in ("COVAREP", "FACET_4.2"):
                with h5py.File(path / f"{stem}.csd") as file:
                    videos = next(iter(file.values()))["data"]
                    totals[split].append(sum(used(v["features"][()]) for k, v in videos.items() if k.startswith(split)))
        return {s: tuple(t) for s, t in totals.items()}
    if layout == "manifest":
        with (path / "manifest.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        totals = {s: [0, 0] for s in SPLITS}
        for r in rows:
            for i, name in enumerate(("audio", "vision")):
                totals[r["split"]][i] += used(np.load(path / r[name])) if r[name] else 0
        return {s: tuple(t) for s, t in totals.items()}
    files = [path] if path.is_file() else sorted(path.glob("*.pkl"))
    content = {}
    for file in files:
        loaded = pickle.loads(file.read_bytes())
        content.update(loaded if isinstance(loaded, dict) else {file.stem.rpartition("_")[2]: loaded})
    content = {{"dev": "valid"}.get(k, k): v for k, v in content.items()}
    places = {
        "tuples": (lambda r: r[0][2], lambda r: r[0][1]), "misa": (lambda r: r[0][2], lambda r: r[0][1]),
        "magbert": (lambda r: r[0][2], lambda r: r[0][1]), "sdk": (lambda r: r[0][1][0], lambda r: r[0][2][0]),
        "avec2019": (lambda r: r[1], lambda r: r[4]),
    }  # fmt: skip
    if layout in places:
        return {s: tuple(sum(used(get(row)) for row in rows) for get in places[layout]) for s, rows in content.items()}
    return {s: (used(part["audio"]), used(part["vision"])) for s, part in content.items()}


def write(folder: Path, layout: str, data, rng) -> Path:
    """A file of the layout; of padded ones with the padding at a random side, and lengths that are not all right."""
    if layout in ("misa", "magbert", "sdk", "avec2019"):
        for rows in data.values():
            for s in rows:
                steps = s.text.count("\n") + 1 if layout == "avec2019" else len(s.text.split())
                s.audio, s.vision = (x[np.arange(steps) % len(x)] for x in (s.audio, s.vision))
    if layout != "avec2019":
        for rows in data.values():
            for s in rows:
                s.text = s.text.replace("\n", " ")
    path = WRITERS[layout](folder, data, "mosi")
    if layout in ("declarelab", "declarelab-aligned", "mmsa", "mmsa-aligned", "mmsa-fet"):
        content = pickle.loads(path.read_bytes())
        for part in content.values():
            for name in ("audio", "vision"):
                if rng.random() < 0.5:  # the other side: each sequence as far from the other end
                    part[name] = shifted(part[name])
                if f"{name}_lengths" in part:
                    wrong = rng.random(len(part[name])) < 0.2
                    part[f"{name}_lengths"] = np.maximum(np.array(part[f"{name}_lengths"]) - wrong, 1).tolist()
        writers.dump(content, path)
    if layout == "tuples":
        for file in path.glob("*.pkl"):
            rows = [
                ((*inner[:4], max(inner[4] - int(rng.random() < 0.3), 0), inner[5]), label, name)
                for inner, label, name in pickle.loads(file.read_bytes())
            ]
            writers.dump(rows, file)
    return path


def shifted(padded):
    """Each sequence at the other end of its row."""
    out = np.zeros_like(padded)
    for row, given in zip(out, padded, strict=True):
        places = np.flatnonzero(given.any(1))
        if len(places):
            first, last = places[0], places[-1] + 1
            at = len(given) - last if first < len(given) - last else len(given) - first - (last - first)
            row[at : at + last - first] = given[first:last]
    return out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layout", WRITERS)
def test_frames_in_the_store_and_dropped_are_those_of_the_file(tmp_path, tokenizer, layout, seed):
    if layout == "csd":
        pytest.importorskip("h5py", reason="needs the extra csd")
    rng = np.random.default_rng(seed)
    path = write(tmp_path / "in", layout, random_data(rng), rng)
    expected = in_file(path, layout)
    assert all(count > 0 for counts in expected.values() for count in counts)
    dropped = 0
    for rule in RULES:
        store = convert(path, tmp_path / rule, tokenizer, rule, choice=Choice(align="segments"))
        data = open_store(store)
        for split, counts in expected.items():
            for name, count in zip(("audio", "vision"), counts, strict=True):
                lost = data.meta["counts"][split]["dropped"][name]
                assert used(getattr(data.splits[split], name).values) + lost == count, (rule, split, name)
                dropped += lost
        said = any("frames that are not zero left out" in note for note in data.meta["notes"])
        assert said == any(sum(c["dropped"].values()) for c in data.meta["counts"].values())
    assert dropped or layout in ("misa", "magbert", "sdk", "avec2019", "csd", "manifest")
