"""The two-stage step and the epoch around it, for any model that returns `(prediction, features)`.

Stage 1 moves the estimators on detached features. Stage 2 moves the model on its task loss and on the information terms
that the estimators read. Batches are `Batch` objects or plain tuples `(inputs, target, index)`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.averages import EpochResult, WeightAverage
from engine.bank import FeatureBank
from engine.compiled import compile_regions
from engine.epoch import run_epoch
from engine.errors import ConfigError, EstimatorError, NonFiniteError
from engine.finite import NonFinite
from engine.graph_state import DeviceNumbers
from engine.objective import Objective, ObjectiveOutput, Rows
from engine.passes import EagerPasses, OnBatch, batch_sizes
from engine.position import Position
from engine.profile import part
from engine.static import StaticPasses

StageOneFeatures = Literal["fresh", "cached", "bank"]
GraphMode = Literal["auto", "emulate", "off"] | bool


@dataclass
class StepOutput:
    """One batch of stage 2 or of evaluation: prediction [B, n], features and 0-d losses, all detached."""

    prediction: Tensor
    features: dict[str, Tensor]
    loss: Tensor
    task: Tensor
    information: ObjectiveOutput | None


class TwoStageStep:
    """Both stages' updates on one batch.

    Args:
        model: maps a batch's inputs to `(prediction [B, n], features {name: [B, width]})`.
        objective: the information terms, or None to train on the task loss alone.
        task_loss: maps (prediction, target) to a 0-d loss; None for a step that only predicts, whose loss is 0.
        main_optimizer: over the model's parameters; None for a step that only evaluates.
        estimator_optimizer: over the objective's parameters; None without an objective, or to evaluate only.
        clip_value: clip every gradient element to ±clip_value, in both stages.
        clip_norm: clip the norm of a stage's whole gradient.
        average: decay of a moving average of the model's weights, which `self.average` keeps; None for no average.
        autocast: type of the model's matrix products in training (see `engine.precision`); None for float32.
            Information terms, losses, stored values and evaluation are always float32. With float16 the loss is scaled,
            and a step whose gradients overflow is skipped.
        compile: "off", or a mode of torch.compile for the layers that the model repeats (see `engine.compiled`).
        label: name under which the target joins the objective's features, as float [B, n]; None to leave it out.
        generator: draws product rows and the order of a bank's rows. A generator on the CPU gives the same draws on
            every device.
        graphs: "off" or False runs one operation after another. "emulate" makes a static step (see `engine.static`) and
            never captures it. True captures it as CUDA graphs on a GPU, and is an error where that is impossible.
            "auto" captures it on a GPU where the model allows it, and is "off" elsewhere.
        non_finite: what `train_epoch` does about a loss or a gradient that is not finite. "stop" raises an error that
            names the term, the batch and its samples. "skip" leaves out the step, counts it in `EpochResult.skipped`,
            and stops after `engine.finite.MOST_IN_A_ROW` of them in a row. `stage1` and `stage2` themselves raise a
            NonFiniteError before the update, on a CPU.

    Example:
        >>> class Model(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x), {"X": x}
        >>> model, batches = Model(3, 1), [(torch.ones(4, 3), torch.zeros(4, 1), torch.arange(4))]
        >>> step = TwoStageStep(model, None, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), 0.1))
        >>> result, bank = step.train_epoch(batches, 4, None, batch_size=4)
        >>> step.evaluate(batches).loss < result.loss
        True
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective | None = None,
        task_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        main_optimizer: torch.optim.Optimizer | None = None,
        estimator_optimizer: torch.optim.Optimizer | None = None,
        *,
        clip_value: float | None = None,
        clip_norm: float | None = None,
        average: float | None = None,
        autocast: torch.dtype | None = None,
        compile: str = "off",
        label: str | None = "C",
        generator: torch.Generator | None = None,
        graphs: GraphMode = "off",
        non_finite: str = "stop",
    ):
        self.model, self.objective, self.task_loss = model, objective, task_loss
        self.main_optimizer, self.estimator_optimizer = main_optimizer, estimator_optimizer
        self.clip_value, self.clip_norm, self.label = clip_value, clip_norm, label
        self.average = None if average is None else WeightAverage(model, average)
        self.autocast, self.compile = autocast, compile
        device = next((p.device for p in model.parameters()), torch.device("cpu")).type
        self.scaler = torch.amp.GradScaler(device) if autocast == torch.float16 else None
        self._run_forward, self._run_stage1, self._run_stage2 = self.forward, self._stage1_loss, self._stage2_loss
        if compile != "off":
            compile_regions(model, compile)
        self.generator = generator or torch.Generator().manual_seed(0)
        self.held: DeviceNumbers | None = None  # set while a static pass runs
        self.finite = NonFinite(self, non_finite)
        self.eager = EagerPasses(self)
        self.static = self._static_step(graphs)

    def _static_step(self, graphs: GraphMode) -> StaticPasses | None:
        on_gpu = next((p.is_cuda for p in self.model.parameters()), False)
        guided = self.finite.policy == "skip" and not self.finite.skips_on_device()
        if graphs in ("off", False) or (graphs == "auto" and (not on_gpu or guided)):
            return None
        if guided:
            raise ConfigError(
                "graphs", f"{graphs!r} with non_finite='skip' and an optimiser that the host has to tell",
                "one that skips on the device: fused Adam or AdamW", "Use one, or graphs off, or non_finite='stop'.",
            )  # fmt: skip
        return StaticPasses(self, capture=on_gpu and graphs != "emulate", strict=graphs != "auto")

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within the context the model holds its averaged weights, if there are any."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    # -- parts of a stage ------------------------------------------------------------------------------------

    def forward(self, inputs: Any, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The model's prediction and features, with the target among the features as `label`."""
        device = target.device.type
        lower = self.autocast is not None and self.model.training
        with torch.autocast(device, self.autocast) if lower else contextlib.nullcontext():
            prediction, features = self.model(inputs)
        prediction = _full(prediction)
        features = {name: _full(value) for name, value in features.items()}
        if self.label is not None:
            features[self.label] = target.reshape(len(target), -1).to(prediction.dtype)
        return prediction, features

    def draw_products(self, bank: Mapping[str, Tensor] | None, batch_size: int) -> dict[str, Rows] | None:
        """Product rows for one batch, or None where no term needs them."""
        if bank is None or self.objective is None or not self.objective.needs_products:
            return None
        with part("products"):
            return self.objective.sample_products(bank, batch_size, self.generator)

    def _prepared(self, inputs: Any) -> Any:
        """Inputs for a compiled graph, from the model's own `prepare` where it has one."""
        prepare = getattr(self.model, "prepare", None) if self.compile != "off" else None
        return inputs if prepare is None else prepare(inputs)

    def _begin(self) -> None:
        if self.compile != "off":
            # A CUDA graph overwrites the results of the step before.
            torch.compiler.cudagraph_mark_step_begin()

    def _optimizer(self, name: str) -> torch.optim.Optimizer:
        optimizer = getattr(self, name)
        if optimizer is None:
            raise ConfigError(
                "TwoStageStep", f"no {name}", "one, to train with", f"Pass {name}=, or only evaluate with this step.",
            )  # fmt: skip
        return optimizer

    def _update(
        self, loss: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        optimizer.zero_grad(set_to_none=True)
        with part("backward"):
            (loss if scaler is None else scaler.scale(loss)).backward()
        with part("update"):
            self._apply(optimizer, scaler)

    def _apply(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self.clip_value is not None:
            nn.utils.clip_grad_value_(parameters, self.clip_value)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        self.finite.check_gradients(optimizer)
        with contextlib.nullcontext() if self.held is None else self.held.rates(optimizer):
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()

    # -- the two stages ----------------------------------------------------------------------------

    def stage1(self, features: Mapping[str, Tensor], products: Mapping[str, Rows] | None) -> ObjectiveOutput:
        """One update of the estimators on features [B, width], which are detached first."""
        optimizer = self._optimizer("estimator_optimizer")
        self.objective.train()
        self._begin()
        output = self._run_stage1({k: v.detach() for k, v in features.items()}, products)
        self.finite.check_loss(output.loss, None, output)
        self._update(output.loss, optimizer)
        return output

    def _stage1_loss(self, features: Mapping[str, Tensor], products: Mapping[str, Rows] | None) -> ObjectiveOutput:
        with part("estimators"):
            return self.objective.estimator_loss(features, products)

    def stage2(
        self, inputs: Any, target: Tensor, products: Mapping[str, Rows] | None, *, information: bool = True
    ) -> StepOutput:
        """One update of the model on task loss + information terms (`information=False`: on the task loss alone)."""
        optimizer = self._optimizer("main_optimizer")
        self.model.train()
        information = information and self.objective is not None
        self._begin()
        with self._frozen_estimators():
            output, loss = self._run_stage2(self._prepared(inputs), target, products, information)
            self.finite.check_loss(output.loss, output.task, output.information)
            self._update(loss, optimizer, self.scaler)
        if self.average is not None:
            with part("average"):
                self.average.update(self.average.next_rate() if self.held is None else self.held.tensor("average"))
        return output

    def _stage2_loss(
        self, inputs: Any, target: Tensor, products: Mapping[str, Rows] | None, information: bool
    ) -> tuple[StepOutput, Tensor]:
        prediction, features = self.forward(inputs, target)
        task = prediction.new_zeros(()) if self.task_loss is None else self.task_loss(prediction, target)
        terms = None
        loss = task
        if information:
            with part("estimators"):
                terms = self.objective.model_loss(features, products)
            loss = task + terms.loss
        output = StepOutput(
            prediction.detach(), {k: v.detach() for k, v in features.items()}, loss.detach(), task.detach(), terms
        )
        return output, loss

    @contextlib.contextmanager
    def _frozen_estimators(self) -> Iterator[None]:
        """Within the context the estimators cannot change.

        Eval mode keeps their running state (MINE's average). Without requires_grad no gradients of their weights are
        computed.
        """
        if self.objective is None:
            yield
            return
        self.objective.eval()
        with _without_grad(self.objective):
            yield

    # -- whole passes ------------------------------------------------------------------------------

    @torch.no_grad()
    def features(self, inputs: Any, target: Tensor) -> dict[str, Tensor]:
        """Features of one batch in the model's present state, dropout included as in training; without gradients."""
        self.model.train()
        self._begin()
        return self._run_forward(self._prepared(inputs), target)[1]

    def collect(self, loader: Iterable, size: int, on_batch: OnBatch = lambda stage, batch_index: None) -> FeatureBank:
        """Features of every sample of `loader` in the model's present state, dropout included as in training."""
        return self.eager.collect(loader, size, on_batch)

    def shuffled(self, count: int) -> Tensor:
        """A random order int64 [count], drawn on the generator's device."""
        return torch.randperm(count, generator=self.generator, device=self.generator.device)

    def train_epoch(
        self,
        loader: Iterable,
        size: int,
        bank: FeatureBank | None,
        *,
        batch_size: int,
        stage1_n: int = 1,
        stage1_features: StageOneFeatures = "cached",
        on_batch: OnBatch = lambda stage, batch_index: None,
        position: Position | None = None,
    ) -> tuple[EpochResult, FeatureBank]:
        """`stage1_n` passes of stage 1, then one of stage 2.

        Without a bank (the first epoch) stage 1 is skipped and stage 2 uses the task loss alone. So does a last batch
        smaller than `Objective.min_batch`, on which the terms are undefined.

        Args:
            loader: the training batches, iterated anew for every pass. A static step needs one with a length.
            size: number of training samples.
            bank: the bank returned by the previous epoch.
            batch_size: rows of a stage-1 batch where features are taken from a bank.
            stage1_features: where stage 1 takes its features from. "fresh": the model runs on every batch, as in the
                reference. "cached": it runs once per epoch, and product rows come from that pass too. "bank": it does
                not run, and the features of the last epoch are used.
            on_batch: called after every batch with the stage ("collect", "stage1", "stage2") and the batch's number.
            position: follows the epoch, so that `on_batch` can save where it is; one that was loaded is gone on from.

        Returns:
            The means over the epoch with the features that stage 1 saw, and the bank for the next epoch.

        Raises:
            NonFiniteError: a loss or a gradient is not finite, under non_finite="stop".
            EstimatorError: an estimate of this epoch is not finite, under on_degenerate="raise".
            ConfigError: a static step on a loader without a length, a model that cannot be captured, or no optimiser.
        """
        self._optimizer("main_optimizer")
        if self.objective is not None and stage1_n > 0:
            self._optimizer("estimator_optimizer")
        if self.static is not None and batch_sizes(loader, batch_size, size) is None:
            raise ConfigError(
                "graphs", f"a {type(loader).__name__} without a length", "a loader that has one",
                "Give a list, a DataLoader or another object with __len__, or use graphs off.",
            )  # fmt: skip
        return run_epoch(
            self, loader, size, bank, batch_size, stage1_n, stage1_features, on_batch, position or Position()
        )

    def _check_finite(self, result: EpochResult) -> None:
        """Raise an error for a task loss or an estimate that is not finite.

        On a CPU each step is checked. On a GPU and in compiled graphs it is done here, once per epoch.
        """
        if not math.isfinite(result.task) and self.scaler is None and self.finite.policy == "stop":
            raise NonFiniteError(
                "task loss", f"a mean of {result.task} in this epoch", "finite losses",
                'Check the samples, lower train.lr, set train.clip_norm, or set train.non_finite="skip".',
            )  # fmt: skip
        if self.objective is None or self.objective.settings.on_degenerate != "raise":
            return
        for name, value in (result.estimators | result.information).items():
            if not math.isfinite(value):
                raise EstimatorError(
                    f"objective term {name}", f"an estimate of {value} in this epoch", "finite estimates",
                    'Check the features and the learning rate, or set objective.on_degenerate="skip".',
                )  # fmt: skip

    @torch.no_grad()
    def evaluate(self, loader: Iterable, bank: FeatureBank | None = None) -> EpochResult:
        """Stage-2 loss, prediction [N, n], target and features [N, width] over `loader`, in its order.

        Information terms use product rows from `bank`. They are left out without a bank, and on a batch smaller than
        `Objective.min_batch`.
        """
        passes = self.static if self.static is not None and getattr(loader, "in_order", False) else self.eager
        return passes.evaluate(loader, bank)

    @torch.no_grad()
    def evaluated(
        self, inputs: Any, target: Tensor, products: Mapping[str, Rows] | None, information: bool
    ) -> StepOutput:
        """Losses, prediction and features of one batch, in evaluation mode."""
        self.model.eval()
        with self._frozen_estimators():
            return self._stage2_loss(inputs, target, products, information)[0]


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@contextlib.contextmanager
def _without_grad(module: nn.Module) -> Iterator[None]:
    needing = [p for p in module.parameters() if p.requires_grad]
    for p in needing:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in needing:
            p.requires_grad_(True)
