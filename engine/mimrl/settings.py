"""MIMRL's own settings: encoders, fusion encoder and head, and its eight information terms by their coefficients."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from engine.config import Config, ModelConfig, ObjectiveConfig
from engine.config.help import dash
from engine.config.section import COMMON, LONGEST, WIDEST, Probability, Section, dashed, none, spread
from engine.errors import ConfigError
from engine.vocabulary import MODALITIES, Activation, Encoder

TERMS = {
    "I(F;T)": "MI(F, T)",
    "I(F;A)": "MI(F, A)",
    "I(F;V)": "MI(F, V)",
    "inv": "MI(T, A) + MI(T, V)",
    "spec_t": "CMI(T, C | A) + CMI(T, C | V) - CMI(T, A | C) - CMI(T, V | C)",
    "spec_a": "CMI(A, C | T) - CMI(T, A | C)",
    "spec_v": "CMI(V, C | T) - CMI(T, V | C)",
    "comp": "CMI(T, A | C) + CMI(T, V | C)",
}
"""The eight information terms in the order of `objective.c2`: fused, invariant, specific and complementary.

F is the fused feature; T, A and V are those of text, audio and vision; C is the label.
"""

ESTIMATORS = {
    "F_T": "MI(F, T)",
    "F_A": "MI(F, A)",
    "F_V": "MI(F, V)",
    "T_A": "MI(T, A)",
    "T_V": "MI(T, V)",
    "AC_T": "CMI(A, C | T)",
    "TA_C": "CMI(T, A | C)",
    "VC_T": "CMI(V, C | T)",
    "TV_C": "CMI(T, V | C)",
    "TC_A": "CMI(T, C | A)",
    "TC_V": "CMI(T, C | V)",
}
"""The eleven estimators in the order of `objective.c1`, by the names that the published code gives them."""

C1, C2 = [1.0] * len(ESTIMATORS), [0.01] * len(TERMS)

Compose = Literal["mean", "sum", "cat"]
LastActivation = Literal["sigmoid", "hardtanh"]


def _shapes(value: Any) -> Any:
    """The blocks of "20-3-128=10-3-128", which is how people write them."""
    if isinstance(value, str):
        value = value.split("=")
    if isinstance(value, (list, tuple)):
        return [block.strip().split("-") if isinstance(block, str) else block for block in value]
    return value


Width = Annotated[int, Field(ge=1, le=LONGEST)]
Shapes = Annotated[list[tuple[Width, Width, Width]], BeforeValidator(_shapes)]


class CubeMLPConfig(Section):
    """The CubeMLP fusion encoder: one entry per block. Shapes are time-modality-channel, e.g. 20-3-128=10-3-128."""

    d_hiddens: Shapes = Field(
        [(20, 3, 128), (10, 3, 128)],
        min_length=1,
        max_length=64,
        description="hidden sizes, one shape per block",
        json_schema_extra=COMMON,
    )
    d_outs: Shapes = Field(
        [(20, 3, 128), (10, 3, 128)],
        min_length=1,
        max_length=64,
        description="output sizes, one shape per block",
        json_schema_extra=COMMON,
    )
    activate: Activation = Field("gelu", description="activation between the two linear layers of each axis")
    bias: bool = Field(True, description="bias of those linear layers")
    ln_first: bool = Field(False, description="LayerNorm before the MLP instead of after the residual sum")
    res_project: Annotated[list[bool], dashed] = Field(
        [True, True],
        max_length=64,
        description="one per block: linear residual (true) or identity (false; the sizes must agree)",
    )
    dropout: Annotated[tuple[Probability, Probability, Probability], spread(3)] = Field(
        (0.0, 0.0, 0.0), description="time, modality, channel"
    )


class MIMRLModelConfig(ModelConfig):
    """Encoders, fusion encoder and head."""

    d_common: int = Field(128, ge=1, le=WIDEST, description="width D of the text, audio and vision features")
    encoder: Encoder = Field("gru", description="audio and vision encoder", json_schema_extra=COMMON)
    fusion: str = Field(
        "cubemlp",
        description="cubemlp, tfn, transformer, or a name given to engine.register_fusion",
        json_schema_extra=COMMON,
    )
    cubemlp: CubeMLPConfig = CubeMLPConfig()
    text_padding: Literal["mean", "zero"] = Field(
        "mean",
        description="fast mode: what the fusion encoder finds past a sentence's end; mean is the sentence's mean "
        "(faithful mode: the text encoder's outputs at padding)",
    )
    compose_t: Compose = Field("mean", description="how CubeMLP's output is joined over time")
    compose_k: Compose = Field("mean", description="how CubeMLP's output is joined over modalities, before time")
    dropout: Annotated[tuple[Probability, Probability, Probability, Probability], spread(4)] = Field(
        (0.1, 0.1, 0.1, 0.1), description="text, audio, vision, head"
    )
    modality_dropout: Probability | Literal["auto"] = Field(
        "auto",
        description="share of a training batch whose audio, and likewise whose vision, the fusion encoder does not see "
        "(auto: 0.5 in fast mode with text, else 0)",
    )


class MIMRLObjectiveConfig(ObjectiveConfig):
    """The information terms and their estimators. `c1` and `c2` are a short way to write the published ones."""

    cmi_last_activate: LastActivation = Field("sigmoid", description="compat=mimrl only")
    c1: Annotated[Annotated[list[float], spread(len(ESTIMATORS))] | None, none] = Field(
        C1,
        description="stage 1: one coefficient per estimator (F_T F_A F_V T_A T_V, then AC_T TA_C VC_T TV_C TC_A TC_V); "
        "one number stands for all; none: objective.estimator_weights gives them",
    )
    c2: Annotated[Annotated[list[float], spread(len(TERMS))] | None, none] = Field(
        C2,
        description="stage 2: I(F;T) I(F;A) I(F;V) inv spec_t spec_a spec_v comp; one number stands for all; none: "
        "objective.terms gives the terms",
        json_schema_extra=COMMON,
    )
    compat: Literal["auto", "none", "mimrl"] = Field(
        "auto", description="mimrl reproduces the published code's estimators, faults included (auto in faithful mode)"
    )

    @model_validator(mode="after")
    def _vectors(self) -> MIMRLObjectiveConfig:
        """Written terms and weights take the place of the default vectors."""
        replaced = {"c2": bool(self.terms), "c1": bool(self.terms or self.estimator_weights)}
        for name, default, entries in (("c1", C1, ESTIMATORS), ("c2", C2, TERMS)):
            if name not in self.model_fields_set:
                self.__dict__[name] = None if replaced[name] else list(default)
            vector = getattr(self, name)
            if vector is not None and len(vector) != len(entries):
                raise ConfigError(
                    f"objective.{name}",
                    f"{len(vector)} coefficients",
                    f"{len(entries)}, for {' '.join(entries)}",
                    "Give one number for each, or a single number for all.",
                )
        return self


def written_terms(objective: MIMRLObjectiveConfig) -> list[str]:
    """The information terms as text: `terms`, or the eight published ones with the coefficients `c2`.

    >>> written_terms(MIMRLObjectiveConfig(c2=0.5))[3]
    'inv = 0.5 * (MI(T, A) + MI(T, V))'
    """
    if objective.c2 is None:
        return objective.terms
    pairs = zip(objective.c2, TERMS.items(), strict=True)
    return [f"{c!r} * {text}" if name.startswith("I(") else f"{name} = {c!r} * ({text})" for c, (name, text) in pairs]


# -- checks and what `auto` stands for --------------------------------------------------------------


def check(config: Config) -> None:
    """Raise `ConfigError` if two of MIMRL's settings contradict each other."""
    _check_vectors(config.objective)
    _check_terms(config)
    _check_modalities(config)
    if config.model.fusion == "cubemlp":
        _check_cubemlp(config)


