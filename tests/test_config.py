"""The configuration: presets, overrides, shorthand, and one-line errors for whatever is wrong."""

import copy
import pickle
import re
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import yaml
from pydantic import Field

import engine.task as task_module
from engine.config import (
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    TrainConfig,
    common_keys,
    key_table,
    keys,
    load_config,
    parse_yaml,
    presets,
)
from engine.errors import ConfigError, OutputError
from engine.task import Task, register_task

PROJECT = Path(__file__).resolve().parents[1]
PRESETS = ("avec2019", "demo", "mosei", "mosi", "mosi-paper")


def error(*overrides: str, source: str | Path = "mosi") -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


# -- presets and files --


def test_presets_are_the_documented_ones():
    assert tuple(sorted(preset.name for preset in presets("mimrl"))) == PRESETS
    assert all(len(preset.summary) > 20 for preset in presets())


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("mode", ["fast", "faithful"])
def test_round_trip(name: str, mode: str, tmp_path: Path):
    config = load_config(name, [f"mode={mode}"])
    assert config.preset == name
    config.save(tmp_path / "config.yaml")
    assert Config.load_yaml(tmp_path / "config.yaml") == config
    resolved = config.resolve()
    resolved.save(tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == resolved == resolved.resolve()


@pytest.mark.parametrize("name", PRESETS)
def test_preset_says_where_its_numbers_come_from(name: str):
    assert "# Where the numbers come from: " in (PROJECT / f"engine/mimrl/presets/{name}.yaml").read_text()


def test_mosi_recipe():
    c = load_config("mosi")
    assert (c.batch_size, c.data.time_len, c.epochs, c.seed, c.mode) == (32, 40, 8, 0, "fast")
    assert (c.data.normalize_audio, c.data.normalize_vision, c.data.clip) == ("zscore", "zscore", 5)
    assert c.model.cubemlp.d_hiddens == c.model.cubemlp.d_outs == [(20, 3, 128), (10, 3, 128)]
    assert (c.model.encoder, c.model.d_common, c.model.cubemlp.activate, c.model.dropout) == (
        "gru",
        128,
        "gelu",
        (0.1,) * 4,
    )
    assert (c.objective.critic, c.objective.baseline, c.objective.bound) == ("separate", "constant", "infonce")
    assert (c.objective.c1, c.objective.c2, c.objective.k_neighbor) == ([1] * 11, [0.01] * 8, 2)
    assert (c.train.stage1_n, c.train.loss, c.train.clip_value, c.train.lr, c.text.lr_rate) == (
        2,
        "MAE",
        1.5,
        1e-3,
        0.05,
    )
    assert (c.train.schedule.kind, c.train.schedule.milestones, c.train.schedule.rate) == ("multi_step", [5], 0.1)


def test_paper_recipe():
    c = load_config("mosi-paper")
    assert (c.batch_size, c.data.time_len, c.epochs, c.seed) == (128, 100, 70, 0)
    assert (c.data.normalize_audio, c.data.normalize_vision, c.data.clip) == ("none", "none", None)
    assert c.model.cubemlp.d_hiddens == c.model.cubemlp.d_outs == [(50, 3, 128), (10, 3, 128)]
    assert (c.train.lr, c.text.lr_rate, c.train.schedule.milestones) == (4e-3, 0.01, [9, 60])


def test_avec2019_recipe():
    c = load_config("avec2019")
    assert (c.data.dataset, c.batch_size, c.data.time_len, c.train.loss) == ("avec2019", 32, 100, "CCC")
    assert (c.model.cubemlp.activate, c.objective.c2, c.train.lr) == ("relu", [0.1] * 8, 1e-3)


def test_mode_resolves_auto():
    fast, faithful = (load_config("mosi", [f"mode={m}"]).resolve() for m in ("fast", "faithful"))
    assert (fast.objective.compat, fast.train.stage1_features, fast.data.length_rule) == ("none", "cached", "recorded")
    assert (faithful.objective.compat, faithful.train.stage1_features, faithful.data.length_rule) == (
        "mimrl",
        "fresh",
        "sum_zero",
    )
    assert load_config("mosi", ["mode=faithful", "objective.compat=none"]).resolve().objective.compat == "none"


def test_file_starts_from_its_preset(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("preset: mosi-paper\ntrain:\n  lr: 1e-4\n")
    c = load_config(str(file))
    assert (c.train.lr, c.batch_size, c.train.schedule.milestones) == (1e-4, 128, [9, 60])


@pytest.mark.parametrize(
    "content, expected",
    [
        ("epochs: [1", "line 1"),
        ("- a\n- b\n", "found a YAML list"),
        ("epoks: 3", "epoks: found an unknown key"),
        ("preset: mosy", "preset 'mosy': found no preset of that name"),
        ("train: 3", "train: found 3; expected a group of settings"),
        ("epochs: 0", "epochs: found 0; expected a value >= 1"),
    ],
)
def test_bad_file(content: str, expected: str, tmp_path: Path):
    (tmp_path / "bad.yaml").write_text(content)
    assert expected in error(source=tmp_path / "bad.yaml")


def test_unreadable_file(tmp_path: Path):
    assert "No such file" in error(source=tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"preset: \xe9\xff")
    assert "not UTF-8" in error(source=tmp_path / "latin.yaml")
    assert "Did you mean mosi?" in error(source="mosii")


def test_save_where_nothing_can_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="found a file where a folder is needed"):
        load_config("mosi").save(tmp_path / "file" / "config.yaml")


# -- overrides --


@pytest.mark.parametrize(
    "override, get, value",
    [
        ("train.lr=5e-4", lambda c: c.train.lr, 5e-4),
        ("mode=faithful", lambda c: c.mode, "faithful"),
        ("text.freeze=no", lambda c: c.text.freeze, "no"),
        ("data.clip=none", lambda c: c.data.clip, None),
        ("threads=none", lambda c: c.threads, None),
        ("output.report=false", lambda c: c.output.report, False),
        ("data.path=2024-01-01", lambda c: c.data.path, "2024-01-01"),
        ("text_encoder=models/a=b", lambda c: c.text_encoder, "models/a=b"),
        ("device=cuda:1", lambda c: c.device, "cuda:1"),
        ("objective.c2=0.1", lambda c: c.objective.c2, [0.1] * 8),
        ("objective.c1=[1,2,3,4,5,6,7,8,9,10,11]", lambda c: c.objective.c1, list(range(1, 12))),
        ("model.dropout=0", lambda c: c.model.dropout, (0, 0, 0, 0)),
        ("model.cubemlp.d_outs=20-3-128=5-2-64", lambda c: c.model.cubemlp.d_outs, [(20, 3, 128), (5, 2, 64)]),
        ("model.cubemlp.d_hiddens=[[9,3,8],[7,6,5]]", lambda c: c.model.cubemlp.d_hiddens, [(9, 3, 8), (7, 6, 5)]),
        ("model.cubemlp.res_project=1-1", lambda c: c.model.cubemlp.res_project, [True, True]),
        ("train.schedule.milestones=9-60", lambda c: c.train.schedule.milestones, [9, 60]),
        ("train.schedule.milestones=3", lambda c: c.train.schedule.milestones, [3]),
        ("train={lr: 0.5, loss: MSE}", lambda c: (c.train.lr, c.train.loss, c.train.stage1_n), (0.5, "MSE", 2)),
    ],
)
def test_override(override: str, get, value):
    assert get(load_config("mosi", [override])) == value


def test_the_last_override_holds_and_siblings_stay():
    c = load_config("mosi-paper", ["train.lr=1", "train.lr=2", "train.schedule.rate=0.5"])
    assert (c.train.lr, c.train.schedule.rate, c.train.schedule.milestones) == (2, 0.5, [9, 60])


@pytest.mark.parametrize(
    "override, parts",
    [
        ("lr=1", ["lr: found an unknown key", "expected one of preset, task, mode, seed", "Did you mean train.lr?"]),
        ("train.lrr=1", ["train.lrr: found an unknown key", "expected one of loss, stage1_n", "mean train.lr"]),
        ("train.lr.x=1", ["expected no key below train.lr"]),
        ("trainer.lr=1", ["trainer: found an unknown key", "train"]),
        ("train=3", ["train: found one value for a group", "train.lr"]),
        ("preset=mosei", ["--preset"]),
        ("epochs", ["key=value"]),
        ("=3", ["key=value"]),
        ("epochs=", ["epochs", "an integer"]),
        ("epochs={", ["epochs", "YAML"]),
        ("epochs=2.5", ["epochs: found 2.5; expected an integer"]),
        ("train.lr=abc", ["train.lr: found abc; expected a number"]),
        ("train.lr=.inf", ["train.lr", "finite"]),
        ("train.lr=-1", ["train.lr: found -1; expected a value > 0"]),
        ("mode=fsat", ["mode: found fsat; expected one of fast, faithful", "Did you mean fast?"]),
        ("data.modalities=[face]", ["data.modalities[0]: found face; expected 'text', 'audio' or 'vision'."]),
        ("data.modalities=[]", ["data.modalities: found []; expected at least 1 of them."]),
        ("text.freeze=some", ["one of no, part, all"]),
        ("output.report=maybe", ["expected true or false"]),
        ("device=gpu", ["device: found gpu; expected auto, cpu, cuda"]),
        ("seed=-1", ["seed: found -1; expected a value >= 0"]),
        ("batch_size=1", ["batch_size: found 1; expected a value >= 2"]),
        ("model.dropout=[.1,.2]", ["model.dropout[2]"]),
        ("model.cubemlp.d_outs=20-3-x=1-1-1", ["model.cubemlp.d_outs[0][2]: found x; expected an integer"]),
        ("model.cubemlp.d_outs=20-3-0=1-1-1", ["model.cubemlp.d_outs[0][2]: found 0; expected a value >= 1"]),
        ("objective={c2: 1, zz: 3}", ["objective.zz: found an unknown key"]),
    ],
)
def test_bad_override(override: str, parts: list[str]):
    text = error(override)
    for part in parts:
        assert part in text


# -- settings at odds --


@pytest.mark.parametrize(
    "overrides, parts",
    [
        (["objective.k_neighbor=17"], ["objective.k_neighbor", "batch_size 32", "at most 16"]),
        (["train.loss=CE"], ["train.loss: found CE with model.task=regression", "MAE, MSE, RMSE, SIMSE, CCC"]),
        (["model.task=classification"], ["train.loss: found MAE with model.task=classification"]),
        (["model.task=classification", "train.loss=CE"], ["model.num_class: found 1", "2 or more"]),
        (["model.num_class=3"], ["model.num_class: found 3 with model.task=regression; expected 1"]),
        (["objective.c1=[1, 2]"], ["objective.c1: found 2 coefficients; expected 11, for F_T"]),
        (["objective.c2=[1, 2, 3]"], ["objective.c2: found 3 coefficients; expected 8, for I(F;T)"]),
        (["train.schedule.milestones=60-9"], ["rising order"]),
        (["model.cubemlp.d_outs=20-3-128"], ["found 2 d_hiddens, 1 d_outs and 2 res_project"]),
        (["model.cubemlp.res_project=0-1"], ["block 0: found 20-3-128; expected 40-3-128"]),
        (["model.cubemlp.res_project=1-0"], ["block 1: found 10-3-128; expected 20-3-128"]),
        (["data.dataset=avec2019", "model.task=classification", "train.loss=CE", "model.num_class=2"], ["regression"]),
    ],
)
def test_settings_at_odds(overrides: list[str], parts: list[str]):
    text = error(*overrides)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.k_neighbor=16"],
        ["objective.k_neighbor=17", "objective.enabled=false"],
        ["model.task=classification", "train.loss=Focal", "model.num_class=3"],
        ["model.cubemlp.res_project=0-1", "data.time_len=20"],
        ["model.cubemlp.res_project=0-1", "model.fusion=tfn"],
    ],
)
def test_settings_that_agree(overrides: list[str]):
    load_config("mosi", overrides)


