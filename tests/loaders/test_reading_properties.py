"""Properties of the readers over many generated inputs."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engine.errors import DataError
from engine.loaders import safe_pickle
from engine.loaders.make_data.writers import pad
from engine.loaders.ragged import Ragged, from_padded
from engine.loaders.text import draw_words
from tests.fuzz.targets import PICKLES, TARGETS, execute
from tests.loaders.test_safe_pickle import equal

INTEGERS = st.integers(-(2**63), 2**64 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
ARRAYS = hnp.arrays(
    st.sampled_from(["f2", "<f4", ">f8", "i1", "u8", "?", "c16"]), hnp.array_shapes(max_dims=3, min_side=0, max_side=4)
)
LEAVES = st.none() | st.booleans() | INTEGERS | st.floats(allow_nan=False) | TEXT | st.binary() | ARRAYS
CONTENT = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def same(a, b):
    if isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in b)
    if isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return np.array_equal(a, b, equal_nan=a.dtype.kind in "fc") if isinstance(b, np.ndarray) else equal(a, b)


@given(CONTENT, st.integers(0, 5))
@settings(deadline=None)
def test_what_python_pickles_is_read_back(content, protocol):
    assert same(safe_pickle.loads(pickle.dumps(content, protocol)), content)


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes_are_a_pickle_or_one_line(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.pkl"
    path.write_bytes(data)
    try:
        safe_pickle.load(path)
    except DataError as problem:
        assert "\n" not in str(problem)


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_edited_content_is_read_or_refused(name):
    target = TARGETS[name]()

    @given(st.binary(min_size=4, max_size=24).filter(lambda b: b[:1] != b"\x80"))
    @settings(deadline=None)
    def check(data):
        assert execute(target, data) is None

    check()


FRAMES = hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.just(2)), elements=st.floats(-4, 4, width=32))
SEQUENCES = st.lists(FRAMES, min_size=1, max_size=5)


@given(SEQUENCES, st.sampled_from(["left", "right"]))
@settings(deadline=None)
def test_padding_is_undone(sequences, side):
    """Zero frames inside stay; only those at the padded side cannot be told from padding."""
    edge = 0 if side == "left" else -1
    sequences = [s for s in sequences if s[edge].any()]
    if not sequences:
        return
    sequences += [np.ones((1, 2), np.float32)] * len(sequences)  # from which the side of the padding is plain
    ids = [str(i) for i in range(len(sequences))]
    padded = pad(sequences, 8, side)
    got = from_padded(padded, side, "all_zero", None, ids, "x").ragged
    assert all(np.array_equal(got[i], s) for i, s in enumerate(sequences))
    lengths = np.array([len(s) for s in sequences])
    if side == "right":
        got = from_padded(padded, side, "recorded", lengths, ids, "x").ragged
        assert got.lengths.tolist() == lengths.tolist()


@given(SEQUENCES, st.integers(1, 7))
@settings(deadline=None)
def test_cutting_keeps_the_first_rows(sequences, most):
    cut = Ragged.join(sequences, np.float32, 2).cut(most)
    assert all(np.array_equal(cut[i], s[:most]) for i, s in enumerate(sequences))


@given(st.lists(st.lists(st.text("ab", min_size=1, max_size=2), max_size=4), max_size=5), st.integers(0, 99))
@settings(deadline=None)
def test_a_drawn_text_has_one_word_of_each_sentence(lines, epoch):
    (drawn,) = draw_words(["\n".join(map(" ".join, lines))], 0, epoch)
    spoken = [line for line in lines if line]
    assert len(drawn.split()) == len(spoken)
    assert all(word in line for word, line in zip(drawn.split(), spoken, strict=True))
