"""The MMIM-style model as a task of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from engine.config import Config, Section
from engine.mmim.settings import MMIMModelConfig
from engine.task import Inputs, Task
from engine.vocabulary import MODALITIES

if TYPE_CHECKING:
    from torch import nn

    from engine.loaders.dataset import Dataset
    from engine.objective.terms import Expression
    from engine.report.words import Words

TERMS = {
    "I(T;A)": "shared by text and audio",
    "I(T;V)": "shared by text and vision",
    "I(F;T)": "what the fused feature keeps of text",
    "I(F;A)": "what the fused feature keeps of audio",
    "I(F;V)": "what the fused feature keeps of vision",
}
"""The terms, as the report explains them."""


class MMIMTask(Task):
    """MMIM's hierarchy of terms: text with audio and vision below the fusion, the fused feature with each above it.

    MMIM bounds the lower terms by a Gaussian model (Barber-Agakov) and the upper ones by contrastive scores. Here
    `objective.bound` chooses the bound of both, InfoNCE by default.
    """

    name = "mmim"
    sections: Mapping[str, type[Section]] = {"model": MMIMModelConfig}
    presets = "engine.mmim.presets"
    terms = ("0.1 * MI(T, A)", "0.1 * MI(T, V)", "0.1 * MI(F, T)", "0.1 * MI(F, A)", "0.1 * MI(F, V)")

    def model(self, config: Config, inputs: Inputs, text_encoder: nn.Module | None) -> nn.Module:
        from engine.mmim.model import MMIM

        return MMIM(config, inputs, text_encoder)

    def expressions(self, config: Config) -> list[Expression]:
        """The terms, without those that name a modality that `data.modalities` leaves out."""
        from engine.objective import without_features

        absent = [name[0].upper() for name in MODALITIES if name not in config.data.modalities]
        return without_features(super().expressions(config), absent)

    def start(self, config: Config, model: nn.Module, dataset: Dataset) -> None:
        """A regression begins near the mean label."""
        if config.model.task == "regression":
            mean = float(dataset.splits["train"].label[:, 0].mean())
            model.head.layers[-1].bias.data.fill_(mean)

    def report_words(self) -> Words:
        from engine.report.words import Words

        return Words(lambda settings: TERMS, {"F": "F, fused", "T": "T, text", "A": "A, audio", "V": "V, vision"})


MMIM_TASK = MMIMTask()
