"""Length rules, cleaning, and missing modalities."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import DataError
from engine.loaders.ragged import Ragged, from_padded, from_sequences
from tests.loaders.writers import pad

IDS = ["a", "b", "c"]


def take(array, side="left", rule="all_zero", lengths=None):
    return from_padded(np.asarray(array, np.float32), side, rule, lengths, IDS[: len(array)], "x.pkl, train/audio")


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=300),
    st.sampled_from(["left", "right"]),
    st.sampled_from(["all_zero", "sum_zero", "recorded"]),
    st.sampled_from([np.float32, np.float64, np.float16]),
)
def test_padding_and_taking_out_is_identity(lengths, side, rule, dtype):
    rng = np.random.default_rng(0)
    sequences = [rng.uniform(0.5, 1, (n, 3)).astype(dtype) for n in lengths]
    got = from_padded(
        pad(sequences, 8, side, dtype), side, rule, np.array(lengths), [str(i) for i in range(len(lengths))], "x"
    )
    assert got.ragged.values.dtype == np.float32
    assert got.ragged.lengths.tolist() == lengths
    assert np.array_equal(got.ragged.values, np.concatenate(sequences).astype(np.float32))
    assert (got.nonfinite, got.missing) == (0, [])


def test_zero_frames_inside_are_kept_by_all_zero_only():
    frames = [[0, 0], [0, 0], [1, 2], [0, 0], [3, 4]]  # left-padded, zero frame inside
    assert take([frames]).ragged[0].tolist() == [[1, 2], [0, 0], [3, 4]]
    # the reference: 5 - 3 frames that sum to 0 = the last 2 frames: a real frame is lost
    assert take([frames], rule="sum_zero").ragged[0].tolist() == [[0, 0], [3, 4]]
    turned = [list(reversed(frames))]
    assert take(turned, "right").ragged[0].tolist() == [[3, 4], [0, 0], [1, 2]]
    assert take(turned, "right", "sum_zero").ragged[0].tolist() == [[3, 4], [0, 0]]


def test_frames_that_sum_to_zero_count_as_padding_in_the_reference_only():
    frames = [[0, 0], [1, -1], [2, 3]]
    assert take([frames]).ragged[0].tolist() == [[1, -1], [2, 3]]
    assert take([frames], rule="sum_zero").ragged[0].tolist() == [[2, 3]]


def test_sum_zero_equals_the_reference_formula():
    rng = np.random.default_rng(1)
    x = rng.integers(-1, 2, (40, 7, 2)).astype(np.float64)
    got = from_padded(x, "left", "sum_zero", None, [str(i) for i in range(40)], "x").ragged
    for i, row in enumerate(x):
        length = len(row) - sum(frame.sum() == 0 for frame in row)
        want = row[len(row) - length :]
        if not want.any():
            want = np.zeros((1, 2))
        assert np.array_equal(got[i], want)


def test_recorded_lengths_cut_the_tail():
    frames = [[1, 1], [2, 2], [3, 3], [0, 0]]
    got = take([frames, frames, frames], "right", "recorded", np.array([2, 4, 99]))
    assert [len(got.ragged[i]) for i in range(3)] == [2, 4, 4]
    assert take([frames], "right", "all_zero", np.array([2])).ragged.lengths.tolist() == [3]


@pytest.mark.parametrize("rule", ["all_zero", "sum_zero", "recorded"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_all_zero_is_missing(rule, side):
    got = take([np.zeros((4, 2)), np.ones((4, 2))], side, rule, np.array([1, 4]))
    assert got.missing == [0]
    assert got.ragged[0].tolist() == [[0, 0]]
    assert got.ragged.lengths.tolist() == [1, 4]


def test_empty_sequences_are_missing():
    got = from_sequences([np.zeros((0, 2)), np.array([]), np.ones((2, 2)), np.zeros((3, 2))], list("abcd"), "x")
    assert got.missing == [0, 1, 3]
    assert got.ragged.lengths.tolist() == [1, 1, 2, 1]


def test_non_finite_values_become_zero_and_are_counted():
    nan, inf = np.nan, np.inf
    frames = np.array([[[0, 0], [nan, 1], [inf, -inf], [2, 3]]])
    got = take(frames)
    assert got.nonfinite == 3
    assert got.ragged[0].tolist() == [[0, 1], [0, 0], [2, 3]]
    assert from_sequences([frames[0]], ["a"], "x").nonfinite == 3


def test_values_beyond_float32_count_as_infinite():
    got = from_padded(np.array([[[1e300, 1.0]]]), "left", "all_zero", None, ["a"], "x")
    assert got.nonfinite == 1
    assert got.ragged[0].tolist() == [[0, 1]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_sequence_without_a_finite_value_is_an_error_naming_the_id(bad):
    padded = np.zeros((2, 4, 2), np.float32)
    padded[0, 1:], padded[1, 3:] = 1, bad
    with pytest.raises(DataError, match=r"x\.pkl, train/audio, row 1 \(id b\).*without one finite value"):
        take(padded)
    with pytest.raises(DataError, match=r"row 1 \(id b\)"):
        from_sequences([padded[0], padded[1, 3:]], ["a", "b"], "x")


def test_zeros_with_some_infinite_values_are_missing_not_an_error():
    # silence: every column 0, one of them log(0)
    got = take([[[0, -np.inf], [0, -np.inf]], [[1, 1], [1, 1]]])
    assert got.missing == [0]
    assert got.nonfinite == 2


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 4)),
        np.zeros((2, 4, 2)),
        np.zeros((3, 4, 2), "U3"),
        np.zeros((3, 4, 2), object),
        [[[1.0]]] * 3,
    ],
)
def test_wrong_shapes_and_dtypes(array):
    with pytest.raises(DataError, match="x, train/audio"):
        from_padded(array, "left", "all_zero", None, IDS, "x, train/audio")


@pytest.mark.parametrize("shape", [(3, 4, 0), (3, 0, 2)])
def test_an_array_without_columns_or_frames_is_a_missing_modality(shape):
    found = from_padded(np.zeros(shape), "left", "all_zero", None, IDS, "x, train/audio")
    assert found.missing == [0, 1, 2] and found.ragged.lengths.tolist() == [1, 1, 1]
    assert found.ragged.dim == max(shape[2], 1) and not found.ragged.values.any()


def test_wrong_sequences():
    with pytest.raises(DataError, match=r"row 1 \(id b\).*3 features per frame.*2 as in the rows before"):
        from_sequences([np.ones((2, 2)), np.ones((2, 3))], ["a", "b"], "x")
    with pytest.raises(DataError, match=r"row 0 \(id a\).*\(2,\)"):
        from_sequences([np.ones(2)], ["a"], "x")
    with pytest.raises(DataError, match="dtype"):
        from_sequences([np.array([["x"]])], ["a"], "x")


def test_sequences_without_a_frame_are_all_missing():
    found = from_sequences([np.zeros((0, 2)), np.zeros((0, 0))], ["a", "b"], "x")
    assert found.missing == [0, 1] and found.ragged.values.tolist() == [[0], [0]]
    assert found.ragged.lengths.tolist() == [1, 1]


def test_ragged_join():
    r = Ragged.join([np.arange(2), np.arange(0), np.arange(3)], np.int32)
    assert r.values.dtype == np.int32
    assert [r[i].tolist() for i in range(len(r))] == [[0, 1], [], [0, 1, 2]]


# -- the side of the padding, and what is left out --


@pytest.mark.parametrize("rule", ["all_zero", "sum_zero", "recorded"])
@pytest.mark.parametrize("usual", ["left", "right"])
def test_padding_at_the_other_side_is_found(usual, rule):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 8, 30)
    sequences = [rng.uniform(0.5, 1, (n, 3)).astype(np.float32) for n in lengths]
    other = "left" if usual == "right" else "right"
    for side, told in ((usual, None), (other, other)):
        got = from_padded(pad(sequences, 8, side), usual, rule, lengths, [str(i) for i in range(30)], "x")
        assert np.array_equal(got.ragged.values, np.concatenate(sequences))
        assert (got.side, got.dropped, got.missing) == (told, 0, [])


def test_a_few_zeros_at_the_other_end_decide_nothing():
    """Frames of zeros at an end may be real, in sequences that fill the array: they stay."""
    full, padded = np.ones((6, 2)), np.array([[0, 0]] * 3 + [[1, 1]] * 3)
    edge = full.copy()
    edge[-2:] = 0
    got = take([full, edge, padded])
    assert got.side is None
    assert got.ragged.lengths.tolist() == [6, 6, 3]
    assert got.ragged[1].tolist() == edge.tolist()


def test_frames_outside_their_lengths_are_counted():
    frames = [[1, 1], [2, 2], [3, 3], [0, 0]]
    got = take([frames, frames, frames], "right", "recorded", np.array([2, 4, 1]))
    assert (got.dropped, got.side) == (1 + 2, None)
    assert take([[[0, 0], [1, 2], [0, 0], [3, 4], [5, 6]]], rule="sum_zero").dropped == 1
    with pytest.raises(DataError, match=r"7 of 9 frames that are not zero outside the lengths of rule recorded"):
        take([frames, frames, frames], "right", "recorded", np.array([1, 1, 0]))


def test_sequences_longer_than_recorded_are_cut_where_it_loses_less():
    rng = np.random.default_rng(0)
    sequences = [rng.normal(size=(n, 2)).astype(np.float32) for n in (2, 3, 5)]
    for side, told in (("right", None), ("left", "left")):
        rows = list(pad(sequences, 5, side))
        got = from_sequences(rows, IDS, "x", [2, 3, 5])
        assert all(np.array_equal(got.ragged[i], s) for i, s in enumerate(sequences))
        assert (got.side, got.dropped) == (told, 0)
    got = from_sequences(sequences, IDS, "x", [2, 1, 0])  # 0: not recorded
    assert got.ragged.lengths.tolist() == [2, 1, 5]
    assert (got.side, got.dropped) == (None, 2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_sequences_of_one_length_with_zeros_at_one_end_are_padded(side):
    rng = np.random.default_rng(0)
    sequences = [rng.normal(size=(n, 2)).astype(np.float32) for n in (2, 3, 5, 1, 4, 2, 5, 3)]
    rows, ids = list(pad(sequences, 5, side)), [str(i) for i in range(10)]
    got = from_sequences([*rows, np.zeros((5, 2)), np.zeros((0, 2))], ids, "x")
    assert all(np.array_equal(got.ragged[i], s) for i, s in enumerate(sequences))
    assert (got.side, got.usual, got.missing, got.dropped) == (side, None, [8, 9], 0)
    assert got.padded_to == 5
    few = [*rows[:5], *[np.zeros((5, 2))] * 4]  # that are not all zero
    for kept in ([*rows, np.zeros((6, 2))], [rows[0], *[sequences[2]] * 8], few):  # of two lengths; too few with zeros
        got = from_sequences(kept, ids[:9], "x")
        assert got.side is None
        assert set(got.ragged.lengths.tolist()[:5]) == {5}
        assert got.padded_to is None


def test_rows_that_share_an_array():
    shared, zeros = np.arange(1, 9, dtype=np.float64).reshape(4, 2), np.zeros((5, 2))
    got = from_sequences([shared, zeros, shared, shared[:0]] * 50, [str(i) for i in range(200)], "x")
    assert np.array_equal(got.ragged[2], shared) and np.array_equal(got.ragged[198], shared)
    assert got.missing == [i for i in range(200) if i % 2]
    silence = np.array([[0, -np.inf], [0, 0]])
    got = from_sequences([shared, *[silence] * 9], [str(i) for i in range(10)], "x")
    assert (got.nonfinite, got.missing) == (9, list(range(1, 10)))


def test_rows_that_share_an_array_too_often():
    """Each row's frames are written out: a small file must not fill the disk."""
    shared = np.ones((1000, 1000), np.float32)
    with pytest.raises(DataError, match=r"1 arrays of 4000000 bytes that 1000 rows share; expected .*64 times"):
        from_sequences([shared] * 1000, [str(i) for i in range(1000)], "x")


