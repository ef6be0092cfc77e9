"""Words that settings choose among, each list once. Settings, help, errors and the code that acts on them read it here.

>>> "infonce" in BOUNDS
True
"""

from typing import Literal, get_args

Bound = Literal["infonce", "dv", "mine", "tuba", "nwj", "js", "js_fgan", "smile", "interpolate"]
VariationalBound = Literal["club", "club_sample", "l1out", "ba"]
Critic = Literal["separate", "concat"]
Baseline = Literal["constant", "unnormalized", "gaussian"]
ConditionalEstimator = Literal["ldr", "dv", "nwj"]
OnDegenerate = Literal["raise", "skip"]
NonFinitePolicy = Literal["stop", "skip"]
Encoder = Literal["gru", "lstm", "conv"]
Activation = Literal["elu", "gelu", "hardshrink", "hardtanh", "leakyrelu", "prelu", "relu", "rrelu", "tanh"]
RegressionLoss = Literal["MAE", "MSE", "RMSE", "SIMSE", "CCC"]
ClassificationLoss = Literal["CE", "BCE", "Focal"]
Modality = Literal["text", "audio", "vision"]
Split = Literal["train", "valid", "test"]
ModelTask = Literal["regression", "classification"]
Loader = Literal["auto", "resident", "dali", "torch"]
KnownLengthRule = Literal["recorded", "all_zero", "sum_zero"]
LengthRule = Literal["auto", KnownLengthRule]
Alignment = Literal["words", "segments"]
Normalization = Literal["none", "zscore", "minmax"]
Freeze = Literal["no", "part", "all"]
Optimizer = Literal["adam", "sgd"]
ScheduleKind = Literal["none", "step", "multi_step", "exp", "plateau"]
Stage1Features = Literal["auto", "fresh", "cached", "bank"]
DatasetName = Literal["mosi", "mosei", "sims", "avec2019", "custom"]
Gather = Literal["off", "gather", "ring"]
LabelScale = Literal["auto", "mosi", "sims", "phq8", "none"]

BOUNDS: tuple[str, ...] = get_args(Bound)
VARIATIONAL_BOUNDS: tuple[str, ...] = get_args(VariationalBound)
UPPER_BOUNDS = VARIATIONAL_BOUNDS[:3]
CRITICS: tuple[str, ...] = get_args(Critic)
BASELINES: tuple[str, ...] = get_args(Baseline)
GATHERS: tuple[str, ...] = get_args(Gather)
ENCODERS: tuple[str, ...] = get_args(Encoder)
ON_DEGENERATE: tuple[str, ...] = get_args(OnDegenerate)
NON_FINITE: tuple[str, ...] = get_args(NonFinitePolicy)
MODEL_TASKS: tuple[str, ...] = get_args(ModelTask)
CONDITIONAL_ESTIMATORS: tuple[str, ...] = get_args(ConditionalEstimator)
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
REGRESSION_LOSSES: tuple[str, ...] = get_args(RegressionLoss)
CLASSIFICATION_LOSSES: tuple[str, ...] = get_args(ClassificationLoss)
LOSSES = REGRESSION_LOSSES + CLASSIFICATION_LOSSES
MODALITIES: tuple[str, ...] = get_args(Modality)
SPLITS: tuple[str, ...] = get_args(Split)
LENGTH_RULES: tuple[str, ...] = get_args(LengthRule)
ALIGNMENTS: tuple[str, ...] = get_args(Alignment)
