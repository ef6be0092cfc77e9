"""What a sweep and a search consist of: combinations, ranges and choices, and one-line errors for what is wrong."""

from pathlib import Path

import pytest

from engine.config import Config, changed, load_config
from engine.errors import ConfigError, DataError, EngineError, OutputError
from engine.sweeps import plan
from engine.sweeps.pool import resources
from engine.sweeps.settings import folder_name, grid_of, read_file, read_words, split_list
from engine.sweeps.space import Choice, Range, is_searched, read_space, read_space_words

MOSI = load_config("mosi")


def test_changed_settings_are_checked_and_leave_the_original_alone():
    config = changed(MOSI, {"train.schedule.rate": 0.5, "model.dropout": 0.25})
    assert (
        config.train.schedule.rate == 0.5
        and config.model.dropout == load_config("mosi", ["model.dropout=.25"]).model.dropout
    )
    assert MOSI.train.schedule.rate == 0.1 and config.train.lr == MOSI.train.lr
    with pytest.raises(ConfigError, match=r"train.lrr: found an unknown key.*Did you mean train.lr"):
        changed(MOSI, {"train.lrr": 1})


def test_a_grid_has_every_combination_once():
    cells = grid_of(MOSI, {"train.lr": ["1e-3", 5e-4], "batch_size": [16, 32, 64]})
    assert len(cells) == 6 == len({cell.name for cell in cells})
    assert cells[0].name == "train.lr=0.001,batch_size=16"
    assert {(c.config.train.lr, c.config.batch_size) for c in cells} == {
        (lr, b) for lr in (1e-3, 5e-4) for b in (16, 32, 64)
    }


def test_named_settings_are_whole_sets_and_join_with_the_grid():
    named = {"plain": {"objective": {"enabled": False}, "train.stage1_n": 1}, "two": None}
    cells = {cell.name: cell.config for cell in grid_of(MOSI, {"train": {"lr": [0.5, 0.25]}}, named)}
    assert list(cells) == ["plain,train.lr=0.5", "plain,train.lr=0.25", "two,train.lr=0.5", "two,train.lr=0.25"]
    assert not cells["plain,train.lr=0.25"].objective.enabled and cells["plain,train.lr=0.25"].train.stage1_n == 1
    assert cells["two,train.lr=0.5"].objective.enabled and cells["two,train.lr=0.5"].train.stage1_n == 2


def test_nothing_to_vary_is_one_setting():
    (cell,) = grid_of(MOSI, {})
    assert cell.name == "base" and cell.config == MOSI


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"train.lr": [1e-3, "x"]}, "train.lr: found x; expected a number"),
        ({"train.lr": [-1]}, r"train.lr: found -1; expected a value > 0"),
        ({"train.lr": 1e-3}, "grid, train.lr: found 0.001; expected a list of values"),
        ({"train.lr": [1e-3, "0.001"]}, "grid: found train.lr=0.001 twice"),
        ({"seed": [0, 1]}, "grid, seed: found a setting that is the same for all runs.*Give seeds instead"),
        ({"task": ["mimrl", "mmim"]}, "grid, task: found a setting that is the same"),
        ({"objective.k_neighbor": [2, 17]}, "objective.k_neighbor: found 17 with batch_size 32"),
        ({"batch_size": list(range(2, 200)), "epochs": list(range(1, 200))}, "found 39402 settings"),
        ({"train": [1]}, "grid, train: found"),
    ],
)
def test_a_wrong_grid_is_one_line(grid: dict, message: str):
    with pytest.raises(ConfigError, match=message) as problem:
        grid_of(MOSI, grid)
    assert "\n" not in str(problem.value)


def test_words_of_the_command_line():
    assert split_list("[1,2],3") == ["[1,2]", "3"]
    assert split_list("0.1 * MI(F, T),0.2 * CMI(T, A | C)") == ["0.1 * MI(F, T)", "0.2 * CMI(T, A | C)"]
    assert split_list("'a,b',c") == ["'a,b'", "c"]
    grid = read_words(["train.clip_value=none,1.5", "data.modalities=[audio,vision],text"], "mimrl")
    cells = grid_of(load_config("mosi", ["text.freeze=all"]), {"train.clip_value": grid["train.clip_value"]})
    assert [cell.config.train.clip_value for cell in cells] == [None, 1.5]
    assert cells[0].name == "train.clip_value=none"
    assert grid["data.modalities"] == [["audio", "vision"], "text"]
    with pytest.raises(ConfigError, match="the key twice"):
        read_words(["epochs=1", "epochs=2"], "mimrl")


@pytest.mark.parametrize("label", ["../../etc/passwd", "a/b", "..", "a b", "x" * 300, "naïve", "a\x1b[31m", "-"])
def test_folders_have_plain_names(label: str):
    name = folder_name(label)
    assert name and "/" not in name and not name.startswith((".", "-")) and len(name) <= 110 and name.isascii()
    assert name != folder_name(label + "!")


# -- search spaces --


