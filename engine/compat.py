"""Moving from the reference: its parameter names, its checkpoints and its command line.

The reference is the published MIMRL code (IEEE Trans. Affective Computing 2025). Nothing here runs it: a checkpoint is
read with `torch.load(weights_only=True)`, a command line is parsed as text.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from engine import checkpoint
from engine.config import ACTIVATIONS, BOUNDS, Config, load_config, text_of
from engine.errors import CheckpointError, ConfigError, DataError, OutputError
from engine.files import is_compressed, user_path, write_json
from engine.run_folder import NORMALIZER, TOKENIZER, Checksums

if TYPE_CHECKING:
    from engine.loaders.normalize import Normalizer

MI_NAMES = ("F_T", "F_A", "F_V", "T_A", "T_V")
CMI_NAMES = ("AC_T", "TA_C", "VC_T", "TV_C", "TC_A", "TC_V")
ESTIMATOR_PREFIX = "estimators."

_MODALITY = {"a": "audio_encoder", "v": "vision_encoder"}
_SEQUENCE = {"rnn": "rnn", "conv": "conv", "ln": "norm"}
_AXIS = {"l": "time", "k": "modality", "d": "channel"}
_MI_PART = {"critic_model.MLP_g": "critic.g", "critic_model.MLP_h": "critic.h", "critic_model.MLP_f": "critic.f",
            "baseline_model.MLP": "baseline.mlp"}  # fmt: skip


def _invert(table: Mapping[str, str]) -> dict[str, str]:
    return {value: key for key, value in table.items()}


def _one_of(table: Mapping[str, str]) -> str:
    return "|".join(re.escape(key) for key in table)


_FROM_MODALITY, _FROM_SEQUENCE, _FROM_AXIS, _FROM_MI_PART = map(_invert, (_MODALITY, _SEQUENCE, _AXIS, _MI_PART))
_MI_ANY = "|".join(name.lower() for name in MI_NAMES)
_CMI_ANY = "|".join(name.lower() for name in CMI_NAMES)

_TO_ENGINE = [
    (r"bertmodel\.(.+)", lambda m: f"text_encoder.model.{m[1]}"),
    (r"W_t\.weight", lambda m: "text_projection.weight"),
    (rf"({_one_of(_SEQUENCE)})_([av])\.(\w+)", lambda m: f"{_MODALITY[m[2]]}.{_SEQUENCE[m[1]]}.{m[3]}"),
    (
        r"mlp_encoder\.layers_stack\.(\d+)\.mlp_([lkd])\.(fc[12])\.(weight|bias)",
        lambda m: f"fusion.blocks.{m[1]}.{_AXIS[m[2]]}.{m[3]}.{m[4]}",
    ),
    (
        r"mlp_encoder\.layers_stack\.(\d+)\.res_projection_([lkd])\.weight",
        lambda m: f"fusion.blocks.{m[1]}.{_AXIS[m[2]]}.residual.weight",
    ),
    (
        r"mlp_encoder\.layers_stack\.(\d+)\.ln_([lkd])\.(weight|bias)",
        lambda m: f"fusion.blocks.{m[1]}.{_AXIS[m[2]]}.norm.{m[3]}",
    ),
    (r"classifier\.(\d+)\.(weight|bias)", lambda m: f"head.layers.{m[1]}.{m[2]}"),
    (
        rf"vmi_estimator_({_MI_ANY})\.({_one_of(_MI_PART)})\.(\d+)\.(weight|bias)",
        lambda m: f"{ESTIMATOR_PREFIX}{m[1].upper()}.{_MI_PART[m[2]]}.{m[3]}.{m[4]}",
    ),
    (
        rf"vcmi_estimator_({_CMI_ANY})\.classifier\.mlp\.(\d+)\.(weight|bias)",
        lambda m: f"{ESTIMATOR_PREFIX}{m[1].upper()}.classifier.{m[2]}.{m[3]}",
    ),
]

_TO_REFERENCE = [
    (r"text_encoder\.model\.(.+)", lambda m: f"bertmodel.{m[1]}"),
    (r"text_projection\.weight", lambda m: "W_t.weight"),
    (
        rf"({_one_of(_FROM_MODALITY)})\.({_one_of(_FROM_SEQUENCE)})\.(\w+)",
        lambda m: f"{_FROM_SEQUENCE[m[2]]}_{_FROM_MODALITY[m[1]]}.{m[3]}",
    ),
    (
        rf"fusion\.blocks\.(\d+)\.({_one_of(_FROM_AXIS)})\.(fc[12])\.(weight|bias)",
        lambda m: f"mlp_encoder.layers_stack.{m[1]}.mlp_{_FROM_AXIS[m[2]]}.{m[3]}.{m[4]}",
    ),
    (
        rf"fusion\.blocks\.(\d+)\.({_one_of(_FROM_AXIS)})\.residual\.weight",
        lambda m: f"mlp_encoder.layers_stack.{m[1]}.res_projection_{_FROM_AXIS[m[2]]}.weight",
    ),
    (
        rf"fusion\.blocks\.(\d+)\.({_one_of(_FROM_AXIS)})\.norm\.(weight|bias)",
        lambda m: f"mlp_encoder.layers_stack.{m[1]}.ln_{_FROM_AXIS[m[2]]}.{m[3]}",
    ),
    (r"head\.layers\.(\d+)\.(weight|bias)", lambda m: f"classifier.{m[1]}.{m[2]}"),
    (
        rf"estimators\.({'|'.join(MI_NAMES)})\.({_one_of(_FROM_MI_PART)})\.(\d+)\.(weight|bias)",
        lambda m: f"vmi_estimator_{m[1].lower()}.{_FROM_MI_PART[m[2]]}.{m[3]}.{m[4]}",
    ),
    (
        rf"estimators\.({'|'.join(CMI_NAMES)})\.classifier\.(\d+)\.(weight|bias)",
        lambda m: f"vcmi_estimator_{m[1].lower()}.classifier.mlp.{m[2]}.{m[3]}",
    ),
]


def _translate(name: str, rules: list) -> str | None:
    for pattern, build in rules:
        if match := re.fullmatch(pattern, name):
            return build(match)
    return None


def _unknown_names(where: str, names: list[str]) -> CheckpointError:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return CheckpointError(
        where,
        f"parameters that are not in the published MIMRL model: {shown}",
        "the names of the published MIMRL model",
        "If the model was changed, rename or drop those parameters; a CubeMLP with prelu slopes cannot be imported.",
    )


def strip_module(name: str) -> str:
    """The name without the `module.` prefixes that DataParallel adds."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def reference_to_engine(name: str) -> str:
    """Our name of a parameter of the reference; `module.` prefixes are dropped.

    Names that begin with `estimators.` belong to the objective's state dict, all others to the model's.

    Raises:
        CheckpointError: the reference has no such parameter.
    """
    translated = _translate(strip_module(name), _TO_ENGINE)
    if translated is None:
        raise _unknown_names("parameter name", [name])
    return translated


