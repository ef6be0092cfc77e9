"""The two-stage step and the epoch around it, for any model that returns `(prediction, features)`.

Stage 1 moves the estimators on detached features; stage 2 moves the model on its task loss and on the information terms
those estimators report. Batches are `Batch` objects or plain `(inputs, target, index)` tuples.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.compiled import compile_regions
from engine.errors import EstimatorError
from engine.kernels.knn_product import Bank
from engine.loaders.batch import Batch
from engine.objective import Objective, ObjectiveOutput, Rows
from engine.profile import part

StageOneFeatures = Literal["fresh", "cached", "bank"]


class FeatureBank:
    """Detached features of every sample of a training set, stored by row: what product rows are drawn from.

    Args:
        size: number of samples in the set.
    """

    def __init__(self, size: int):
        self.size = size
        self.rows: dict[str, Tensor] = {}
        self.filled = torch.zeros(size, dtype=torch.bool)

    def store(self, index: Tensor, features: Mapping[str, Tensor]) -> None:
        """Keep a copy of `features` [B, width] of the samples `index` int64 [B]."""
        for name, value in features.items():
            if name not in self.rows:
                self.rows[name] = value.new_zeros(self.size, *value.shape[1:])
            self.rows[name][index] = value.detach()
        self.filled[index.to(self.filled.device)] = True

    def tensors(self) -> Bank:
        """The features of the samples seen, [n, width] each, in row order: what product rows are drawn from."""
        if bool(self.filled.all()):
            return Bank(self.rows)
        return Bank({name: value[self.filled.to(value.device)] for name, value in self.rows.items()})

    def state_dict(self) -> dict[str, Any]:
        return {"filled": self.filled, "rows": self.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.filled, self.rows = state["filled"].clone(), {k: v.clone() for k, v in state["rows"].items()}


@dataclass
class StepOutput:
    """One stage-2 step: detached prediction [B, n] and features, and detached 0-d losses."""

    prediction: Tensor
    features: dict[str, Tensor]
    loss: Tensor
    task: Tensor
    information: ObjectiveOutput | None


class Average:
    """Sample-weighted means of named 0-d tensors, read back once: a device need not wait at every step."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weights: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor], weight: int) -> None:
        for name, value in values.items():
            value = value.detach() * weight
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.weights[name] = self.weights.get(name, 0) + weight

    def result(self) -> dict[str, float]:
        return {name: float(value) / self.weights[name] for name, value in self.sums.items()}


@dataclass
class EpochResult:
    """Means over one pass. `information` and `estimators` (nats) are empty where the terms were not evaluated."""

    loss: float
    task: float
    information: dict[str, float] = field(default_factory=dict)
    estimators: dict[str, float] = field(default_factory=dict)
    prediction: Tensor | None = None
    target: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)