def _check_vectors(objective: MIMRLObjectiveConfig) -> None:
    rivals = (("c1", "estimator_weights"), ("c1", "terms"), ("c2", "terms"))
    for vector, written in rivals:
        if getattr(objective, vector) is not None and getattr(objective, written):
            raise ConfigError(
                f"objective.{written}",
                f"objective.{vector} beside it",
                "one of the two",
                f"Set objective.{vector}=none, or drop objective.{written}.",
            )
    if objective.c2 is None and not objective.terms:
        raise ConfigError("objective.c2", "none and no objective.terms", "one of the two", "Give objective.terms.")


def _check_terms(config: Config) -> None:
    """Written terms use features that there are, and weights are of terms in use."""
    objective = config.objective
    if not objective.terms and not objective.estimator_weights:
        return
    from engine.objective.expressions import parse_terms, stage1_weights, term_text

    expressions = parse_terms(written_terms(objective))
    features = ["F", *(name[0].upper() for name in config.data.modalities), "C"]
    for expression in expressions if objective.terms else ():
        for term, _ in expression.coefficients:
            for feature in (term.x, term.y, term.given):
                if feature is not None and feature not in features:
                    raise ConfigError(
                        "objective.terms",
                        f"the feature {feature} in {term_text(term)}",
                        f"{', '.join(features[:-1])} or C",
                        "F is the fused feature, C the label; the others are those of data.modalities.",
                    )
    stage1_weights(expressions, objective.estimator_weights)


