"""Every way in which data can be wrong is one line: file, key, row or id, what was found and expected, what to do."""

import os

import numpy as np
import pytest

from engine.config import DataConfig
from engine.errors import DataError
from engine.loaders import open_dataset
from engine.loaders.convert import convert
from engine.loaders.inspect import inspect_path
from tests.loaders import writers
from tests.loaders.test_text import small_tokenizer


@pytest.fixture
def tokenizer(tmp_path):
    return str(small_tokenizer(tmp_path / "encoder"))


@pytest.fixture
def data():
    return writers.samples()


def fails(path, tokenizer, *parts):
    """Opening and converting raise one line with all `parts`, and nothing is written; inspect lists the same line."""
    folder = path if path.is_dir() else path.parent
    before = {p.name for p in folder.iterdir()}
    with pytest.raises(DataError) as error:
        open_dataset(path, DataConfig(), tokenizer)
    text = str(error.value)
    assert "\n" not in text
    for part in (*parts, "found ", "expected "):
        assert part in text, (part, text)
    with pytest.raises(DataError):
        convert(path, folder / "store", tokenizer)
    assert {p.name for p in folder.iterdir()} == before
    return text


def change(content, split, key, value):
    content[split][key] = value(content[split][key])
    return content


def rename(content, split, old, new):
    content[split] = {new if k == old else k: v for k, v in content[split].items()}
    return content


def without(content, split, key):
    del content[split][key]
    return content


def at(array, index, value):
    array = np.array(array)
    array[index] = value
    return array


