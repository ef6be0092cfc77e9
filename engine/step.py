"""The two-stage step and the epoch around it, for any model that returns `(prediction, features)`.

Stage 1 moves the estimators on detached features; stage 2 moves the model on its task loss and on the information terms
those estimators report. Batches are `Batch` objects or plain `(inputs, target, index)` tuples.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.compiled import compile_regions
from engine.errors import ConfigError, EstimatorError
from engine.kernels.knn_product import Bank
from engine.loaders.batch import Batch
from engine.objective import Objective, ObjectiveOutput, Rows
from engine.profile import part
from engine.static import Held, StaticStep

StageOneFeatures = Literal["fresh", "cached", "bank"]
Graphs = Literal["auto", "emulate", "off"] | bool
Sums = Mapping[str, tuple[float, int]]
"""{name: (sum over samples, samples)}."""
Take = Callable[[int, int], Mapping[str, Any] | None]
"""A batch's number and its rows -> its product rows."""


class FeatureBank:
    """Detached features of every sample of a training set, stored by row: what product rows are drawn from.

    Args:
        size: number of samples in the set.
        device: where the features will be, if it is known; else what is stored decides.
    """

    def __init__(self, size: int, device: torch.device | None = None):
        self.size = size
        self.rows: dict[str, Tensor] = {}
        self.filled = torch.zeros(size, dtype=torch.bool, device=device)  # where the features are

    def store(self, index: Tensor, features: Mapping[str, Tensor]) -> None:
        """Keep a copy of `features` [B, width] of the samples `index` int64 [B]."""
        for name, value in features.items():
            if name not in self.rows:
                self.rows[name] = value.new_zeros(self.size, *value.shape[1:])
            self.rows[name].index_copy_(0, index, value.detach())
        if self.filled.device != index.device:
            self.filled = self.filled.to(index.device)
        self.filled.index_fill_(0, index, True)

    def tensors(self) -> Bank:
        """The features of the samples seen, [n, width] each, in row order: what product rows are drawn from."""
        if bool(self.filled.all()):
            return Bank(self.rows)
        return Bank({name: value[self.filled] for name, value in self.rows.items()})

    def clear(self) -> None:
        """Forget what was stored; the memory stays."""
        self.filled.zero_()

    def copy(self) -> FeatureBank:
        """A bank of the same content in memory of its own."""
        made = FeatureBank(self.size)
        made.load_state_dict(self.state_dict())
        return made

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
    """Sample-weighted means of named numbers. Tensors are read back once: a device need not wait at every step."""

    def __init__(self) -> None:
        self._vectors: dict[tuple[str, ...], tuple[Tensor, int]] = {}
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, names: Sequence[str], values: Tensor, weight: int) -> None:
        """Add one batch's values [names], which are means over `weight` samples."""
        key = tuple(names)
        total, seen = self._vectors.get(key, (0.0, 0))
        self._vectors[key] = total + values.detach() * weight, seen + weight

    def add_sums(self, sums: Sums) -> None:
        for name, (value, weight) in sums.items():
            total, seen = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + value, seen + weight

    def sums(self) -> Sums:
        """What was added; waits for the device."""
        for names, (total, weight) in self._vectors.items():
            self.add_sums({name: (value, weight) for name, value in zip(names, total.tolist(), strict=True)})
        self._vectors.clear()
        return self._sums

    def result(self) -> dict[str, float]:
        return {name: value / weight for name, (value, weight) in self.sums().items()}