class WeightAverage:
    """Exponential moving average of a module's floating-point parameters and buffers (Polyak averaging).

    Args:
        module: whose weights are followed.
        decay: weight of the past at every update, in (0, 1). Early updates forget faster, min(decay, (1+t) / (10+t)),
            so that the first steps' weights do not linger.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay, self.updates = module, decay, 0
        self.values = {k: v.detach().clone() for k, v in module.state_dict().items() if v.is_floating_point()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's present weights in."""
        rate = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        state = self.module.state_dict()
        torch._foreach_lerp_(list(self.values.values()), [state[k].detach() for k in self.values], rate)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the module holds the averaged weights."""
        own = {k: v.detach().clone() for k, v in self.module.state_dict().items() if k in self.values}
        self.module.load_state_dict(self.values, strict=False)
        try:
            yield
        finally:
            self.module.load_state_dict(own, strict=False)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "values": self.values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = state["updates"]
        for name, value in state["values"].items():
            self.values[name].copy_(value)


class TwoStageStep:
    """Both stages' updates on one batch.

    Args:
        model: maps a batch's inputs to `(prediction [B, n], features {name: [B, width]})`.
        objective: the information terms, or None to train on the task loss alone.
        task_loss: maps (prediction, target) to a 0-d loss.
        main_optimizer: over the model's parameters.
        estimator_optimizer: over the objective's parameters; None where the objective is None.
        clip_value: clip every gradient element to ±clip_value, in both stages.
        clip_norm: clip the norm of a stage's whole gradient.
        average: decay of a moving average of the model's weights, kept after every stage-2 update in `self.average`;
            None keeps none.
        autocast: type of the model's matrix products in training (see `engine.precision`); None: float32. Information
            terms, losses, what is stored and evaluation are float32 always. With float16 the loss is scaled, and a step
            whose gradients overflow is left out.
        compile: "off", or a mode of torch.compile: the layers that the model repeats are then compiled in place (see
            `engine.compiled`, which can compile whole stages too).
        label: name under which the target enters the objective's features, as float [B, n]; None to leave it out.
        generator: CPU generator that product rows are drawn with.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective | None,
        task_loss: Callable[[Tensor, Tensor], Tensor],
        main_optimizer: torch.optim.Optimizer,
        estimator_optimizer: torch.optim.Optimizer | None = None,
        *,
        clip_value: float | None = None,
        clip_norm: float | None = None,
        average: float | None = None,
        autocast: torch.dtype | None = None,
        compile: str = "off",
        label: str | None = "C",
        generator: torch.Generator | None = None,
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

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the model holds its averaged weights, where an average is kept."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    # -- pieces ------------------------------------------------------------------------------------

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
        """Inputs as the model wants them in a graph, by its own `prepare` where it has one."""
        prepare = getattr(self.model, "prepare", None) if self.compile != "off" else None
        return inputs if prepare is None else prepare(inputs)

    def _begin(self) -> None:
        if self.compile != "off":
            # a CUDA graph writes its results where those of the step before are
            torch.compiler.cudagraph_mark_step_begin()

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
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()

    # -- the two stages ----------------------------------------------------------------------------

    def stage1(self, features: Mapping[str, Tensor], products: Mapping[str, Rows] | None) -> ObjectiveOutput:
        """One update of the estimators on features [B, width], which are detached first."""
        self.objective.train()
        self._begin()
        output = self._run_stage1({k: v.detach() for k, v in features.items()}, products)
        self._update(output.loss, self.estimator_optimizer)
        return output

    def _stage1_loss(self, features: Mapping[str, Tensor], products: Mapping[str, Rows] | None) -> ObjectiveOutput:
        with part("estimators"):
            return self.objective.estimator_loss(features, products)

    def stage2(
        self, inputs: Any, target: Tensor, products: Mapping[str, Rows] | None, *, information: bool = True
    ) -> StepOutput:
        """One update of the model on task loss + information terms (`information=False`: on the task loss alone)."""
        self.model.train()
        information = information and self.objective is not None
        self._begin()
        with self._frozen_estimators():
            output, loss = self._run_stage2(self._prepared(inputs), target, products, information)
            self._update(loss, self.main_optimizer, self.scaler)
        if self.average is not None:
            with part("average"):
                self.average.update()
        return output

    def _stage2_loss(
        self, inputs: Any, target: Tensor, products: Mapping[str, Rows] | None, information: bool
    ) -> tuple[StepOutput, Tensor]:
        prediction, features = self.forward(inputs, target)
        task = self.task_loss(prediction, target)
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
        """Stage 2 does not step the estimators: in eval mode they keep their running state (MINE's average), and
        without requires_grad their weight gradients are not computed."""
        if self.objective is None:
            yield
            return
        self.objective.eval()
        with _without_grad(self.objective):
            yield

    # -- whole passes ------------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self, loader: Iterable, size: int) -> FeatureBank:
        """Features of every sample of `loader` in the model's present state, dropout included as in training."""
        self.model.train()
        bank = FeatureBank(size)
        for inputs, target, index in map(unpack, loader):
            self._begin()
            bank.store(index, self._run_forward(self._prepared(inputs), target)[1])
        return bank

    def train_epoch(
        self,
        loader: Iterable,
        size: int,
        bank: FeatureBank | None,
        *,
        batch_size: int,
        stage1_n: int = 1,
        stage1_features: StageOneFeatures = "cached",
        on_batch: Callable[[str, int], None] = lambda stage, batch_index: None,
    ) -> tuple[EpochResult, FeatureBank]:
        """`stage1_n` passes of stage 1, then one of stage 2.

        Without a bank (the first epoch) stage 1 is skipped and stage 2 uses the task loss alone. So does a last batch
        smaller than `Objective.min_batch`, on which the terms are undefined.

        Args:
            loader: the training batches, iterated anew for every pass.
            size: number of training samples.
            bank: the bank returned by the previous epoch.
            batch_size: rows of a stage-1 batch where features are taken from a bank.
            stage1_features: "fresh" runs the model in every stage-1 batch (as the reference), "cached" once an epoch
                (and product rows come from that pass too), "bank" not at all: last epoch's features serve.
            on_batch: called after every batch with the stage ("collect", "stage1", "stage2") and the batch's number.

        Returns:
            The means over stage 2 (`estimators`: over stage 1), and the bank for the next epoch.
        """
        use_information = self.objective is not None and bank is not None
        estimators = Average()
        if use_information and stage1_n > 0:
            if stage1_features == "cached":
                with part("collect"):
                    bank = self.collect(_counted(loader, "collect", on_batch), size)
            with part("stage1"):
                for _ in range(stage1_n):
                    fresh = stage1_features == "fresh"
                    batches = self._fresh_features(loader) if fresh else self._bank_batches(bank, batch_size)
                    known = bank.tensors()
                    for number, features in enumerate(batches):
                        rows = len(next(iter(features.values())))
                        if rows < self.objective.min_batch:
                            continue
                        output = self.stage1(features, self.draw_products(known, rows))
                        estimators.add(output.values, rows)
                        on_batch("stage1", number)
        known = bank.tensors() if use_information else None
        next_bank = FeatureBank(size)
        losses, information = Average(), Average()
        with part("stage2"):
            for number, (inputs, target, index) in enumerate(map(unpack, loader)):
                use = use_information and len(target) >= self.objective.min_batch
                products = self.draw_products(known, len(target)) if use else None
                output = self.stage2(inputs, target, products, information=use)
                next_bank.store(index, output.features)
                losses.add({"loss": output.loss, "task": output.task}, len(target))
                if output.information is not None:
                    information.add(output.information.values, len(target))
                on_batch("stage2", number)
        result = EpochResult(**losses.result(), information=information.result(), estimators=estimators.result())
        self._check_finite(result)
        return result, next_bank

    def _check_finite(self, result: EpochResult) -> None:
        """What estimators see for themselves on a CPU is seen here, once an epoch, on a GPU and in compiled graphs."""
        if self.objective is None or self.objective.settings.on_degenerate != "raise":
            return
        for name, value in (result.estimators | result.information).items():
            if not math.isfinite(value):
                raise EstimatorError(
                    f"objective term {name}", f"an estimate of {value} in this epoch", "finite estimates",
                    'Check the features and the learning rate, or set objective.on_degenerate="skip".',
                )  # fmt: skip

    @torch.no_grad()
    def _fresh_features(self, loader: Iterable) -> Iterator[dict[str, Tensor]]:
        for inputs, target, _ in map(unpack, loader):
            self.model.train()
            self._begin()
            yield self._run_forward(self._prepared(inputs), target)[1]

    def _bank_batches(self, bank: FeatureBank, batch_size: int) -> Iterator[dict[str, Tensor]]:
        known = bank.tensors()
        count = len(next(iter(known.values())))
        order = torch.randperm(count, generator=self.generator)
        for rows in order.split(batch_size):
            yield {name: value[rows.to(value.device)] for name, value in known.items()}

    @torch.no_grad()
    def evaluate(self, loader: Iterable, bank: FeatureBank | None = None) -> EpochResult:
        """Stage-2 loss, prediction [N, n], target and features [N, width] over `loader`, in its order.

        Information terms are evaluated with product rows from `bank`; without one, or on a batch smaller than
        `Objective.min_batch`, they are left out.
        """
        self.model.eval()
        known = bank.tensors() if bank is not None else None
        losses, information = Average(), Average()
        predictions, targets, features = [], [], []
        for inputs, target, _ in map(unpack, loader):
            use = known is not None and len(target) >= self.objective.min_batch
            products = self.draw_products(known, len(target)) if use else None
            with self._frozen_estimators():
                output, _ = self._stage2_loss(inputs, target, products, use)
            losses.add({"loss": output.loss, "task": output.task}, len(target))
            if output.information is not None:
                information.add(output.information.values, len(target))
            predictions.append(output.prediction)
            targets.append(target)
            features.append(output.features)
        joined = {name: torch.cat([f[name] for f in features]) for name in features[0]}
        return EpochResult(
            **losses.result(), information=information.result(), prediction=torch.cat(predictions),
            target=torch.cat(targets), features=joined,
        )  # fmt: skip


def unpack(item: Batch | tuple) -> tuple[Any, Tensor, Tensor]:
    """A batch as (inputs, target, index)."""
    return (item, item.label, item.index) if isinstance(item, Batch) else item


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


def _counted(loader: Iterable, stage: str, on_batch: Callable[[str, int], None]) -> Iterator:
    for number, item in enumerate(loader):
        yield item
        on_batch(stage, number)