def engine_to_reference(name: str) -> str:
    """The reference's name of one of our parameters: the inverse of `reference_to_engine`.

    Raises:
        CheckpointError: the reference has no counterpart (another fusion encoder, for instance).
    """
    translated = _translate(name, _TO_REFERENCE)
    if translated is None:
        raise CheckpointError(
            "parameter name",
            f"{name}, which the published MIMRL model does not have",
            "a parameter of MIMRL with CubeMLP",
            "Only a model with fusion=cubemlp has names in the reference.",
        )
    return translated


def split_reference_state(
    state: Mapping[str, Tensor], where: str = "reference checkpoint"
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Split a state dict of the reference into `(model state, objective state, unused names)`, under our names.

    Unused are buffers that carry no weight (`position_ids` of older transformers). The text encoder's pooler is kept.

    Raises:
        CheckpointError: a name the published model does not have; the first few are listed.
    """
    model: dict[str, Tensor] = {}
    objective: dict[str, Tensor] = {}
    unused: list[str] = []
    unknown: list[str] = []
    for name, tensor in state.items():
        plain = strip_module(name)
        if plain.endswith((".position_ids", ".token_type_ids")):
            unused.append(plain)
        elif (translated := _translate(plain, _TO_ENGINE)) is None:
            unknown.append(plain)
        else:
            (objective if translated.startswith(ESTIMATOR_PREFIX) else model)[translated] = tensor
    if unknown:
        raise _unknown_names(where, unknown)
    return model, objective, unused


# -- the command line -------------------------------------------------------------------------------------------------

REFERENCE_TEXT_ENCODER = "bert-base-uncased"
DATASETS = {
    **dict.fromkeys(("mosi_Dec", "mosi_SDK", "mosi_20", "mosi_50"), "mosi"),
    **dict.fromkeys(("mosei_Dec", "mosei_SDK", "mosei_20", "mosei_50"), "mosei"),
    "avec2019": "avec2019",
    **dict.fromkeys(
        ("pom_SDK", "pom", "youtube", "youtubev2", "mmmo", "mmmov2", "moud", "iemocap_20"), "custom"
    ),
}  # fmt: skip
_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def _bools(text: str) -> list[bool]:
    words = text.lower().split("-")
    if not all(word in _TRUE + _FALSE for word in words):
        raise ValueError
    return [word in _TRUE for word in words]


def _floats(text: str) -> list[float]:
    return [float(number) for number in text.split("-")]


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split("-")]


def _shapes(text: str) -> list[tuple[int, ...]]:
    blocks = [tuple(_ints(block)) for block in text.split("=")]
    if any(len(block) != 3 for block in blocks):
        raise ValueError
    return blocks


_KINDS = {
    str: "a word",
    int: "an integer",
    float: "a number",
    bool: "no value",
    _bools: "0 or 1 joined by `-`, such as 0-1-1",
    _floats: "numbers joined by `-`, such as 0.1-0.1 (no minus signs, no exponents)",
    _ints: "integers joined by `-`, such as 9-60",
    _shapes: "blocks of l-k-d joined by `=`, such as 50-3-128=10-3-128",
}


@dataclass(frozen=True)
class Flag:
    """One flag of the reference and what becomes of it.

    Attributes:
        name: without the dashes.
        read: how its value is read; bool is a switch without a value.
        default: the reference's default, as one would type it ("" for a switch: off).
        keys: our settings that it sets, separated by spaces; empty if there are none.
        fate: "mapped"; "unused" (no result depends on it, or on it in the reference); "unsupported".
        note: what to know about it.
        choices: the values the reference takes, where they are named; {value: ours}.
        length: how many values a list holds.
    """

    name: str
    read: Callable[[str], Any]
    default: str
    keys: str = ""
    fate: str = "mapped"
    note: str = ""
    choices: Mapping[str, str] | None = None
    length: int | None = None


def _same(*values: str) -> dict[str, str]:
    return {value: value for value in values}


FLAGS: tuple[Flag, ...] = (
    Flag("task_name", str, "test", fate="unused", note="name the run's folder with --out"),
    Flag("dataset", str, "mosi_SDK", "data.dataset", choices=DATASETS, note="--data names the files"),
    Flag("normalize", _bools, "0-0-0", "data.normalize_audio data.normalize_vision", length=3,
         note="1 is minmax by column, fitted on train (the reference: by split, all columns); no effect on `*_Dec`"),
    Flag("log_scale", _bools, "0-0-0", "data.log_audio data.log_vision", length=3, note="no effect on `*_Dec`"),
    Flag("text", str, "text", "text_encoder", note="`text` is the text encoder, other names are precomputed features"),
    Flag("audio", str, "covarep", "data.audio_features", note="if the files hold several sets; no effect on `*_Dec`"),
    Flag("video", str, "facet41", "data.vision_features", note="as --audio"),
    Flag("batch_size", int, "16", "batch_size"),
    Flag("num_workers", int, "4", fate="unused", note="loading needs no worker processes"),
    Flag("persistent_workers", bool, "", fate="unused", note="loading needs no worker processes"),
    Flag("pin_memory", bool, "", fate="unused", note="the loader decides"),
    Flag("drop_last", bool, "", "data.drop_last", note="training batches only; the reference also drops test samples"),
    Flag("task", str, "regression", "model.task", choices=_same("regression", "classification")),
    Flag("num_class", int, "1", "model.num_class"),
    Flag("d_common", int, "128", "model.d_common"),
    Flag("encoders", str, "gru", "model.encoder", choices=_same("gru", "lstm", "conv")),
    Flag("features_compose_t", str, "mean", "model.compose_t", choices=_same("mean", "sum", "cat")),
    Flag("features_compose_k", str, "mean", "model.compose_k", choices=_same("mean", "sum", "cat")),
    Flag("activate", str, "gelu", "model.cubemlp.activate", choices=_same(*ACTIVATIONS)),
    Flag("time_len", int, "100", "data.time_len"),
    Flag("d_hiddens", _shapes, "10-2-128=5-2-128", "model.cubemlp.d_hiddens"),
    Flag("d_outs", _shapes, "10-2-128=5-2-128", "model.cubemlp.d_outs"),
    Flag("dropout_mlp", _floats, "0.5-0.5-0.5", "model.cubemlp.dropout", length=3),
    Flag("dropout", _floats, "0.5-0.5-0.5-0.5", "model.dropout", length=4),
    Flag("bias", bool, "", "model.cubemlp.bias"),
    Flag("ln_first", bool, "", "model.cubemlp.ln_first"),
    Flag("res_project", _bools, "1-1", "model.cubemlp.res_project"),
    Flag("critic_type", str, "separate", "objective.critic", choices=_same("separate", "concat")),
    Flag("baseline_type", str, "constant", "objective.baseline", note="`gaussain` is gaussian",
         choices={**_same("constant", "unnormalized", "gaussian"), "gaussain": "gaussian"}),
    Flag("bound_type", str, "infonce", "objective.bound", choices=_same(*BOUNDS)),
    Flag("loss_mi_coefficient1", _floats, "-".join(["0.1"] * 11), "objective.c1", length=11),
    Flag("loss_mi_coefficient2", _floats, "-".join(["0.1"] * 8), "objective.c2", length=8),
    Flag("mi_lr_rate", float, "1.0", "train.mi_lr_rate"),
    Flag("cmi_lr_rate", float, "1.0", fate="unused", note="the reference reads it and does not use it"),
    Flag("k_neighbor", int, "2", "objective.k_neighbor"),
    Flag("radius", float, "1.0", fate="unused", note="the reference reads it and does not use it"),
    Flag("cmi_last_acticate", str, "sigmoid", "objective.cmi_last_activate", choices=_same("sigmoid", "hardtanh")),
    Flag("stage1_n", int, "1", "train.stage1_n"),
    Flag("seed", int, "0", "seed", note="the draws differ: equal seeds do not give equal runs in the two programs"),
    Flag("loss", str, "MAE", "train.loss", choices=_same("MAE", "MSE", "RMSE", "SIMSE", "CCC", "CE", "BCE", "Focal")),
    Flag("gradient_clip", float, "1.0", "train.clip_value", note="0 or less is no clipping"),
    Flag("epochs_num", int, "2", "epochs"),
    Flag("optm", str, "Adam", "train.optimizer", choices={"Adam": "adam", "SGD": "sgd"},
         note="SAM is unsupported: the reference lists it and raises"),
    Flag("learning_rate", float, "4e-3", "train.lr"),
    Flag("bert_freeze", str, "no", "text.freeze", choices=_same("no", "part", "all")),
    Flag("bert_lr_rate", float, "-1", "text.lr_rate"),
    Flag("weight_decay", float, "0.0", "train.weight_decay"),
    Flag("lr_decrease", str, "step", "train.schedule.kind", choices=_same("step", "multi_step", "exp", "plateau")),
    Flag("lr_decrease_iter", _ints, "60",
         "train.schedule.step_size train.schedule.milestones train.schedule.patience",
         note="the one that the kind of schedule uses; exp uses none"),
    Flag("lr_decrease_rate", float, "0.1", "train.schedule.rate"),
    Flag("save_best_features", bool, "", "output.features"),
    Flag("print_params", bool, "", fate="unsupported", note="`engine train` does not list the parameters"),
    Flag("check_gradient", bool, "", fate="unsupported", note="non-finite values raise by themselves"),
    Flag("parallel", bool, "", fate="unsupported", note="one device; the results do not depend on it"),
    Flag("cuda", str, "0", "device", note="only if given: N is cuda:N; else auto"),
)  # fmt: skip


def flag_table() -> str:
    """All flags of the reference and their fate, as the Markdown table of docs/moving_from_mimrl.md."""
    rows = ["| flag | default | here | note |", "|---|---|---|---|"]
    for flag in FLAGS:
        here = ", ".join(f"`{key}`" for key in flag.keys.split()) if flag.fate == "mapped" else f"*{flag.fate}*"
        rows.append(f"| `--{flag.name}` | {f'`{flag.default}`' if flag.default else 'off'} | {here} | {flag.note} |")
    return "\n".join(rows) + "\n"


def import_command(text: str) -> tuple[Config, list[str]]:
    """Translate a command line of the reference (`python Main.py --task_name …`) into our configuration.

    Flags that are not given have the reference's defaults. The mode is `faithful`, the text encoder bert-base-uncased,
    as in the reference; `data.path` stays empty.

    Args:
        text: the command; line continuations, a notebook's leading `!` and quoted pieces joined by `+` are understood,
            and so are unambiguous beginnings of flags.

    Returns:
        The configuration, and one note for each flag that was given but has no counterpart and for each thing that is
        done differently.

    Raises:
        ConfigError: an unknown flag, a value that cannot be read, settings that the reference or this project refuses.
    """
    given = _parse(text)
    values = {flag.name: given.get(flag.name, flag.default) for flag in FLAGS}
    read = {flag.name: _read(flag, values[flag.name]) for flag in FLAGS}
    settings = _settings(read, given)
    config = _build_config(settings)
    return config, _notes(given, read)


def render_command(config: Config, notes: Sequence[str]) -> str:
    """The YAML of an imported command, its notes as comments on top."""
    return "".join(f"# {note}\n" for note in notes) + config.to_yaml()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(
            "reference command", message, "a command line of the reference", "Compare with docs/moving_from_mimrl.md."
        )


def _words(text: str) -> list[str]:
    """The words from the first flag on."""
    if text.strip() and "--" not in text and "Main.py" not in text:
        raise ConfigError(
            "reference command", text, "python Main.py --task_name …", "Give the whole command in quotes."
        )
    text = re.sub(r"\\\r?\n", " ", text)
    text = re.sub(r"(['\"])\s*\+\s*\1", "", text)  # 'python … '+ '--flag …', as notebooks build commands
    text = text[text.find("--") :] if "--" in text else ""
    if text.count("'") % 2:
        text = text[: text.rindex("'")]
    try:
        return shlex.split(text)
    except ValueError as cause:
        raise ConfigError("reference command", str(cause).lower(), "matching quotes", "Correct the quotes.") from None


def _parse(text: str) -> dict[str, str]:
    """{flag: value as typed} of the flags that are given; a switch has the value "1"."""
    parser = _Parser(add_help=False, argument_default=argparse.SUPPRESS, prog="Main.py")
    for flag in FLAGS:
        if flag.read is bool:
            parser.add_argument(f"--{flag.name}", action="store_const", const="1")
        else:
            parser.add_argument(f"--{flag.name}")
    known, unknown = parser.parse_known_args(_words(text))
    if unknown:
        word = unknown[0]
        name = word.lstrip("-").partition("=")[0]
        near = difflib.get_close_matches(name, [flag.name for flag in FLAGS], n=2)
        raise ConfigError(
            "reference command",
            f"{'an unknown flag' if word.startswith('-') else 'a value without a flag'} {word}",
            "flags of the reference's Main.py",
            f"Did you mean {' or '.join(f'--{n}' for n in near)}?" if near else "Remove it.",
        )
    return vars(known)


def _read(flag: Flag, text: str) -> Any:
    if flag.read is bool:
        return text == "1"
    try:
        value = flag.read(text)
    except ValueError:
        raise ConfigError(f"--{flag.name}", text, _KINDS[flag.read], "Correct the value.") from None
    if flag.choices is not None and value not in flag.choices:
        near = difflib.get_close_matches(value, flag.choices, n=1)
        raise ConfigError(
            f"--{flag.name}",
            text,
            f"one of {', '.join(flag.choices)}",
            f"Did you mean {near[0]}?" if near else flag.note.capitalize() + "." if flag.note else "Correct the value.",
        )
    if flag.length is not None and len(value) != flag.length:
        raise ConfigError(f"--{flag.name}", f"{len(value)} values", f"{flag.length} values", "Correct the value.")
    return flag.choices[value] if flag.choices is not None else value


def _settings(read: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    """Our settings, {dotted key: value}. Most flags set one key to their value; the others follow."""
    settings = {
        flag.keys: read[flag.name]
        for flag in FLAGS
        if flag.fate == "mapped" and " " not in flag.keys and flag.name not in ("text", "audio", "video", "cuda")
    }
    scaled = "_Dec" not in given.get("dataset", "")
    for i, name in enumerate(("audio", "vision"), start=1):
        settings[f"data.normalize_{name}"] = "minmax" if scaled and read["normalize"][i] else "none"
        settings[f"data.log_{name}"] = scaled and read["log_scale"][i]
        flag = "audio" if name == "audio" else "video"
        settings[f"data.{name}_features"] = read[flag] if scaled and flag in given else "auto"
    settings["data.clip"] = None
    settings["mode"] = "faithful"
    settings["text_encoder"] = REFERENCE_TEXT_ENCODER if _text_is_encoded(read, given) else "features"
    settings["data.text_features"] = "auto" if _text_is_encoded(read, given) else read["text"]
    settings["train.clip_value"] = read["gradient_clip"] if read["gradient_clip"] > 0 else None
    settings["device"] = f"cuda:{read['cuda']}" if "cuda" in given else "auto"
    kind, numbers = read["lr_decrease"], read["lr_decrease_iter"]
    if kind in ("step", "plateau") and len(numbers) != 1:
        raise ConfigError(
            "--lr_decrease_iter", given["lr_decrease_iter"], f"one integer for --lr_decrease {kind}",
            "Use --lr_decrease multi_step for several epochs.",
        )  # fmt: skip
    if kind == "multi_step":
        settings["train.schedule.milestones"] = numbers
    elif kind in ("step", "plateau"):
        settings[f"train.schedule.{'step_size' if kind == 'step' else 'patience'}"] = numbers[0]
    return settings


def _text_is_encoded(read: Mapping[str, Any], given: Mapping[str, str]) -> bool:
    return read["text"] == "text" or "_Dec" in given.get("dataset", "")


def _build_config(settings: Mapping[str, Any]) -> Config:
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return Config(**tree)


def _notes(given: Mapping[str, str], read: Mapping[str, Any]) -> list[str]:
    """What a user should know, in the order of the flags."""
    dataset = given.get("dataset", "mosi_SDK")
    notes = [
        f"--{flag.name}: {flag.fate}; {flag.note}" for flag in FLAGS if flag.name in given and flag.fate != "mapped"
    ]
    if "_Dec" in dataset:
        for name in ("normalize", "log_scale"):
            if any(read[name]):
                notes.append(f"--{name} {given[name]}: no effect; the reference ignores it for {dataset}")
    else:
        if any(read["normalize"][1:]):
            notes.append(
                f"--normalize {given['normalize']}: minmax by column, fitted on the training split; the reference "
                "scales each split by its own extremes over all columns"
            )
        for name in ("normalize", "log_scale"):
            if read[name][0]:
                notes.append(f"--{name} {given[name]}: the text part is unsupported; text is not scaled")
        if read["text"] != "text":
            notes.append(f"--text {read['text']}: precomputed text features; the reference itself cannot run them")
    if DATASETS[dataset] == "custom" and not dataset.startswith("pom"):
        notes.append(
            f"--dataset {dataset}: unsupported as a format; convert the data to one that `engine inspect` reads"
        )
    elif "_Dec" not in dataset:
        notes.append(f"--dataset {dataset}: only the metrics' names follow from it; --data names the files")
    if read["drop_last"]:
        notes.append(
            "--drop_last: training batches only; the reference also drops samples of valid and test (`*_Dec` data)"
        )
    if read["activate"] == "prelu":
        notes.append("--activate prelu: the slope is learned; the reference itself fails with it")
    if read["activate"] == "rrelu":
        notes.append("--activate rrelu: the slope is random in training; the reference uses the mean slope there too")
    if read["lr_decrease"] == "plateau" and read["task"] == "classification":
        notes.append("--lr_decrease plateau: the reference waits for the validation loss of a classification to RISE")
    if _text_is_encoded(read, given):
        notes.append(
            f"text encoder: {REFERENCE_TEXT_ENCODER}, as in the reference; text_encoder=minilm is a small one that "
            "needs no download"
        )
    unasked = {"audio", "video", *given}  # the feature sets are the files' first ones where none is named
    silent = [f"{f.name} {f.default or 'off'}" for f in FLAGS if f.name not in unasked and f.fate == "mapped"]
    if silent:
        notes.append("the reference's defaults: " + ", ".join(silent))
    return notes


# -- checkpoints ------------------------------------------------------------------------------------------------------

_STATE_KEYS = ("model", "state_dict", "net", "network", "model_state_dict", "model_state")
_BERT_BASE = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12}
_HEAD_WIDTH = 64  # of every published BERT: its number of heads is hidden_size / 64


def import_checkpoint(
    path: str | Path,
    out: str | Path,
    command: str | None = None,
    config: str | Path | Config | None = None,
    text_encoder: str | None = None,
) -> list[str]:
    """Turn a checkpoint of the reference into a run folder that `engine evaluate` and `engine predict` take.

    Sizes come from the shapes of the parameters. What shapes cannot tell (activation, mean or sum, bound, …) comes from
    `command` or `config`, else from the reference's defaults; the notes say which. The mode is `faithful`.

    Args:
        path: a file written by `torch.save`: the reference's `best_valid_model.pth.tar`, or a state dict, raw or under
            a usual key. It is read without running any code in it.
        out: the run folder to write.
        command: the command line that trained it.
        config: our configuration (or its YAML file) to take instead of `command`.
        text_encoder: folder or name of the text encoder's configuration and tokenizer; default: what the shapes say,
            with the tokenizer of bert-base-uncased if they are bert-base's.

    Returns:
        Notes for the user: what was inferred, what was assumed, what is missing.

    Raises:
        CheckpointError: the file is missing, damaged, needs code to be read, or is not of the published model; or it
            contradicts `command` or `config`.
        ConfigError: both `command` and `config`, or a problem in one of them.
        OutputError: `out` holds another run or cannot be written.
    """
    from engine.loaders.text import load_tokenizer
    from engine.model.mimrl import build_model
    from engine.model.text_encoder import text_encoder_from_config
    from engine.objective import mimrl_objective

    path, out = user_path(path), user_path(out)
    if command is not None and config is not None:
        raise ConfigError("engine import", "both a command and a config", "one of them", "Leave one out.")
    if (out / "config.yaml").exists():
        raise OutputError(str(out), "another run", "an empty or new folder", "Choose another --out.")
    state, epoch = _read_reference(path)
    model_state, objective_state, unused = split_reference_state(state, str(path))
    for name in [name for name in model_state if name.startswith("text_encoder.model.pooler.")]:
        unused.append(engine_to_reference(name))
        del model_state[name]

    notes: list[str] = []
    if command is not None:
        settings, command_notes = import_command(command)
        superseded = ("text encoder:", "--normalize", "--log_scale")  # said below, of the imported run
        notes += [note for note in command_notes if not note.startswith(superseded)]
        source = "the command"
    elif config is not None:
        settings = config.model_copy(deep=True) if isinstance(config, Config) else load_config(config)
        source = "the config"
    else:
        settings, _ = import_command("")
        source = None
    shapes = _Shapes(str(path), model_state, objective_state)
    inferred = shapes.settings(settings)
    settings = _reconcile(str(path), settings, inferred, source)
    description = _text_description(str(path), shapes, text_encoder, notes)
    settings = settings.model_copy(update={"text_encoder": _tokenizer(shapes, text_encoder, out, notes)})

    resolved = settings.resolve()
    model = build_model(resolved, shapes.audio_dim, shapes.vision_dim, text_encoder_from_config(description))
    checkpoint.load_into(model, model_state, f"{path}: model")
    objective = mimrl_objective(resolved.objective, model.fused_dim, resolved.model.d_common)
    if objective_state:
        checkpoint.load_into(objective, objective_state, f"{path}: estimators")
    else:
        notes.append("estimators: none in the checkpoint; the run's are untrained")
    notes += _import_notes(settings, inferred, source, unused, path, epoch)

    write_json(out / "text_encoder" / "config.json", description)
    if text_encoder is not None:
        try:
            load_tokenizer(text_encoder).save(out)
        except DataError as problem:
            notes.append(f"tokenizer: {problem.found}; put its tokenizer.json into {out}")
    checkpoint.save(
        out / "best.safetensors",
        {"model": model.state_dict(), "objective": objective.state_dict()},
        {
            "epoch": epoch,
            "audio_dim": shapes.audio_dim,
            "vision_dim": shapes.vision_dim,
            "text_encoder": description,
            "imported_from": path.name,
        },
    )
    with Checksums(out).writing(NORMALIZER, *TOKENIZER):
        _no_normalizer(shapes).save(out / NORMALIZER)
    settings.save(out / "config.yaml")
    return notes


def _no_normalizer(shapes: _Shapes) -> Normalizer:
    """The reference normalises before training or not at all, and its checkpoints hold no statistics."""
    from engine.loaders.normalize import ColumnNormalizer, Normalizer

    return Normalizer(*(ColumnNormalizer.fit(np.zeros((1, d)), "none") for d in (shapes.audio_dim, shapes.vision_dim)))


def _read_reference(path: Path) -> tuple[dict[str, Tensor], int | None]:
    """The state dict in a file of `torch.save`, and the epoch beside it."""
    if not path.is_file():
        raise CheckpointError(
            str(path), "no such file", "a file written by torch.save", "Name a .pth.tar file of the reference."
        )
    if is_compressed(path):
        raise CheckpointError(
            str(path), "a compressed archive", "a file as torch.save writes it, whose tensors are as they are",
            "Save it anew with torch.save.",
        )  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickle protocols; what cannot be read is an error below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as cause:
        raise CheckpointError(
            str(path), cause.strerror or str(cause), "a readable file", "Check the file and its permissions."
        ) from None
    except Exception as cause:  # UnpicklingError, RuntimeError, EOFError, KeyError, …, by the kind of damage
        code = re.search(r"GLOBAL (\S+)", str(cause))
        if code:
            raise CheckpointError(
                str(path),
                f"a pickle that runs code when read ({code[1]})",
                "tensors and plain values only",
                "Save model.state_dict() with the code that trained it, and import that.",
            ) from None
        raise CheckpointError(
            str(path),
            f"a file that torch.load cannot read ({type(cause).__name__})",
            "a complete file written by torch.save",
            "It is damaged or of another kind: copy it again.",
        ) from None
    epoch = content.get("epoch") if isinstance(content, dict) else None
    state = content
    if isinstance(content, dict) and not _is_state(content):
        state = next((content[key] for key in _STATE_KEYS if _is_state(content.get(key))), None)
    if not _is_state(state):
        inside = (
            f"a dict of {', '.join(map(str, list(content)[:5]))}"
            if isinstance(content, dict)
            else type(content).__name__
        )
        raise CheckpointError(
            str(path),
            inside,
            f"a state dict, raw or under {', '.join(_STATE_KEYS)}",
            "Save model.state_dict() with the code that trained it, and import that.",
        )
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    return state, epoch if isinstance(epoch, int) else None


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


class _Shapes:
    """What the shapes of the parameters tell about the model."""

    def __init__(self, where: str, model: Mapping[str, Tensor], objective: Mapping[str, Tensor]):
        self.where, self.model, self.objective = where, model, objective
        self.d_common, self.text_dim = self["text_projection.weight"]
        self.encoder, self.audio_dim = self._sequence("audio_encoder")
        _, self.vision_dim = self._sequence("vision_encoder")

    def __getitem__(self, name: str) -> tuple[int, ...]:
        tensor = self.model.get(name, self.objective.get(name))
        if tensor is None:
            raise CheckpointError(
                self.where,
                f"no parameter {engine_to_reference(name)}",
                "every parameter of the published MIMRL model",
                "Import a checkpoint of the whole model.",
            )
        return tuple(tensor.shape)

    def _sequence(self, name: str) -> tuple[str, int]:
        if f"{name}.conv.weight" in self.model:
            return "conv", self[f"{name}.conv.weight"][1]
        gates, width = self[f"{name}.rnn.weight_ih_l0"]
        return ("gru" if gates == 3 * self.d_common else "lstm"), width

    def settings(self, assumed: Config) -> dict[str, Any]:
        """{our key: value} of everything that shapes determine; where they leave a choice, `assumed` makes it."""
        found: dict[str, Any] = {"model.d_common": self.d_common, "model.encoder": self.encoder}
        found |= self._cubemlp()
        found |= self._compose(found["model.cubemlp.d_outs"][-1], assumed)
        last = max(int(name.split(".")[2]) for name in self.model if name.startswith("head.layers."))
        found["model.num_class"] = self[f"head.layers.{last}.weight"][0]
        found["model.task"] = "regression" if found["model.num_class"] == 1 else "classification"
        if self.objective:
            separate = "estimators.F_T.critic.g.0.weight" in self.objective
            found["objective.critic"] = "separate" if separate else "concat"
            found["objective.hidden"] = self[f"estimators.F_T.critic.{'g' if separate else 'f'}.0.weight"][0]
            if separate:
                found["objective.embed"] = self["estimators.F_T.critic.g.6.weight"][0]
            if "estimators.F_T.baseline.mlp.0.weight" in self.objective:
                found["objective.baseline"] = "unnormalized"
            elif assumed.objective.baseline == "unnormalized":
                found["objective.baseline"] = "constant"
        return found

    def _cubemlp(self) -> dict[str, Any]:
        blocks = 1 + max((int(n.split(".")[2]) for n in self.model if n.startswith("fusion.blocks.")), default=0)
        axes = tuple(_AXIS.values())
        d_hiddens, d_outs, d_ins, projected, norms = [], [], [], [], []
        for i in range(blocks):
            block = [f"fusion.blocks.{i}.{axis}" for axis in axes]
            d_ins.append(tuple(self[f"{b}.fc1.weight"][1] for b in block))
            d_hiddens.append(tuple(self[f"{b}.fc1.weight"][0] for b in block))
            d_outs.append(tuple(self[f"{b}.fc2.weight"][0] for b in block))
            norms.append(tuple(self[f"{b}.norm.weight"][0] for b in block))
            projected.append(f"{block[0]}.residual.weight" in self.model)
        found = {
            "data.time_len": d_ins[0][0],
            "model.cubemlp.d_hiddens": d_hiddens,
            "model.cubemlp.d_outs": d_outs,
            "model.cubemlp.res_project": projected,
            "model.cubemlp.bias": "fusion.blocks.0.time.fc1.bias" in self.model,
        }
        if d_ins != d_outs:  # where no axis changes its length, both places of the LayerNorm have the same size
            found["model.cubemlp.ln_first"] = norms == d_ins
        return found

    def _compose(self, cube: tuple[int, int, int], assumed: Config) -> dict[str, str]:
        """cat multiplies the width of the fused feature by the length of the axis; mean and sum look alike."""
        t, k, d = cube
        width = self["head.layers.0.weight"][1]
        wanted = (assumed.model.compose_t, assumed.model.compose_k)
        fits = [
            (how_t, how_k)
            for how_t in ("mean", "sum", "cat")
            for how_k in ("mean", "sum", "cat")
            if d * (t if how_t == "cat" else 1) * (k if how_k == "cat" else 1) == width
        ]
        if not fits:
            raise CheckpointError(
                self.where,
                f"a classifier of input width {width} after a cube of {t}-{k}-{d}",
                f"{d}, {d * k}, {d * t} or {d * t * k}",
                "Import a checkpoint of the published model.",
            )
        how_t, how_k = wanted if wanted in fits else fits[0]
        return {"model.compose_t": how_t, "model.compose_k": how_k}

    def bert(self) -> dict[str, int]:
        """BertConfig's sizes."""
        prefix = "text_encoder.model."
        vocab, hidden = self[f"{prefix}embeddings.word_embeddings.weight"]
        layers = {int(name.split(".")[4]) for name in self.model if name.startswith(f"{prefix}encoder.layer.")}
        return {
            "vocab_size": vocab,
            "hidden_size": hidden,
            "num_hidden_layers": len(layers),
            "intermediate_size": self[f"{prefix}encoder.layer.0.intermediate.dense.weight"][0],
            "max_position_embeddings": self[f"{prefix}embeddings.position_embeddings.weight"][0],
            "type_vocab_size": self[f"{prefix}embeddings.token_type_embeddings.weight"][0],
        }


def _reconcile(where: str, settings: Config, inferred: Mapping[str, Any], source: str | None) -> Config:
    """`settings` with what the shapes say; where the user stated something else, an error."""
    values = settings.model_dump()
    for key, value in inferred.items():
        *path, last = key.split(".")
        node = values
        for part in path:
            node = node[part]
        if source is not None and node[last] != value:
            raise CheckpointError(
                where,
                f"{key}={text_of(value)} by the shapes of its parameters",
                f"{text_of(node[last])}, as {source} says",
                f"Give the command or config that trained this checkpoint, or correct {key}.",
            )
        node[last] = value
    values["mode"] = "faithful"
    values["data"] |= {"normalize_audio": "none", "normalize_vision": "none", "log_audio": False, "log_vision": False}
    if source is None and values["model"]["task"] == "classification":
        values["train"]["loss"] = "CE"
    return Config(**values)


def _text_description(where: str, shapes: _Shapes, text_encoder: str | None, notes: list[str]) -> dict[str, Any]:
    """The text encoder's Hugging Face configuration."""
    sizes = shapes.bert()
    if sizes["hidden_size"] != shapes.text_dim:
        raise CheckpointError(
            where,
            f"a text encoder of width {sizes['hidden_size']} before W_t of width {shapes.text_dim}",
            "equal widths",
            "Import a checkpoint of the whole model.",
        )
    if text_encoder is None:
        from transformers import BertConfig

        heads = max(1, sizes["hidden_size"] // _HEAD_WIDTH)
        notes.append(
            f"text encoder: BERT of {sizes['num_hidden_layers']} layers, width {sizes['hidden_size']}; ASSUMED are "
            f"{heads} attention heads (width / {_HEAD_WIDTH}), gelu and layer_norm_eps 1e-12: name its folder with "
            "--text-encoder to be sure"
        )
        return json.loads(BertConfig(**sizes, num_attention_heads=heads).to_json_string(use_diff=False))
    from transformers import AutoConfig

    from engine.model.text_encoder import load_pretrained

    given = load_pretrained(AutoConfig, text_encoder)
    for key, size in sizes.items():
        if getattr(given, key, size) != size:
            raise CheckpointError(
                where,
                f"a text encoder with {key} {size}",
                f"{getattr(given, key)}, as in {text_encoder}",
                "Name the text encoder that the checkpoint was trained with.",
            )
    return json.loads(given.to_json_string())


def _tokenizer(shapes: _Shapes, text_encoder: str | None, out: Path, notes: list[str]) -> str:
    """The value of our setting `text_encoder`, which names the tokenizer."""
    if text_encoder is not None:
        return text_encoder
    if _BERT_BASE.items() <= shapes.bert().items():
        notes.append(f"tokenizer: {REFERENCE_TEXT_ENCODER}, whose sizes the text encoder has")
        return REFERENCE_TEXT_ENCODER
    folder = out / "text_encoder"
    notes.append(f"tokenizer: unknown; put its files into {folder}, or set text_encoder in config.yaml")
    return str(folder)


def _import_notes(
    settings: Config, inferred: Mapping[str, Any], source: str | None, unused: list[str], path: Path, epoch: int | None
) -> list[str]:
    # A mean and a sum have the same shapes.
    certain = {k: v for k, v in inferred.items() if not (k.startswith("model.compose_") and v != "cat")}
    notes = ["from the shapes: " + ", ".join(f"{key}={text_of(value)}" for key, value in certain.items())]
    assumed = {
        "model.compose_t": settings.model.compose_t,
        "model.compose_k": settings.model.compose_k,
        "model.cubemlp.activate": settings.model.cubemlp.activate,
        "model.cubemlp.ln_first": settings.model.cubemlp.ln_first,
        "objective.bound": settings.objective.bound,
        "objective.baseline": settings.objective.baseline,
        "objective.k_neighbor": settings.objective.k_neighbor,
        "objective.cmi_last_activate": settings.objective.cmi_last_activate,
    }
    told = ", ".join(f"{key}={text_of(value)}" for key, value in assumed.items() if key not in certain)
    notes.append(f"from {source}: {told}" if source else f"ASSUMED, for want of a command or config: {told}")
    notes.append(
        "normalisation: none, for a checkpoint holds no statistics (the reference has none for `*_Dec` data); "
        "give data scaled as in training"
    )
    if unused:
        notes.append("not used: " + ", ".join(unused))
    if epoch is not None and path.name.startswith("best_"):
        notes.append(
            f"{path.name}: the reference keeps references to its parameters, not copies, so its `best` files hold the "
            "weights of the LAST epoch of the run: evaluate before comparing with its log"
        )
    return notes
