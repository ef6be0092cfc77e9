"""Every family of files gives the same samples, whatever it is called."""

import numpy as np
import pytest

from engine.errors import DataError
from engine.loaders import formats
from engine.loaders.formats import RawDataset, find_source, read, register_format
from tests.loaders import writers
from tests.loaders.writers import SPLITS


@pytest.fixture
def data():
    return writers.samples()


def assert_holds(raw: RawDataset, data, ids=True):
    assert list(raw.splits) == list(SPLITS)
    for split, rows in data.items():
        got = raw.splits[split]
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
}


@pytest.mark.parametrize("rule", ["recorded", "all_zero", "sum_zero"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_samples(tmp_path, data, family, rule):
    path = write(tmp_path, family, data)
    _, raw = read(path, rule)
    assert raw.format == FAMILIES[family]
    assert_holds(raw, data, ids=family != "mosei")
    _, from_folder = read(tmp_path, rule)
    assert_holds(from_folder, data, ids=family != "mosei")


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
        ({"train": [(((1, 2, 3)), 0.0, "a")], "dev": [], "test": []}, "MAG-BERT"),
        ({"train": [[0] * 7], "valid": [[0] * 7], "test": [[0] * 7]}, "AVEC2019"),
        ({"train": [[[[]], 0, 0, 0, ""]], "valid": [], "test": []}, "CMU-SDK"),
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

    before = dict(formats._FORMATS)
    try:
        register_format(Text())
        path = tmp_path / "x.mine"
        path.write_bytes(b"MYDATA 1")
        assert read(path, "all_zero")[1].notes == ["all_zero"]
        assert_holds(read(write(tmp_path / "m", "mmsa", data), "recorded")[1], data)  # others are still found
    finally:
        formats._FORMATS.clear()
        formats._FORMATS.update(before)


def test_find_source_messages(tmp_path, data):
    writers.write_tuples(tmp_path, data, prefix="mosi_")
    with pytest.raises(DataError, match=r"Did you mean mosi_train\.pkl"):
        find_source(tmp_path / "mosi_trian.pkl")
    writers.write_tuples(tmp_path, data, prefix="mosei_")
    with pytest.raises(DataError, match=r"2 candidates.*Name the file"):
        find_source(tmp_path)
    assert set(find_source(tmp_path / "mosei_dev.pkl").files) == set(SPLITS)
    with pytest.raises(DataError, match="no pickle"):
        (tmp_path / "empty").mkdir()
        find_source(tmp_path / "empty")
    (tmp_path / "mosi_valid.pkl").write_bytes((tmp_path / "mosi_dev.pkl").read_bytes())
    with pytest.raises(DataError, match="one valid file"):
        find_source(tmp_path / "mosi_dev.pkl")