MMSA_CASES = {
    "missing_key": (lambda c: without(c, "valid", "id"), ["x.pkl, valid", "no 'id'", "Add 'id'"]),
    "no_audio_and_no_vision": (
        lambda c: without(without(c, "valid", "vision"), "valid", "audio"),
        ["x.pkl, valid", "no 'audio'", "Add 'audio'"],
    ),
    "id_nan": (lambda c: change(c, "valid", "id", lambda x: [*x[:-1], float("nan")]), ["valid/id, row 2", "empty id"]),
    "id_nan_word": (
        lambda c: change(c, "valid", "id", lambda x: np.array([*x[:-1], np.nan])),
        ["valid/id, row 2", "id 'nan'", "a name for the sample"],
    ),
    "texts_are_numbers": (
        lambda c: change(c, "test", "raw_text", lambda x: np.arange(4.0)),
        ["test/raw_text", "a number in every row", "the key that holds the transcripts"],
    ),
    "misnamed_key": (lambda c: rename(c, "train", "audio", "audios"), ["no 'audio'", "Rename 'audios' to 'audio'"]),
    "misnamed_labels": (
        lambda c: {s: rename(c, s, "regression_labels", "regresion_label")[s] for s in c},
        ["no 'regression_labels'", "Rename 'regresion_label'"],
    ),
    "misnamed_optional": (
        lambda c: rename(c, "test", "audio_lengths", "audio_length"),
        ["'audio_length'", "Did you mean 'audio_lengths'?"],
    ),
    "missing_split": (lambda c: {k: v for k, v in c.items() if k != "test"}, ["no test", "Write all three"]),
    "misnamed_split": (
        lambda c: {"train": c["train"], "valid": c["valid"], "tests": c["test"]},
        ["no test", "Rename 'tests'"],
    ),
    "split_under_two_names": (lambda c: {**c, "dev": c["valid"]}, ["the split valid under two names", "'dev'"]),
    "lengths_that_hold_little": (
        lambda c: change(c, "train", "audio_lengths", lambda x: [1] * 7),
        ["train/audio", "outside the lengths of rule recorded", "data.length_rule=all_zero"],
    ),
    "split_is_no_dict": (lambda c: {**c, "valid": [1]}, ["x.pkl, valid", "a list", "a dict"]),
    "wrong_dims": (
        lambda c: change(c, "train", "audio", lambda x: x[:, :, 0]),
        ["train/audio", "(7, 9)", "(7, length, features)"],
    ),
    "wrong_count": (
        lambda c: change(c, "train", "vision", lambda x: x[:-1]),
        ["train/vision", "(6, 11, 4)", "(7, length"],
    ),
    "wrong_dtype": (lambda c: change(c, "test", "audio", lambda x: x.astype("U5")), ["test/audio", "<U5"]),
    "object_dtype": (
        lambda c: change(c, "test", "audio", lambda x: np.array(list(x), dtype=object)),
        ["test/audio", "object"],
    ),
    "a_list": (lambda c: change(c, "test", "audio", lambda x: x.tolist()), ["test/audio", "list"]),
    "texts_too_few": (lambda c: change(c, "test", "raw_text", lambda x: x[:-1]), ["test/raw_text", "3 texts", "4"]),
    "no_texts": (lambda c: {s: without(c, s, "raw_text")[s] for s in c}, ["no 'raw_text'"]),
    "empty_texts": (
        lambda c: {s: change(c, s, "raw_text", lambda x: np.array([""] * len(x)))[s] for s in c},
        ["x.pkl", "no text in any sample"],
    ),
    "labels_too_few": (
        lambda c: change(c, "train", "regression_labels", lambda x: x[:-1]),
        ["train/regression_labels", "(6,)"],
    ),
    "labels_of_4_columns": (lambda c: change(c, "train", "regression_labels", lambda x: np.ones((7, 4))), ["(7, 4)"]),
    "label_nan": (
        lambda c: change(c, "test", "regression_labels", lambda x: at(x, 2, np.nan)),
        ["row 2 (id v_ideo4_0)", "nan"],
    ),
    "label_inf": (
        lambda c: change(c, "test", "regression_labels", lambda x: at(x, 2, np.inf)),
        ["row 2 (id v_ideo4_0)", "inf"],
    ),
    "labels_are_words": (
        lambda c: change(c, "test", "regression_labels", lambda x: np.array(["good"] * 4)),
        ["not numbers"],
    ),
    "lengths_too_few": (
        lambda c: change(c, "train", "audio_lengths", lambda x: x[1:]),
        ["train/audio_lengths", "7 whole numbers"],
    ),
    "lengths_negative": (
        lambda c: change(c, "train", "audio_lengths", lambda x: [-1, *x[1:]]),
        ["train/audio_lengths"],
    ),
    "lengths_not_numbers": (
        lambda c: change(c, "train", "audio_lengths", lambda x: ["a"] * 7),
        ["train/audio_lengths"],
    ),
    "empty_split": (
        lambda c: {**c, "valid": {k: v[:0] for k, v in c["valid"].items()}},
        ["x.pkl, valid/id", "no rows"],
    ),
    "nan_only": (
        lambda c: change(
            c, "train", "vision", lambda x: np.where((np.arange(7) == 3)[:, None, None] & (x != 0), np.nan, x)
        ),
        ["train/vision, row 3 (id v_ideo1_0)", "without one finite value"],
    ),
    "duplicate_within": (
        lambda c: change(c, "train", "id", lambda x: at(x, 3, x[1])),
        ["x.pkl, train, row 3", "id v_ideo0_1 a second time", "train, row 1 has it"],
    ),
    "duplicate_between": (
        lambda c: change(c, "test", "id", lambda x: at(x, 0, "v_ideo0$_$1")),
        ["x.pkl, test, row 0", "id v_ideo0_1 a second time", "train, row 1 has it"],
    ),
    "other_width_in_a_split": (
        lambda c: change(c, "valid", "audio", lambda x: x[:, :, :3]),
        ["x.pkl, audio", "5 in train, 3 in valid, 5 in test", "the same number in every split"],
    ),
}


@pytest.mark.parametrize("case", MMSA_CASES)
def test_mmsa(tmp_path, data, tokenizer, case):
    spoil, parts = MMSA_CASES[case]
    path = writers.dump(spoil(writers.mmsa(data)), tmp_path / "in" / "x.pkl")
    text = fails(path, tokenizer, *parts)
    assert text in inspect_path(path).problems


