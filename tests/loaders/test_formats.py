"""Every family of files gives the same samples, whatever it is called."""

import csv
import json
import os

import numpy as np
import pytest

from engine.config import DataConfig
from engine.errors import DataError
from engine.loaders import DataWarning, formats, open_dataset
from engine.loaders.formats import Choice, RawDataset, find_source, read, register_format, registry
from tests.loaders import writers
from tests.loaders.test_text import small_tokenizer
from tests.loaders.writers import SPLITS


@pytest.fixture
def data():
    return writers.samples()


def assert_holds(raw: RawDataset, data, ids=True):
    assert list(raw.splits) == list(SPLITS)
    for split, rows in data.items():
        got = raw.splits[split]
        if ids and raw.splits[split].ids != [s.id for s in rows]:  # MMSA-FET writes samples in no order
            rows = sorted(rows, key=lambda s: got.ids.index(s.id))
        if ids:
            assert got.ids == [s.id for s in rows]
        assert got.text == [s.text for s in rows]
        assert got.label.dtype == np.float32
        assert np.array_equal(got.label, np.array([[s.label] for s in rows], np.float32))
        for modality in ("audio", "vision"):
            ragged = getattr(got, modality).ragged
            assert len(ragged) == len(rows)
            assert all(np.array_equal(ragged[i], getattr(s, modality)) for i, s in enumerate(rows))


def write(folder, family, data):
    if family == "declarelab":
        return writers.write_declarelab(folder, data)
    if family == "declarelab_f64":
        return writers.write_declarelab(folder, data, dtype=np.float64)
    if family == "mosei":
        return writers.write_declarelab(folder, data, ids="mosei")
    if family == "mmsa":
        return writers.dump(writers.mmsa(data), folder / "unaligned_50.pkl")
    if family == "mmsa_aligned":
        return writers.dump(writers.mmsa(data, lengths=False, text_bert=True), folder / "aligned_50.pkl")
    if family == "mmsa_split_names":
        content = writers.mmsa(data)
        return writers.dump(
            {"train": content["train"], "dev": content["valid"], "test": content["test"]}, folder / "x.pkl"
        )
    if family == "tuples_in_one":
        return writers.dump(writers.tuples(data), folder / "all.pkl")
    if family == "declarelab_aligned":
        return writers.write_declarelab(folder, data, name="mosi_data.pkl", caps=writers.Caps(50, 50))
    if family == "mmsa_fet":
        return writers.dump(writers.mmsa_fet(data), folder / "feature.pkl")
    if family == "magbert":
        return writers.dump(writers.magbert(data), folder / "mosi.pkl")
    if family in ("sdk", "sdk_mosei"):
        return writers.write_split_files(folder, writers.sdk(data, family[4:] or "mosi"), prefix="mosi_")
    if family == "manifest":
        return writers.write_manifest(folder, data)
    if family == "manifest_csv":
        return writers.write_manifest(folder, data, kind="csv")
    fields = 4 if family == "misa" else 6
    return writers.write_tuples(
        folder,
        data,
        fields,
        "valid" if family == "tuples_valid" else "dev",
        "mosei_" if family == "tuples_valid" else "",
    )


FAMILIES = {
    "declarelab": "declarelab",
    "declarelab_f64": "declarelab",
    "mosei": "declarelab",
    "mmsa": "mmsa",
    "mmsa_aligned": "mmsa",
    "mmsa_split_names": "mmsa",
    "tuples": "tuples",
    "tuples_valid": "tuples",
    "tuples_in_one": "tuples",
    "misa": "tuples",
    "declarelab_aligned": "declarelab",
    "mmsa_fet": "mmsa",
    "magbert": "magbert",
    "sdk": "sdk",
    "sdk_mosei": "sdk",
    "manifest": "manifest",
    "manifest_csv": "manifest",
}


