"""The general groups of settings. A task may replace any of them by a subclass with settings of its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from engine.config.section import (
    COMMON,
    LONGEST,
    MOST_EPOCHS,
    WIDEST,
    Positive,
    Probability,
    Section,
    as_modalities,
    as_names,
    dashed,
    no,
    none,
    off,
    one_or_many,
)
from engine.vocabulary import (
    MODALITIES,
    Alignment,
    Baseline,
    Bound,
    ClassificationLoss,
    ConditionalEstimator,
    Critic,
    DatasetName,
    Freeze,
    Gather,
    LabelScale,
    LengthRule,
    Loader,
    Modality,
    ModelTask,
    NonFinitePolicy,
    Normalization,
    OnDegenerate,
    Optimizer,
    RegressionLoss,
    ScheduleKind,
    Stage1Features,
)


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
        "auto",
        description="family of the files; auto recognises it by content; a name refuses files of every other family",
    )
    modalities: Annotated[list[Modality], as_modalities] = Field(
        list(MODALITIES),
        min_length=1,
        description="what a sample is made of; the data may hold others; terms that name an absent one are left out",
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
    label_column: Annotated[int | None, none] = Field(
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
    align: Alignment = Field(
        "words",
        description=".csd files: one row per word (the mean of its frames), or the frames of a segment as they are",
    )
    pool_audio: int = Field(
        1,
        ge=1,
        le=LONGEST,
        description="number of successive frames whose mean becomes one step; for recordings of minutes "
        "(100: one step a second of 10 ms frames)",
    )
    pool_vision: int = Field(1, ge=1, le=LONGEST, description="as pool_audio")
    skip_columns: Annotated[list[str], as_names] = Field(
        [],
        description="columns of a manifest's .csv files that are no features, such as [frameTime, timestamp, "
        "confidence, success]",
    )
    dataset: DatasetName = Field("mosi", description="names the metrics to report")
    label_scale: LabelScale = Field(
        "auto",
        description="whose classes the accuracies use: mosi cuts [-3, 3] (MOSI, MOSEI), sims cuts [-1, 1], phq8 is "
        "PHQ-8 / 25 in [0, 1]; none: MAE, Corr, CCC and RMSE only; auto: by data.dataset, where the labels fit it "
        "(custom: none)",
    )
    time_len: int = Field(
        40,
        ge=1,
        le=LONGEST,
        description="length of the time axis of the fusion encoder and cap on text tokens",
        json_schema_extra=COMMON,
    )
    length_rule: LengthRule = Field(
        "auto",
        description="how padding is told from frames: by recorded lengths where the file has them, else by frames of "
        "zeros (auto in fast mode); sum_zero is the published code's rule (auto in faithful mode)",
    )
    normalize_audio: Normalization = Field(
        "zscore",
        description="column by column, statistics fitted on the training frames only; minmax: to [-1, 1]",
        json_schema_extra=COMMON,
    )
    normalize_vision: Normalization = Field("zscore", description="as normalize_audio", json_schema_extra=COMMON)
    log_audio: bool = Field(False, description="log(f - min + 1) before normalising, min fitted on train")
    log_vision: bool = Field(False, description="as log_audio")
    clip: Annotated[float | None, none] = Field(
        5.0, gt=0, description="after z-scoring, values are clipped to +-clip; none: not clipped"
    )
    shuffle: bool = Field(True, description="a new order of the training samples every epoch")
    drop_last: bool = Field(
        False, description="drop a short last training batch (a last batch of one is always dropped)"
    )

    loader: Loader = Field(
        "auto",
        description="where batches are made: on the device, which holds the whole split (resident), in an NVIDIA DALI "
        "pipeline, or in PyTorch worker processes; all give the same batches (auto: resident where it fits)",
    )
    workers: Annotated[int | None, none] = Field(
        None,
        ge=0,
        le=256,
        description="torch: worker processes (none: half the cores, at most 4; on a CPU 0); dali: threads (none: 2)",
    )
    precision: Literal["float32", "float16"] = Field(
        "float32", description="of normalised frames: float16 halves their memory and rounds them to 11 bits"
    )
    max_padding: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, none] = Field(
        None,
        description="bound on the share of padding in an epoch's audio and vision: samples of similar length are "
        "batched together as far as needed; none: batches of any length",
    )
    augment: AugmentConfig = AugmentConfig()


class TextConfig(Section):
    """The text encoder named by the top-level `text_encoder`."""

    freeze: Annotated[Freeze, no] = Field(
        "no", description="part: encoder layers 0..8 frozen, embeddings trained", json_schema_extra=COMMON
    )
    lr_rate: float = Field(
        0.05,
        description="text encoder's learning rate = train.lr x this (<= 0: same as train.lr)",
        json_schema_extra=COMMON,
    )


class ModelConfig(Section):
    """What the model predicts."""

    task: ModelTask = Field("regression", description="what the head predicts")
    num_class: int = Field(1, ge=1, le=LONGEST, description="1 for regression")


class ObjectiveConfig(Section):
    """The information terms and their estimators. All values are in nats."""

    enabled: bool = Field(True, description="false trains on the task loss alone", json_schema_extra=COMMON)
    terms: Annotated[list[str], one_or_many] = Field(
        [],
        max_length=1000,
        json_schema_extra=COMMON,
        description='weighted sums of MI(X, Y) and CMI(X, Y | Z) of named features, such as "0.01 * MI(F, T)" or '
        '"inv = 0.01 * (MI(T, A) + MI(T, V))"; positive weights maximise; MI(X, Y, bound=club) has a bound of its own; '
        "empty: the task's own terms",
    )
    estimator_weights: dict[str, float] = Field(
        {},
        max_length=1000,
        description='stage 1: weights of single estimators, such as {"MI(F, T)": 2.0}; all others have weight 1',
    )
    critic: Critic = Field(
        "separate", description="scores h(y)g(x)', or an MLP on every pair", json_schema_extra=COMMON
    )
    bound: Bound = Field(
        "infonce",
        description="bound on the mutual information of the unconditional terms",
        json_schema_extra=COMMON,
    )
    baseline: Baseline = Field("constant", description="log-baseline of tuba, nwj and interpolate")
    hidden: int = Field(256, ge=1, le=WIDEST, description="hidden width of critics and conditional classifiers")
    embed: int = Field(128, ge=1, le=WIDEST, description="embedding width of the separate critic")
    alpha: float = Field(0.01, gt=0, lt=1, description="interpolate: weight of the multi-sample baseline")
    smile_tau: float = Field(5.0, gt=0, description="smile: scores are clipped to +-tau in the partition function")
    ema_rate: float = Field(0.01, gt=0, le=1, description="mine: rate of the log-domain moving average")
    cmi_estimator: ConditionalEstimator = Field(
        "ldr", description="value of the conditional terms; the other two are reported"
    )
    k_neighbor: int = Field(2, ge=1, le=LONGEST, description="neighbours that a query row has in the product sampler")
    on_degenerate: OnDegenerate = Field("raise", description="what a batch of one or non-finite scores do")
    gather: Gather = Field(
        "gather",
        description="with several ranks: estimates from the joined batch, by gathered rows or by keys that travel "
        '(ring); "off": from each rank\'s own batch, in loops of your own only',
    )

    @model_validator(mode="before")
    @classmethod
    def _without_compat(cls, values: Any) -> Any:
        """Older programs say compat="none", which is all that the general estimators compute."""
        if "compat" in cls.model_fields or not isinstance(values, dict) or values.get("compat") != "none":
            return values
        return {name: value for name, value in values.items() if name != "compat"}

    @field_validator("terms")
    @classmethod
    def _readable_terms(cls, texts: list[str]) -> list[str]:
        if texts:
            from engine.objective.expressions import parse_terms

            parse_terms(texts)
        return texts

    @field_validator("estimator_weights")
    @classmethod
    def _readable_weights(cls, weights: dict[str, float]) -> dict[str, float]:
        if weights:
            from engine.objective.expressions import parse_weights

            parse_weights(weights)
        return weights


class ScheduleConfig(Section):
    """Learning rates over the epochs, the same for both optimisers."""

    kind: ScheduleKind = Field("multi_step", description="kind of schedule")
    milestones: Annotated[list[Positive], dashed] = Field(
        [5], max_length=1000, description="multi_step: epochs at which the rate is multiplied, e.g. 9-60"
    )
    step_size: int = Field(60, ge=1, le=MOST_EPOCHS, description="step: epochs between two multiplications")
    rate: float = Field(0.1, gt=0, description="factor of every kind")
    patience: int = Field(10, ge=0, le=MOST_EPOCHS, description="plateau: epochs without a better validation loss")


class TrainConfig(Section):
    """Losses, the two stages, and their optimisers."""

    loss: Literal[RegressionLoss, ClassificationLoss] = Field("MAE", description="task loss", json_schema_extra=COMMON)
    stage1_n: int = Field(
        2, ge=0, le=1000, description="passes of stage 1 over the training set per epoch", json_schema_extra=COMMON
    )
    stage1_features: Stage1Features = Field(
        "auto",
        description="fresh: encoders run in every stage-1 pass (auto in faithful mode); cached: once per epoch (auto "
        "in fast mode); bank: last epoch's features",
    )
    optimizer: Optimizer = Field("adam", description="optimiser of both stages")
    lr: float = Field(
        1e-3, gt=0, description="learning rate of encoders, fusion encoder and head", json_schema_extra=COMMON
    )
    mi_lr_rate: float = Field(1.0, gt=0, description="estimators' learning rate = lr x this")
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty, both optimisers")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only")
    schedule: ScheduleConfig = ScheduleConfig()
    clip_value: Annotated[float | None, none] = Field(
        1.5, gt=0, description="clip every gradient element to +-clip_value; none: not clipped"
    )
    amp: Annotated[Literal["off", "auto", "bf16", "fp16"], off] = Field(
        "auto",
        description="type of the model's matrix products; auto: bf16 (fp16 on older GPUs) where the hardware supports "
        "it, else and in faithful mode off; off: float32; losses, information terms and evaluation are always float32",
    )
    compile: Annotated[Literal["off", "default", "reduce-overhead", "max-autotune"], off] = Field(
        "off", description="torch.compile mode for the layers that the model repeats; off: nothing is compiled"
    )
    graphs: Annotated[Literal["auto", "off", "emulate"], off] = Field(
        "auto",
        description="both stages as CUDA graphs, each shape captured once and replayed (auto: on a GPU); emulate: the "
        "same static functions without capture, on any device; off: one operation after another",
    )
    clip_norm: Annotated[float | None, none] = Field(
        None, gt=0, description="clip the norm of the stage's whole gradient; none: not clipped"
    )
    average: Annotated[Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] | None, none] = Field(
        "auto",
        description="decay of a moving average of the model's weights, one update per batch; the average is what is "
        "evaluated and kept (auto: 0.98 in fast mode, none in faithful mode)",
    )
    non_finite: NonFinitePolicy = Field(
        "stop",
        description="what a loss or a gradient that is NaN or infinite does: stop the run, or skip the step and count "
        "it (20 skipped steps in a row stop the run)",
    )
    checkpoint_minutes: Annotated[Annotated[float, Field(gt=0)] | None, none] = Field(
        10.0,
        description="a checkpoint within the epoch after so many minutes, written beside training; none: none by time",
    )
    checkpoint_steps: Annotated[Annotated[int, Field(ge=1)] | None, none] = Field(
        None,
        description="a checkpoint after so many batches of any stage; training waits until it is written, so that a "
        "run that is killed loses no more batches; none: none by batches",
    )
    timeout: float = Field(
        1800.0, gt=0, le=1e6, description="several ranks (torchrun): seconds that a rank waits for the others"
    )
    shard: bool = Field(
        False,
        description="several ranks (torchrun): each holds a part of the text encoder, of its gradients and of its "
        "optimiser state (FSDP2)",
    )


class OutputConfig(Section):
    """What a run leaves behind beside metrics, predictions and checkpoints."""

    tensorboard: bool = Field(True, description="write TensorBoard scalars")
    report: bool = Field(True, description="write report.html at the end")
    features: bool = Field(
        False, description="write the F, T, A, V features of every split at the best epoch", json_schema_extra=COMMON
    )
    progress: bool = Field(True, description="show progress and time left")
