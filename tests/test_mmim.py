"""The second task: everything that a run has works for a model that is not MIMRL."""

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from engine import checkpoint, trainer
from engine.cli import main
from engine.config import Config, load_config
from engine.errors import ConfigError
from engine.loaders import open_dataset
from engine.mmim.model import MMIM
from engine.model.text_encoder import load_text_encoder
from engine.task import Inputs, find_task
from tests.small_runs import SIZES, history, timeless
from tests.test_predict import same, table

TERMS = ["I(T;A)", "I(T;V)", "I(F;T)", "I(F;A)", "I(F;V)"]


@pytest.fixture
def config(data, text_encoder) -> Config:
    return small(data, text_encoder)


def small(data, text_encoder, /, epochs=3, **sections) -> Config:
    return Config(
        task="mmim",
        epochs=epochs,
        batch_size=6,
        text_encoder=str(text_encoder),
        data={"path": str(data), "time_len": 10, **sections.pop("data", {})},
        model={"d_common": 8},
        objective={"hidden": 16, "embed": 8, **sections.pop("objective", {})},
        train={"lr": 1e-2},
        output={"progress": False, "tensorboard": False, "report": False, **sections.pop("output", {})},
    )


def test_a_run_and_what_is_done_with_it(data, text_encoder, tmp_path):
    run = tmp_path / "run"
    output = {"report": True, "features": True, "tensorboard": True}
    result = trainer.train(small(data, text_encoder, output=output), run)
    first, *others = history(run)
    assert "information" not in first["train"]
    assert [list(record["train"]["information"]) for record in others] == [TERMS, TERMS]
    assert "task: mmim\n" in (run / "config.yaml").read_text()
    assert trainer.evaluate(run, data)["mae"] == pytest.approx(result.metrics["test"]["mae"], abs=1e-5)
    assert same(table(trainer.predict(run, data, tmp_path / "p.csv")), table(run / "predictions_test.csv"))
    with safe_open(run / "features_test.safetensors", "np") as file:
        assert set(file.keys()) == {"F", "T", "A", "V", "label"}
    page = (run / "report.html").read_text(encoding="utf-8")
    assert all(term in page for term in TERMS)


def test_a_resumed_run_ends_bit_equal(config, tmp_path):
    trainer.train(config, tmp_path / "whole")
    trainer.train(config.model_copy(update={"epochs": 1}), tmp_path / "two")
    trainer.train(config, tmp_path / "two", resume=True)
    whole, two = (checkpoint.load(tmp_path / name / "last.safetensors")[0] for name in ("whole", "two"))
    for part in ("model", "objective"):
        assert all(torch.equal(value, two[part][name]) for name, value in whole[part].items())
    assert [timeless(r) for r in history(tmp_path / "whole")] == [timeless(r) for r in history(tmp_path / "two")]


def test_the_command_line(data, text_encoder, tmp_path, capsys):
    """Seeds, resuming, evaluation and predictions of another task than MIMRL."""
    out = tmp_path / "runs"
    words = [f"text_encoder={text_encoder}", "batch_size=6", "data.time_len=10", "model.d_common=8", "seeds=0,1"]
    train = ["train", "--task", "mmim", "--preset", "mmim-mosi", "--data", str(data), "--out", str(out), *words]
    assert main([*train, "epochs=1"]) == 0
    assert main([*train, "epochs=2", "--resume"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["runs"]) == ["seed0", "seed1"] and summary["test"]["mae"]["std"] > 0
    run = ["--run", str(out / "seed0"), "--data", str(data)]
    capsys.readouterr()
    assert main(["evaluate", *run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mae"] == pytest.approx(
        summary["runs"]["seed0"]["test"]["mae"], abs=1e-4
    )
    assert main(["predict", *run, "--out", str(tmp_path / "p.csv")]) == 0
    assert len(table(tmp_path / "p.csv")) == SIZES["test"]


@pytest.mark.parametrize(
    "modalities, terms", [(("text", "audio"), ["I(T;A)", "I(F;T)", "I(F;A)"]), (("vision",), ["I(F;V)"])]
)
def test_fewer_modalities(data, text_encoder, tmp_path, modalities, terms):
    settings = small(data, text_encoder, epochs=2, data={"modalities": list(modalities)})
    trainer.train(settings, tmp_path / "run")
    assert list(history(tmp_path / "run")[1]["valid"]["information"]) == terms
    assert trainer.evaluate(tmp_path / "run", data)["mae"] > 0


def test_terms_of_the_settings_replace_those_of_the_task(data, text_encoder, tmp_path):
    objective = {"terms": ["0.5 * MI(F, T)", "leak = -0.5 * CMI(A, V | C)"]}
    settings = small(data, text_encoder, epochs=2, objective=objective)
    trainer.train(settings, tmp_path / "run")
    assert list(history(tmp_path / "run")[1]["train"]["information"]) == ["I(F;T)", "leak"]


def test_a_feature_that_the_model_does_not_have(data, text_encoder, tmp_path):
    with pytest.raises(ConfigError, match=r"no width for feature 'Z'"):
        trainer.train(small(data, text_encoder, objective={"terms": ["MI(Z, T)"]}), tmp_path / "run")


def test_the_fused_feature_is_text_plus_what_the_mlp_adds(config, data, text_encoder):
    settings = config.resolve()
    dataset = open_dataset(str(data), settings.data, settings.text_encoder)
    torch.manual_seed(0)
    inputs = Inputs(dataset.audio_dim, dataset.vision_dim)
    model = MMIM(settings, inputs, load_text_encoder(str(text_encoder))).eval()
    (batch,) = dataset.loader("test", 9, shuffle=False, seed=0)
    with torch.no_grad():
        prediction, features = model(batch)
        three = torch.cat([features[name] for name in "TAV"], dim=1)
        torch.testing.assert_close(features["F"], features["T"] + model.fusion(three))
        torch.testing.assert_close(prediction, nn.functional.linear(features["F"], *model.head.layers[0].parameters()))
        alone = [model(one)[0] for one in dataset.loader("test", 1, shuffle=False, seed=0)]
    torch.testing.assert_close(torch.cat(alone), prediction)  # no sample depends on its batch mates


def test_it_begins_at_the_mean_label(config, data, text_encoder):
    settings, task = config.resolve(), find_task("mmim")
    dataset = open_dataset(str(data), settings.data, settings.text_encoder)
    model = task.model(settings, Inputs(dataset.audio_dim, dataset.vision_dim), load_text_encoder(str(text_encoder)))
    task.start(settings, model, dataset)
    assert model.head.layers[-1].bias.item() == pytest.approx(dataset.splits["train"].label.mean().item())


def test_a_preset_of_another_task_is_refused():
    with pytest.raises(ConfigError, match="no preset of that name for the task mmim"):
        load_config("mosi", task="mmim")