@pytest.mark.parametrize("rule", ["recorded", "all_zero", "sum_zero"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_samples(tmp_path, data, family, rule):
    path = write(tmp_path, family, data)
    _, raw = read(path, rule)
    assert raw.format == FAMILIES[family]
    if family == "mmsa_fet":  # its files are cut to the mean length + 3 deviations
        longest = {m: max(max(raw.splits[s].__dict__[m].ragged.lengths) for s in SPLITS) for m in ("audio", "vision")}
        assert longest == {"audio": writers.AUDIO_CAP, "vision": writers.VISION_CAP}
    assert_holds(raw, data, ids=family != "mosei")
    _, from_folder = read(tmp_path, rule)
    assert_holds(from_folder, data, ids=family != "mosei")


def test_same_named_files_of_different_families_are_told_apart(tmp_path, data):
    """Four families call their files train.pkl, dev.pkl and test.pkl, or mosi_train.pkl and so on."""
    talks = writers.interviews()
    made = {
        "tuples": writers.write_tuples(tmp_path / "tuples", data),
        "sdk": writers.write_split_files(tmp_path / "sdk", writers.sdk(data), valid="dev"),
        "avec2019": writers.write_split_files(tmp_path / "avec", writers.avec2019(talks), valid="dev"),
        "magbert": writers.write_split_files(
            tmp_path / "mag", {"valid" if k == "dev" else k: v for k, v in writers.magbert(data).items()}, valid="dev"
        ),
    }
    titles = {f.name: f.title for f in formats.formats()}
    for name, folder in made.items():
        assert sorted(p.name for p in folder.iterdir()) == ["dev.pkl", "test.pkl", "train.pkl"]
        assert read(folder, "recorded", expected=name)[1].format == name
        for other in made.keys() - {name}:
            with pytest.raises(DataError) as error:
                read(folder, "recorded", expected=other)
            assert f"found a {titles[name]} file; expected a {titles[other]} file" in str(error.value)


def test_avec2019(tmp_path):
    data = writers.interviews()
    folder = writers.write_split_files(tmp_path, writers.avec2019(data), valid="dev")
    raw = read(folder, "recorded")[1]
    assert raw.draws_words and raw.cut
    for split, rows in data.items():
        got = raw.splits[split]
        assert got.ids == [f"{split}_{i}" for i in range(len(rows))]
        assert got.text == [s.text for s in rows]
        assert np.array_equal(got.label[:, 0], np.array([s.label for s in rows], np.float32))
        assert all(np.array_equal(got.audio.ragged[i], s.audio) for i, s in enumerate(rows))
        assert all(np.array_equal(got.vision.ragged[i], s.vision) for i, s in enumerate(rows))
    other = read(folder, "recorded", choice=Choice("ds", "resnet"))[1].splits["test"]
    assert np.array_equal(other.audio.ragged[0], data["test"][0].more["ds"])
    assert np.array_equal(other.vision.ragged[0], data["test"][0].more["resnet"])
    with pytest.raises(DataError, match=r"no audio features 'mfc'; expected one of mfcc, ege, ds. Set .*mfcc"):
        read(folder, "recorded", choice=Choice("mfc"))


def test_sdk_lists_hold_several_feature_sets(tmp_path, data):
    folder = writers.write_split_files(tmp_path, writers.sdk(data))
    other = read(folder, "recorded", choice=Choice("IS09", "openface"))[1].splits["train"]
    assert (other.audio.ragged.dim, other.vision.ragged.dim) == (1, 1)
    assert other.audio.ragged.lengths.tolist() == [len(s.text.split()) for s in data["train"]]
    rows = writers.sdk(data)["train"]
    for name, number in (("last_hidden", 2), ("glove", 1), ("auto", 2)):
        found = read(folder, "recorded", True, choice=Choice(text_features=name))[1].splits["train"].features
        assert all(np.array_equal(found.ragged[i], row[0][0][number]) for i, row in enumerate(rows))
    with pytest.raises(DataError, match="no vision features 'facet'"):
        read(folder, "recorded", choice=Choice(vision_features="facet"))


def test_pom_asks_which_trait(tmp_path, data):
    folder = writers.write_split_files(tmp_path, writers.sdk(data, "pom"), prefix="pom_")
    with pytest.raises(DataError, match=r"labels of shape \(7, 18\).*data\.label_column"):
        read(folder, "recorded")
    assert_holds(read(folder, "recorded", choice=Choice(label_column=2))[1], data)
    assert (read(folder, "recorded", choice=Choice(label_column=3))[1].splits["train"].label == 4).all()
    with pytest.raises(DataError, match="a column 18"):
        read(folder, "recorded", choice=Choice(label_column=18))


def spoken(data):
    """As `write_csd` names segments: ids `video[i]`."""
    count = {}
    out = {}
    for split, rows in data.items():
        out[split] = []
        for s in rows:
            video = f"{split}_{s.id.rsplit('_', 1)[0]}"
            out[split].append(f"{video}[{count.get(video, 0)}]")
            count[video] = count.get(video, 0) + 1
    return out


@pytest.mark.parametrize("labels", [1, 7])
def test_csd_segments(tmp_path, data, labels):
    folder = writers.write_csd(tmp_path, data, labels=labels)
    for path in (folder, folder / "COVAREP.csd"):
        raw = read(path, "recorded", choice=Choice(align="segments"))[1]
        assert raw.format == "csd"
        assert {s: raw.splits[s].ids for s in SPLITS} == spoken(data)
        assert_holds(raw, data, ids=False)


def test_changes_beside_the_features_are_seen(tmp_path, data):
    """A store made on first use is made anew when a list of splits or an array of a manifest changes."""
    encoder = str(small_tokenizer(tmp_path / "encoder"))
    csd = writers.write_csd(tmp_path / "csd", data)
    before = len(open_dataset(csd, DataConfig(), encoder).splits["train"])
    splits = json.loads((csd / "splits.json").read_text())
    splits["valid"].append(splits["train"].pop())
    (csd / "splits.json").write_text(json.dumps(splits))
    assert len(open_dataset(csd, DataConfig(), encoder).splits["train"]) < before
    own = writers.write_manifest(tmp_path / "own", data)
    open_dataset(own, DataConfig(), encoder)
    frames = np.full((2, writers.AUDIO), 3, np.float32)
    np.save(own / "audio" / "v_ideo0_0.npy", frames)
    changed = open_dataset(own, DataConfig(normalize_audio="none"), encoder)
    assert np.array_equal(changed.splits["train"].audio[0], frames)


def test_csd_words(tmp_path):
    data = writers.samples()
    one = writers.aligned(data)  # as many frames as words: each word has its own
    assert_holds(read(writers.write_csd(tmp_path / "one", one), "recorded")[1], one, ids=False)
    two = writers.samples()
    for rows in two.values():
        for s in rows:
            n = len(s.text.split())
            s.audio = np.repeat(np.arange(2 * n, dtype=np.float32), 5).reshape(2 * n, 5)  # frames 2i and 2i + 1
            s.audio[0, 0] = -np.inf
    got = read(writers.write_csd(tmp_path / "two", two), "recorded")[1]
    for split, rows in two.items():
        for i, s in enumerate(rows):
            mean = 2 * np.arange(len(s.text.split()), dtype=np.float32)[:, None] + np.full(5, 0.5, np.float32)
            mean[0, 0] = 0.5  # of 0 and 1: the infinite value counts as 0
            assert np.allclose(got.splits[split].audio.ragged[i], mean)
    assert any("14 NaN or infinite values of COVAREP.csd" in note for note in got.notes)


@pytest.mark.parametrize("align", ["words", "segments"])
def test_csd_columns_far_from_zero_are_told(tmp_path, data, align):
    for rows in data.values():
        for s in rows:
            s.audio = s.audio + np.array([0, 0, 1.7e9, 0, 0])
    raw = read(writers.write_csd(tmp_path, data), "recorded", choice=Choice(align=align))[1]
    assert raw.splits["train"].audio.coarse == [2]
    assert raw.splits["train"].vision.coarse == []


def test_csd_choices_and_splits(tmp_path, data):
    folder = writers.write_csd(tmp_path, data)
    (folder / "COVAREP.csd").rename(folder / "openSMILE_IS09.csd")  # the root's name tells as well
    assert read(folder, "recorded")[1].format == "csd"
    with pytest.raises(DataError, match=r"found no text features; .*Name a text encoder"):
        read(folder, "recorded", features=True)
    (folder / "FACET_4.1.csd").write_bytes((folder / "FACET_4.2.csd").read_bytes())
    with pytest.raises(DataError, match=r"several sets of vision features.*set data\.vision_features=FACET_4\.1"):
        read(folder, "recorded")
    read(folder, "recorded", choice=Choice(vision_features="FACET_4.1"))
    (folder / "FACET_4.1.csd").unlink()
    splits = (folder / "splits.json").read_text()
    (folder / "splits.json").unlink()
    with pytest.raises(DataError, match="no list of each split's videos"):
        read(folder, "recorded")
    rows = [{"video_id": v, "mode": s} for s, videos in json.loads(splits).items() for v in videos]
    writers.write_csv(folder / "label.csv", rows[:-1])
    notes = read(folder, "recorded")[1].notes
    assert any("1 labelled videos are in no split" in note for note in notes)
    (folder / "words.csd").unlink()
    with pytest.raises(DataError, match="no words"):
        read(folder, "recorded")


def test_manifest_missing_modality_and_text_features(tmp_path, data):
    data["train"][2].audio = np.zeros((0, writers.AUDIO), np.float32)
    folder = writers.write_manifest(tmp_path, data, features=6)
    raw = read(folder, "recorded", features=True)[1]
    assert raw.splits["train"].audio.missing == [2]
    assert raw.splits["train"].features.ragged.lengths.tolist() == [len(s.text.split()) for s in data["train"]]
    assert read(folder / "manifest.csv", "recorded")[1].splits["train"].features is None


def test_a_modality_that_no_sample_has(tmp_path, data):
    """MMSA-FET leaves out what was not extracted."""
    content = writers.mmsa_fet(data)
    for split in content.values():
        del split["audio"], split["audio_lengths"]
    fet = writers.dump(content, tmp_path / "feature.pkl")
    own = writers.samples()
    for rows in own.values():
        for s in rows:
            s.audio = s.audio[:0]
    for path in (fet, writers.write_manifest(tmp_path / "own", own)):
        raw = read(path, "recorded")[1]
        assert any("missing in every sample" in note for note in raw.notes)
        for split, rows in data.items():
            got = raw.splits[split]
            assert got.audio.ragged.values.shape == (len(rows), 1)
            assert got.audio.missing == list(range(len(rows)))
            assert sorted(map(len, got.vision.ragged)) == sorted(len(s.vision) for s in rows)
        with pytest.warns(DataWarning, match="audio"):
            opened = open_dataset(path, DataConfig(), str(small_tokenizer(tmp_path / "encoder")))
        batch = next(iter(opened.loader("train", 4)))
        assert batch.audio.shape == (4, 1, 1) and not batch.audio.any()


@pytest.mark.parametrize("family", ["declarelab", "mmsa", "tuples_in_one"])
def test_names_do_not_matter(tmp_path, data, family):
    path = write(tmp_path, family, data)
    odd = path.rename(tmp_path / ("unaligned_50.bin" if family == "declarelab" else "mosi_data_noalign"))
    assert read(odd, "recorded")[1].format == FAMILIES[family]


def test_one_split_file_stands_for_all(tmp_path, data):
    writers.write_tuples(tmp_path, data)
    assert_holds(read(tmp_path / "train.pkl", "recorded")[1], data)


def test_mosei_ids_and_left_split_names(tmp_path, data):
    path = writers.write_declarelab(tmp_path, data, ids="mosei")
    ids = read(path, "recorded")[1].splits["train"].ids
    assert ids[0] == "v_ideo0_0.000_1.000"
    assert len(set(ids)) == len(ids)


def test_seven_label_columns_begin_with_sentiment(tmp_path, data):
    content = writers.declarelab(data)
    for split in content.values():
        split["labels"] = np.concatenate([split["labels"].reshape(-1, 1), np.full((len(split["labels"]), 6), 9)], 1)[
            :, None
        ]
    writers.dump(content, tmp_path / "x.pkl")
    writers.write_csv(tmp_path / "label.csv", writers.label_rows(data))
    assert_holds(read(tmp_path, "recorded")[1], data)
    rows = writers.tuples(data)
    for split in rows:
        rows[split] = [(inner, np.concatenate([y, np.full((1, 6), 9)], 1), i) for inner, y, i in rows[split]]
    assert_holds(read(writers.dump(rows, tmp_path / "y" / "rows.pkl"), "recorded")[1], data)


@pytest.mark.parametrize("columns", [4, 6, 7])
@pytest.mark.parametrize("features", [True, False])
def test_a_column_of_several_labels(tmp_path, data, columns, features):
    """Emotions: the label column is named, and the CSV's sentiment is compared only where the pickle has it."""
    content, chosen = writers.declarelab(data), {}
    for name, split in content.items():
        labels = np.random.default_rng(1).uniform(0, 3, (len(split["id"]), columns)).round(2)
        labels[:, 0] = split["labels"].reshape(-1)
        split["labels"], chosen[name] = labels, labels[:, 2:3].astype(np.float32)
    path = writers.dump(content, tmp_path / "x.pkl")
    writers.write_csv(tmp_path / "label.csv", writers.label_rows(data)[::-1])
    raw = read(path, "recorded", features=features, choice=Choice(label_column=2))[1]
    for name, rows in data.items():
        assert np.array_equal(raw.splits[name].label, chosen[name])
        assert raw.splits[name].text == (None if features else [s.text for s in rows])
    told = ["the labels of label.csv are not compared: the pickle's have no sentiment"]
    assert raw.notes == (told if columns != 7 and not features else [])
    if columns != 7:
        with pytest.raises(DataError, match=r"data\.label_column"):
            read(path, "recorded", features=True)


def test_rows_that_nothing_checks_are_not_joined_by_position(tmp_path, data):
    content = writers.declarelab(data, "mosei")
    for split in content.values():
        split["labels"] = np.ones((len(split["id"]), 6))
    path = writers.dump(content, tmp_path / "x.pkl")
    rows = [{**r, "clip_id": f"c{r['clip_id']}"} for r in writers.label_rows(data)]
    writers.write_csv(tmp_path / "label.csv", rows)
    with pytest.raises(DataError, match=r"train, row 0: found id v_ideo0.*no sentiment label; expected a way to check"):
        read(path, "recorded", choice=Choice(label_column=2))


@pytest.mark.parametrize("key", ["auto", "classes", "classification_labels", "regression_labels_T"])
def test_sets_of_labels_of_an_mmsa_file(tmp_path, data, key):
    content = writers.mmsa(data)
    for split in content.values():
        n = len(split["id"])
        split["classification_labels"] = np.arange(n) % 3
        split["regression_labels_T"] = np.linspace(-1, 1, n)
    path = writers.dump(content, tmp_path / "x.pkl")
    name = {"auto": "regression_labels", "classes": "classification_labels"}.get(key, key)
    raw = read(path, "recorded", choice=Choice(label_key=key))[1]
    for split in SPLITS:
        assert np.array_equal(raw.splits[split].label[:, 0], np.asarray(content[split][name], np.float32))
    del content["test"]["classification_labels"]
    if key == "classes":  # not in every split: the only labels there are
        raw = read(writers.dump(content, path), "recorded", choice=Choice(label_key=key))[1]
        assert np.array_equal(raw.splits["train"].label[:, 0], content["train"]["regression_labels"].astype("f"))


@pytest.mark.parametrize("family", ["mmsa", "manifest", "tuples"])
@pytest.mark.parametrize("split", SPLITS)
def test_a_modality_that_one_split_lacks(tmp_path, data, family, split):
    """It is as wide as in the other splits: one frame of zeros a sample, counted."""
    for s in data[split]:
        s.vision = s.vision[:0]
    if family == "mmsa":
        content = writers.mmsa(data)
        del content[split]["vision"], content[split]["vision_lengths"]
        path = writers.dump(content, tmp_path / "x.pkl")
    else:
        path = write(tmp_path, family, data)
    with pytest.warns(DataWarning) as caught:
        opened = open_dataset(path, DataConfig(normalize_vision="none"), str(small_tokenizer(tmp_path / "encoder")))
    count = len(data[split])
    said = [str(w.message) for w in caught]
    assert any(f"{count} samples without vision, kept as one zero frame ({split} {count})" in line for line in said)
    assert opened.vision_dim == writers.VISION
    for name, rows in data.items():
        vision = opened.splits[name].vision
        assert vision.values.shape == (sum(max(len(s.vision), 1) for s in rows), writers.VISION)
        assert vision.values.any() == (name != split)


@pytest.mark.parametrize("kind", ["resident", "torch"])
def test_data_without_a_modality_is_as_wide_as_the_runs_training_data(tmp_path, data, kind):
    encoder = str(small_tokenizer(tmp_path / "encoder"))
    trained = open_dataset(writers.write_manifest(tmp_path / "a", data), DataConfig(), encoder)
    for rows in data.values():
        for s in rows:
            s.vision = s.vision[:0]
    path = writers.write_manifest(tmp_path / "b", data)
    with pytest.warns(DataWarning, match="14 samples without vision"):
        opened = open_dataset(path, DataConfig(), encoder, normalizer=trained.normalizer)
    assert (opened.audio_dim, opened.vision_dim) == (writers.AUDIO, writers.VISION)
    (batch,) = opened.loader("test", 9, kind=kind, workers=1 if kind == "torch" else None)
    assert batch.vision.shape == (4, 1, writers.VISION) and not batch.vision.any()
    assert batch.audio.any()


def test_csv_in_any_order_with_any_columns(tmp_path, data):
    writers.write_declarelab(tmp_path, data)
    rows = [{"annotation": "", **dict(reversed(r.items()))} for r in writers.label_rows(data)]
    writers.write_csv(tmp_path / "MOSI-label.csv", rows[::-1])
    assert_holds(read(tmp_path, "recorded")[1], data)


def test_mosei_csv_with_starts_is_joined_by_them(tmp_path, data):
    writers.write_declarelab(tmp_path, data, ids="mosei")
    rows = []
    for split, items in data.items():
        for i, s in enumerate(items):
            video = s.id.rsplit("_", 1)[0]
            rows.append({"video_id": video, "clip_id": f"{i * 1.5:g}", "text": s.text, "label": s.label, "mode": split})
    starts = [(r["video_id"], r["clip_id"]) for r in rows]
    assert len(set(starts)) == len(starts)
    writers.write_csv(tmp_path / "MOSI-label.csv", rows[::-1])
    assert_holds(read(tmp_path, "recorded")[1], data, ids=False)


def test_the_csv_named_like_the_pickle_is_used(tmp_path, data):
    writers.write_declarelab(tmp_path, data)
    writers.write_csv(tmp_path / "MOSEI-label.csv", writers.label_rows(writers.samples(seed=9)))
    writers.write_csv(tmp_path / "results.csv", [{"epoch": 1, "mae": 1}])
    assert_holds(read(tmp_path, "recorded")[1], data)


def test_unused_csv_rows_and_other_modes_are_noted(tmp_path, data):
    writers.write_declarelab(tmp_path, data)
    rows = writers.label_rows(data)
    rows[0]["mode"] = "test"
    rows.append({**rows[0], "clip_id": "99"})
    writers.write_csv(tmp_path / "MOSI-label.csv", rows)
    notes = read(tmp_path, "recorded")[1].notes
    assert len(notes) == 2
    assert notes[0].startswith("1 samples are in another split")
    assert notes[1].startswith("1 rows of MOSI-label.csv")


def test_mmsa_drops_what_follows_the_recorded_length(tmp_path, data):
    content = writers.mmsa(data)
    first = data["train"][0]
    content["train"]["audio_lengths"][0] = 1
    path = writers.dump(content, tmp_path / "x.pkl")
    assert np.array_equal(read(path, "recorded")[1].splits["train"].audio.ragged[0], first.audio[:1])
    assert np.array_equal(read(path, "all_zero")[1].splits["train"].audio.ragged[0], first.audio)


def test_tuple_lists_are_cut_to_recorded_lengths(tmp_path, data):
    rows = writers.tuples(data)
    (words, vision, audio, text, _, alen), label, name = rows["train"][0]
    longer = np.concatenate([vision, np.ones((2, vision.shape[1]), np.float32)])
    rows["train"][0] = ((words, longer, audio, text, len(vision), alen), label, name)
    path = writers.dump(rows, tmp_path / "x.pkl")
    assert np.array_equal(read(path, "recorded")[1].splits["train"].vision.ragged[0], vision)
    assert np.array_equal(read(path, "all_zero")[1].splits["train"].vision.ragged[0], longer)


@pytest.mark.parametrize("text_bert", [False, True])
def test_mmsa_text_features_only_when_asked_for(tmp_path, data, text_bert):
    content = writers.mmsa(data, text_bert=text_bert, features=6)
    path = writers.dump(content, tmp_path / "x.pkl")
    assert read(path, "recorded")[1].splits["train"].features is None
    got = read(path, "recorded", features=True)[1].splits["train"].features.ragged
    want = [len(s.text.split()) + 2 for s in data["train"]]
    assert got.lengths.tolist() == want
    assert np.array_equal(got[1], content["train"]["text"][1, : want[1]])


def test_sims_keys_are_tolerated(tmp_path, data):
    content = writers.mmsa(data)
    for split in content.values():
        for side in "TAV":
            split[f"regression_labels_{side}"] = split["regression_labels"]
    assert_holds(read(writers.dump(content, tmp_path / "x.pkl"), "recorded")[1], data)


@pytest.mark.parametrize(("family", "asked"), [("mmsa", "declarelab"), ("declarelab", "mmsa"), ("tuples", "mmsa")])
def test_another_family_than_expected_is_named(tmp_path, data, family, asked):
    path = write(tmp_path, family, data)
    titles = {f.name: f.title for f in formats.formats()}
    with pytest.raises(DataError) as error:
        read(path, "recorded", expected=asked)
    assert f"found a {titles[family]} file; expected a {titles[asked]} file" in str(error.value)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"train": [[0] * 6], "valid": [], "test": []}, "splits that are a list of 6-item rows"),
        ([(([], [], []), 0.0, "a")], "a list of rows as in a MAG-BERT file that is not named train, dev/valid or test"),
        ([[0] * 7], "a list of rows as in a list of AVEC2019 interviews (MIMRL) file"),
        ({"train": {"x": 1}, "valid": {}, "test": {}}, "a dict of splits with keys x"),
        ({"a": 1}, "a dict with keys 'a'"),
        ([1, 2], "a list of int"),
        (3, "a pickled int"),
    ],
)
def test_unknown_families_are_described(tmp_path, content, found):
    path = writers.dump(content, tmp_path / "x.pkl")
    with pytest.raises(DataError) as error:
        read(path, "recorded")
    text = str(error.value)
    assert found in text
    assert all(f.title in text for f in formats.formats())


