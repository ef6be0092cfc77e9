"""The whole model over three recorded two-stage steps: features, estimates, losses and gradients, in faithful mode."""

import contextlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import losses
from engine.config import Config
from engine.kernels import registry
from engine.loaders.batch import Batch
from engine.mimrl.model import build_model
from engine.mimrl.names import engine_to_reference, split_reference_state
from engine.mimrl.terms import MIMRL_ESTIMATORS, mimrl_objective
from engine.model.text_encoder import text_encoder_from_config
from engine.step import TwoStageStep
from engine.step.graph_state import DeviceNumbers
from engine.training.parts import parameter_groups
from tests.golden.common import assert_grad, assert_values, cases, load, part, recorded_parameters

REFERENCE_TERM = {str(t): f"{t.x}{t.y}_{t.given}".lower() for t in MIMRL_ESTIMATORS if t.given is not None}


def faithful_config(info: dict) -> Config:
    return Config(
        mode="faithful",
        data={"time_len": info["time_len"]},
        model={
            "d_common": info["d_common"],
            "encoder": info["encoder"],
            "compose_t": info["compose_t"],
            "compose_k": info["compose_k"],
            "dropout": (0.0, 0.0, 0.0, 0.0),
            "cubemlp": {k: info[k] for k in ("d_hiddens", "d_outs", "activate", "bias", "ln_first", "res_project")},
        },
        objective={
            "critic": info["critic"],
            "bound": info["bound"],
            "baseline": info["baseline"].replace("gaussain", "gaussian"),
            "hidden": info["critic_hidden"],
            "embed": info["critic_embed"],
            "k_neighbor": info["k_neighbor"],
            "cmi_last_activate": info["cmi_last_activate"],
            "c1": [info["stage1_coefficient"]] * 11,
            "c2": [info["stage2_coefficient"]] * 8,
        },
    ).resolve()


def batch_of(step: dict[str, Tensor], static: bool = False) -> Batch:
    """The recorded batch; with `static` as a static step has it: in a bucket that is wider than the batch."""
    rows = len(step["label"])
    batch = Batch(
        index=torch.arange(rows), ids=[str(i) for i in range(rows)], label=step["label"],
        token_ids=step["input_ids"].long(), token_mask=step["attention_mask"].long(), text=None,
        audio=step["audio"], audio_length=torch.full((rows,), step["audio"].shape[1]),
        vision=step["vision"], vision_length=torch.full((rows,), step["vision"].shape[1]),
    )  # fmt: skip
    if not static:
        return batch
    wider = {name: F.pad(step[name], (0, 0, 0, 6)) for name in ("audio", "vision")}
    widths = {f"{name}_width": torch.tensor(step[name].shape[1]) for name in wider}
    return replace(batch, static=True, **wider, **widths)


@contextlib.contextmanager
def static_step(step: TwoStageStep):
    """What a static step's functions run in."""
    step.held = DeviceNumbers(torch.device("cpu"))
    for optimizer in (step.main_optimizer, step.estimator_optimizer):
        step.held.refresh_rates(optimizer)
    with registry.static():
        yield
    step.held = None