def _check_modalities(config: Config) -> None:
    names = config.data.modalities
    if len(names) == len(MODALITIES):
        return
    listed = f"[{', '.join(names)}]"
    if config.mode == "faithful":
        raise ConfigError(
            "data.modalities",
            f"{listed} with mode=faithful",
            "all three: the published model has no other form",
            "Use mode=fast.",
        )
    if "text" not in names and config.model.modality_dropout not in ("auto", 0):
        raise ConfigError(
            "model.modality_dropout",
            f"{config.model.modality_dropout:g} with data.modalities={listed}",
            "0 or auto: it hides audio and vision behind the text",
            "Set model.modality_dropout=auto.",
        )


def _check_cubemlp(config: Config) -> None:
    cube = config.model.cubemlp
    if not len(cube.d_hiddens) == len(cube.d_outs) == len(cube.res_project):
        raise ConfigError(
            "model.cubemlp",
            f"{len(cube.d_hiddens)} d_hiddens, {len(cube.d_outs)} d_outs and {len(cube.res_project)} res_project",
            "one entry of each per block",
            "Give the three the same number of entries.",
        )
    size = (config.data.time_len, len(config.data.modalities), config.model.d_common)
    for i, (out, project) in enumerate(zip(cube.d_outs, cube.res_project, strict=True)):
        if not project and out != size:
            raise ConfigError(
                f"model.cubemlp.d_outs, block {i}",
                dash(out),
                f"{dash(size)}, the block's input (time-modality-channel; the first is data.time_len, the number of "
                "data.modalities, model.d_common), because its residual is the identity",
                f"Set d_outs of the block to {dash(size)}, or its res_project to true.",
            )
        size = out


def resolve(config: Config) -> None:
    """Replace every `auto` that depends on the mode by its value, where MIMRL's differs from the general one."""
    faithful = config.mode == "faithful"
    if config.objective.compat == "auto":
        config.objective.compat = "mimrl" if faithful else "none"
    if config.model.modality_dropout == "auto":
        config.model.modality_dropout = 0.0 if faithful or "text" not in config.data.modalities else 0.5
    if not faithful:
        return
    if config.train.stage1_features == "auto":
        config.train.stage1_features = "fresh"
    if config.train.amp == "auto":
        config.train.amp = "off"
    if config.train.average == "auto":
        config.train.average = None
    if config.data.length_rule == "auto":
        config.data.length_rule = "sum_zero"
