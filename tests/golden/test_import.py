"""A checkpoint of the reference, imported, predicts what the reference predicted."""

import json

import pytest
import torch

from engine.config import load_config
from engine.mimrl.checkpoints import import_checkpoint
from engine.trainer import load_run
from tests.golden.common import assert_values, cases, load, part, recorded_parameters
from tests.golden.test_model import batch_of


def command(info: dict) -> str:
    """The command line that would have trained the recorded model."""

    def dash(shape):
        return "-".join(map(str, shape))

    switches = "".join(f" --{name}" for name in ("bias", "ln_first") if info[name])
    return (
        "python Main.py --dataset mosi_Dec --parallel"
        f" --encoders {info['encoder']} --d_common {info['d_common']} --time_len {info['time_len']}"
        f" --d_hiddens {'='.join(map(dash, info['d_hiddens']))} --d_outs {'='.join(map(dash, info['d_outs']))}"
        f" --activate {info['activate']} --res_project {dash(int(flag) for flag in info['res_project'])}{switches}"
        f" --features_compose_t {info['compose_t']} --features_compose_k {info['compose_k']}"
        f" --critic_type {info['critic']} --bound_type {info['bound']} --baseline_type {info['baseline']}"
        f" --cmi_last_acticate {info['cmi_last_activate']} --k_neighbor {info['k_neighbor']}"
    )


@pytest.fixture
def text_encoder(tmp_path):
    """Writes the folder with the configuration of the recorded text encoder, and names it."""

    def write(info: dict) -> str:
        folder = tmp_path / "bert"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "bert"} | info["bert"]))
        return str(folder)

    return write


@cases("model_")
def test_imported_checkpoint_predicts_as_the_reference(name, info, tmp_path, text_encoder):
    recorded = part(load(name), "step0.")
    state = {f"module.{key}": value for key, value in recorded_parameters(info).items()}
    torch.save({"epoch": 7, "model": state}, tmp_path / "best_valid_model.pth.tar")

    notes = import_checkpoint(
        tmp_path / "best_valid_model.pth.tar", tmp_path / "run", command(info), text_encoder=text_encoder(info)
    )
    run = load_run(tmp_path / "run")
    with torch.no_grad():
        prediction, features = run.model(batch_of(recorded))

    for key, value in {"prediction": prediction, **features}.items():
        assert_values(value, recorded[f"stage1.{key}"], f"{name} {key}")
    assert run.meta["epoch"] == 7
    assert run.config.mode == "faithful"
    assert any("LAST epoch" in note for note in notes)
    stored = run.objective.estimator_state()
    assert len(stored) == sum("vmi_" in key or "vcmi_" in key for key in state)


@cases("model_")
def test_shapes_tell_the_architecture(name, info, tmp_path, text_encoder):
    """Without a command, everything that shapes determine is found, and the rest is called an assumption."""
    load(name)
    torch.save(recorded_parameters(info), tmp_path / "state.pth")
    notes = import_checkpoint(tmp_path / "state.pth", tmp_path / "run", text_encoder=text_encoder(info))
    config = load_config(tmp_path / "run" / "config.yaml")
    cube = config.model.cubemlp
    assert config.model.encoder == info["encoder"]
    assert config.model.d_common == info["d_common"]
    assert config.data.time_len == info["time_len"]
    assert cube.d_hiddens == [tuple(shape) for shape in info["d_hiddens"]]
    assert cube.d_outs == [tuple(shape) for shape in info["d_outs"]]
    assert cube.res_project == info["res_project"]
    assert cube.bias == info["bias"]
    assert cube.ln_first == info["ln_first"]
    assert config.objective.critic == info["critic"]
    assert config.objective.hidden == info["critic_hidden"]
    assert (config.objective.baseline == "unnormalized") == (info["baseline"] == "unnormalized")
    assert any(note.startswith("ASSUMED") and "activate=gelu" in note for note in notes)