# -- from Python --


def test_construction_and_assignment_raise_our_error():
    with pytest.raises(ConfigError, match="batch_size: found 1"):
        Config(batch_size=1)
    with pytest.raises(ConfigError, match=r"train\.loss: found L2"):
        Config(train={"loss": "L2"})
    config = Config()
    with pytest.raises(ConfigError, match="epochs: found x"):
        config.epochs = "x"
    with pytest.raises(ConfigError, match="k_neighbor"):
        config.batch_size = 2
    assert (config.epochs, config.batch_size) == (8, 32)
    config.train.loss = "CE"
    with pytest.raises(ConfigError, match=r"found CE with model\.task=regression"):
        config.resolve()
    assert Config().train == TrainConfig()


# -- the list of keys --


def test_every_key_is_described_and_settable():
    for key in keys():
        assert key.description, key.name
        if key.name not in ("preset", "data.path"):
            load_config("mosi", [f"{key.name}={key.default}"])
    assert {"mode", "train.lr", "model.fusion", "objective.terms"} < {key.name for key in common_keys()}


def test_keys_are_the_leaves_of_the_yaml():
    def leaves(values: dict, prefix: str = "") -> list[str]:
        found = []
        for name, value in values.items():
            group = isinstance(value, dict) and value
            found += leaves(value, f"{prefix}{name}.") if group else [prefix + name]
        return found

    assert leaves(yaml.safe_load(Config().to_yaml())) == [key.name for key in keys()]