def products_of(stage: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    return {term: tuple(stage[f"prod.{name}.{c}"] for c in "xyz") for term, name in REFERENCE_TERM.items()}


class Replay:
    """Our model set up as the recording was, stepped on its batches and product rows."""

    def __init__(self, info: dict):
        config = faithful_config(info)
        _, audio_dim, vision_dim = info["d_in"]
        encoder = text_encoder_from_config({"model_type": "bert"} | info["bert"])
        self.model = build_model(config, audio_dim, vision_dim, encoder)
        self.objective = mimrl_objective(config.objective, self.model.fused_dim, config.model.d_common)
        model, objective, unused = split_reference_state(recorded_parameters(info))
        assert not unused
        self.model.load_state_dict(model)
        self.objective.load_state_dict(objective)
        sgd = info["sgd"]
        groups = parameter_groups(self.model, self.model.text_encoder)
        main = torch.optim.SGD(
            [{"params": groups["main"]}, {"params": groups["text"], "lr": sgd["lr_text"]}],
            lr=sgd["lr_main"], momentum=sgd["momentum"], fused=True,
        )  # fmt: skip
        estimators = torch.optim.SGD(
            self.objective.parameters(), lr=sgd["lr_estimators"], momentum=sgd["momentum"], fused=True
        )
        self.gradients: dict[str, Tensor] = {}
        self.step = TwoStageStep(
            self.model, self.objective, losses.task_loss("MAE", 1), main, estimators, clip_value=sgd["clip_grad_value"]
        )
        for name, parameter in self.model.named_parameters():
            parameter.register_post_accumulate_grad_hook(self._keep(engine_to_reference(name)))
        for parameter in self.objective.parameters():
            parameter.register_post_accumulate_grad_hook(self._keep_estimators)

    def _keep(self, name: str):
        def hook(parameter: nn.Parameter) -> None:
            self.gradients[name] = parameter.grad.clone()  # before clipping

        return hook

    def _keep_estimators(self, _: nn.Parameter) -> None:
        for name, gradient in self.objective.estimator_state(grads=True).items():
            if gradient is not None:
                self.gradients[engine_to_reference(name)] = gradient.clone()


@pytest.mark.parametrize("graphs", ["off", "emulate"])
@cases("model_")
def test_three_two_stage_steps(name, info, graphs):
    """Static steps in float64: in the last step of model_5_lstm the recorded gradient of a bias is 8 % off the exact
    one, which static and other steps agree on to 1e-9; in float32 rounding decides who stays within 10 % of it."""
    recorded, replay = load(name), Replay(info)
    if graphs == "off":
        replay_steps(name, recorded, replay, static=False)
        return
    recorded = {key: value.double() if value.is_floating_point() else value for key, value in recorded.items()}
    replay.model.double()
    replay.objective.double()
    with static_step(replay.step):
        replay_steps(name, recorded, replay, static=True)


def replay_steps(name: str, recorded: dict[str, Tensor], replay: Replay, static: bool) -> None:
    count = len({key.split(".")[0] for key in recorded if key.startswith("step")})
    assert count >= 1
    for number in range(count):
        step = part(recorded, f"step{number}.")
        batch = batch_of(step, static)
        for stage in ("stage1", "stage2"):
            expected = part(step, f"{stage}.")
            replay.gradients.clear()
            if stage == "stage1":
                with torch.no_grad():
                    prediction, features = replay.step.forward(batch, batch.label)
                output = replay.step.stage1(features, products_of(expected))
                total = output.loss
            else:
                done = replay.step.stage2(batch, batch.label, products_of(expected))
                prediction, features, output, total = done.prediction, done.features, done.information, done.loss
            found = {k: features[k] for k in "FTAV"} | {
                "prediction": prediction,
                "values": torch.stack(list(output.values.values())),
                "losses": torch.stack([loss.detach() for loss in output.losses.values()]),
                "total": total,
            }
            for key, value in found.items():
                where = f"{name} step {number} {stage} {key}"
                if number == 0:
                    assert_values(value, expected[key], where)
                else:
                    relative = (value.detach() - expected[key]).norm() / expected[key].norm()
                    assert relative <= 2e-3, f"{where}: relative difference {relative:.2e}"
            check_gradients(replay.gradients, expected, number, f"{name} step {number} {stage}")


def check_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], number: int, where: str) -> None:
    norms = part(expected, "grad_norm.")
    assert norms, f"{where}: no recorded gradient norms"
    for parameter, norm in norms.items():
        actual, norm = found[parameter].norm().item() if parameter in found else 0.0, norm.item()
        if norm < 1e-5:
            assert actual < 1e-5, f"{where}: |grad {parameter}| {actual:.2e}, recorded {norm:.2e}"
        elif number == 0:
            assert abs(actual - norm) <= 1e-3 * norm + 1e-4, f"{where}: |grad {parameter}| {actual:.6e}, {norm:.6e}"
        else:
            assert abs(actual - norm) <= 0.1 * norm + 1e-5, f"{where}: |grad {parameter}| {actual:.6e}, {norm:.6e}"
    if number == 0:
        for parameter, gradient in part(expected, "grad.").items():
            assert_grad(found.get(parameter), gradient, f"{where}: grad {parameter}")


@cases("model_")
def test_recordings_would_notice_the_corrected_estimators(name, info):
    """Corrected estimators read other values on the same first step: the recordings pin the difference."""
    recorded, replay = load(name), Replay(info)
    settings = faithful_config(info).objective.model_copy(update={"compat": "none"})
    corrected = mimrl_objective(settings, replay.model.fused_dim, info["d_common"])
    step = part(recorded, "step0.")
    batch, expected = batch_of(step), part(step, "stage1.")
    with torch.no_grad():
        _, features = replay.step.forward(batch, batch.label)
        values = torch.stack(list(corrected.estimator_loss(features, products_of(expected)).values.values()))
    with pytest.raises(AssertionError):
        assert_values(values, expected["values"])