def test_a_format_of_ones_own(tmp_path, data):
    class Text:
        name = "text"
        title = "lines of text"

        def recognises(self, source):
            return source.head.startswith(b"MYDATA")

        def read(self, source, rule, features):
            return RawDataset(self.name, {}, notes=[rule])

    before = dict(registry._FORMATS)
    try:
        register_format(Text())
        path = tmp_path / "x.mine"
        path.write_bytes(b"MYDATA 1")
        assert read(path, "all_zero")[1].notes == ["all_zero"]
        assert_holds(read(write(tmp_path / "m", "mmsa", data), "recorded")[1], data)  # others are still found
    finally:
        registry._FORMATS.clear()
        registry._FORMATS.update(before)


def test_find_source_messages(tmp_path, data):
    writers.write_tuples(tmp_path, data, prefix="mosi_")
    with pytest.raises(DataError, match=r"Did you mean mosi_train\.pkl"):
        find_source(tmp_path / "mosi_trian.pkl")
    writers.write_tuples(tmp_path, data, prefix="mosei_")
    with pytest.raises(DataError, match=r"2 candidates.*Name the file"):
        find_source(tmp_path)
    assert set(find_source(tmp_path / "mosei_dev.pkl").files) == set(SPLITS)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        find_source(tmp_path / "pipe")
    with pytest.raises(DataError, match="no pickle"):
        (tmp_path / "empty").mkdir()
        find_source(tmp_path / "empty")
    (tmp_path / "mosi_valid.pkl").write_bytes((tmp_path / "mosi_dev.pkl").read_bytes())
    with pytest.raises(DataError, match="one valid file"):
        find_source(tmp_path / "mosi_dev.pkl")