DECLARELAB_CASES = {
    "misnamed_labels": (
        lambda c: {s: rename(c, s, "labels", "label")[s] for s in c},
        ["no 'labels'", "Rename 'label' to 'labels'"],
    ),
    "missing_key": (lambda c: without(c, "valid", "audio"), ["x.pkl, valid", "no 'audio'"]),
    "wrong_dims": (lambda c: change(c, "train", "audio", lambda x: x[0]), ["train/audio", "(9, 5)"]),
    "empty_id": (lambda c: change(c, "train", "id", lambda x: at(x, (2, 0), b"")), ["train/id, row 2", "an empty id"]),
    "empty_split": (lambda c: {**c, "test": {k: v[:0] for k, v in c["test"].items()}}, ["x.pkl, test/id", "no rows"]),
    "label_nan": (
        lambda c: change(c, "test", "labels", lambda x: at(x, (1, 0, 0), np.nan)),
        ["test, labels, row 1", "nan"],
    ),
    "nan_only": (
        lambda c: change(
            c, "test", "audio", lambda x: np.where((np.arange(4) == 0)[:, None, None] & (x != 0), np.nan, x)
        ),
        ["test/audio, row 0 (id v_ideo3_1)"],
    ),
    "duplicate": (
        lambda c: change(
            change(c, "train", "id", lambda x: at(x, 3, x[1])), "train", "labels", lambda x: at(x, 3, x[1])
        ),
        ["train, row 3", "a second time"],
    ),
}


@pytest.mark.parametrize("case", DECLARELAB_CASES)
def test_declarelab(tmp_path, data, tokenizer, case):
    spoil, parts = DECLARELAB_CASES[case]
    path = writers.dump(spoil(writers.declarelab(data)), tmp_path / "in" / "x.pkl")
    writers.write_csv(path.parent / "label.csv", writers.label_rows(data))
    fails(path, tokenizer, *parts)


CSV_CASES = {
    "a_cell_too_many": (
        "mosi",
        lambda rows: [{**rows[0], "text": "was, not"}, *rows[1:]],
        ["label.csv, line 2", "6 cells", "5, as the header has", "in quotes"],
    ),
    "decimal_commas": (
        "mosi",
        lambda rows: [{**r, "label": '"0,5"'} for r in rows],
        ["label.csv, line 2", "'0,5', with a decimal comma", "decimal points"],
    ),
    "a_column_twice": ("mosi", lambda rows: [{**r, "label ": 1} for r in rows], ["label.csv", "2 columns 'label'"]),
    "clips_cut_by_a_spreadsheet": (
        "mosi",
        lambda rows: [{**r, "clip_id": f"{r['clip_id']}0.5"} for r in rows],
        ["train, row 0", "of v_ideo0 it has 00.5, 10.5, 20.5", "as it was before a spreadsheet saved it"],
    ),
    "none": ("mosi", lambda rows: None, ["no label CSV", "video_id, clip_id, text, label"]),
    "another_set": (
        "mosi",
        lambda rows: [{**r, "video_id": "x" + r["video_id"]} for r in rows],
        ["train, row 0", "id v_ideo0_0, which label.csv does not have", "video_id v_ideo0, clip_id 0"],
    ),
    "one_row_missing": ("mosi", lambda rows: rows[:4] + rows[5:], ["train, row 4", "id v_ideo1_1"]),
    "a_row_twice": ("mosi", lambda rows: [*rows, rows[2]], ["line 16", "(v_ideo0, 2) a second time"]),
    "other_label": (
        "mosi",
        lambda rows: [{**r, "label": r["label"] + 0.2 * (i == 5)} for i, r in enumerate(rows)],
        ["label.csv, line 7 (v_ideo1, 2)", "the label of id v_ideo1_2 (train)", "texts would go to the wrong samples"],
    ),
    "label_not_a_number": (
        "mosi",
        lambda rows: [{**r, "label": "good"} for r in rows],
        ["label.csv, line 2", "'good'"],
    ),
    "label_nan": ("mosi", lambda rows: [{**r, "label": "nan"} for r in rows], ["label.csv, line 2", "label nan"]),
    "misnamed_column": (
        "mosi",
        lambda rows: [{("labels" if k == "label" else k): v for k, v in r.items()} for r in rows],
        ["label.csv", "a column label", "Rename 'labels' to 'label'"],
    ),
    "mosei_other_order": (
        "mosei",
        lambda rows: rows[::-1],
        [
            "label.csv, line 2",
            "video v_ideo4",
            "v_ideo0, the video of id v_ideo0_0.000_1.000 (train)",
            "train, valid, test order",
        ],
    ),
    "mosei_order_within_a_video": (
        "mosei",
        lambda rows: [rows[1], rows[0], *rows[2:]],
        ["label.csv, line 2", "label", "in its order"],
    ),
    "mosei_fewer_rows": ("mosei", lambda rows: rows[:-1], ["13 rows", "14, one per sample"]),
}


