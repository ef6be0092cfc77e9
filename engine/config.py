"""One typed configuration: YAML presets, dotted overrides, clear errors, saved with every run.

    config = load_config("mosi", ["mode=faithful", "train.lr=5e-4"])  # a preset
    config = load_config("my.yaml")  # a file; `preset: mosi` in it starts from that preset
    config.save("run/config.yaml")

Every problem is a `ConfigError`: one line that names the key, what was found and what is allowed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from engine.errors import ConfigError
from engine.files import read_text, user_path, write_text

BOUNDS = ("infonce", "dv", "mine", "tuba", "nwj", "js", "js_fgan", "smile", "interpolate")
ACTIVATIONS = ("elu", "gelu", "hardshrink", "hardtanh", "leakyrelu", "prelu", "relu", "rrelu", "tanh")
ESTIMATORS = ("F_T", "F_A", "F_V", "T_A", "T_V", "AC_T", "TA_C", "VC_T", "TV_C", "TC_A", "TC_V")
TERMS = ("I(F;T)", "I(F;A)", "I(F;V)", "inv", "spec_t", "spec_a", "spec_v", "comp")
REGRESSION_LOSSES = ("MAE", "MSE", "RMSE", "SIMSE", "CCC")
CLASSIFICATION_LOSSES = ("CE", "BCE", "Focal")
MODALITIES = ("text", "audio", "vision")

# What a settings file may cost: those of this project have 150 values and 6 KB.
FILE_BYTES = 1 << 18
FILE_VALUES = 10_000
FILE_DEPTH = 20

# No setting in earnest comes near these; without them a mistyped digit asks for terabytes.
WIDEST = 1 << 14
LONGEST = 100_000
MOST_EPOCHS = 1_000_000

# The keys most people touch, shown by `engine train --help`; `engine config --keys` shows all.
COMMON_KEYS = (
    "mode",
    "seed",
    "epochs",
    "batch_size",
    "text_encoder",
    "device",
    "data.time_len",
    "data.normalize_audio",
    "data.normalize_vision",
    "text.freeze",
    "text.lr_rate",
    "model.encoder",
    "model.fusion",
    "model.cubemlp.d_hiddens",
    "model.cubemlp.d_outs",
    "objective.enabled",
    "objective.critic",
    "objective.bound",
    "objective.c2",
    "train.loss",
    "train.lr",
    "train.stage1_n",
    "output.features",
)


def _shapes(value: Any) -> Any:
    """The reference's shorthand: "20-3-128=10-3-128" is two blocks."""
    if isinstance(value, str):
        value = value.split("=")
    if isinstance(value, (list, tuple)):
        return [block.strip().split("-") if isinstance(block, str) else block for block in value]
    return value


def _dashed(value: Any) -> Any:
    """The reference's shorthand for lists: "9-60" is [9, 60]; a single number is a list of one."""
    if isinstance(value, str):
        return value.split("-")
    return [value] if isinstance(value, (int, float)) else value


def _modalities(value: Any) -> Any:
    """Each name once, in the order text, audio, vision; "audio-vision" and "audio,vision" are lists too."""
    if isinstance(value, str):
        value = [name.strip() for name in re.split("[-,]", value)]
    if isinstance(value, (list, tuple)) and set(map(str, value)) <= set(MODALITIES):
        return [name for name in MODALITIES if name in value]
    return value


def _spread(n: int) -> BeforeValidator:
    """A single number stands for n equal ones."""
    return BeforeValidator(lambda value: [value] * n if isinstance(value, (int, float, str)) else value)


# YAML has no lower-case `none`, and reads `no` as false; both are what people write.
# YAML reads a bare `off` as false.
_off = BeforeValidator(lambda value: "off" if value is False else value)
_none = BeforeValidator(lambda value: None if isinstance(value, str) and value.lower() == "none" else value)
_no = BeforeValidator(lambda value: "no" if value is False else value)

