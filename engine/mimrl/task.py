"""MIMRL as a task of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from engine.config import Config, Section
from engine.mimrl import settings
from engine.task import Inputs, Task, label_classes

if TYPE_CHECKING:
    from torch import nn

    from engine.cli.command import Command
    from engine.loaders.dataset import Dataset
    from engine.objective import Objective
    from engine.objective.terms import Expression, Term
    from engine.report.words import Words


class MIMRLTask(Task):
    """The published model, its eleven estimators and its eight information terms.

    In faithful mode a batch is what the published code makes of it: texts are padded to `data.time_len`, and means run
    over the batch's own width.
    """

    name = "mimrl"
    modes = ("fast", "faithful")
    sections: Mapping[str, type[Section]] = {
        "model": settings.MIMRLModelConfig,
        "objective": settings.MIMRLObjectiveConfig,
    }
    presets = "engine.mimrl.presets"

    def check(self, config: Config) -> None:
        """Raise `ConfigError` if two settings of its own contradict each other."""
        settings.check(config)

    def resolve(self, config: Config) -> None:
        """Replace every `auto` of its own settings in `config` by the value that it stands for."""
        settings.resolve(config)

    def pad_tokens(self, config: Config) -> int | None:
        return config.data.time_len if config.mode == "faithful" else None

    def exact_widths(self, config: Config) -> bool:
        return config.mode == "faithful"

    def model(self, config: Config, inputs: Inputs, text_encoder: nn.Module | None) -> nn.Module:
        from engine.mimrl.model import build_model

        return build_model(config, inputs.audio, inputs.vision, text_encoder)

    def expressions(self, config: Config) -> list[Expression]:
        from engine.mimrl.terms import expressions_of

        return expressions_of(config.objective, config.data.modalities)

    def objective(self, config: Config, model: nn.Module) -> Objective:
        from engine.mimrl.terms import mimrl_objective

        classes, d_common = label_classes(config).get("C"), config.model.d_common
        return mimrl_objective(config.objective, model.fused_dim, d_common, config.data.modalities, classes)

    def start(self, config: Config, model: nn.Module, dataset: Dataset) -> None:
        """In fast mode a regression begins at the mean label."""
        if config.mode == "fast" and config.model.task == "regression":
            model.start_at(float(dataset.splits["train"].label[:, 0].mean()))

    def warnings(self, config: Config, objective: Objective) -> Sequence[str]:
        """The terms that name a modality which `data.modalities` leaves out, and what `Task` says of written terms."""
        from engine.mimrl.terms import weights_of

        # the published terms have their bounds, whoever trains them
        advice = () if config.objective.c2 is not None else super().warnings(config, objective)
        out = [str(term) for term in weights_of(config.objective) if term not in objective.terms]
        if not config.objective.enabled or not out:
            return advice
        kept = ", ".join(map(str, objective.terms))
        return [
            f"data.modalities=[{', '.join(config.data.modalities)}]: the objective keeps {kept} and leaves out "
            f"{', '.join(out)}, which name another modality",
            *advice,
        ]

    def minimised(self, config: Config, objective: Objective) -> list[Term]:
        """Nothing of the published terms: their differences compare features, and nothing is to be removed."""
        return [] if config.objective.c2 is not None else super().minimised(config, objective)

    def held_bytes(self, config: Config, batch_size: int) -> int:
        """Bytes of the fusion encoder's input, or of a wider one inside it."""
        cube = config.model.cubemlp
        width = max([config.model.d_common, *(shape[2] for shape in cube.d_hiddens + cube.d_outs)])
        return 4 * batch_size * config.data.time_len * len(config.data.modalities) * width

    def commands(self) -> Sequence[Command]:
        """`engine import` and `engine import-command`."""
        from engine.mimrl.cli import COMMANDS

        return COMMANDS

    def report_words(self) -> Words:
        from engine.mimrl.report import WORDS

        return WORDS


MIMRL_TASK = MIMRLTask()