@pytest.mark.parametrize("case", CSV_CASES)
def test_label_csv(tmp_path, data, tokenizer, case):
    ids, spoil, parts = CSV_CASES[case]
    path = writers.dump(writers.declarelab(data, ids), tmp_path / "in" / "x.pkl")
    rows = spoil(
        [{**r, "clip_id": r["clip_id"] if ids == "mosi" else f"c{r['clip_id']}"} for r in writers.label_rows(data)]
    )
    if rows:  # as they are, without quotes
        lines = [",".join(rows[0]), *(",".join(map(str, r.values())) for r in rows)]
        (path.parent / "label.csv").write_text("\n".join(lines))
    text = fails(path, tokenizer, *parts)
    assert text in inspect_path(path).problems


def test_a_text_that_is_cut_by_its_commas(tmp_path, data, tokenizer):
    path = writers.dump(writers.declarelab(data), tmp_path / "in" / "x.pkl")
    rows = [f"{r['video_id']},{r['clip_id']},{r['label']},so, so" for r in writers.label_rows(data)]
    (path.parent / "label.csv").write_text("\n".join(["video_id,clip_id,label,text", *rows]))
    fails(path, tokenizer, "label.csv, line 2", "5 cells", "4, as the header has", "in quotes")


def test_csv_that_is_not_utf8(tmp_path, data, tokenizer):
    data["train"][0].text = "caf\u00e9"
    path = writers.dump(writers.declarelab(data), tmp_path / "in" / "x.pkl")
    writers.write_csv(path.parent / "label.csv", writers.label_rows(data))
    csv = path.parent / "label.csv"
    csv.write_bytes(csv.read_bytes().decode().encode("latin1"))
    fails(path, tokenizer, "label.csv", "UTF-8")


def spoil_row(rows, split, i, new):
    rows[split][i] = new(rows[split][i])
    return rows


TUPLE_CASES = {
    "another_row": (lambda r: spoil_row(r, "train", 2, lambda x: x[:2]), ["train, row 2", "another kind of row"]),
    "words_are_a_str": (
        lambda r: spoil_row(r, "train", 2, lambda x: ((x[0][0], x[0][1], x[0][2], "text"), *x[1:])),
        ["train, row 2 (id v_ideo0_2)", "actual_words of type str", "a list of words"],
    ),
    "frames_1d": (
        lambda r: spoil_row(r, "test", 1, lambda x: ((x[0][0], np.ones(3), *x[0][2:]), *x[1:])),
        ["test, visual, row 1 (id v_ideo3_2)", "(3,)"],
    ),
    "other_width": (
        lambda r: spoil_row(r, "test", 1, lambda x: ((x[0][0], x[0][1], np.ones((2, 9)), *x[0][3:]), *x[1:])),
        ["test, acoustic, row 1", "9 features per frame", "5 as in the rows before"],
    ),
    "labels_differ": (
        lambda r: spoil_row(r, "valid", 1, lambda x: (x[0], np.ones((1, 7)), x[2])),
        ["valid, labels", "different lengths"],
    ),
    "label_nan": (
        lambda r: spoil_row(r, "valid", 1, lambda x: (x[0], np.array([[np.nan]]), x[2])),
        ["valid, labels, row 1", "nan"],
    ),
    "nan_only": (
        lambda r: spoil_row(r, "valid", 1, lambda x: ((x[0][0], np.full((2, 4), np.nan), *x[0][2:]), *x[1:])),
        ["valid, visual, row 1 (id v_ideo2_2)", "without one finite value"],
    ),
    "empty_split": (lambda r: {**r, "valid": []}, ["valid", "no rows"]),
    "duplicate": (
        lambda r: spoil_row(r, "test", 1, lambda x: (*x[:2], "v_ideo0_0")),
        ["test, row 1", "id v_ideo0_0 a second time"],
    ),
}


