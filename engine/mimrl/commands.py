"""Command lines of the published MIMRL code, as settings. A command line is parsed as text; nothing of it runs."""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, get_args

from engine.config import Config
from engine.errors import ConfigError
from engine.mimrl.settings import Compose, LastActivation
from engine.vocabulary import ACTIVATIONS, BASELINES, BOUNDS, CRITICS, ENCODERS, LOSSES, Freeze, ModelTask, ScheduleKind

REFERENCE_TEXT_ENCODER = "bert-base-uncased"
DATASETS = {
    **dict.fromkeys(("mosi_Dec", "mosi_SDK", "mosi_20", "mosi_50"), "mosi"),
    **dict.fromkeys(("mosei_Dec", "mosei_SDK", "mosei_20", "mosei_50"), "mosei"),
    "avec2019": "avec2019",
    **dict.fromkeys(
        ("pom_SDK", "pom", "youtube", "youtubev2", "mmmo", "mmmov2", "moud", "iemocap_20"), "custom"
    ),
}  # fmt: skip
SCHEDULES = [kind for kind in get_args(ScheduleKind) if kind != "none"]
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
    Flag("task", str, "regression", "model.task", choices=_same(*get_args(ModelTask))),
    Flag("num_class", int, "1", "model.num_class"),
    Flag("d_common", int, "128", "model.d_common"),
    Flag("encoders", str, "gru", "model.encoder", choices=_same(*ENCODERS)),
    Flag("features_compose_t", str, "mean", "model.compose_t", choices=_same(*get_args(Compose))),
    Flag("features_compose_k", str, "mean", "model.compose_k", choices=_same(*get_args(Compose))),
    Flag("activate", str, "gelu", "model.cubemlp.activate", choices=_same(*ACTIVATIONS)),
    Flag("time_len", int, "100", "data.time_len"),
    Flag("d_hiddens", _shapes, "10-2-128=5-2-128", "model.cubemlp.d_hiddens"),
    Flag("d_outs", _shapes, "10-2-128=5-2-128", "model.cubemlp.d_outs"),
    Flag("dropout_mlp", _floats, "0.5-0.5-0.5", "model.cubemlp.dropout", length=3),
    Flag("dropout", _floats, "0.5-0.5-0.5-0.5", "model.dropout", length=4),
    Flag("bias", bool, "", "model.cubemlp.bias"),
    Flag("ln_first", bool, "", "model.cubemlp.ln_first"),
    Flag("res_project", _bools, "1-1", "model.cubemlp.res_project"),
    Flag("critic_type", str, "separate", "objective.critic", choices=_same(*CRITICS)),
    Flag("baseline_type", str, "constant", "objective.baseline", note="`gaussain` is gaussian",
         choices={**_same(*BASELINES), "gaussain": "gaussian"}),
    Flag("bound_type", str, "infonce", "objective.bound", choices=_same(*BOUNDS)),
    Flag("loss_mi_coefficient1", _floats, "-".join(["0.1"] * 11), "objective.c1", length=11),
    Flag("loss_mi_coefficient2", _floats, "-".join(["0.1"] * 8), "objective.c2", length=8),
    Flag("mi_lr_rate", float, "1.0", "train.mi_lr_rate"),
    Flag("cmi_lr_rate", float, "1.0", fate="unused", note="the reference reads it and does not use it"),
    Flag("k_neighbor", int, "2", "objective.k_neighbor"),
    Flag("radius", float, "1.0", fate="unused", note="the reference reads it and does not use it"),
    Flag("cmi_last_acticate", str, "sigmoid", "objective.cmi_last_activate", choices=_same(*get_args(LastActivation))),
    Flag("stage1_n", int, "1", "train.stage1_n"),
    Flag("seed", int, "0", "seed", note="the draws differ: equal seeds do not give equal runs in the two programs"),
    Flag("loss", str, "MAE", "train.loss", choices=_same(*LOSSES)),
    Flag("gradient_clip", float, "1.0", "train.clip_value", note="0 or less is no clipping"),
    Flag("epochs_num", int, "2", "epochs"),
    Flag("optm", str, "Adam", "train.optimizer", choices={"Adam": "adam", "SGD": "sgd"},
         note="SAM is unsupported: the reference lists it and raises"),
    Flag("learning_rate", float, "4e-3", "train.lr"),
    Flag("bert_freeze", str, "no", "text.freeze", choices=_same(*get_args(Freeze))),
    Flag("bert_lr_rate", float, "-1", "text.lr_rate"),
    Flag("weight_decay", float, "0.0", "train.weight_decay"),
    Flag("lr_decrease", str, "step", "train.schedule.kind", choices=_same(*SCHEDULES)),
    Flag("lr_decrease_iter", _ints, "60",
         "train.schedule.step_size train.schedule.milestones train.schedule.patience",
         note="the one that the kind of schedule uses; exp uses none"),
    Flag("lr_decrease_rate", float, "0.1", "train.schedule.rate"),
    Flag("save_best_features", bool, "", "output.features"),
    Flag("print_params", bool, "", fate="unsupported", note="`engine train` does not list the parameters"),
    Flag("check_gradient", bool, "", fate="unsupported", note="non-finite values raise by themselves"),
    Flag("parallel", bool, "", fate="unsupported", note="start `torchrun -m engine train` for several GPUs"),
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