Bound = Literal["infonce", "dv", "mine", "tuba", "nwj", "js", "js_fgan", "smile", "interpolate"]
Activation = Literal["elu", "gelu", "hardshrink", "hardtanh", "leakyrelu", "prelu", "relu", "rrelu", "tanh"]
Compose = Literal["mean", "sum", "cat"]
Positive = Annotated[int, Field(ge=1, le=MOST_EPOCHS)]
Width = Annotated[int, Field(ge=1, le=LONGEST)]
Shapes = Annotated[list[tuple[Width, Width, Width]], BeforeValidator(_shapes)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A group of settings. Assigning to a field validates it, and raises `ConfigError` as loading does."""

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
        str_max_length=4096,
    )

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.get(name)
        try:
            super().__setattr__(name, value)
        except ValidationError as cause:
            raise _translate(cause, type(self)) from None
        except ConfigError:
            self.__dict__[name] = before  # a refused value must not stay behind
            raise


class AugmentConfig(Section):
    """Random changes of the training samples, drawn anew in every pass from the seed and the sample alone."""

    drop_text: Probability = Field(
        0.0, description="chance that a sample comes without its text; never all three at once"
    )
    drop_audio: Probability = Field(0.0, description="as drop_text: the audio is missing, one frame of zeros")
    drop_vision: Probability = Field(0.0, description="as drop_audio")
    mask_text: Probability = Field(
        0.0, description="chance of each token to become the unknown token (of text features: zeros)"
    )
    mask_audio: Probability = Field(0.0, description="chance of each audio frame to become zeros; the length stays")
    mask_vision: Probability = Field(0.0, description="as mask_audio")


class DataConfig(Section):
    """What is read and how it is made into samples."""

    path: str = Field("", description="file or folder of features, or a store made by `engine convert`")
    format: str = Field(
        "auto", description="family of the files: auto recognises it by content; a name refuses every other family"
    )
    modalities: Annotated[list[Literal["text", "audio", "vision"]], BeforeValidator(_modalities)] = Field(
        list(MODALITIES),
        min_length=1,
        description="what a sample is made of; data needs to hold no others, and terms that name one are left out",
    )
    audio_features: str = Field(
        "auto",
        description="feature set to use where the data has several (AVEC2019 lists: mfcc, ege, ds; CMU-SDK lists: "
        "covarep, eb10, is09; .csd: the file's name); auto: the first",
    )
    vision_features: str = Field(
        "auto",
        description="as audio_features (AVEC2019 lists: au, resnet; CMU-SDK lists: facet41, facet42, openface)",
    )
    text_features: str = Field(
        "auto", description="as audio_features, for text_encoder=features (CMU-SDK lists: last_hidden, glove, ...)"
    )
    label_column: Annotated[int | None, _none] = Field(
        None,
        ge=0,
        le=LONGEST,
        description="column of labels with several; none: the only one, or of 7 the first (sentiment)",
    )
    label_key: str = Field(
        "auto",
        description="set of labels to use where an MMSA file has several (regression_labels, classification_labels, "
        "regression_labels_T, ...); classes: classification_labels where the file has them (auto for "
        "model.task=classification); else regression_labels (auto)",
    )
    align: Literal["words", "segments"] = Field(
        "words", description=".csd files: a row a word (the mean of its frames), or the frames of a segment as they are"
    )
    dataset: Literal["mosi", "mosei", "sims", "avec2019", "custom"] = Field(
        "mosi", description="names the metrics to report"
    )
    label_scale: Literal["auto", "mosi", "sims", "phq8", "none"] = Field(
        "auto",
        description="whose classes the accuracies use: mosi cuts [-3, 3] (MOSI, MOSEI), sims cuts [-1, 1], phq8 is "
        "PHQ-8 / 25 in [0, 1]; none: MAE, Corr, CCC and RMSE only; auto: by data.dataset, where the labels fit it "
        "(custom: none)",
    )
    time_len: int = Field(
        40, ge=1, le=LONGEST, description="length of the time axis of the fusion encoder and cap on text tokens"
    )
    length_rule: Literal["auto", "recorded", "all_zero", "sum_zero"] = Field(
        "auto",
        description="how padding is told from frames: recorded lengths where the file has them, else frames of zeros "
        "(auto in fast mode); sum_zero is the reference's rule (auto in faithful mode)",
    )
    normalize_audio: Literal["none", "zscore", "minmax"] = Field(
        "zscore", description="column by column, statistics fitted on the training frames only; minmax: to [-1, 1]"
    )
    normalize_vision: Literal["none", "zscore", "minmax"] = Field("zscore", description="as normalize_audio")
    log_audio: bool = Field(False, description="log(f - min + 1) before normalising, min fitted on train")
    log_vision: bool = Field(False, description="as log_audio")
    clip: Annotated[float | None, _none] = Field(
        5.0, gt=0, description="after z-scoring, values are clipped to +-clip; none: not clipped"
    )
    shuffle: bool = Field(True, description="a new order of the training samples every epoch")
    drop_last: bool = Field(
        False, description="drop a short last training batch (a last batch of one is always dropped)"
    )

    loader: Literal["auto", "resident", "dali", "torch"] = Field(
        "auto",
        description="where batches are made: on the device that holds the whole split (resident), in an NVIDIA DALI "
        "pipeline, in PyTorch worker processes; all give the same batches (auto: resident where it fits)",
    )
    workers: Annotated[int | None, _none] = Field(
        None,
        ge=0,
        le=256,
        description="torch: worker processes (none: half the cores, at most 4; on a CPU 0); dali: threads (none: 2)",
    )
    precision: Literal["float32", "float16"] = Field(
        "float32", description="of normalised frames: float16 halves their memory and rounds them to 11 bits"
    )
    max_padding: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, _none] = Field(
        None,
        description="bound on the share of padding in an epoch's audio and vision: samples of like length come "
        "together, no more than it takes; none: batches of any length",
    )
    augment: AugmentConfig = AugmentConfig()


class TextConfig(Section):
    """The text encoder named by the top-level `text_encoder`."""

    freeze: Annotated[Literal["no", "part", "all"], _no] = Field(
        "no", description="part: encoder layers 0..8 frozen, embeddings trained"
    )
    lr_rate: float = Field(0.05, description="text encoder's learning rate = train.lr x this (<= 0: same as train.lr)")


class CubeMLPConfig(Section):
    """The CubeMLP fusion encoder: one entry a block. Shapes are time-modality-channel, e.g. 20-3-128=10-3-128."""

    d_hiddens: Shapes = Field(
        [(20, 3, 128), (10, 3, 128)], min_length=1, max_length=64, description="hidden sizes, one shape a block"
    )
    d_outs: Shapes = Field(
        [(20, 3, 128), (10, 3, 128)], min_length=1, max_length=64, description="output sizes, one shape a block"
    )
    activate: Activation = Field("gelu", description="activation between the two linear layers of each axis")
    bias: bool = Field(True, description="bias of those linear layers")
    ln_first: bool = Field(False, description="LayerNorm before the MLP instead of after the residual sum")
    res_project: Annotated[list[bool], BeforeValidator(_dashed)] = Field(
        [True, True],
        max_length=64,
        description="one a block: linear residual (true) or identity (false; the sizes must agree)",
    )
    dropout: Annotated[tuple[Probability, Probability, Probability], _spread(3)] = Field(
        (0.0, 0.0, 0.0), description="time, modality, channel"
    )


class ModelConfig(Section):
    """Encoders, fusion encoder and head."""

    d_common: int = Field(128, ge=1, le=WIDEST, description="width D of the text, audio and vision features")
    encoder: Literal["gru", "lstm", "conv"] = Field("gru", description="audio and vision encoder")
    fusion: str = Field("cubemlp", description="cubemlp, tfn, transformer, or a name given to engine.register_fusion")
    cubemlp: CubeMLPConfig = CubeMLPConfig()
    text_padding: Literal["mean", "zero"] = Field(
        "mean",
        description="fast mode: what the fusion encoder finds past a sentence's end; mean is the sentence's mean "
        "(faithful mode: the text encoder's outputs at padding)",
    )
    compose_t: Compose = Field("mean", description="how CubeMLP's output is joined over time")
    compose_k: Compose = Field("mean", description="how CubeMLP's output is joined over modalities, before time")
    dropout: Annotated[tuple[Probability, Probability, Probability, Probability], _spread(4)] = Field(
        (0.1, 0.1, 0.1, 0.1), description="text, audio, vision, head"
    )
    modality_dropout: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = Field(
        "auto",
        description="share of a training batch whose audio, and likewise whose vision, the fusion encoder does not see "
        "(auto: 0.5 in fast mode with text, else 0)",
    )
    task: Literal["regression", "classification"] = Field("regression", description="what the head predicts")
    num_class: int = Field(1, ge=1, le=LONGEST, description="1 for regression")


class ObjectiveConfig(Section):
    """The information terms and their estimators. All values are in nats."""

    enabled: bool = Field(True, description="false trains on the task loss alone")
    critic: Literal["separate", "concat"] = Field("separate", description="scores h(y)g(x)', or an MLP on every pair")
    bound: Bound = Field("infonce", description="bound on the mutual information of the five unconditional terms")
    baseline: Literal["constant", "unnormalized", "gaussian"] = Field(
        "constant", description="log-baseline of tuba, nwj and interpolate"
    )
    hidden: int = Field(256, ge=1, le=WIDEST, description="hidden width of critics and conditional classifiers")
    embed: int = Field(128, ge=1, le=WIDEST, description="embedding width of the separate critic")
    alpha: float = Field(0.01, gt=0, lt=1, description="interpolate: weight of the multi-sample baseline")
    smile_tau: float = Field(5.0, gt=0, description="smile: scores are clipped to +-tau in the partition function")
    ema_rate: float = Field(0.01, gt=0, le=1, description="mine: rate of the log-domain moving average")
    cmi_estimator: Literal["ldr", "dv", "nwj"] = Field(
        "ldr", description="value of the conditional terms; the other two are reported"
    )
    cmi_last_activate: Literal["sigmoid", "hardtanh"] = Field("sigmoid", description="compat=mimrl only")
    k_neighbor: int = Field(2, ge=1, le=LONGEST, description="neighbours a query row has in the product sampler")
    c1: Annotated[list[float], _spread(11)] = Field(
        [1.0] * 11,
        description="stage 1: one coefficient an estimator (F_T F_A F_V T_A T_V, then AC_T TA_C VC_T TV_C TC_A TC_V); "
        "one number stands for all",
    )
    c2: Annotated[list[float], _spread(8)] = Field(
        [0.01] * 8,
        description="stage 2: I(F;T) I(F;A) I(F;V) inv spec_t spec_a spec_v comp; one number stands for all",
    )
    compat: Literal["auto", "none", "mimrl"] = Field(
        "auto", description="mimrl reproduces the reference's estimators, faults included (auto in faithful mode)"
    )
    on_degenerate: Literal["raise", "skip"] = Field("raise", description="batch of one or non-finite scores")


class ScheduleConfig(Section):
    """Learning rates over the epochs, the same for both optimisers."""

    kind: Literal["none", "step", "multi_step", "exp", "plateau"] = Field("multi_step", description="kind of schedule")
    milestones: Annotated[list[Positive], BeforeValidator(_dashed)] = Field(
        [5], max_length=1000, description="multi_step: epochs at which the rate is multiplied, e.g. 9-60"
    )
    step_size: int = Field(60, ge=1, le=MOST_EPOCHS, description="step: epochs between two multiplications")
    rate: float = Field(0.1, gt=0, description="factor of every kind")
    patience: int = Field(10, ge=0, le=MOST_EPOCHS, description="plateau: epochs without a better validation loss")


class TrainConfig(Section):
    """Losses, the two stages, and their optimisers."""

    loss: Literal["MAE", "MSE", "RMSE", "SIMSE", "CCC", "CE", "BCE", "Focal"] = Field("MAE", description="task loss")
    stage1_n: int = Field(2, ge=0, le=1000, description="passes of stage 1 over the training set an epoch")
    stage1_features: Literal["auto", "fresh", "cached", "bank"] = Field(
        "auto",
        description="fresh: encoders run in every stage-1 pass (auto in faithful mode); cached: once an epoch (auto in "
        "fast mode); bank: last epoch's features",
    )
    optimizer: Literal["adam", "sgd"] = Field("adam", description="optimiser of both stages")
    lr: float = Field(1e-3, gt=0, description="learning rate of encoders, fusion encoder and head")
    mi_lr_rate: float = Field(1.0, gt=0, description="estimators' learning rate = lr x this")
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty, both optimisers")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only")
    schedule: ScheduleConfig = ScheduleConfig()
    clip_value: Annotated[float | None, _none] = Field(
        1.5, gt=0, description="clip every gradient element to +-clip_value; none: not clipped"
    )
    amp: Annotated[Literal["off", "auto", "bf16", "fp16"], _off] = Field(
        "auto",
        description="type of the model's matrix products; auto: bf16 (older GPUs: fp16) where the hardware has units "
        "for it, else and in faithful mode off, which is float32; losses, information terms and evaluation are "
        "float32 always",
    )
    compile: Annotated[Literal["off", "default", "reduce-overhead", "max-autotune"], _off] = Field(
        "off", description="torch.compile the layers that the model repeats, in this mode; off: nothing is compiled"
    )
    graphs: Annotated[Literal["auto", "off", "emulate"], _off] = Field(
        "auto",
        description="both stages as CUDA graphs, each shape captured once and replayed (auto: on a GPU); emulate: the "
        "same static functions uncaptured, on any device; off: one operation after another",
    )
    clip_norm: Annotated[float | None, _none] = Field(
        None, gt=0, description="clip the norm of the stage's whole gradient; none: not clipped"
    )
    average: Annotated[Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] | None, _none] = Field(
        "auto",
        description="decay of a moving average of the model's weights, one update a batch, which is what is evaluated "
        "and kept (auto: 0.98 in fast mode, none in faithful mode)",
    )


class OutputConfig(Section):
    """What a run leaves behind beside metrics, predictions and checkpoints."""

    tensorboard: bool = Field(True, description="write TensorBoard scalars")
    report: bool = Field(True, description="write report.html at the end")
    features: bool = Field(False, description="write the F, T, A, V features of every split at the best epoch")
    progress: bool = Field(True, description="show progress and time left")


class Config(Section):
    """Everything a run depends on. Round-trips through YAML."""

    preset: str = Field("", description="the preset this configuration started from")
    task: str = Field("mimrl", description="what is trained: model, information terms, loss and metrics")
    mode: Literal["fast", "faithful"] = Field(
        "fast", description="faithful: the reference's mathematics, faults included"
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="one seed gives bit-equal runs on one CPU with one number of threads"
    )
    epochs: int = Field(8, ge=1, le=MOST_EPOCHS, description="passes over the training set")
    batch_size: int = Field(32, ge=2, le=LONGEST, description="samples a step; estimators need at least 2")
    text_encoder: str = Field(
        "minilm", description="minilm, a local folder, a Hugging Face name, or features (precomputed)"
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:0, mps")
    threads: Annotated[int | None, _none] = Field(
        None, ge=1, le=1024, description="CPU threads; none: all. Last digits depend on it"
    )
    data: DataConfig = DataConfig()
    text: TextConfig = TextConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    output: OutputConfig = OutputConfig()

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as cause:
            raise _translate(cause, Config) from None

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        self.check()
        return self

    def check(self) -> None:
        """Raise `ConfigError` where two settings are at odds. Runs on loading and in `resolve`."""
        objective, train, model = self.objective, self.train, self.model
        for key, values, names in (("c1", objective.c1, ESTIMATORS), ("c2", objective.c2, TERMS)):
            if len(values) != len(names):
                raise ConfigError(
                    f"objective.{key}",
                    f"{len(values)} coefficients",
                    f"{len(names)}, for {' '.join(names)}",
                    "Give one number for each, or a single number for all.",
                )
        if objective.enabled and objective.k_neighbor > self.batch_size // 2:
            raise ConfigError(
                "objective.k_neighbor",
                f"{objective.k_neighbor} with batch_size {self.batch_size}",
                f"at most {self.batch_size // 2} (half the batch, so that there is more than one query row)",
                "Lower objective.k_neighbor or raise batch_size.",
            )
        allowed = REGRESSION_LOSSES if model.task == "regression" else CLASSIFICATION_LOSSES
        if train.loss not in allowed:
            raise ConfigError(
                "train.loss",
                f"{train.loss} with model.task={model.task}",
                f"one of {', '.join(allowed)}",
                "Change train.loss or model.task.",
            )
        if (model.task == "regression") != (model.num_class == 1):
            raise ConfigError(
                "model.num_class",
                f"{model.num_class} with model.task={model.task}",
                "1" if model.task == "regression" else "2 or more",
                "Change model.num_class or model.task.",
            )
        if self.data.dataset == "avec2019" and model.task != "regression":
            raise ConfigError(
                "model.task", "classification with data.dataset=avec2019", "regression", "Use data.dataset=custom."
            )
        if self.data.dataset == "avec2019" and self.data.label_scale not in ("auto", "phq8", "none"):
            raise ConfigError(
                "data.label_scale", f"{self.data.label_scale} with data.dataset=avec2019", "auto, phq8 or none",
                "Use data.dataset=custom.",
            )  # fmt: skip
        self._check_modalities()
        milestones = train.schedule.milestones
        if sorted(set(milestones)) != milestones:
            raise ConfigError(
                "train.schedule.milestones", str(milestones), "epochs in rising order", "Sort them and drop repeats."
            )
        if model.fusion == "cubemlp":
            self._check_cubemlp()

    def _check_modalities(self) -> None:
        names = self.data.modalities
        if len(names) == len(MODALITIES):
            return
        listed = f"[{', '.join(names)}]"
        if self.mode == "faithful":
            raise ConfigError(
                "data.modalities",
                f"{listed} with mode=faithful",
                "all three: the published model has no other form",
                "Use mode=fast.",
            )
        if "text" not in names and self.model.modality_dropout not in ("auto", 0):
            raise ConfigError(
                "model.modality_dropout",
                f"{self.model.modality_dropout:g} with data.modalities={listed}",
                "0 or auto: it hides audio and vision behind the text",
                "Set model.modality_dropout=auto.",
            )
        if used := [name for name, rate in self.data.augment.model_dump().items() if rate]:
            key = next((n for n in used if n.startswith("drop") or n.partition("_")[2] not in names), None)
            if key is not None:
                raise ConfigError(
                    f"data.augment.{key}",
                    f"{getattr(self.data.augment, key):g} with data.modalities={listed}",
                    "0: samples are dropped from among three modalities, and frames of what is there are masked",
                    f"Set data.augment.{key}=0.",
                )

    def _check_cubemlp(self) -> None:
        cube = self.model.cubemlp
        if not len(cube.d_hiddens) == len(cube.d_outs) == len(cube.res_project):
            raise ConfigError(
                "model.cubemlp",
                f"{len(cube.d_hiddens)} d_hiddens, {len(cube.d_outs)} d_outs and {len(cube.res_project)} res_project",
                "one entry of each a block",
                "Give the three the same number of entries.",
            )
        size = (self.data.time_len, len(self.data.modalities), self.model.d_common)
        for i, (out, project) in enumerate(zip(cube.d_outs, cube.res_project, strict=True)):
            if not project and out != size:
                raise ConfigError(
                    f"model.cubemlp.d_outs, block {i}",
                    _dash(out),
                    f"{_dash(size)}, the block's input (time-modality-channel; the first is data.time_len, how many "
                    "data.modalities, model.d_common), because its residual is the identity",
                    f"Set d_outs of the block to {_dash(size)}, or its res_project to true.",
                )
            size = out

    def resolve(self) -> Config:
        """A checked copy in which every `auto` that depends on the mode is replaced by its value."""
        c = self.model_copy(deep=True)
        faithful = c.mode == "faithful"
        if c.objective.compat == "auto":
            c.objective.compat = "mimrl" if faithful else "none"
        if c.train.stage1_features == "auto":
            c.train.stage1_features = "fresh" if faithful else "cached"
        if faithful and c.train.amp == "auto":
            c.train.amp = "off"
        if c.model.modality_dropout == "auto":
            c.model.modality_dropout = 0.0 if faithful or "text" not in c.data.modalities else 0.5
        if c.train.average == "auto":
            c.train.average = None if faithful else 0.98
        if c.data.length_rule == "auto":
            c.data.length_rule = "sum_zero" if faithful else "recorded"
        if c.data.label_key == "auto" and c.model.task == "classification":
            c.data.label_key = "classes"
        c.check()
        return c

    def to_yaml(self) -> str:
        """Every key with its value; `load_yaml` of it gives an equal configuration."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=120)

    def save(self, path: str | Path) -> None:
        """Write `to_yaml` to `path`, whole or not at all. Raises `OutputError`."""
        write_text(path, self.to_yaml())

    @classmethod
    def load_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> Config:
        """Read a YAML file; a `preset:` in it names the preset whose values hold where the file has none.

        Raises:
            ConfigError: no such file, not YAML, an unknown key, or a value out of range.
        """
        path = user_path(path)
        values = _read(path, str(path))
        base = values.get("preset") or ""
        if base:
            values = _merge(_preset(base), values)
        return _build(values, overrides)


def load_config(source: str | Path, overrides: Iterable[str] = ()) -> Config:
    """A configuration from a preset's name or a YAML file's path, then `key=value` overrides in order.

    Keys are dotted (`train.lr=5e-4`); values are read as YAML, and CubeMLP shapes also as `20-3-128=10-3-128`.

    Raises:
        ConfigError: no such preset or file, an unknown key, a value out of range, or settings at odds.
    """
    if (
        isinstance(source, Path)
        or source.endswith((".yaml", ".yml"))
        or (source not in presets() and user_path(source).is_file())
    ):
        return Config.load_yaml(source, overrides)
    return _build(_preset(source), overrides)


def presets() -> dict[str, str]:
    """Name and one-line summary (the first comment line) of every packaged preset."""
    files = sorted((f for f in _preset_folder().iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name[:-5])
    return {f.name[:-5]: f.read_text("utf-8").split("\n", 1)[0].lstrip("# ") for f in files}


class Key(NamedTuple):
    """One setting, as help and documentation show it."""

    name: str
    type: str
    default: str
    description: str


def keys(section: type[Section] | None = None, prefix: str = "") -> list[Key]:
    """Every setting with its type, default and description, in the order of the YAML."""
    found = []
    for name, field in (section or Config).model_fields.items():
        if _is_section(field.annotation):
            found += keys(field.annotation, f"{prefix}{name}.")
        else:
            found.append(Key(prefix + name, _type_text(field), text_of(field.default), field.description or ""))
    return found


def text_of(value: Any) -> str:
    """A value as one would write it after `key=`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], (list, tuple)):
            return "=".join(_dash(v) for v in value)
        if len(value) > 1 and isinstance(value[0], float) and len(set(value)) == 1:
            return text_of(value[0])  # one number stands for all of them
        return "[" + ", ".join(text_of(v) for v in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _dash(shape: Iterable[int]) -> str:
    return "-".join(str(n) for n in shape)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _type_text(field: Any) -> str:
    return re.sub(r"\b(typing|engine\.config)\.", "", _plain(field.annotation))


def _plain(annotation: Any) -> str:
    """The type in words, without the limits that the error message gives when they are passed."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _plain(args[0])
    if origin is Literal:
        return " | ".join(args)
    if origin is list:
        return f"list of {_plain(args[0])}"
    if origin is tuple:
        return f"{len(args)} {_plain(args[0])}"
    if origin is Union or type(annotation).__name__ == "UnionType":
        return " | ".join(_plain(a) for a in args)
    return {str: "text", float: "number", int: "integer", bool: "true | false", type(None): "none"}[annotation]


def _preset_folder() -> Any:
    return resources.files("engine") / "presets"


def _preset(name: Any) -> dict[str, Any]:
    known = presets()
    name = name if isinstance(name, str) else _short(name)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            f"preset {name!r}",
            "no preset of that name",
            f"one of {', '.join(known)}, or the path of a YAML file",
            f"Did you mean {near[0]}?" if near else "Choose a preset, or check the path.",
        )
    return {**_read(_preset_folder() / f"{name}.yaml", f"preset {name}"), "preset": name}


class _Loader(yaml.SafeLoader):
    """Bounded: aliases and merges make a small file grow without end (each level of a "billion laughs" tenfold)."""

    def __init__(self, text: str):
        super().__init__(text)
        self._depth, self._values, self._sizes = 0, 0, {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node, counted with all that it holds at every reference to it."""
        place = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            self._count(self._sizes.get(id(node), FILE_VALUES + 1), place)  # unknown while it is made: it holds itself
            return node
        self._depth += 1
        if self._depth > FILE_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"values nested more than {FILE_DEPTH} deep", problem_mark=place)
        before = self._values
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._count(1 + (len(node.value) // 100 if isinstance(node, yaml.ScalarNode) else 0), place)
        self._sizes[id(node)] = self._values - before
        return node

    def _count(self, size: int, place: yaml.Mark) -> None:
        self._values += size
        if self._values > FILE_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f"more than {FILE_VALUES} values (long texts count as several, aliases as what they stand for)",
                problem_mark=place,
            )

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are there once: of two, YAML would silently take the last."""
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Plain values from YAML that a stranger may have written.

    Raises:
        yaml.YAMLError: it is none, or is beyond `FILE_BYTES`, `FILE_VALUES` or `FILE_DEPTH`.
    """
    if len(text) > FILE_BYTES:
        raise yaml.MarkedYAMLError(problem=f"{len(text)} characters, more than the {FILE_BYTES} that are read")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError:
        raise
    except Exception as cause:  # a date of month 13, a number of 10,000 digits, a tag on another kind of value, ...
        problem = "a number of too many digits" if "digits" in str(cause) else "a value that is not what it looks like"
        raise yaml.MarkedYAMLError(problem=problem) from cause


def yaml_problem(cause: yaml.YAMLError) -> str:
    """What is wrong, in one phrase."""
    found = getattr(cause, "problem", None)
    if found is None and getattr(cause, "reason", None):  # a character that YAML does not allow
        found = f"{cause.reason} (U+{cause.character:04X})" if isinstance(cause.character, int) else cause.reason
    return (found or "text that is not YAML").removeprefix("found ")


def _read(path: Any, where: str) -> dict[str, Any]:
    try:
        values = parse_yaml(read_text(path, FILE_BYTES) if isinstance(path, Path) else path.read_text("utf-8"))
    except yaml.YAMLError as cause:
        mark = getattr(cause, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(where + line, yaml_problem(cause), "a YAML mapping of settings", "Mend the file.") from None
    except (OSError, ValueError) as cause:
        found = getattr(cause, "strerror", None) or str(cause)
        raise ConfigError(where, found, "a readable YAML file", "Check the path.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(where, f"a YAML {type(values).__name__}", "a mapping such as `epochs: 8`", "Mend the file.")
    return values


def _merge(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in values.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _build(values: dict[str, Any], overrides: Iterable[str]) -> Config:
    for override in overrides:
        values = _merge(values, _override(override))
    return Config(**{str(key): value for key, value in values.items()})


def _override(text: str) -> dict[str, Any]:
    """{"a": {"b": value}} from "a.b=value"."""
    name, equals, raw = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise ConfigError(f"setting {text!r}", "no key=value", "key=value such as train.lr=5e-4", "Write it that way.")
    if name == "preset":
        raise ConfigError(
            "preset", f"a setting ({_short(text)})", "the preset chosen at the start", "Use --preset NAME."
        )
    path = name.split(".")
    annotation: Any = Config
    for depth, part in enumerate(path):
        if not _is_section(annotation) or part not in annotation.model_fields:
            raise _unknown_key(path[: depth + 1] if _is_section(annotation) else path, annotation)
        annotation = annotation.model_fields[part].annotation
    value: Any = raw
    if annotation is not str:
        try:
            value = parse_yaml(raw)
        except yaml.YAMLError:
            raise ConfigError(name, _short(raw), "a YAML value", "Put quotes around the text.") from None
    if _is_section(annotation) and not isinstance(value, dict):
        inside = ", ".join(f"{name}.{key}" for key in annotation.model_fields)
        raise ConfigError(name, f"one value for a group of settings ({_short(raw)})", inside, "Set one of its keys.")
    for part in reversed(path):
        value = {part: value}
    return value


def _unknown_key(path: list[str], section: Any) -> ConfigError:
    name = ".".join(path)
    every = [key.name for key in keys()]
    last = {
        key.rsplit(".", 1)[-1]: [k for k in every if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]] for key in every
    }
    near = difflib.get_close_matches(name, every, n=3, cutoff=0.7)
    for match in difflib.get_close_matches(path[-1], last, n=3, cutoff=0.75):
        near += [key for key in last[match] if key not in near]
    siblings = list(section.model_fields) if _is_section(section) else []
    group = ".".join(path[:-1])
    expected = f"one of {', '.join(siblings)}" if siblings else f"no key below {group}, which is a single value"
    do = f"Did you mean {' or '.join(near[:3])}?" if near else "`engine config --keys` lists every key."
    return ConfigError(name, "an unknown key", expected + (f" in {group}" if siblings and group else ""), do)


def _short(value: Any) -> str:
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        text = "a number of too many digits"
    text = " ".join(text.split()) or "nothing"
    return text if len(text) <= 60 else text[:57] + "..."


def _translate(cause: ValidationError, root: type[Section]) -> ConfigError:
    """The first of pydantic's errors as one line in the user's terms."""
    error = cause.errors()[0]
    parts: list[str] = []
    section: Any = root
    annotation: Any = root
    for part in error["loc"]:
        if isinstance(part, int):
            parts[-1] += f"[{part}]"
        elif _is_section(annotation):
            parts.append(str(part))
            section = annotation
            annotation = section.model_fields[part].annotation if part in section.model_fields else None
    name, found = ".".join(parts), _short(error["input"])
    if error["type"] == "extra_forbidden":
        return _unknown_key(parts, section)
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return ConfigError(name, found, "a group of settings", f"Set one of {', '.join(annotation.model_fields)}.")
    context = error.get("ctx", {})
    limit = next((f"{sign} {context[k]}" for k, sign in _LIMITS.items() if k in context), None)
    if error["type"] == "literal_error":
        options = [str(option) for option in get_args(annotation) or ()]
        near = difflib.get_close_matches(str(error["input"]), options, n=1)
        do = f"Did you mean {near[0]}?" if near else "Choose one of these."
        return ConfigError(name, found, f"one of {', '.join(options)}" if options else context["expected"], do)
    if limit:
        return ConfigError(name, found, f"a value {limit}", "Change the value.")
    if error["type"] == "string_pattern_mismatch":
        return ConfigError(name, found, section.model_fields[parts[-1]].description, "Change the value.")
    if error["type"] == "missing":
        return ConfigError(name, "nothing", "a value", "Add it.")
    expected = error["msg"].removeprefix("Input should be ").split(", ")[0].replace("valid ", "")
    expected = {"a integer": "an integer", "a boolean": "true or false"}.get(expected, expected)
    return ConfigError(name, found, expected, "Change the value.")


_LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


class _Dumper(yaml.SafeDumper):
    """Lists of plain values on one line, groups on lines of their own."""


_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)