@pytest.mark.parametrize("case", TUPLE_CASES)
def test_tuples(tmp_path, data, tokenizer, case):
    spoil, parts = TUPLE_CASES[case]
    for split, rows in spoil(writers.tuples(data)).items():
        writers.dump(rows, tmp_path / "in" / f"{split}.pkl")
    fails(tmp_path / "in", tokenizer, *parts)


def test_tuples_without_a_split(tmp_path, data, tokenizer):
    writers.write_tuples(tmp_path / "in", data)
    (tmp_path / "in" / "test.pkl").unlink()
    fails(tmp_path / "in", tokenizer, "splits train, valid, no test")


def test_truncated_and_malicious_pickles_reach_the_user_as_one_line(tmp_path, data, tokenizer):
    import os

    path = writers.dump(writers.mmsa(data), tmp_path / "in" / "x.pkl")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    fails(path, tokenizer, "x.pkl", "ends early", "download it again")

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'mark'}",)

    content = writers.mmsa(data)
    content["train"]["audio"] = Evil()
    writers.dump(content, path)
    fails(path, tokenizer, "x.pkl", "posix.system", "Nothing was run")
    assert not (tmp_path / "mark").exists()


def test_features_asked_for_and_absent(tmp_path, data):
    path = writers.dump(writers.mmsa(data), tmp_path / "in" / "x.pkl")
    fails(path, "features", "no 'text'")
    writers.write_tuples(tmp_path / "tuples", data)
    fails(tmp_path / "tuples", "features", "precomputed text features")


def test_all_zero_text_features_are_no_features(tmp_path, data):
    content = writers.declarelab(data)
    for split in content.values():
        split["text"][:] = 0
    path = writers.dump(content, tmp_path / "in" / "x.pkl")
    fails(path, "features", "x.pkl, text", "text features")


def test_stores_made_for_the_other_kind_of_text(tmp_path, data, tokenizer):
    source = writers.dump(writers.mmsa(data, features=6), tmp_path / "x.pkl")
    tokens = convert(source, tmp_path / "tokens", tokenizer)
    with pytest.raises(DataError, match="no precomputed text features"):
        open_dataset(tokens, DataConfig(), "features")
    content = writers.mmsa(data, features=6)
    for split in content.values():
        del split["raw_text"]
    no_text = convert(writers.dump(content, tmp_path / "y.pkl"), tmp_path / "features", "features")
    with pytest.raises(DataError, match="no texts"):
        open_dataset(no_text, DataConfig(), tokenizer)


def test_nothing_there(tmp_path, tokenizer):
    with pytest.raises(DataError, match="nothing; expected a file or folder"):
        open_dataset(tmp_path / "none", DataConfig(), tokenizer)


