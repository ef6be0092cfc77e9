"""The two-stage step and the epoch around it, for any model and any loader.

Stage 1 moves the estimators on detached features. Stage 2 moves the model on its task loss and on the information terms
that the estimators read. `engine.step.batches` says what batches and model outputs may look like.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.errors import ConfigError, EstimatorError, NonFiniteError
from engine.objective import Objective, ObjectiveOutput, Rows
from engine.profile import part
from engine.step import state as step_state
from engine.step.averages import EpochResult, WeightAverage
from engine.step.bank import FeatureBank
from engine.step.batches import KeywordInputs, ReadBatch, Target, check_index, mapped, read_batch, rows_of
from engine.step.checks import check_bank, check_epoch, check_task_loss, task_of, unwrapped
from engine.step.compiled import compile_regions
from engine.step.epoch import one_at_a_time, run_epoch
from engine.step.finite import NonFinite
from engine.step.graph_state import DeviceNumbers
from engine.step.outputs import (
    Features,
    ReadOutput,
    check_features,
    check_prediction_rows,
    full_precision,
    read_output,
    with_label,
)
from engine.step.passes import EagerPasses, OnBatch, batch_sizes, nothing
from engine.step.position import Position
from engine.step.recent import RecentFeatures
from engine.step.static import StaticPasses
from engine.step.updates import Accumulation, Updates, without_grad

StageOneFeatures = Literal["fresh", "cached", "bank"]
GraphMode = Literal["auto", "emulate", "off"] | bool


@dataclass
class StepOutput:
    """One batch of stage 2 or of evaluation: prediction, features [B, width] and 0-d losses, all detached.

    The prediction is what the model returned: a tensor [B, n], a dict of tensors, or None. `information` is None where
    the terms were left out.
    """

    prediction: Any
    features: dict[str, Tensor]
    loss: Tensor
    task: Tensor
    information: ObjectiveOutput | None


class TwoStageStep(Updates):
    """Train a model and its estimators in two stages, batch by batch or by whole epochs.

    Args:
        model: maps a batch's inputs to `(prediction [B, n], features {name: [B, width]})`, or to a dict, dataclass or
            `ModelOutput`: see `engine.step.outputs.read_output`. It may be wrapped for distributed training.
        objective: the information terms, or None to train on the task loss alone.
        task_loss: maps (prediction, target) to a 0-d loss. "model": the model computes it and returns it as `loss`; a
            dict's target is then passed to the model too. None: there is none, and the information terms train alone.
        main_optimizer: over the model's parameters; None for a step that only evaluates.
        estimator_optimizer: over the objective's parameters; None without an objective, or to evaluate only.
        clip_value: clip every gradient element to ±clip_value, in both stages.
        clip_norm: clip the norm of a stage's whole gradient.
        average: decay of a moving average of the model's weights, which `self.average` keeps; None for no average.
        autocast: type of the model's matrix products in training (see `engine.precision`); None for float32.
            Information terms, losses, stored values and evaluation are always float32. With float16 the loss is scaled,
            and a step whose gradients overflow is skipped.
        compile: "off", or a mode of torch.compile for the layers that the model repeats (see `engine.step.compiled`).
        label: name under which the target joins the objective's features, as float [B, n]; None to leave it out. The
            targets of a dict join under their own names.
        generator: draws product rows and the order of a bank's rows. A generator on the CPU gives the same draws on
            every device.
        graphs: "off" or False runs one operation after another. "emulate" makes a static step (see
            `engine.step.static`) and never captures it. True captures it as CUDA graphs on a GPU, and is an error
            where that is impossible. "auto" captures it on a GPU where the model allows it, and is "off" elsewhere.
        features: what picks the features from the model's output: a function of (output, inputs), a dict {feature:
            entry}, or names of entries. None: the features that the model returns.
        accumulate: micro-batches per update, in both stages. The gradient is that of the mean over all their rows.
            Information terms are estimated on each micro-batch, so InfoNCE sees only its negatives.
        non_finite: what `train_epoch` does about a loss or a gradient that is not finite. "stop" raises an error that
            names the term, the batch and its samples. "skip" leaves out the step, counts it in `EpochResult.skipped`,
            and stops after `engine.step.finite.MOST_IN_A_ROW` of them in a row. `stage1` and `stage2` themselves raise
            a NonFiniteError before the update, on a CPU.

    Attributes:
        backward: how a loss is differentiated; by default `loss.backward()`. Lightning's `manual_backward` and
            Accelerate's `accelerator.backward` can take its place.

    Raises:
        ConfigError: an optimiser holds no parameter of its module, or one of the other optimiser's; or settings that
            exclude each other.

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
        task_loss: Callable[[Any, Any], Tensor] | Literal["model"] | None = None,
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
        features: Features = None,
        accumulate: int = 1,
    ):
        check_task_loss(task_loss)
        self.model, self.objective, self.task_loss = model, unwrapped(objective), task_loss
        self._wrapped_objective = objective if objective is not self.objective else None
        self._pick, self.accumulate = features, accumulate
        self._readers = {} if self.objective is None else {n: str(t) for t in self.objective.terms for n in t.features}
        self.backward: Callable[[Tensor], None] = Tensor.backward
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
        self.in_epoch = False
        self.finite = NonFinite(self, non_finite)
        self.eager = EagerPasses(self)
        self.static = self._static_step(graphs)
        self.groups = {"main": Accumulation(accumulate), "estimators": Accumulation(accumulate)}
        self._checked: dict[str, torch.optim.Optimizer] = {}
        for name in ("main_optimizer", "estimator_optimizer"):
            if getattr(self, name) is not None:
                self._optimizer(name)

    @property
    def device(self) -> torch.device | None:
        """The device of the model's first parameter; None for a model without parameters."""
        return next((p.device for p in self.model.parameters()), None)

    def _static_step(self, graphs: GraphMode) -> StaticPasses | None:
        on_gpu = next((p.is_cuda for p in self.model.parameters()), False)
        guided = self.finite.policy == "skip" and not self.finite.skips_on_device()
        if graphs in ("off", False) or (graphs == "auto" and (not on_gpu or guided)):
            return None
        if self.accumulate > 1:
            if graphs == "auto":
                return None
            raise ConfigError(
                "TwoStageStep", f"accumulate={self.accumulate} with graphs={graphs!r}", "one of the two",
                "Use graphs off, or larger batches.",
            )  # fmt: skip
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

    def read(self, item: Any) -> ReadBatch:
        """A batch of any loader as (inputs, target, index, rows), on the model's device."""
        return read_batch(item, pass_target=self.task_loss == "model").to(self.device)

    def batches(self, loader: Iterable, size: int | None = None, by_row: bool = False) -> Iterator[ReadBatch]:
        """The loader's batches, read.

        Args:
            size: number of samples of the training set, where features are stored by row. Each batch must then tell
                the rows of its samples; without an objective it need not, unless `by_row`.
        """
        for item in loader:
            batch = read_batch(item, pass_target=self.task_loss == "model")
            if size is not None and (by_row or self.objective is not None or batch.index is not None):
                check_index(batch, size)
            yield batch.to(self.device)

    def forward(self, inputs: Any, target: Target) -> tuple[Any, dict[str, Tensor]]:
        """The model's prediction and features, with the target among the features as `label`."""
        return self._outputs(inputs, target)[:2]

    def _outputs(self, inputs: Any, target: Target) -> ReadOutput:
        lower = self.autocast is not None and self.model.training
        device = target.device if isinstance(target, Tensor) else self.device or torch.device("cpu")
        with torch.autocast(device.type, self.autocast) if lower else contextlib.nullcontext():
            output = self.model(**inputs) if isinstance(inputs, KeywordInputs) else self.model(inputs)
            prediction, features, loss = read_output(output, inputs, self._pick, self._readers)
        prediction = mapped(full_precision, prediction)
        features = {name: full_precision(value) for name, value in features.items()}
        if self.label is not None and target is not None:
            features = with_label(features, self.label, target, prediction)
        if not torch.compiler.is_compiling():
            rows = rows_of(target, features, prediction)
            check_prediction_rows(prediction, rows)
            check_features(features, self._readers, rows)
        return ReadOutput(prediction, features, loss)

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

    # -- the two stages ----------------------------------------------------------------------------

    def stage1(self, features: Mapping[str, Tensor], products: Mapping[str, Rows] | None) -> ObjectiveOutput:
        """One update of the estimators on features [B, width], which are detached first.

        With `accumulate` it is one micro-batch of an update.
        """
        optimizer = self._optimizer("estimator_optimizer")
        self.objective.train()
        self._begin()
        output = self._run_stage1({k: v.detach() for k, v in features.items()}, products)
        self.finite.check_loss(output.loss, None, output)
        self._update(output.loss, optimizer, rows=len(next(iter(features.values()))))
        return output

    def _stage1_loss(self, features: Mapping[str, Tensor], products: Mapping[str, Rows] | None) -> ObjectiveOutput:
        with part("estimators"):
            if self._wrapped_objective is not None:
                return self._wrapped_objective(features, products, stage="estimators")
            return self.objective.estimator_loss(features, products)

    def stage2(
        self, inputs: Any, target: Target, products: Mapping[str, Rows] | None, *, information: bool = True
    ) -> StepOutput:
        """One update of the model on task loss + information terms (`information=False`: on the task loss alone).

        With `accumulate` it is one micro-batch of an update.
        """
        optimizer = self._optimizer("main_optimizer")
        self.model.train()
        information = information and self.objective is not None
        self._begin()
        with self._frozen_estimators():
            output, loss = self._run_stage2(self._prepared(inputs), target, products, information)
            self._update_model(output, loss, optimizer, rows_of(target, output.features, output.prediction, inputs))
        return output

    def _update_model(self, output: StepOutput, loss: Tensor, optimizer: torch.optim.Optimizer, rows: int) -> None:
        if self.task_loss is None and output.information is None:
            return  # there is nothing to learn from, as in the first epoch without a target
        self.finite.check_loss(output.loss, output.task, output.information)
        if self._update(loss, optimizer, self.scaler, rows):
            self._update_average()

    def _stage2_loss(
        self, inputs: Any, target: Target, products: Mapping[str, Rows] | None, information: bool
    ) -> tuple[StepOutput, Tensor]:
        return self._losses(self._outputs(inputs, target), target, products, information)

    def _losses(
        self, outputs: ReadOutput, target: Target, products: Mapping[str, Rows] | None, information: bool
    ) -> tuple[StepOutput, Tensor]:
        prediction, features, own = outputs
        task = task_of(self.task_loss, prediction, target, own, self.device)
        terms, loss = None, task
        if information:
            with part("estimators"):
                terms = self.objective.model_loss(features, products)
            loss = task + terms.loss
        output = StepOutput(
            mapped(Tensor.detach, prediction), {k: v.detach() for k, v in features.items()}, loss.detach(),
            task.detach(), terms,
        )  # fmt: skip
        return output, loss

    def train_batch(self, item: Any, recent: RecentFeatures | None = None, *, stage1_n: int = 1) -> StepOutput:
        """Both stages on one batch, for a loop that has no epochs or no bank of the whole training set.

        The model runs once. Its detached features move the estimators `stage1_n` times. Then the model moves on its
        task loss and the terms. Without enough recent features for product rows, and on a batch smaller than
        `Objective.min_batch`, it moves on the task loss alone. With `accumulate` each of the `stage1_n` times counts as
        a micro-batch of stage 1.

        Args:
            item: a batch of any loader; it needs no index.
            recent: features that conditional terms draw their product rows from. This batch's are added to them.

        Raises:
            ConfigError: conditional terms without `recent`, or what `stage1` and `stage2` raise.
        """
        optimizer, batch = self._optimizer("main_optimizer"), self.read(item)
        self.model.train()
        outputs = self._outputs(batch.inputs, batch.target)
        known = self.known(recent, batch.rows)
        information = self.objective is not None and batch.rows >= self.objective.min_batch and known is not None
        for _ in range(stage1_n if information else 0):
            self.stage1(outputs.features, self.draw_products(known, batch.rows))
        with self._frozen_estimators():
            products = self.draw_products(known, batch.rows) if information else None
            output, loss = self._losses(outputs, batch.target, products, information)
            self._update_model(output, loss, optimizer, batch.rows)
        if recent is not None and self.objective is not None:
            recent.store({name: output.features[name] for name in self._readers})
        return output

    def known(self, recent: RecentFeatures | None, rows: int) -> Mapping[str, Tensor] | None:
        """What product rows of a batch are drawn from: {} where none are needed, None where there is too little."""
        if self.objective is None or not self.objective.needs_products:
            return {}
        if recent is None:
            raise ConfigError(
                "TwoStageStep.train_batch", "conditional terms without recent=", "features to draw product rows from",
                "Pass recent=engine.step.recent.RecentFeatures(4096), and the same object every time.",
            )  # fmt: skip
        k = self.objective.settings.k_neighbor
        if self.device is not None:
            recent.to(self.device)  # a state may have been loaded on the CPU
        return recent.tensors() if len(recent) - min(rows // k, len(recent)) >= k else None

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
        with without_grad(self.objective):
            yield

    # -- whole passes ------------------------------------------------------------------------------

    @torch.no_grad()
    def features(self, inputs: Any, target: Target) -> dict[str, Tensor]:
        """Features of one batch in the model's present state, dropout included as in training; without gradients."""
        self.model.train()
        self._begin()
        return self._run_forward(self._prepared(inputs), target)[1]

    def collect(self, loader: Iterable, size: int, on_batch: OnBatch = nothing) -> FeatureBank:
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
        on_batch: OnBatch = nothing,
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
            on_batch: called after every batch with the stage ("collect", "stage1", "stage2") and the batch's number. It
                may evaluate or change anything, but not begin another epoch.
            position: follows the epoch, so that `on_batch` can save where it is; one that was loaded is gone on from.
                Every epoch needs a new one.

        Returns:
            The means over the epoch with the features that stage 1 saw, and the bank for the next epoch.

        Raises:
            NonFiniteError: a loss or a gradient is not finite, under non_finite="stop".
            EstimatorError: an estimate of this epoch is not finite, under on_degenerate="raise".
            ConfigError: a static step on a loader without a length, a model that cannot be captured, or no optimiser.
        """
        check_epoch(stage1_features, stage1_n, batch_size)
        self._optimizer("main_optimizer")
        if self.objective is not None and stage1_n > 0:
            self._optimizer("estimator_optimizer")
        if self.static is not None and batch_sizes(loader, batch_size, size) is None:
            raise ConfigError(
                "graphs", f"a {type(loader).__name__} without a length", "a loader that has one",
                "Give a list, a DataLoader or another object with __len__, or use graphs off.",
            )  # fmt: skip
        check_bank(bank, size, self._readers)
        with one_at_a_time(self):
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
        # a static pass has one set of counters and sums, which a callback's evaluation would overwrite
        static = self.static if getattr(loader, "in_order", False) and self.held is None else None
        return (static or self.eager).evaluate(loader, bank)

    @torch.no_grad()
    def evaluated(
        self, inputs: Any, target: Target, products: Mapping[str, Rows] | None, information: bool
    ) -> StepOutput:
        """Losses, prediction and features of one batch, in evaluation mode."""
        self.model.eval()
        with self._frozen_estimators():
            return self._stage2_loss(inputs, target, products, information)[0]

    # -- state -------------------------------------------------------------------------------------

    def state_dict(self, parts: Collection[str] = step_state.PARTS) -> dict[str, Any]:
        """Everything that a loop needs to go on as if it had not stopped. `torch.load(weights_only=True)` reads it.

        It holds the optimisers, the average, the scaler, the generator and the gradients of a group of micro-batches
        that is not complete. A bank is no part of it: it has a `state_dict` of its own.

        Args:
            parts: what else it holds: "model", "objective" and "random", torch's own random state, which dropout and a
                shuffling loader draw from. Leave out what your loop saves itself.
        """
        return step_state.state_of(self, parts)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            CheckpointError: the state is of a step with other optimisers, average, scaler or modules.
        """
        step_state.load_state(self, state)
