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
AXES = {"l": "time", "k": "modality", "d": "channel"}

_WORDS = {
    "modality": {"a": "audio_encoder", "v": "vision_encoder"},
    "layer": {"rnn": "rnn", "conv": "conv", "ln": "norm"},
    "axis": AXES,
    "mi": {name.lower(): name for name in MI_NAMES},
    "cmi": {name.lower(): name for name in CMI_NAMES},
    "part": {"critic_model.MLP_g": "critic.g", "critic_model.MLP_h": "critic.h", "critic_model.MLP_f": "critic.f",
             "baseline_model.MLP": "baseline.mlp"},
}  # fmt: skip
"""Parts of a name that have other words in the two, {published: ours}."""

_FORMS = {"rest": ".+", "leaf": r"\w+", "n": r"\d+", "fc": "fc[12]", "kind": "weight|bias"}
"""Parts of a name that are the same in both, as patterns."""

_NAMES = (
    ("bertmodel.{rest}", "text_encoder.model.{rest}"),
    ("W_t.weight", "text_projection.weight"),
    ("{layer}_{modality}.{leaf}", "{modality}.{layer}.{leaf}"),
    ("mlp_encoder.layers_stack.{n}.mlp_{axis}.{fc}.{kind}", "fusion.blocks.{n}.{axis}.{fc}.{kind}"),
    ("mlp_encoder.layers_stack.{n}.res_projection_{axis}.weight", "fusion.blocks.{n}.{axis}.residual.weight"),
    ("mlp_encoder.layers_stack.{n}.ln_{axis}.{kind}", "fusion.blocks.{n}.{axis}.norm.{kind}"),
    ("classifier.{n}.{kind}", "head.layers.{n}.{kind}"),
    ("vmi_estimator_{mi}.{part}.{n}.{kind}", "estimators.{mi}.{part}.{n}.{kind}"),
    ("vcmi_estimator_{cmi}.classifier.mlp.{n}.{kind}", "estimators.{cmi}.classifier.{n}.{kind}"),
)
"""Every name of the published model, and ours."""

_OURS = {part: {ours: published for published, ours in words.items()} for part, words in _WORDS.items()}


def _pattern(name: str, words: Mapping[str, Mapping[str, str]]) -> re.Pattern[str]:
    """What matches the names of one form; `words`: those of its parts."""
    pieces = re.split(r"\{(\w+)\}", name)
    for i in range(1, len(pieces), 2):
        part = pieces[i]
        form = _FORMS[part] if part in _FORMS else "|".join(map(re.escape, words[part]))
        pieces[i] = f"(?P<{part}>{form})"
    pieces[::2] = map(re.escape, pieces[::2])
    return re.compile("".join(pieces))


_TO_ENGINE = [(_pattern(published, _WORDS), ours) for published, ours in _NAMES]
_TO_REFERENCE = [(_pattern(ours, _OURS), published) for published, ours in _NAMES]


def _translate(
    name: str, rules: list[tuple[re.Pattern[str], str]], words: Mapping[str, Mapping[str, str]]
) -> str | None:
    for pattern, other in rules:
        if match := pattern.fullmatch(name):
            return other.format(
                **{part: words.get(part, {}).get(word, word) for part, word in match.groupdict().items()}
            )
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
    translated = _translate(strip_module(name), _TO_ENGINE, _WORDS)
    if translated is None:
        raise _unknown_names("parameter name", [name])
    return translated


def engine_to_reference(name: str) -> str:
    """The reference's name of one of our parameters: the inverse of `reference_to_engine`.

    Raises:
        CheckpointError: the reference has no counterpart (another fusion encoder, for instance).
    """
    translated = _translate(name, _TO_REFERENCE, _OURS)
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
        elif (translated := _translate(plain, _TO_ENGINE, _WORDS)) is None:
            unknown.append(plain)
        else:
            (objective if translated.startswith(ESTIMATOR_PREFIX) else model)[translated] = tensor
    if unknown:
        raise _unknown_names(where, unknown)
    return model, objective, unused