def test_documentation_holds_the_table_of_keys():
    """Print a new one with: python -c "from engine.config import key_table; print(key_table())"."""
    assert key_table() in (PROJECT / "docs/config.md").read_text()


# -- settings that a stranger wrote --


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: &a [x, x, x, x, x, x, x, x, x, x]\nb: &b [" + ", ".join(["*a"] * 40) + "]\nc: [" + ", ".join(["*b"] * 40)
         + "]\n", "line 3: found more than 10000 values"),
        ("data: &a [*a]", "more than 10000 values"),
        ("a: &a " + "x" * 100_000 + "\nb: [" + ", ".join(["*a"] * 20) + "]", "more than 10000 values"),
        ("seed: " + "[" * 30 + "]" * 30, "line 1: found values nested more than 20 deep"),
        ("seed: " + "9" * 5000, "a number of too many digits"),
        ("seed: 2001-13-01", "seed: found 2001-13-01; expected an integer"),
        ("epochs: 2\ndata:\n  clip: 1\n  clip: 2\n", "line 4: found the key 'clip' twice"),
        ("#" + "x" * 300_000, "300001 bytes, more than the 262144 that are read"),
        ("preset: [mosi]", "no preset of that name"),
        ("epochs: 1000001", "epochs: found 1000001; expected a value <= 1000000"),
        ("data: {time_len: 100001}", "expected a value <= 100000"),
        ("model: {d_common: 16385}", "expected a value <= 16384"),
        ("data: {workers: 257}", "expected a value <= 256"),
    ],
)  # fmt: skip
def test_what_a_file_may_cost(tmp_path, text, found):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(found)) as error:
        load_config(tmp_path / "x.yaml")
    assert "\n" not in str(error.value)


