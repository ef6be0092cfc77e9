"""One typed configuration: YAML presets, dotted overrides, clear errors, saved with every run."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.errors import ConfigError
from engine.files import write_text

BOUNDS = ("infonce", "dv", "mine", "tuba", "nwj", "js", "js_fgan", "smile", "interpolate")
ACTIVATIONS = ("elu", "gelu", "hardshrink", "hardtanh", "leakyrelu", "prelu", "relu", "rrelu", "tanh")

Bound = Literal["infonce", "dv", "mine", "tuba", "nwj", "js", "js_fgan", "smile", "interpolate"]
Activation = Literal["elu", "gelu", "hardshrink", "hardtanh", "leakyrelu", "prelu", "relu", "rrelu", "tanh"]
Compose = Literal["mean", "sum", "cat"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class DataConfig(Section):
    """What is read and how it is made into samples."""

    path: str = Field("", description="file or folder of features, or a store made by `engine convert`")
    dataset: Literal["mosi", "mosei", "avec2019", "custom"] = Field("mosi", description="names the metrics to report")
    time_len: int = Field(40, ge=1, description="length of the time axis of the fusion encoder and cap on text tokens")
    length_rule: Literal["auto", "recorded", "all_zero", "sum_zero"] = Field(
        "auto",
        description="how padding is told from frames: recorded lengths where the file has them, else frames of zeros "
        "(auto in fast mode); sum_zero is the reference's rule (auto in faithful mode)",
    )
    normalize_audio: Literal["none", "zscore", "minmax"] = "zscore"
    normalize_vision: Literal["none", "zscore", "minmax"] = "zscore"
    log_audio: bool = Field(False, description="log(f - min + 1) before normalising, min fitted on train")
    log_vision: bool = False
    clip: float | None = Field(5.0, gt=0, description="after z-scoring, values are clipped to +-clip")
    shuffle: bool = True
    drop_last: bool = Field(False, description="drop a short last training batch (a last batch of one is always dropped)")


class TextConfig(Section):
    """The text encoder named by the top-level `text_encoder`."""

    freeze: Literal["no", "part", "all"] = Field("no", description="part: encoder layers 0..8 frozen, embeddings trained")
    lr_rate: float = Field(0.05, description="text encoder's learning rate = train.lr x this (<= 0: same as train.lr)")


class CubeMLPConfig(Section):
    d_hiddens: list[tuple[int, int, int]] = [(20, 3, 128), (10, 3, 128)]
    d_outs: list[tuple[int, int, int]] = [(20, 3, 128), (10, 3, 128)]
    activate: Activation = "gelu"
    bias: bool = True
    ln_first: bool = False
    res_project: list[bool] = [True, True]
    dropout: tuple[float, float, float] = Field((0.0, 0.0, 0.0), description="time, modality, channel")


class ModelConfig(Section):
    d_common: int = Field(128, ge=1)
    encoder: Literal["gru", "lstm", "conv"] = "gru"
    fusion: str = Field("cubemlp", description="cubemlp, tfn, transformer, or a name given to engine.register_fusion")
    cubemlp: CubeMLPConfig = CubeMLPConfig()
    compose_t: Compose = "mean"
    compose_k: Compose = "mean"
    dropout: tuple[float, float, float, float] = Field((0.1, 0.1, 0.1, 0.1), description="text, audio, vision, head")
    task: Literal["regression", "classification"] = "regression"
    num_class: int = Field(1, ge=1, description="1 for regression")


class ObjectiveConfig(Section):
    """The information terms and their estimators. All values are in nats."""

    enabled: bool = Field(True, description="false trains on the task loss alone")
    critic: Literal["separate", "concat"] = "separate"
    bound: Bound = "infonce"
    baseline: Literal["constant", "unnormalized", "gaussian"] = "constant"
    hidden: int = Field(256, ge=1)
    embed: int = Field(128, ge=1)
    alpha: float = Field(0.01, gt=0, lt=1, description="interpolate: weight of the multi-sample baseline")
    smile_tau: float = Field(5.0, gt=0)
    ema_rate: float = Field(0.01, gt=0, le=1, description="mine: rate of the log-domain moving average")
    cmi_estimator: Literal["ldr", "dv", "nwj"] = "ldr"
    cmi_last_activate: Literal["sigmoid", "hardtanh"] = Field("sigmoid", description="compat=mimrl only")
    k_neighbor: int = Field(2, ge=1)
    c1: list[float] = Field([1.0] * 11, description="stage 1: one coefficient an estimator (F_T F_A F_V T_A T_V, then AC_T "
                            "TA_C VC_T TV_C TC_A TC_V)")
    c2: list[float] = Field([0.01] * 8, description="stage 2: I(F;T) I(F;A) I(F;V) inv spec_t spec_a spec_v comp")
    compat: Literal["auto", "none", "mimrl"] = Field("auto", description="mimrl reproduces the reference's estimators, faults included")
    on_degenerate: Literal["raise", "skip"] = Field("raise", description="batch of one or non-finite scores")


class ScheduleConfig(Section):
    kind: Literal["none", "step", "multi_step", "exp", "plateau"] = "multi_step"
    milestones: list[int] = [5]
    step_size: int = Field(60, ge=1)
    rate: float = Field(0.1, gt=0)
    patience: int = Field(10, ge=0)


class TrainConfig(Section):
    loss: Literal["MAE", "MSE", "RMSE", "SIMSE", "CCC", "CE", "BCE", "Focal"] = "MAE"
    stage1_n: int = Field(2, ge=0, description="passes of stage 1 over the training set an epoch")
    stage1_features: Literal["auto", "fresh", "cached", "bank"] = Field(
        "auto", description="fresh: encoders run in every stage-1 pass; cached: once an epoch; bank: last epoch's features"
    )
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = Field(1e-3, gt=0)
    mi_lr_rate: float = Field(1.0, gt=0, description="estimators' learning rate = lr x this")
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only")
    schedule: ScheduleConfig = ScheduleConfig()
    clip_value: float | None = Field(1.5, gt=0, description="clip every gradient element to +-clip_value")
    clip_norm: float | None = Field(None, gt=0, description="clip the norm of the stage's whole gradient")


class OutputConfig(Section):
    tensorboard: bool = True
    report: bool = True
    features: bool = Field(False, description="write the F, T, A, V features of every split at the best epoch")
    progress: bool = True


class Config(Section):
    """Everything a run depends on. Round-trips through YAML."""

    preset: str = ""
    mode: Literal["fast", "faithful"] = Field("fast", description="faithful: the reference's mathematics, faults included")
    seed: int = 0
    epochs: int = Field(8, ge=1)
    batch_size: int = Field(32, ge=2)
    text_encoder: str = Field("minilm", description="minilm, a local folder, a Hugging Face name, or features (precomputed)")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0, mps")
    threads: int | None = Field(None, ge=1, description="CPU threads; default: all")
    data: DataConfig = DataConfig()
    text: TextConfig = TextConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    output: OutputConfig = OutputConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        cube = self.model.cubemlp
        if not len(cube.d_hiddens) == len(cube.d_outs) == len(cube.res_project):
            raise ValueError("model.cubemlp: d_hiddens, d_outs and res_project need one entry a block each")
        return self

    def resolve(self) -> Config:
        """A copy in which every `auto` that depends on the mode is replaced by its value."""
        c = self.model_copy(deep=True)
        faithful = c.mode == "faithful"
        if c.objective.compat == "auto":
            c.objective.compat = "mimrl" if faithful else "none"
        if c.train.stage1_features == "auto":
            c.train.stage1_features = "fresh" if faithful else "cached"
        if c.data.length_rule == "auto":
            c.data.length_rule = "sum_zero" if faithful else "recorded"
        return c

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def save(self, path: str | Path) -> None:
        write_text(path, self.to_yaml())