def test_columns_that_float32_cannot_tell_apart():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 6, 4))
    values[..., 1] += 1.7e9  # seconds since 1970
    values[..., 2] = 0.1 + 1e-17 * values[..., 2]  # a constant and what rounding added
    values[..., 3] = 1e6 + 1e5 * values[..., 3]
    assert take([[[1.0, 2.0]]]).coarse == []
    for dtype, expected in ((np.float64, [1]), (np.float32, [])):
        got = from_padded(values.astype(dtype), "left", "all_zero", None, IDS, "x")
        assert got.coarse == expected
        assert from_sequences(list(values.astype(dtype)), IDS, "x").coarse == expected


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64])
def test_integers_that_float32_blurs_are_told(dtype):
    clock = np.arange(1_700_000_000, 1_700_000_100).astype(dtype)  # seconds since 1970
    values = np.stack([clock, clock % 7], -1)[None]
    assert from_padded(values, "right", "all_zero", None, ["a"], "x").coarse == [0]
    assert from_sequences(list(values), ["a"], "x").coarse == [0]


def test_zeros_at_the_ends_of_sequences_are_counted():
    frames = [[[0], [0], [1], [0]], [[0], [2], [3], [4]], [[0], [0], [0], [0]]]
    got = from_padded(np.array(frames, np.float32), "right", "recorded", np.array([4, 4, 4]), IDS, "x")
    assert (got.edges, got.missing) == ({"left": (2, 3), "right": (1, 1)}, [2])
    assert from_sequences([np.array(f, np.float32) for f in frames], IDS, "x").edges == got.edges