def test_aliases_and_merges_in_earnest_are_read(tmp_path):
    text = "model: {cubemlp: {d_hiddens: &s [[6, 3, 16]], d_outs: *s, res_project: [true]}}\n"
    (tmp_path / "x.yaml").write_text(text + "text: &t {lr_rate: 0.5}\nseed: 1\n")
    found = load_config(tmp_path / "x.yaml")
    assert found.model.cubemlp.d_outs == found.model.cubemlp.d_hiddens == [(6, 3, 16)]
    assert parse_yaml("base: &b {x: 1, y: 2}\nmore: {<<: *b, y: 3}") == {
        "base": {"x": 1, "y": 2},
        "more": {"x": 1, "y": 3},
    }


# -- tasks with settings of their own --


class WidthConfig(ModelConfig):
    width: int = Field(64, ge=1, description="width of the only layer")


class Narrow(Task):
    name = "narrow"
    modes = ("plain", "fancy")
    sections: ClassVar = {"model": WidthConfig}

    def check(self, config: Config) -> None:
        if config.model.width > config.batch_size:
            raise ConfigError("model.width", str(config.model.width), "at most batch_size", "Lower it.")

    def resolve(self, config: Config) -> None:
        if config.mode == "fancy" and config.train.average == "auto":
            config.train.average = 0.5