SDK_CASES = {
    "another_row": (lambda r: spoil_row(r, "train", 2, lambda x: x[:3]), ["train, row 2", "another kind of row"]),
    "no_audio_sets": (
        lambda r: spoil_row(r, "train", 0, lambda x: [[x[0][0], [], x[0][2]], *x[1:]]),
        ["train, row 0", "no audio features"],
    ),
    "fewer_sets_later": (
        lambda r: spoil_row(r, "train", 1, lambda x: [[x[0][0], [], x[0][2]], *x[1:]]),
        ["train, row 1, covarep", "0 feature sets"],
    ),
    "words_are_numbers": (
        lambda r: spoil_row(r, "test", 0, lambda x: [[[{}, *x[0][0][1:]], *x[0][1:]], *x[1:]]),
        ["test, row 0, words", "a dict"],
    ),
    "frames_1d_of_another_width": (
        lambda r: spoil_row(r, "valid", 1, lambda x: [[x[0][0], [np.ones(9)], x[0][2]], *x[1:]]),
        ["valid, covarep, row 1", "9 features per frame"],
    ),
    "label_nan": (
        lambda r: spoil_row(r, "valid", 1, lambda x: [x[0], float("nan"), *x[2:]]),
        ["valid, labels, row 1 (id v_ideo2_2)", "nan"],
    ),
    "nan_only": (
        lambda r: spoil_row(r, "test", 1, lambda x: [[x[0][0], [np.full((2, 5), np.nan)], x[0][2]], *x[1:]]),
        ["test, covarep, row 1 (id v_ideo3_2)", "without one finite value"],
    ),
    "empty_split": (lambda r: {**r, "valid": []}, ["valid", "no rows"]),
    "duplicate": (lambda r: spoil_row(r, "test", 1, lambda x: [*x[:-1], "v_ideo0_0"]), ["id v_ideo0_0 a second time"]),
}


@pytest.mark.parametrize("case", SDK_CASES)
def test_sdk_lists(tmp_path, data, tokenizer, case):
    spoil, parts = SDK_CASES[case]
    for split, rows in spoil(writers.sdk(data, "mosei")).items():
        writers.dump(rows, tmp_path / "in" / f"mosei_{split}.pkl")
    fails(tmp_path / "in", tokenizer, *parts)


AVEC_CASES = {
    "another_row": (lambda r: spoil_row(r, "train", 2, lambda x: x[:6]), ["train, row 2", "another kind of row"]),
    "text_is_a_str": (
        lambda r: spoil_row(r, "train", 2, lambda x: ["a b c", *x[1:]]),
        ["train, row 2, text", "a str", "a list of text"],
    ),
    "fewer_steps": (
        lambda r: spoil_row(r, "test", 1, lambda x: [x[0], x[1][:-1], *x[2:]]),
        ["test, row 1, mfcc", "a row for each of the"],
    ),
    "score_not_divided": (
        lambda r: spoil_row(r, "valid", 1, lambda x: [*x[:6], 12.0]),
        ["valid, row 1", "label 12", "Divide the scores by 25"],
    ),
    "label_missing": (lambda r: spoil_row(r, "valid", 1, lambda x: [*x[:6], None]), ["labels, row 1", "nan"]),
    "label_nan": (
        lambda r: spoil_row(r, "valid", 1, lambda x: [*x[:6], np.nan]),
        ["labels, row 1 (id valid_1)", "nan"],
    ),
    "nan_only": (
        lambda r: spoil_row(r, "test", 0, lambda x: [*x[:4], np.full_like(x[4], np.nan), *x[5:]]),
        ["test, au, row 0 (id test_0)", "without one finite value"],
    ),
    "no_sentences": (
        lambda r: {**r, "test": [[np.array([], "U1"), *(f[:0] for f in x[1:6]), x[6]] for x in r["test"]]},
        ["test", "no text, audio or vision in any sample"],
    ),
}


@pytest.mark.parametrize("case", AVEC_CASES)
def test_avec2019_lists(tmp_path, tokenizer, case):
    spoil, parts = AVEC_CASES[case]
    for split, rows in spoil(writers.avec2019(writers.interviews())).items():
        writers.dump(rows, tmp_path / "in" / f"{split}.pkl")
    fails(tmp_path / "in", tokenizer, *parts)


def test_magbert_words(tmp_path, data, tokenizer):
    content = spoil_row(writers.magbert(data), "test", 1, lambda x: (([1, 2], *x[0][1:]), *x[1:]))
    path = writers.dump(content, tmp_path / "in" / "mosi.pkl")
    fails(path, tokenizer, "test, row 1 (id v_ideo3_2)", "a list of words")


def rewrite(change):
    """A change of the manifest's text."""
    return lambda folder: (folder / "manifest.csv").write_text(change((folder / "manifest.csv").read_text()))


