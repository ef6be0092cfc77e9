"""The two-stage step on several ranks: each computes its rows of a batch, and all take the step of the whole batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.ranks import Ranks
from engine.step import StepOutput, TwoStageStep
from engine.step.averages import Average, EpochResult, means
from engine.step.bank import FeatureBank
from engine.step.outputs import ReadOutput
from engine.step.passes import EagerPasses
from engine.training.passes import Share
from engine.training.rank_objective import ObjectiveOnRanks


class StepOnRanks(TwoStageStep):
    """A `TwoStageStep` whose batches are dealt to the ranks, as `Passes` does.

    The model runs on a rank's own rows. Predictions and features are then joined, so that the task loss, the
    information terms and the bank see the whole batch, as in one process. The gradients are averaged over the ranks
    before they are clipped.

    Args:
        ranks: the ranks of the run. The other arguments are those of `TwoStageStep`.
    """

    def __init__(self, ranks: Ranks, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options, graphs="off")
        self.ranks = ranks
        if self.objective is not None:
            self.objective = ObjectiveOnRanks(self.objective, ranks)
        self.eager = PassesOnRanks(self)

    def _outputs(self, inputs: Any, target: Tensor) -> ReadOutput:
        """What the model gives for the whole batch: `inputs` are a `Share` of it or all, `target` is whole."""
        if not isinstance(inputs, Share):
            return super()._outputs(inputs, target)
        # Apart from the model, the generators of all ranks draw the same. So a checkpoint holds one state for all.
        with torch.random.fork_rng([target.device] if target.is_cuda else []):
            torch.manual_seed(inputs.seed)
            if inputs.rows is None:
                return super()._outputs(inputs.inputs, target)
            prediction, features, loss = super()._outputs(inputs.inputs, target[inputs.rows])
        joined = self.ranks.join([prediction, *features.values()])
        return ReadOutput(joined[0], dict(zip(features, joined[1:], strict=True)), loss)

    def _prepared(self, inputs: Any) -> Any:
        if isinstance(inputs, Share):
            return replace(inputs, inputs=super()._prepared(inputs.inputs))
        return super()._prepared(inputs)

    def _apply(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
        self.ranks.average_gradients(p for group in optimizer.param_groups for p in group["params"])
        super()._apply(optimizer, scaler)


class PassesOnRanks(EagerPasses):
    """The passes of a `StepOnRanks`. In an evaluation the ranks take turns, each with a whole batch."""

    step: StepOnRanks

    def evaluate(self, loader: Iterable, bank: FeatureBank | None) -> EpochResult:
        """A pass without training. All ranks have the whole result, in the loader's order, as one process has it."""
        ranks = self.step.ranks
        if not ranks.together:
            return super().evaluate(loader, bank)
        sizes = loader.batch_sizes()
        (take,) = self.begin_epoch(bank, [sizes])
        own: list[tuple[StepOutput, Tensor]] = []
        numbers: list[int] = []
        example: tuple[StepOutput, Tensor] | None = None
        for number, counts, batch in loader.turns():
            inputs, target, _, _ = self.step.read(batch)
            use = bank is not None and len(target) >= self.step.objective.min_batch
            products = take(number, len(target)) if use else None
            with contextlib.nullcontext() if self.step.objective is None else self.step.objective.apart():
                example = self.step.evaluated(inputs, target, products, use), target
            if counts:
                own.append(example)
                numbers.append(number)
        losses, information = self._sums(numbers, [output for output, _ in own], sizes)
        rows = self._rows(own, example, sizes)
        return EpochResult(
            **means(losses.sums()),
            information=means(information.sums()),
            prediction=rows.pop("<prediction>"),
            target=rows.pop("<target>"),
            features=rows,
        )

    def _sums(self, numbers: list[int], outputs: list[StepOutput], sizes: list[int]) -> tuple[Average, Average]:
        """The sums over all batches, added in their order: so they have the last digits of one process."""
        values: dict[int, tuple] = {}
        for number, output in zip(numbers, outputs, strict=True):
            terms = output.information
            told = None if terms is None else (list(terms.names), terms.stacked_values)
            values[number] = torch.stack([output.loss, output.task]), told
        every = {number: value for part in self.step.ranks.gather(values) for number, value in part.items()}
        losses, information = Average(), Average()
        for number in sorted(every):
            of_losses, told = every[number]
            losses.add(("loss", "task"), of_losses, sizes[number])
            if told is not None:
                information.add(*told, sizes[number])
        return losses, information

    def _rows(
        self, own: list[tuple[StepOutput, Tensor]], example: tuple[StepOutput, Tensor] | None, sizes: list[int]
    ) -> dict[str, Tensor]:
        """Predictions, targets and features of all rows, in their order."""
        ranks = self.step.ranks
        counts = [sum(sizes[rank :: ranks.size]) for rank in range(ranks.size)]
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        order = [
            starts[number] + i
            for rank in range(ranks.size)
            for number in range(rank, len(sizes), ranks.size)
            for i in range(sizes[number])
        ]
        named = [_named(output, target) for output, target in own]
        rows: dict[str, Tensor] = {}
        for name, value in _named(*example).items():
            mine = torch.cat([tensors[name] for tensors in named]) if named else value[:0]
            joined = ranks.join_rows(mine, counts)
            rows[name] = torch.empty_like(joined).index_copy_(0, torch.tensor(order, device=joined.device), joined)
        return rows


def _named(output: StepOutput, target: Tensor) -> Mapping[str, Tensor]:
    return {"<prediction>": output.prediction, "<target>": target, **output.features}