@pytest.fixture
def narrow(monkeypatch) -> str:
    monkeypatch.setattr(task_module, "_REGISTERED", {})
    return register_task(Narrow()).name


def narrow_config(*overrides: str, content: str = "task: narrow\nmodel: {width: 8}\n", folder: Path) -> Config:
    (folder / "narrow.yaml").write_text(content)
    return load_config(folder / "narrow.yaml", overrides)


def test_a_task_has_sections_and_modes_of_its_own(narrow, tmp_path: Path):
    config = narrow_config("model.width=9", folder=tmp_path)
    assert (config.model, config.mode) == (WidthConfig(width=9), "plain")
    assert type(config.objective) is ObjectiveConfig and not hasattr(config.objective, "c2")
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), config.model_copy(deep=True)):
        assert twin == config and type(twin.model) is WidthConfig
    config.save(tmp_path / "saved.yaml")
    assert "width: 9" in config.to_yaml() and load_config(tmp_path / "saved.yaml") == config
    assert load_config(tmp_path / "saved.yaml", ["mode=fancy"]).resolve().train.average == 0.5
    assert [key.name for key in keys("narrow") if key.name.startswith("model.")] == [
        "model.task",
        "model.num_class",
        "model.width",
    ]
    assert next(key.type for key in keys("narrow") if key.name == "mode") == "plain | fancy"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("mode=fast", ["mode: found fast; expected one of plain, fancy"]),
        (
            "model.widht=3",
            ["model.widht: found an unknown key; expected one of task, num_class, width", "model.width?"],
        ),
        ("model.fusion=tfn", ["model.fusion: found an unknown key"]),
        ("objective.c2=1", ["objective.c2: found an unknown key"]),
        ("model.width=0", ["model.width: found 0; expected a value >= 1"]),
        ("model.width=33", ["model.width: found 33; expected at most batch_size"]),
        ("task=other", ["task: found 'other', which is not known here; expected one of mimrl, mmim, narrow"]),
    ],
)
def test_mistakes_in_settings_of_a_task(narrow, tmp_path: Path, override: str, parts: list[str]):
    with pytest.raises(ConfigError) as caught:
        narrow_config(override, folder=tmp_path)
    for part in parts:
        assert part in str(caught.value)


def test_assignment_to_settings_of_a_task(narrow):
    config = Config(task="narrow", model={"width": 4})
    with pytest.raises(ConfigError, match="width: found 0"):
        config.model.width = 0
    with pytest.raises(ConfigError, match=r"model\.width: found 99; expected at most batch_size"):
        config.model = {"width": 99}
    config.model = {"width": 5}
    with pytest.raises(ConfigError, match="a MIMRLModelConfig of another task"):
        config.model = Config().model
    with pytest.raises(ConfigError, match="task: found 'mimrl' with the section model of another task"):
        config.task = "mimrl"
    assert (config.task, config.model) == ("narrow", WidthConfig(width=5))