def test_ranges_and_choices():
    space = read_space(
        {
            "train": {"lr": {"low": "1e-4", "high": "1e-2", "log": True}, "stage1_n": {"low": 1, "high": 4}},
            "model.dropout": {"low": 0, "high": 0.5, "step": 0.2},
            "batch_size": [16, 32],
            "train.clip_norm": [None, 1],
        },
        MOSI,
    )
    assert space == {
        "train.lr": Range(1e-4, 1e-2, None, True, False),
        "train.stage1_n": Range(1, 4, None, False, True),
        "model.dropout": Range(0, 0.4, 0.2, False, False),  # the last value that the steps reach
        "batch_size": Choice((16, 32)),
        "train.clip_norm": Choice((None, 1.0)),
    }
    words = ["train.lr=1e-4..1e-2:log", "train.stage1_n=1..4", "model.dropout=0..0.5:step=0.2", "batch_size=16,32"]
    assert read_space_words(words, MOSI) == {key: space[key] for key in list(space)[:4]}
    assert not is_searched("objective.terms=0.1 * MI(F, T)") and not is_searched("train.lr=1e-3")
    plain = {key: one.plain() for key, one in space.items()}
    assert read_space(plain, MOSI) == space


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"train.lrr": [1, 2]}, "train.lrr: found an unknown key"),
        ({"train.lr": {"low": "small", "high": 1}}, "space, train.lr, low: found 'small'; expected a number"),
        ({"train.lr": {"low": -1, "high": 1}}, "train.lr: found -1.0; expected a value > 0"),
        ({"train.lr": {"low": 1, "high": 0.1}}, "low 1 above high 0.1"),
        ({"train.lr": {"low": 0.1, "high": float("inf")}}, "high: found inf; expected a finite number"),
        ({"train.lr": {"low": 0.1, "high": 1, "steps": 3}}, "the word 'steps'; expected low, high, step and log"),
        ({"train.lr": {"low": 0.1}}, "a range without low and high"),
        ({"train.lr": {"low": 0.1, "high": 1, "log": "yes please"}}, "log: found 'yes please'; expected true or false"),
        ({"train.lr": {"low": 0.1, "high": 0.3, "step": 0.3}}, "a step of 0.3 from 0.1 to 0.3"),
        ({"train.lr": {"low": 0.1, "high": 1, "log": True, "step": 0.1}}, "log and step together"),
        ({"model.dropout": {"low": 0, "high": 0.5, "log": True}}, "low 0 on a logarithmic scale"),
        ({"train.stage1_n": {"low": 0.5, "high": 2}}, "low: found 0.5; expected an integer"),
        ({"train.stage1_n": {"low": True, "high": 2}}, "low: found True; expected a number"),
        ({"mode": {"low": 0, "high": 1}}, "a range for a setting that is no number"),
        ({"mode": ["fast", "fsat"]}, "mode: found fsat; expected one of fast, faithful. Did you mean fast"),
        ({"train.lr": [0.1, 0.1]}, "0.1,0.1, which repeats a value"),
        ({"train.lr": 0.1}, "space, train.lr: found 0.1; expected a range"),
        ({"train.lr": []}, "expected a range"),
        ({"train": 3}, "space, train: found 3; expected a mapping"),
        ({"seed": [0, 1]}, "space, seed: found a setting that is the same for all trials"),
        ({"train.lr": [0.1], "train": {"lr": [0.2]}}, "space, train.lr: found the key twice"),
        ({}, "space: found no settings"),
    ],
)
def test_a_wrong_space_is_one_line(space: dict, message: str):
    with pytest.raises(ConfigError, match=message) as problem:
        read_space(space, MOSI)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "!!python/object/apply:os.system ['touch made']",
            "found could not determine a constructor for the tag",
        ),
        ("a: &a [*a]", "line 1: found more than 10000 values"),
        ("- 1", "found a YAML list"),
        ("a: [", "line 1: found expected the node content"),
        ("a: 1\na: 2", "line 2: found the key 'a' twice"),
        ("\x00", "special characters are not allowed"),
    ],
)
def test_files_of_strangers_are_plain_yaml(text: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("space.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"^space\.yaml.*{found}"):
        read_file("space.yaml")
    assert not Path("made").exists()


# -- the folder's plan, and the machine --


def test_what_is_no_sweep_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a file"):
        plan.saved_plan(tmp_path / "file")
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(OutputError, match="found a run; expected an empty or new folder"):
        plan.saved_plan(tmp_path)
    (tmp_path / plan.PLAN).write_text("[" * 100_000)
    with pytest.raises(DataError, match="expected the plan that engine wrote"):
        plan.saved_plan(tmp_path)


def test_threads_of_the_first_start_are_kept(tmp_path: Path):
    config = Config(data={"path": str(tmp_path)})
    assert plan.checked_base(config, 3, None).threads == 3
    assert plan.checked_base(config, 3, {"settings": {"threads": 2}}).threads == 2
    config.threads = 5
    assert plan.checked_base(config, 3, {"settings": {"threads": 2}}).threads == 5  # which the plan then refuses
    config.data.path = str(tmp_path / "absent")
    with pytest.raises(ConfigError, match="no such file or folder"):
        plan.checked_base(config, 3, None)


def test_runs_share_cores_and_gpus(monkeypatch: pytest.MonkeyPatch):
    import torch

    from engine.sweeps import pool

    monkeypatch.setattr(pool, "cores", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resources(Config(), None) == (4, 4, [])
    assert resources(Config(threads=2), None) == (8, 2, [])
    assert resources(Config(), 8) == (8, 2, [])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert resources(Config(), None) == (16, 1, [])
    with pytest.raises(EngineError, match="jobs: found 0"):
        resources(Config(), 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resources(Config(), None)[::2] == (2, ["0", "1"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert resources(Config(device="cuda"), 4)[::2] == (4, ["3", "GPU-5"])
    assert resources(Config(device="cpu"), None)[::2] == (16, [])
    assert resources(Config(device="cuda:1"), None)[::2] == (1, [])  # a GPU that the user has chosen


def test_a_step_as_wide_as_the_range_is_allowed():
    space = read_space({"model.dropout": {"low": 0.1, "high": 0.3, "step": 0.2}}, Config())  # 0.3 - 0.1 < 0.2
    assert space["model.dropout"].high == pytest.approx(0.3)


def test_named_settings_that_are_no_mapping_are_refused():
    with pytest.raises(ConfigError, match=r"settings: found \['a'\]"):
        grid_of(Config(), {}, ["a"])