def put(name, content):
    """Another file in place of one of the arrays."""

    def write(folder):
        (folder / name).write_bytes(content) if isinstance(content, bytes) else np.save(folder / name, content)

    return write


def link(folder):
    (folder.parent / "secret.npy").write_bytes((folder / "audio" / "v_ideo0_0.npy").read_bytes())
    (folder / "audio" / "v_ideo0_0.npy").unlink()
    (folder / "audio" / "v_ideo0_0.npy").symlink_to("../../secret.npy")


def npy_header(shape):
    """A .npy file that ends with its header."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00v\x00" + text.encode()


FIRST = "audio/v_ideo0_0.npy"
MANIFEST_CASES = {
    "misnamed_column": (rewrite(lambda t: t.replace("label", "labels", 1)), ["a column label", "Rename 'labels'"]),
    "no_text_column": (rewrite(lambda t: t.replace("text", "zzz", 1)), ["a column text", "Add it"]),
    "no_rows": (rewrite(lambda t: t.splitlines()[0]), ["manifest.csv", "no rows"]),
    "label_word": (rewrite(lambda t: t.replace("train,", "train,x", 1)), ["manifest.csv, line 2", "a finite number"]),
    "other_split": (rewrite(lambda t: t.replace("train,", "trian,", 1)), ["line 2", "split 'trian'"]),
    "a_split_missing": (rewrite(lambda t: t.replace("valid,", "train,")), ["splits train, test, no valid"]),
    "a_cell_too_many": (rewrite(lambda t: t.replace("vision/v_ideo0_0.npy", "a,b", 1)), ["line 2", "7 cells"]),
    "empty_id": (rewrite(lambda t: t.replace("v_ideo0_0,", ",", 1)), ["line 2", "an empty id"]),
    "duplicate": (rewrite(lambda t: t.replace("v_ideo0_1,", "v_ideo0_0,", 1)), ["id v_ideo0_0 a second time"]),
    "absolute": (rewrite(lambda t: t.replace(FIRST, "/etc/passwd")), ["line 2 (id v_ideo0_0), audio", "outside"]),
    "upwards": (rewrite(lambda t: t.replace(FIRST, "audio/../../x.npy")), ["audio", "outside the folder"]),
    "upwards_with_backslashes": (rewrite(lambda t: t.replace(FIRST, "..\\x.npy")), ["audio", "outside the folder"]),
    "a_link_outwards": (link, ["audio", "outside the folder"]),
    "no_file": (rewrite(lambda t: t.replace(FIRST, "audio/none.npy")), ["no file 'audio/none.npy'"]),
    "pickled_objects": (put(FIRST, np.array([None, 1], object)), ["v_ideo0_0.npy", "a .npy file of numbers"]),
    "one_dimension": (put(FIRST, np.ones(5)), ["v_ideo0_0.npy", "shape (5,)"]),
    "other_width": (put(FIRST, np.ones((2, 9))), ["train, audio, row 1 (id v_ideo0_1)", "5 features per frame"]),
    "header_beyond_the_file": (
put(FIRST, npy_header("(1000000000000, 9)")),
        ["v_ideo0_0.npy", "a .npy file of numbers"],
    ),
    "no_npy": (put(FIRST, b"PK\x03\x04"), ["v_ideo0_0.npy", "a .npy file of numbers"]),
    "empty_file": (put(FIRST, b""), ["v_ideo0_0.npy", "a .npy file of numbers"]),
    "nan_only": (put(FIRST, np.full((2, 5), np.nan)), ["train, audio, row 0 (id v_ideo0_0)", "finite value"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MANIFEST_CASES)
def test_manifest(tmp_path, data, tokenizer, case):
    spoil, parts = MANIFEST_CASES[case]
    spoil(writers.write_manifest(tmp_path / "in", data))
    fails(tmp_path / "in", tokenizer, *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("1,2,3,4,5\n1,2,x,4,5\n", ["v_ideo0_0.csv, line 2", "not a number"]),
        ("1,2,3,4,5\n1,2,3,4\n", ["v_ideo0_0.csv, line 2", "4 cells", "5 as in the first row"]),
        ("1,2\n", ["row 1 (id v_ideo0_1)", "5 features per frame"]),
        ("1,2,x,4,5\n1,2,3,4,5\n", ["v_ideo0_0.csv, line 1", "not a number"]),
        (",0,1,2,3,4\n0,1,2,3,4,5\n", ["v_ideo0_0.csv, line 1", "without a name", "without its index"]),
    ],
)
def test_manifest_of_csv_files(tmp_path, data, tokenizer, text, parts):
    folder = writers.write_manifest(tmp_path / "in", data, kind="csv")
    (folder / "audio" / "v_ideo0_0.csv").write_text(text)
    fails(folder, tokenizer, *parts)


@pytest.mark.parametrize("header", ["", "a,b,c,d,e\n", "0,1,2,3,4\n"])
def test_headers_of_csv_files(tmp_path, data, tokenizer, header):
    folder = writers.write_manifest(tmp_path / "in", data, kind="csv")
    (folder / "audio" / "v_ideo0_0.csv").write_text(f"{header}1,2,3,4,5\n6,7,8,9,10\n")
    opened = open_dataset(folder, DataConfig(), tokenizer)
    assert opened.splits["train"]._data.audio[0].tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]


def test_csd_without_what_it_needs(tmp_path, data, tokenizer):
    pytest.importorskip("h5py", reason="needs the extra csd")
    folder = writers.write_csd(tmp_path / "in", data)
    splits = (folder / "splits.json").read_text()
    twice = '{"train": ["a"], "valid": ["a"], "test": []}'
    for text, part in (
        ("{", "splits.json"),
        ("[1]", "splits.json"),
        ('{"train": []}', "no labelled segment"),
        (twice, "video a in train and in valid"),
    ):
        (folder / "splits.json").write_text(text)
        fails(folder, tokenizer, part)
    (folder / "splits.json").write_text(splits.replace("valid_", "other_"))
    fails(folder, tokenizer, "valid", "no segment")
    (folder / "splits.json").write_text(splits)
    (folder / "COVAREP.csd").unlink()
    fails(folder, tokenizer, "no audio", "data.audio_features")


def test_a_text_that_is_no_text(tmp_path, data, tokenizer):
    content = writers.mmsa(data)
    for value, name in ((["a"], "a list"), (True, "a bool"), (float("inf"), "a float")):
        content["test"]["raw_text"] = [*list(content["test"]["raw_text"])[:-1], value]
        path = writers.dump(content, tmp_path / "in" / "x.pkl")
        fails(path, tokenizer, "test/raw_text, row 3", name)


def test_a_label_key_that_is_not_there(tmp_path, data, tokenizer):
    def opened(path, key):
        return open_dataset(path, DataConfig(label_key=key), tokenizer)

    path = writers.dump(writers.mmsa(data), tmp_path / "x.pkl")
    with pytest.raises(DataError, match=r"data\.label_key: found 'clasification_labels'.*Did you mean classification_"):
        opened(path, "clasification_labels")
    with pytest.raises(DataError, match=r"train: found keys .* no 'classification_labels_T'"):
        opened(path, "classification_labels_T")
    with pytest.raises(DataError, match=r"with data\.label_key=classification_labels; expected an MMSA file"):
        opened(writers.write_manifest(tmp_path / "own", data), "classification_labels")


@pytest.mark.parametrize("cell", ["audio/loop.npy", "n" * 300 + ".npy", "audio/pipe.npy"])
def test_manifest_cells_that_name_no_file(tmp_path, data, tokenizer, cell):
    folder = writers.write_manifest(tmp_path / "m", data)
    (folder / "audio" / "loop.npy").symlink_to("loop.npy")
    os.mkfifo(folder / "audio" / "pipe.npy")
    table = folder / "manifest.csv"
    lines = table.read_text().splitlines()
    cells = lines[1].split(",")
    cells[lines[0].split(",").index("audio")] = cell
    table.write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]))
    with pytest.raises(DataError, match="no file") as error:
        open_dataset(folder, DataConfig(), tokenizer)
    assert "\n" not in str(error.value)
