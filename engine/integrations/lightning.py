"""A Lightning module for two-stage training, with manual optimisation and two optimisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.objective import Objective
from engine.step import TwoStageStep
from engine.step.batches import KeywordInputs
from engine.step.outputs import read_output
from engine.step.recent import RecentFeatures
from engine.step.state import set_random

try:
    from lightning import LightningModule
except ModuleNotFoundError as cause:
    if cause.name != "lightning":
        raise
    raise ConfigError(
        "engine.integrations.lightning", "no package lightning", "lightning", "Install it: pip install lightning."
    ) from None


class InformationModule(LightningModule):
    """Trains a model and its information terms in two stages on every batch (`TwoStageStep.train_batch`).

    It logs `train_loss`, `train_task` and every term in nats, the same of validation under `valid_`, and of a test
    under `test_`. `Trainer.predict` gives the model's predictions. A checkpoint of Lightning holds all of its state.
    Override `configure_optimizers` for other optimisers: the model's comes first, then the estimators'. Learning-rate
    schedulers are moved once an epoch; `ReduceLROnPlateau` sees `valid_loss`, or `train_loss` without validation.
    Batches and outputs may have every form that `TwoStageStep` takes.

    Args:
        model, objective, task_loss: as for `TwoStageStep`.
        lr, estimator_lr: learning rates of Adam.
        recent: number of samples from which conditional terms draw their product rows.
        stage1_n: updates of the estimators per batch.
        options: more arguments of `TwoStageStep`, such as `features`, `clip_norm`, `autocast` or `accumulate`.

    Raises:
        ConfigError: the Trainer clips, accumulates or lowers precision itself; the step has arguments for all three.

    >>> from engine import MI, Objective
    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> module = InformationModule(model, Objective([MI("Z", "C")], {"Z": 2, "C": 1}), nn.functional.mse_loss)
    >>> module.automatic_optimization
    False
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        task_loss: Callable[[Any, Any], Tensor] | str | None = None,
        *,
        lr: float = 1e-3,
        estimator_lr: float = 1e-3,
        recent: int = 4096,
        stage1_n: int = 1,
        **options: Any,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.objective = model, objective
        self.lr, self.estimator_lr, self.stage1_n = lr, estimator_lr, stage1_n
        self.recent = RecentFeatures(recent)
        self.step = TwoStageStep(model, objective, task_loss, **options)
        self._loaded: dict[str, Any] | None = None

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the model returns."""
        return self.model(*inputs, **named)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for the model, and Adam for the estimators."""
        return [
            torch.optim.Adam(self.model.parameters(), self.lr),
            torch.optim.Adam(self.objective.parameters(), self.estimator_lr),
        ]

    def on_fit_start(self) -> None:
        """Refuse what manual optimisation leaves undone."""
        trainer = self.trainer
        if trainer.precision not in ("32-true", "64-true") or trainer.gradient_clip_val:
            raise ConfigError(
                "Trainer", f"precision={trainer.precision}, gradient_clip_val={trainer.gradient_clip_val}",
                "neither, as this module optimises manually",
                "Pass autocast=torch.bfloat16 and clip_norm= to InformationModule.",
            )  # fmt: skip

    def on_train_start(self) -> None:
        """Give the step Lightning's optimisers, which count the updates, and the state of a checkpoint."""
        optimizers = self.optimizers()
        if not isinstance(optimizers, list) or len(optimizers) != 2:
            count = len(optimizers) if isinstance(optimizers, list) else 1
            do = "Give self.model.parameters() to the first, and self.objective.parameters() to the second."
            expected = "two: the model's, then the estimators'"
            raise ConfigError("InformationModule.configure_optimizers", f"{count} optimisers", expected, do)
        self.step.main_optimizer, self.step.estimator_optimizer = cast("list[Any]", optimizers)
        self.step.backward = self.manual_backward
        if self._loaded is not None:
            optimizers = {
                "main_optimizer": self.step.main_optimizer.state_dict(),
                "estimator_optimizer": self.step.estimator_optimizer.state_dict(),
            }
            self.step.load_state_dict({**self._loaded, **optimizers})
            self._loaded = None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Both stages on one batch."""
        output = self.step.train_batch(batch, self.recent, stage1_n=self.stage1_n)
        self._log("train", output)

    def on_train_epoch_end(self) -> None:
        """Update with the last micro-batches, and move the learning-rate schedulers, which Lightning leaves alone."""
        self.step.flush()
        metrics = self.trainer.callback_metrics
        for config in self.trainer.lr_scheduler_configs:
            plateau = isinstance(config.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            metric = metrics.get("valid_loss", metrics.get("train_loss")) if plateau else None
            self.lr_scheduler_step(config.scheduler, metric)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Losses and terms of one batch, without training."""
        self._evaluate("valid", batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The same, logged under `test_`."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """The model's prediction for one batch of any form; a target in it is not used."""
        inputs = self.step.read(batch).inputs
        output = self.model(**inputs) if isinstance(inputs, KeywordInputs) else self.model(inputs)
        return read_output(output, inputs).prediction

    def _evaluate(self, split: str, batch: Any) -> None:
        read = self.step.read(batch)
        known = self.step.known(self.recent, read.rows)
        information = read.rows >= self.objective.min_batch and known is not None
        products = self.step.draw_products(known, read.rows) if information else None
        self._log(split, self.step.evaluated(read.inputs, read.target, products, information))

    def _log(self, split: str, output: Any) -> None:
        values = {} if output.information is None else output.information.values
        rows = next((len(value) for value in output.features.values()), 1)
        named = {"loss": output.loss, "task": output.task, **values}
        self.log_dict({f"{split}_{name}": value for name, value in named.items()}, batch_size=rows)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not save itself: generator, average, scaler, micro-batches, recent features."""
        state = self.step.state_dict(parts=("random",))
        kept = {name: value for name, value in state.items() if not name.endswith("_optimizer")}
        checkpoint["engine"] = {"step": kept, "recent": self.recent.state_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put it back; the step's part when the optimisers exist."""
        self._loaded = dict(checkpoint["engine"]["step"])
        set_random(self._loaded.pop("random"))  # now, because Lightning begins the training data's pass before training
        self.recent.load_state_dict(checkpoint["engine"]["recent"])
