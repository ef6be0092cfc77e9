"""What a user may hand to the functions that train and evaluate, by mistake: one line each, and nothing is trained."""

import re

import numpy as np
import pytest
import torch

import engine
from engine.config.seeds import different_seeds
from engine.errors import EngineError
from engine.loaders.make_data import make_data

SPACE = {"train.lr": [1e-3]}
NO_CONFIG = re.escape("expected an engine.Config. Make one with engine.load_config(")


@pytest.mark.parametrize("config", [{}, {"epochs": 2}, "mosi", None, 3])
@pytest.mark.parametrize("name", ["train", "train_seeds", "sweep", "tune"])
def test_no_config(tmp_path, name, config):
    more = {"train_seeds": [[0]], "tune": [SPACE]}.get(name, [])
    with pytest.raises(EngineError, match=f"^config: found .*; {NO_CONFIG}"):
        getattr(engine, name)(config, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seeds", [3, "0-2", [], [0, 0], [-1], [1.0], [True], [2**32], ["0"], {}])
@pytest.mark.parametrize("name", ["train_seeds", "sweep"])
def test_no_seeds(tmp_path, name, seeds):
    with pytest.raises(EngineError, match=r"^seeds: found .*; expected a list of different integers"):
        getattr(engine, name)(engine.load_config("mosi"), tmp_path / "out", seeds=seeds)
    assert not (tmp_path / "out").exists()


def test_seeds_of_other_libraries():
    assert different_seeds(np.array([3, 1])) == [3, 1] and type(different_seeds(np.array([3]))[0]) is int
    assert different_seeds(range(2)) == [0, 1] and different_seeds({4}) == [4]


@pytest.mark.parametrize("path", [None, 3, ["a"]])
def test_no_path(path):
    config = engine.load_config("mosi")
    calls = (
        lambda: engine.train(config, path),
        lambda: engine.train_seeds(config, path, [0]),
        lambda: engine.sweep(config, path),
        lambda: engine.evaluate(path, "data"),
    )
    for call in calls:
        with pytest.raises(EngineError, match=r"^path: found .*; expected text or a pathlib\.Path"):
            call()


def test_other_things_in_the_wrong_place(tmp_path):
    config = engine.load_config("mosi")
    with pytest.raises(EngineError, match=r"^dataset: found a path \(data\); .*config\.data\.path"):
        engine.train(config, tmp_path / "out", dataset="data")
    with pytest.raises(EngineError, match=r"^task: found a int \(3\); expected a Task"):
        engine.train(config, tmp_path / "out", task=3)
    with pytest.raises(EngineError, match=r"^device: found a NoneType"):
        engine.evaluate(tmp_path, "data", device=None)


def test_the_threads_of_a_run_do_not_stay(tmp_path):
    """The next run of the process would use them, and its last digits depend on them."""
    data = make_data(tmp_path / "data", "mosi", 40, "declarelab")
    config = engine.load_config("mosi", ["data.modalities=audio-vision", "objective.enabled=false", "epochs=1"])
    config.data.path, config.output.progress, before = str(data), False, torch.get_num_threads()
    config.threads = before + 1
    engine.train(config, tmp_path / "out")
    assert torch.get_num_threads() == before
    for batch_size in (0, -3, "8", 2.0, True):
        with pytest.raises(EngineError, match=r"^batch_size: found .*; expected a number from 1 to"):
            engine.evaluate(tmp_path / "out", data, batch_size=batch_size)