def test_a_file_names_known_tasks_only(tmp_path: Path):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    for place in ("evil:TASK", "tests.test_config:Narrow", "narrow"):
        with pytest.raises(ConfigError, match="which is not known here"):
            narrow_config(content=f"task: {place}\n", folder=tmp_path)


def test_a_preset_belongs_to_a_task(narrow, tmp_path: Path):
    assert {preset.task for preset in presets()} == {"mimrl", "mmim"} and presets("narrow") == []
    with pytest.raises(ConfigError, match="no preset of that name for the task narrow"):
        narrow_config(content="task: narrow\npreset: mosi\n", folder=tmp_path)


def test_a_section_of_a_task_extends_the_general_one(narrow, monkeypatch):
    monkeypatch.setattr(Narrow, "sections", {"model": TrainConfig})
    with pytest.raises(ConfigError, match="expected a subclass of ModelConfig"):
        Config(task="narrow")


# -- information terms --


def test_terms_take_the_place_of_the_vectors(tmp_path: Path):
    config = load_config("mosi", ["objective.terms=['0.1 * MI(F, T)', 'inv = MI(T, A)']"])
    assert config.objective.terms == ["0.1 * MI(F, T)", "inv = MI(T, A)"]
    assert (config.objective.c1, config.objective.c2) == (None, None)
    config.save(tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert load_config("mosi", ["objective.terms=2 * MI(F, T)"]).objective.terms == ["2 * MI(F, T)"]
    config = Config()
    config.objective.estimator_weights = {"MI(F, T)": 2}
    assert (config.objective.c1, config.objective.c2) == (None, [0.01] * 8)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["objective.terms=MI(F, T)", "objective.c2=0.1"], "objective.terms: found objective.c2 beside it"),
        (["objective.terms=MI(F, T)", "objective.c1=1"], "objective.terms: found objective.c1 beside it"),
        (["objective.estimator_weights={'MI(F, T)': 1}", "objective.c1=1"], "objective.c1 beside it"),
        (["objective.c2=none"], "objective.c2: found none and no objective.terms"),
        (["objective.terms=MI(F T)"], "objective.terms[0]: found 'T' at character 6"),
        (["objective.terms=MI(F, X)"], "objective.terms: found the feature X in MI(F, X); expected F, T, A, V or C"),
        (
            ["objective.terms=MI(F, V)", "data.modalities=text,audio"],
            "objective.terms: found the feature V in MI(F, V); expected F, T, A or C",
        ),
        (["objective.estimator_weights={'MI(F, T': 1}"], "objective.estimator_weights: found the end of 'MI(F, T'"),
        (["objective.estimator_weights={'MI(F, C)': 1}"], "a weight for MI(F, C); expected a term in use: MI(F, T), "),
    ],
)
def test_bad_terms(overrides: list[str], expected: str):
    assert expected in error(*overrides)


# -- values that YAML would read as something else ---------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("seed: 010", 10), ("seed: 0", 0), ("train: {lr: 1e-3}", 1e-3), ("train: {lr: 1.0e-05}", 1e-5),
     ("train: {lr: .5}", 0.5), ("epochs: 1_000", 1000), ("data: {path: 2024-05-01}", "2024-05-01"),
     ("data: {path: 007}", "007"), ("train: {weight_decay: no}", 0.0), ("objective: {enabled: yes}", True)],
)  # fmt: skip
def test_words_are_what_their_writer_means(tmp_path, text, value):
    (tmp_path / "x.yaml").write_text(text)
    found = load_config(tmp_path / "x.yaml")
    for part in re.findall(r"\w+(?=:)", text):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["1:30", "0x10", "0b11", "0o17"])
def test_other_bases_are_no_numbers(text):
    """YAML 1.1 reads 1:30 as 90 and 0x10 as 16."""
    with pytest.raises(ConfigError, match=re.escape(f"epochs: found {text}; expected an integer")):
        load_config("mosi", [f"epochs={text}"])