@dataclass
class EpochResult:
    """Means over one pass. `information` and `estimators` (nats) are empty where the terms were not evaluated.

    `features`: of all samples; of training those that stage 1 saw, which are of one state of the model.
    """

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

    def next_rate(self) -> float:
        """The weight of the present in the next update, which this counts."""
        rate = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        return rate

    @torch.no_grad()
    def update(self, rate: float | Tensor) -> None:
        """Take the module's present weights in; `rate` is from `next_rate`, as a number or as a 0-d tensor."""
        state = self.module.state_dict()
        values, present = list(self.values.values()), [state[k].detach() for k in self.values]
        if not isinstance(rate, Tensor):
            torch._foreach_lerp_(values, present, rate)
            return
        change = torch._foreach_sub(present, values)
        torch._foreach_mul_(change, rate)
        torch._foreach_add_(values, change)

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
        main_optimizer: over the model's parameters; None for a step that only evaluates.
        estimator_optimizer: over the objective's parameters; None without an objective, or to evaluate only.
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
        generator: generator that product rows and the order of a bank's rows are drawn with. One on the CPU gives the
            same draws on every device.
        graphs: "auto": a static step (see `engine.static`), captured as CUDA graphs, on a GPU where the model allows
            it, else one operation after another. True: a static step, and an error where it cannot be captured (on
            other devices than a GPU it runs uncaptured). "emulate": a static step, uncaptured. "off" or False: none.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective | None,
        task_loss: Callable[[Tensor, Tensor], Tensor],
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
        graphs: Graphs = "off",
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
        self.held: Held | None = None  # while a static step's function runs
        self.static = self._static_step(graphs)

    def _static_step(self, graphs: Graphs) -> StaticStep | None:
        on_gpu = next((p.is_cuda for p in self.model.parameters()), False)
        if graphs in ("off", False) or (graphs == "auto" and not on_gpu):
            return None
        return StaticStep(self, capture=on_gpu and graphs != "emulate", strict=graphs != "auto")

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
            self._update(loss, optimizer, self.scaler)
        if self.average is not None:
            with part("average"):
                self.average.update(self.average.next_rate() if self.held is None else self.held.tensor("average"))
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
    def features(self, inputs: Any, target: Tensor) -> dict[str, Tensor]:
        """Features of one batch in the model's present state, dropout included as in training; without gradients."""
        self.model.train()
        self._begin()
        return self._run_forward(self._prepared(inputs), target)[1]

    def collect(
        self, loader: Iterable, size: int, on_batch: Callable[[str, int], None] = lambda stage, batch_index: None
    ) -> FeatureBank:
        """Features of every sample of `loader` in the model's present state, dropout included as in training."""
        bank = FeatureBank(size)
        for number, (inputs, target, index) in enumerate(map(unpack, loader)):
            bank.store(index, self.features(inputs, target))
            on_batch("collect", number)
        return bank

    def shuffled(self, count: int) -> Tensor:
        """int64 [count]: an order drawn with the step's generator, on its device."""
        return torch.randperm(count, generator=self.generator, device=self.generator.device)

    @staticmethod
    def batch_sizes(loader: Iterable, batch_size: int, size: int) -> list[int] | None:
        """Rows of every batch of the loader's next pass over `size` samples; None for a bare iterator.

        A loader may say so itself (`batch_sizes()`). Of any other with a length all batches are full but the last.
        """
        if hasattr(loader, "batch_sizes"):
            return loader.batch_sizes()
        if not isinstance(loader, Sized):
            return None
        rest = size - (len(loader) - 1) * batch_size
        return [*[batch_size] * (len(loader) - 1), rest if 0 < rest < batch_size else batch_size]

    def _products_of(self, bank: FeatureBank | None, passes: Sequence[list[int] | None]) -> list[Take]:
        """For each pass a function of a batch's number and its rows that gives its product rows.

        All passes of an epoch draw from one bank: their rows are drawn at once, and neighbours are found once. Rows of
        a batch whose size was not foreseen are drawn on the spot.

        Args:
            passes: the batch sizes of each pass; None where they are not known.
        """
        if bank is None or self.objective is None or not self.objective.needs_products:
            return [lambda number, rows: None for _ in passes]
        known = bank.tensors()
        foreseen = [size for sizes in passes for size in sizes or ()]
        with part("products"):
            drawn = self.objective.sample_epoch(known, foreseen, self.generator) if foreseen else None

        def of_pass(sizes: list[int] | None, first: int) -> Take:
            def take(number: int, rows: int) -> dict[str, Rows]:
                with part("products"):
                    if sizes is None or number >= len(sizes) or rows != sizes[number]:
                        return self.draw_products(known, rows)
                    return drawn.take(first + number)

            return take

        firsts = itertools.accumulate((len(sizes or ()) for sizes in passes[:-1]), initial=0)
        return [of_pass(sizes, first) for sizes, first in zip(passes, firsts, strict=True)]

    def passes_of_epoch(
        self, loader: Iterable, size: int, bank: FeatureBank, batch_size: int, stage1_n: int, fresh: bool
    ) -> list[list[int] | None]:
        """Batch sizes of the epoch's passes with product rows: those of stage 1, then that of stage 2."""
        of_loader, known = self.batch_sizes(loader, batch_size, size), int(bank.filled.sum())
        of_bank = [min(batch_size, known - start) for start in range(0, known, batch_size)]
        return [of_loader if fresh else of_bank] * stage1_n + [of_loader]

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
            loader: the training batches, iterated anew for every pass. A static step needs one with a length.
            size: number of training samples.
            bank: the bank returned by the previous epoch.
            batch_size: rows of a stage-1 batch where features are taken from a bank.
            stage1_features: "fresh" runs the model in every stage-1 batch (as the reference), "cached" once an epoch
                (and product rows come from that pass too), "bank" not at all: last epoch's features serve.
            on_batch: called after every batch with the stage ("collect", "stage1", "stage2") and the batch's number.

        Returns:
            The means over stage 2 (`estimators`: over stage 1) with the features that stage 1 saw, and the bank for
            the next epoch.

        Raises:
            EstimatorError: an estimate of this epoch is not finite, under on_degenerate="raise".
            ConfigError: a static step on a loader without a length, a model that cannot be captured, or no optimiser.
        """
        self._optimizer("main_optimizer")
        if self.objective is not None and stage1_n > 0:
            self._optimizer("estimator_optimizer")
        if self.static is not None and self.batch_sizes(loader, batch_size, size) is None:
            raise ConfigError(
                "graphs", f"a {type(loader).__name__} without a length", "a loader that has one",
                "Give a list, a DataLoader or another object with __len__, or use graphs off.",
            )  # fmt: skip
        bank, fresh = bank if self.objective is not None else None, stage1_features == "fresh"
        if bank is not None and stage1_n > 0 and stage1_features == "cached":
            with part("collect"):
                bank = (self.static or self).collect(loader, size, on_batch)
        sizes = [None] if bank is None else self.passes_of_epoch(loader, size, bank, batch_size, stage1_n, fresh)
        estimators, losses, information = Average(), Average(), Average()
        if self.static is not None:
            firsts = self.static.begin_epoch(bank, sizes)
            stage1, stage2 = self.static.stage1, self.static.stage2
        else:
            firsts = self._products_of(bank, sizes)
            stage1, stage2 = self._stage1_pass, self._stage2_pass
        seen = bank
        if bank is not None and fresh and stage1_n > 0:
            seen = FeatureBank(size) if self.static is None else self.static.stage1_bank(size)
        if bank is not None:
            with part("stage1"):
                for rows in firsts[:-1]:
                    estimators.add_sums(stage1(loader, seen, batch_size, fresh, rows, on_batch))
        with part("stage2"):
            of_losses, of_information, next_bank = stage2(loader, size, bank, firsts[-1], on_batch)
        losses.add_sums(of_losses)
        information.add_sums(of_information)
        result = EpochResult(**losses.result(), information=information.result(), estimators=estimators.result())
        self._check_finite(result)
        if seen is not None:
            result.features = dict((seen if self.static is None else seen.copy()).tensors())
        return result, next_bank

    def _fresh(self, loader: Iterable, bank: FeatureBank) -> Iterator[dict[str, Tensor]]:
        """Features of every batch in the model's present state, kept in `bank`."""
        for inputs, target, index in map(unpack, loader):
            features = self.features(inputs, target)
            bank.store(index, features)
            yield features

    def _stage1_pass(
        self,
        loader: Iterable,
        bank: FeatureBank,
        batch_size: int,
        fresh: bool,
        take: Take,
        on_batch: Callable[[str, int], None],
    ) -> Sums:
        if fresh:
            batches = self._fresh(loader, bank)
        else:
            known = bank.tensors()
            rows = self.shuffled(len(next(iter(known.values())))).split(batch_size)
            batches = ({name: value[r.to(value.device)] for name, value in known.items()} for r in rows)
        estimators = Average()
        for number, features in enumerate(batches):
            rows = len(next(iter(features.values())))
            if rows < self.objective.min_batch:
                continue
            output = self.stage1(features, take(number, rows))
            estimators.add(output.names, output.stacked_values, rows)
            on_batch("stage1", number)
        return estimators.sums()

    def _stage2_pass(
        self,
        loader: Iterable,
        size: int,
        bank: FeatureBank | None,
        take: Take,
        on_batch: Callable[[str, int], None],
    ) -> tuple[Sums, Sums, FeatureBank]:
        next_bank, losses, information = FeatureBank(size), Average(), Average()
        for number, (inputs, target, index) in enumerate(map(unpack, loader)):
            use = bank is not None and len(target) >= self.objective.min_batch
            products = take(number, len(target)) if use else None
            output = self.stage2(inputs, target, products, information=use)
            next_bank.store(index, output.features)
            losses.add(("loss", "task"), torch.stack([output.loss, output.task]), len(target))
            if output.information is not None:
                information.add(output.information.names, output.information.stacked_values, len(target))
            on_batch("stage2", number)
        return losses.sums(), information.sums(), next_bank

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
    def evaluate(self, loader: Iterable, bank: FeatureBank | None = None) -> EpochResult:
        """Stage-2 loss, prediction [N, n], target and features [N, width] over `loader`, in its order.

        Information terms are evaluated with product rows from `bank`; without one, or on a batch smaller than
        `Objective.min_batch`, they are left out.
        """
        if self.static is not None and getattr(loader, "in_order", False):
            of_losses, of_information, found = self.static.evaluate(loader, bank)
            joined = dict(found.rows)
            prediction, target = joined.pop("prediction"), joined.pop("target")
        else:
            of_losses, of_information, joined, prediction, target = self._evaluate_pass(loader, bank)
        losses, information = Average(), Average()
        losses.add_sums(of_losses)
        information.add_sums(of_information)
        return EpochResult(
            **losses.result(), information=information.result(), prediction=prediction, target=target, features=joined
        )

    def _evaluate_pass(
        self, loader: Iterable, bank: FeatureBank | None
    ) -> tuple[Sums, Sums, dict[str, Tensor], Tensor, Tensor]:
        (take,) = self._products_of(bank, [loader.batch_sizes() if hasattr(loader, "batch_sizes") else None])
        losses, information = Average(), Average()
        predictions, targets, features = [], [], []
        for number, (inputs, target, _) in enumerate(map(unpack, loader)):
            use = bank is not None and len(target) >= self.objective.min_batch
            products = take(number, len(target)) if use else None
            output = self.evaluated(inputs, target, products, use)
            losses.add(("loss", "task"), torch.stack([output.loss, output.task]), len(target))
            if output.information is not None:
                information.add(output.information.names, output.information.stacked_values, len(target))
            predictions.append(output.prediction)
            targets.append(target)
            features.append(output.features)
        joined = {name: torch.cat([f[name] for f in features]) for name in features[0]}
        return losses.sums(), information.sums(), joined, torch.cat(predictions), torch.cat(targets)

    @torch.no_grad()
    def evaluated(
        self, inputs: Any, target: Tensor, products: Mapping[str, Rows] | None, information: bool
    ) -> StepOutput:
        """Losses, prediction and features of one batch, in evaluation mode."""
        self.model.eval()
        with self._frozen_estimators():
            return self._stage2_loss(inputs, target, products, information)[0]


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