def test_a_manifest_of_a_spreadsheet_with_another_split_and_a_held_back_test(tmp_path, data):
    """Read through all at once: semicolons, a split that is not read, cells without labels."""
    path = writers.write_manifest(tmp_path / "a", data)
    with (path / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["label"] = "" if row["split"] == "test" else row["label"]
    rows.append(rows[0] | {"id": "more", "split": "holdout", "label": "?"})
    lines = [";".join(rows[0]), *(";".join(row.values()) for row in rows)]
    (path / "manifest.csv").write_text("\n".join(lines))
    with pytest.warns(DataWarning) as caught:
        opened = open_dataset(path, DataConfig(), str(small_tokenizer(tmp_path / "encoder")))
    said = "\n".join(str(w.message) for w in caught)
    assert "splits that are not read: holdout" in said and "the test split has no labels" in said
    assert opened.splits["test"].label.isnan().all() and len(opened.splits["test"]) == len(data["test"])
    assert opened.splits["train"].label[:, 0].tolist() == pytest.approx([s.label for s in data["train"]])
    assert list(opened.splits) == list(SPLITS)


def test_a_set_of_labels_that_was_asked_for_may_be_missing_from_the_test_split_only(tmp_path, data):
    content = writers.mmsa(data)
    for split in content.values():
        split["regression_labels_T"] = np.float32(2) * split["regression_labels"]
    del content["test"]["regression_labels_T"]
    path, encoder = writers.dump(content, tmp_path / "x.pkl"), str(small_tokenizer(tmp_path / "encoder"))
    with pytest.warns(DataWarning, match="the test split has no labels"):
        opened = open_dataset(path, DataConfig(label_key="regression_labels_T"), encoder)
    assert opened.splits["train"].label[:, 0].tolist() == pytest.approx([2 * s.label for s in data["train"]])
    del content["valid"]["regression_labels_T"]
    with pytest.raises(DataError, match=r"valid: .*no 'regression_labels_T'"):
        open_dataset(writers.dump(content, tmp_path / "y.pkl"), DataConfig(label_key="regression_labels_T"), encoder)


def test_data_to_predict_may_have_no_sets_of_labels(tmp_path, data):
    """A run that was trained on one set of an MMSA file predicts files of another format."""
    path, encoder = writers.write_manifest(tmp_path / "a", data), str(small_tokenizer(tmp_path / "encoder"))
    asked, trained = DataConfig(label_key="regression_labels_T"), open_dataset(path, DataConfig(), encoder)
    opened = open_dataset(path, asked, encoder, trained.normalizer, training=False)
    assert opened.splits["test"].ids == [s.id for s in data["test"]]
    with pytest.raises(DataError, match=r"data\.label_key=regression_labels_T"):
        open_dataset(writers.write_manifest(tmp_path / "b", data), asked, encoder)