@pytest.mark.parametrize(
    "setting",
    ["seed=yes", "train.lr=true", "train.schedule.milestones=[true]", "objective.c1=yes", "threads=on",
     "model.dropout=true", "objective.estimator_weights={'MI(F, T)': yes}"],
)  # fmt: skip
def test_true_is_no_number(setting):
    """It would count as 1."""
    with pytest.raises(ConfigError, match=f"^{setting.partition('=')[0]}: found .*True.*; expected a number"):
        load_config("mosi", [setting])


def test_assigning_true_or_to_a_name_that_is_not_there():
    config = load_config("mosi")
    with pytest.raises(ConfigError, match=r"^lr: found True; expected a number"):
        config.train.lr = True
    with pytest.raises(ConfigError, match=r"^lrr: found an unknown key; .* Did you mean train\.lr\?"):
        config.train.lrr = 0.1
    assert config.train.lr == 0.001


@pytest.mark.parametrize(
    ("arguments", "found"),
    [(({},), "source: found {} (dict)"), ((3,), "source: found 3 (int)"),
     (("mosi", "train.lr=1"), "overrides: found train.lr=1 (str)"), (("mosi", {"train.lr": 1}), "(dict)"),
     (("mosi", [3]), "overrides: found [3] (list)"), (("mosi", None), "overrides: found None (NoneType)")],
)  # fmt: skip
def test_arguments_of_another_type(arguments, found):
    with pytest.raises(ConfigError, match=re.escape(found)):
        load_config(*arguments)


def test_sections_made_by_a_call():
    """One line, as for a whole configuration."""
    with pytest.raises(ConfigError, match=r"^modalities\[0\]: found txt; expected .*text"):
        DataConfig(modalities=["txt"])
    with pytest.raises(ConfigError, match=r"^clipp: found an unknown key; .* Did you mean data\.clip\?"):
        DataConfig(clipp=1)
    with pytest.raises(ConfigError, match=r"^schedule\.rate: found -1; expected a value > 0"):
        TrainConfig(schedule={"rate": -1})
    with pytest.raises(ConfigError, match=r"^Config: found \{'epochs': 2\} \(dict\); expected settings by name"):
        Config({"epochs": 2})
    assert TrainConfig(schedule={"rate": 0.5}).schedule.rate == 0.5


def test_a_section_of_a_users_own_takes_true_where_its_types_do():
    class Mine(TrainConfig):
        chosen: Literal[True, "auto"] = "auto"
        anything: object = None
        several: list = Field([])
        either: float | bool = 0.0
        width: int = 1

        def __init__(self, lr: float = 0.1, **others):
            super().__init__(lr=lr, **others)

    mine = Mine(0.5, chosen=True, anything=True, several=[True], either=True)
    assert (mine.lr, mine.chosen, mine.anything, mine.several, mine.either) == (0.5, True, True, [True], True)
    with pytest.raises(ConfigError, match=r"^width: found True; expected a number"):
        Mine(width=True)


def test_settings_of_a_mapping_or_of_json_raise_our_error():
    assert Config.model_validate({"epochs": 3}) == Config.model_validate_json('{"epochs": 3}') == Config(epochs=3)
    for read, given in ((Config.model_validate, {"epochs": -3}), (Config.model_validate_json, '{"epochs": -3}')):
        with pytest.raises(ConfigError, match=r"^epochs: found -3; expected a value >= 1"):
            read(given)
    with pytest.raises(ConfigError, match=r"^train\.lr: found x; expected a number"):
        Config.model_validate({"train": {"lr": "x"}})


def test_dotted_keys_in_a_file(tmp_path):
    (tmp_path / "x.yaml").write_text("train.schedule.rate: 3\n")
    expected = r"train\.schedule\.rate: found a key with dots; .* Write train: \{schedule: \{rate: \.\.\.\}\}\.$"
    with pytest.raises(ConfigError, match=expected):
        load_config(tmp_path / "x.yaml")
