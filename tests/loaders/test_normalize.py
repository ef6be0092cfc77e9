"""Normalisation: train statistics, missing frames, constant columns, save and load."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import DataConfig
from engine.errors import DataError
from engine.kernels import use_backend
from engine.kernels.ragged import cpu
from engine.loaders import normalize, open_dataset
from engine.loaders.content import SplitData
from engine.loaders.normalize import ColumnNormalizer, Normalizer
from engine.loaders.ragged import Ragged
from engine.loaders.split import Split
from tests.loaders import writers


def columns(count=500, seed=0):
    x = np.random.default_rng(seed).normal(loc=[3, -1000, 5], scale=[2, 0.5, 0], size=(count, 3)).astype(np.float32)
    x[::7] = 0  # missing
    return x


def present(x):
    return x[x.any(1)].astype(np.float64)


def test_zscore_leaves_missing_frames_out_and_zero():
    x = columns()
    fitted = ColumnNormalizer.fit(x, "zscore")
    y = fitted.apply(x)
    assert y.dtype == np.float32
    assert not y[::7].any()
    assert np.allclose(y[x.any(1)].mean(0), 0, atol=1e-4)
    assert np.allclose(y[x.any(1)].std(0), [1, 1, 0], atol=1e-4)
    assert np.allclose(fitted.shift[:2], present(x).mean(0)[:2])
    assert np.allclose(1 / fitted.scale[:2], present(x).std(0)[:2])


def test_constant_column_is_zero_even_for_other_values():
    fitted = ColumnNormalizer.fit(columns(), "zscore")
    other = np.array([[1, 2, 77]], np.float32)
    assert fitted.apply(other)[0, 2] == 0
    assert ColumnNormalizer.fit(columns(), "minmax").apply(other)[0, 2] == 0


def test_a_column_constant_up_to_rounding_of_its_mean_is_constant():
    x = np.full((1001, 2), 0.1, np.float32)
    x[:, 1] = np.arange(1001)
    assert not ColumnNormalizer.fit(x, "zscore").apply(x)[:, 0].any()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(0.5, 5))
def test_clip_bounds_every_value(seed, clip):
    x = columns(60, seed)
    x[3] = 1e6
    y = ColumnNormalizer.fit(x[10:], "zscore", clip=clip).apply(x)
    assert np.abs(y).max() == np.float32(clip)


def test_minmax_is_minus_one_to_one_on_train():
    x = columns()
    y = ColumnNormalizer.fit(x, "minmax", clip=0.5).apply(x)[x.any(1)]
    assert np.allclose(y.min(0), [-1, -1, 0])
    assert np.allclose(y.max(0), [1, 1, 0])


def test_log_uses_the_minimum_of_train():
    x = np.array([[1.0], [2], [5]], np.float32)
    fitted = ColumnNormalizer.fit(x, "none", log=True)
    below = np.array([[-3.0], [1], [5]], np.float32)
    assert np.allclose(fitted.apply(below), np.log([[1], [1], [5]]))
    y = ColumnNormalizer.fit(x, "minmax", log=True).apply(x)
    assert np.allclose(y[:, 0], 2 * np.log([1, 2, 5]) / np.log(5) - 1)
    z = ColumnNormalizer.fit(x, "zscore", log=True).apply(x)
    g = np.log([1, 2, 5])
    assert np.allclose(z[:, 0], (g - g.mean()) / g.std(), atol=1e-6)


def test_missing_frames_and_the_clip_also_with_a_logarithm():
    x = np.array([[1.0], [0], [2], [5]], np.float32)  # the second frame is missing
    g = np.log([1, 2, 5])
    for kind, expected in (("zscore", np.clip((g - g.mean()) / g.std(), -0.5, 0.5)), ("minmax", 2 * g / g[2] - 1)):
        y = ColumnNormalizer.fit(x, kind, log=True, clip=0.5).apply(x)
        assert np.allclose(y[:, 0], [expected[0], 0, *expected[1:]], atol=1e-6)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("kind", ["zscore", "minmax"])
def test_frames_are_read_in_blocks(monkeypatch, kind, log):
    x, checks = columns(), []
    x[100, 0], x[450, 1] = 50, -2000  # extremes of columns lie in different blocks
    whole = ColumnNormalizer.fit(x, kind, log)
    expected = whole.apply(x)
    monkeypatch.setattr(normalize, "BLOCK", 64)
    fitted = ColumnNormalizer.fit(x, kind, log)
    for name in ("low", "shift", "scale"):
        np.testing.assert_allclose(getattr(fitted, name), getattr(whole, name), rtol=1e-9, err_msg=name)
    assert np.array_equal(whole.apply(x, check=lambda: checks.append(1)), expected)
    assert len(checks) == 2 * 8  # before and after each block of 64 of 500 frames


def test_none_changes_nothing():
    x = columns()
    assert np.array_equal(ColumnNormalizer.fit(x, "none").apply(x), x)


def test_not_one_frame_present():
    zero = np.zeros((4, 2), np.float32)
    for kind in ("zscore", "minmax", "none"):
        for log in (False, True):
            assert not ColumnNormalizer.fit(zero, kind, log).apply(zero).any()


def split(seed):
    x = columns(seed=seed)
    ragged = Ragged(x, np.array([0, 100, len(x)]))
    return SplitData(["a", "b"], None, np.zeros((2, 1), np.float32), ragged, Ragged(x[:, :2].copy(), ragged.offsets))


def test_a_split_that_is_cut():
    """The first frames of every sequence, normalised with statistics of whole ones."""
    fitted = Normalizer.fit(split(0), DataConfig(normalize_audio="zscore", normalize_vision="none"))
    cut, whole = Split(split(0), fitted, None, cut=120), Split(split(0), fitted, None)
    assert (cut.lengths("audio").tolist(), whole.lengths("audio").tolist()) == ([100, 120], [100, 400])
    for key in ("audio", "vision"):
        for short, long in zip(cut.rows(key, np.array([1, 0])), whole.rows(key, np.array([1, 0])), strict=True):
            assert np.array_equal(short, long[:120])
    assert (cut.frame_bytes, whole.frame_bytes) == (220 * 5 * 4, 500 * 5 * 4)
    assert Split(split(0), fitted, None, cut=120, precision="float16").frame_bytes == 220 * 5 * 2


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_reference_backend_gives_the_same_values_without_the_kernel(monkeypatch, dtype):
    x = columns()
    fitted = ColumnNormalizer.fit(x, "zscore", clip=1.5)
    expected = fitted.apply(x, dtype)
    monkeypatch.setattr(cpu, "scale", lambda *_: pytest.fail("the compiled kernel ran"))
    with use_backend("reference"):
        assert np.array_equal(fitted.apply(x, dtype), expected)
    assert expected[1, 0] == dtype(np.clip((np.float64(x[1, 0]) - fitted.shift[0]) * fitted.scale[0], -1.5, 1.5))


@pytest.mark.parametrize("kind", ["none", "zscore", "minmax"])
def test_saved_statistics_give_the_same_values(tmp_path, kind):
    config = DataConfig(normalize_audio=kind, log_vision=True, clip=None if kind == "none" else 0.5)
    fitted = Normalizer.fit(split(0), config)
    fitted.save(tmp_path / "n.safetensors")
    loaded = Normalizer.load(tmp_path / "n.safetensors")
    other = split(1)
    for modality in ("audio", "vision"):
        values = getattr(other, modality).values
        assert np.array_equal(getattr(loaded, modality).apply(values), getattr(fitted, modality).apply(values))
    assert set(fitted.state()) == {f"{m}.{k}" for m in ("audio", "vision") for k in ("low", "shift", "scale")}


def test_load_names_the_file(tmp_path):
    for content in (None, b"junk"):
        path = tmp_path / "n.safetensors"
        if content:
            path.write_bytes(content)
        with pytest.raises(DataError, match=r"n\.safetensors"):
            Normalizer.load(path)


def test_other_width_is_an_error():
    with pytest.raises(DataError, match="2 feature columns; expected 3"):
        Normalizer.fit(split(0), DataConfig()).audio.apply(np.ones((1, 2), np.float32))
    column, values = ColumnNormalizer.fit(columns(), "none"), np.ones((1, 2), np.float32)
    for read in (column.linear, lambda values: column.keeps(values, np.float32)):
        with pytest.raises(DataError, match="2 feature columns; expected 3"):
            read(values)


def test_what_is_left_as_it_is():
    x = columns()
    plain, scaled = ColumnNormalizer.fit(x, "none"), ColumnNormalizer.fit(x, "zscore", clip=2.0)
    assert plain.keeps(x, np.float32) and plain.linear(x) is None
    assert not plain.keeps(x, np.float16) and not scaled.keeps(x, np.float32)
    assert not ColumnNormalizer.fit(x, "none", log=True).keeps(x, np.float32)
    shift, scale, most = scaled.linear(x)
    assert np.array_equal(shift, scaled.shift) and np.array_equal(scale, scaled.scale) and most == 2
    assert ColumnNormalizer.fit(x, "minmax", clip=2.0).linear(x)[2] == np.inf  # only z-scores are clipped


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"scale": np.full(3, np.nan)}, "not finite"),
        ({"shift": np.zeros(2)}, "not float64"),
        ({"low": np.zeros((3, 1))}, "not float64"),
        ({"low": np.zeros(3, np.float32)}, "not float64"),
        ({"kind": "other"}, "another form"),
        ({"clip": "x"}, "another form"),
        ({"clip": 0.0}, "another form"),
        ({"log": 1}, "another form"),
    ],
)
def test_statistics_that_fit_does_not_make_are_refused(tmp_path, changes, found):
    sound = {"kind": "zscore", "log": False, "clip": 5.0} | {k: np.ones(3) for k in ("low", "shift", "scale")}
    path = tmp_path / "n.safetensors"
    Normalizer(ColumnNormalizer(**sound), ColumnNormalizer(**sound)).save(path)
    assert Normalizer.load(path).audio.dim == 3
    Normalizer(ColumnNormalizer(**sound), ColumnNormalizer(**(sound | changes))).save(path)
    with pytest.raises(DataError, match=found):
        Normalizer.load(path)


def test_a_few_values_that_squeeze_all_others_are_told():
    x = np.random.default_rng(0).normal(size=(400, 4)).astype(np.float32)
    x[:, 3] = 0
    x[7, 2:] = 1e9  # in a column of its own 0 and one value: nothing is lost
    split = SplitData([], None, x, *(Ragged(part, np.array([0, 400])) for part in (x, x[:, :2])))
    for kind in ("zscore", "minmax"):
        notes = Normalizer.fit(split, DataConfig(normalize_audio=kind)).notes(split)
        assert len(notes) == 1 and "audio: nine tenths of the training values of columns 2 lie within 0.01" in notes[0]
    assert Normalizer.fit(split, DataConfig(normalize_audio="none")).notes(split) == []
    assert Normalizer.fit(split, DataConfig(log_audio=True)).notes(split) == []


def test_a_long_split_is_looked_at_in_part(monkeypatch):
    """A sort of all values would take as long as the fit."""
    x = np.random.default_rng(0).normal(size=(9000, 2)).astype(np.float32)
    x[::900, 1] = 1e9
    looked_at, quantile = [], np.quantile
    monkeypatch.setattr(
        np, "quantile", lambda values, *a, **k: looked_at.append(len(values)) or quantile(values, *a, **k)
    )
    assert ColumnNormalizer.fit(x, "zscore").squeezed(x) == [1]
    assert looked_at == [3000]


def test_squeezed_values_are_told_once(tmp_path):
    data = writers.samples()
    for rows in data.values():
        for sample in rows:
            sample.audio = np.repeat(sample.audio, 9, 0)
    data["train"][0].audio[0, 0] = 1e9
    opened = DataConfig(modalities=["audio", "vision"])
    path = writers.write_tuples(tmp_path, data)
    with pytest.warns(UserWarning, match="training values of columns 0 lie within"):
        fitted = open_dataset(path, opened).normalizer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_dataset(path, opened, normalizer=fitted)
