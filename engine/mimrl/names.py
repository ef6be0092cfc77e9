"""Parameter names: those of the published MIMRL code and ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from engine.errors import CheckpointError
from engine.mimrl.settings import ESTIMATORS

MI_NAMES = [name for name, term in ESTIMATORS.items() if term.startswith("MI")]
CMI_NAMES = [name for name in ESTIMATORS if name not in MI_NAMES]
ESTIMATOR_PREFIX = "estimators."

_MODALITY = {"a": "audio_encoder", "v": "vision_encoder"}
_SEQUENCE = {"rnn": "rnn", "conv": "conv", "ln": "norm"}
AXES = {"l": "time", "k": "modality", "d": "channel"}
_MI_PART = {"critic_model.MLP_g": "critic.g", "critic_model.MLP_h": "critic.h", "critic_model.MLP_f": "critic.f",
            "baseline_model.MLP": "baseline.mlp"}  # fmt: skip


def _invert(table: Mapping[str, str]) -> dict[str, str]:
    return {value: key for key, value in table.items()}


def _one_of(table: Mapping[str, str]) -> str:
    return "|".join(re.escape(key) for key in table)


_FROM_MODALITY, _FROM_SEQUENCE, _FROMAXES, _FROM_MI_PART = map(_invert, (_MODALITY, _SEQUENCE, AXES, _MI_PART))
_MI_ANY = "|".join(name.lower() for name in MI_NAMES)
_CMI_ANY = "|".join(name.lower() for name in CMI_NAMES)

_TO_ENGINE = [
    (r"bertmodel\.(.+)", lambda m: f"text_encoder.model.{m[1]}"),
    (r"W_t\.weight", lambda m: "text_projection.weight"),
    (rf"({_one_of(_SEQUENCE)})_([av])\.(\w+)", lambda m: f"{_MODALITY[m[2]]}.{_SEQUENCE[m[1]]}.{m[3]}"),
    (
        r"mlp_encoder\.layers_stack\.(\d+)\.mlp_([lkd])\.(fc[12])\.(weight|bias)",
        lambda m: f"fusion.blocks.{m[1]}.{AXES[m[2]]}.{m[3]}.{m[4]}",
    ),
    (
        r"mlp_encoder\.layers_stack\.(\d+)\.res_projection_([lkd])\.weight",
        lambda m: f"fusion.blocks.{m[1]}.{AXES[m[2]]}.residual.weight",
    ),
    (
        r"mlp_encoder\.layers_stack\.(\d+)\.ln_([lkd])\.(weight|bias)",
        lambda m: f"fusion.blocks.{m[1]}.{AXES[m[2]]}.norm.{m[3]}",
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
        rf"fusion\.blocks\.(\d+)\.({_one_of(_FROMAXES)})\.(fc[12])\.(weight|bias)",
        lambda m: f"mlp_encoder.layers_stack.{m[1]}.mlp_{_FROMAXES[m[2]]}.{m[3]}.{m[4]}",
    ),
    (
        rf"fusion\.blocks\.(\d+)\.({_one_of(_FROMAXES)})\.residual\.weight",
        lambda m: f"mlp_encoder.layers_stack.{m[1]}.res_projection_{_FROMAXES[m[2]]}.weight",
    ),
    (
        rf"fusion\.blocks\.(\d+)\.({_one_of(_FROMAXES)})\.norm\.(weight|bias)",
        lambda m: f"mlp_encoder.layers_stack.{m[1]}.ln_{_FROMAXES[m[2]]}.{m[3]}",
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
