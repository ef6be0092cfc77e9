"""Losses and gradients that are not finite: which term it was, in which batch, and whether the run stops or goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from engine.errors import ConfigError, EstimatorError, NonFiniteError
from engine.model.estimators import readable
from engine.sharded import is_sharded, local, somewhere
from engine.step.finite_flags import Flags, by_kind, first_not_finite
from engine.step.position import Position
from engine.vocabulary import NON_FINITE

if TYPE_CHECKING:
    from engine.objective import ObjectiveOutput
    from engine.step import TwoStageStep

MOST_IN_A_ROW = 20
"""A run that has left out so many steps one after another stops."""
NAMED = 5
"""Samples of a batch that an error names."""

T = TypeVar("T")


class NonFinite:
    """What a `TwoStageStep` does about losses and gradients that are not finite.

    On a CPU each step is checked before its update, so that a `NonFiniteError` leaves the parameters as they were. On a
    GPU and in a static step the host does not wait: losses are noted on the device and read at the end of a pass, by a
    static step at the end of an epoch. A step is left out on the device.

    Args:
        step: whose steps are checked.
        policy: "stop" raises an error. "skip" leaves out the step and counts it.

    Attributes:
        ids: names of the training samples by row, for messages; None: their rows are named.
        position: of the epoch, whose `skipped` and `in_a_row` count the steps that were left out.
    """

    def __init__(self, step: TwoStageStep, policy: str):
        if policy not in NON_FINITE:
            raise ConfigError(
                "TwoStageStep", f"non_finite={policy!r}", f"one of {', '.join(NON_FINITE)}", "Choose one."
            )
        self.step, self.policy = step, policy
        self.ids: Sequence[str] | None = None
        self.position = Position()
        self.flags: Flags | None = None
        self._rows: Callable[[int], Tensor] | None = None
        self._before: list[tuple[Tensor, Tensor]] = []
        self._noted: dict[tuple[str, ...], list[tuple[int, Tensor]]] = {}

    def begin(self, position: Position, rows: Callable[[int], Tensor] | None = None) -> None:
        """Count in the position of a new epoch, or of one that is gone on with.

        Args:
            rows: gives the rows of a batch of the loader's present pass.
        """
        if not position.resumed:
            position.in_a_row = self.position.in_a_row
        self.position, self._rows = position, rows
        position.before_saving = self.read

    # -- one step --

    def check_loss(self, loss: Tensor, task: Tensor | None, information: ObjectiveOutput | None) -> None:
        """Raise NonFiniteError for a loss that is not finite.

        Args:
            task: the part of it that is the task loss; None in stage 1.
        """
        if self.step.scaler is not None:
            return
        if not self._looks(loss):
            if self.policy == "skip":
                self.flags_for(loss.device).note_loss(loss)
            return
        if math.isfinite(loss.item()):
            return
        if task is not None and not math.isfinite(task.item()):
            raise _error("task loss", f"a loss of {task.item()}")
        if information is not None:
            values = dict(zip(information.names, information.stacked_values.tolist(), strict=True))
            for name, value in values.items():
                if not math.isfinite(value):
                    raise _error(f"objective term {name}", f"an estimate of {value}")
        raise _error("loss", f"{loss.item()}, the sum of finite terms")

    def check_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise NonFiniteError for clipped gradients that are not finite. A loss scaler looks at its own itself."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters or self.step.scaler is not None:
            return
        if not self._looks(parameters[0]):
            if self.policy == "skip":
                self._skip_on_device(optimizer, parameters)
            return
        gradients = [p.grad for p in parameters]
        if not any(somewhere([_any_non_finite([local(g) for g in gradients])], gradients)):
            return
        bad = somewhere([not bool(local(g).isfinite().all()) for g in gradients], gradients)
        wrong = {id(p) for p, is_bad in zip(parameters, bad, strict=True) if is_bad}
        modules = [m for m in (self.step.model, self.step.objective) if m is not None]
        names = [name for module in modules for name, p in module.named_parameters() if id(p) in wrong]
        optimizer.zero_grad(set_to_none=True)
        more = f" and {len(names) - 1} more parameters" if len(names) > 1 else ""
        raise _error(f"gradient of {names[0] if names else 'a parameter'}{more}", "values that are not finite")

    def _skip_on_device(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        """Have the optimiser and the moving average leave out a step that is not finite, and put the buffers back."""
        flags = self.flags_for(parameters[0].device)
        flags.note_gradients([p.grad for p in parameters])
        vars(optimizer)["found_inf"] = flags.bad  # which a fused Adam reads on the device
        self._leave_out_on_device(flags)

    def note_found(self, found: Tensor) -> Tensor:
        """Leave out the step on the device where its loss is not finite, or where `found` says 1: 1 there, else 0."""
        flags = self.flags_for(found.device)
        flags.bad.copy_(torch.maximum(flags.bad, found))
        self._leave_out_on_device(flags)
        return flags.bad

    def _leave_out_on_device(self, flags: Flags) -> None:
        if self.step.average is not None:
            self.step.average.hold = flags.bad
        for buffer, value in self._before:
            buffer.copy_(torch.where(flags.bad > 0, value, buffer))

    def on_device(self, tensor: Tensor) -> bool:
        """Whether steps are left out on the device, without the host: under "skip", without a loss scaler."""
        return self.policy == "skip" and self.step.scaler is None and not self._looks(tensor)

    def host_looks(self, tensor: Tensor) -> bool:
        """Whether the host looks at the gradients of every step."""
        return self.step.scaler is None and self._looks(tensor)

    def _looks(self, tensor: Tensor) -> bool:
        """Whether the host may read the tensor. It has to, to leave out the step of most optimisers."""
        return readable(tensor) or (self.policy == "skip" and self.step.held is None and not self.skips_on_device())

    def skips_on_device(self) -> bool:
        """Whether the step's optimisers can leave out a step without the host: fused Adam or AdamW of whole weights."""
        own = [o for o in (self.step.main_optimizer, self.step.estimator_optimizer) if o is not None]
        groups = [(o, g) for o in own for g in o.param_groups]
        return all(
            isinstance(o, torch.optim.Adam) and g.get("fused") and not any(map(is_sharded, g["params"]))
            for o, g in groups
        )

    def flags_for(self, device: torch.device) -> Flags:
        """What notes steps on the device."""
        if self.flags is None:
            self.flags = Flags(device)
        return self.flags

    def keep(self, loss: Tensor) -> Tensor | None:
        """Whether the present step is made: a bool on the device, or None where the host knows that it is."""
        return None if self.policy == "stop" or self._looks(loss) else self.flags_for(loss.device).bad == 0

    # -- batches of an epoch --

    def guarded(self, stage: str, number: int, index: Tensor | None, run: Callable[[], T]) -> T | None:
        """What `run` returns; None where the step was left out.

        Raises:
            NonFiniteError, EstimatorError: as `run`, with the batch and its samples.
        """
        before = self._before = self._buffers() if self.policy == "skip" else []
        try:
            result = run()
        except EstimatorError as problem:
            if "finite" not in problem.expected:
                raise
            if self.policy == "stop":
                raise self._placed(problem, stage, number, index) from problem
            self._leave_out(problem, stage, number, index, before)
            return None
        if self.flags is not None and self.policy == "skip":
            self.flags.count()
        self.position.in_a_row = 0
        return result

    def read(self) -> None:
        """Take what was noted on the device into the position.

        Raises:
            NonFiniteError: a loss was not finite, or too many steps in a row were left out.
        """
        found = self._first()
        if found is not None:
            stage, number, name = found
            present = self._rows is not None and self.position.order is None and stage == self.position.stage
            index = self._rows(number) if present else None
            raise self._placed(_error(name, "a value that is not finite"), stage, number, index)
        if self.flags is None:
            return
        left, most = self.flags.read_counts()
        self.position.skipped += left
        if self.step.average is not None:
            self.step.average.settle()
        if most >= MOST_IN_A_ROW:
            raise _error("losses or gradients", f"{most} steps in a row that were left out")

    def _buffers(self) -> list[tuple[Tensor, Tensor]]:
        modules = [m for m in (self.step.model, self.step.objective) if m is not None]
        return [(b, b.clone()) for module in modules for b in module.buffers()]

    def _leave_out(
        self,
        problem: EstimatorError,
        stage: str,
        number: int,
        index: Tensor | None,
        before: list[tuple[Tensor, Tensor]],
    ) -> None:
        _put_back(before)
        self.position.skipped += 1
        self.position.in_a_row += 1
        if self.position.in_a_row >= MOST_IN_A_ROW:
            last = self._placed(problem, stage, number, index)
            raise NonFiniteError(
                last.where, f"{self.position.in_a_row} steps in a row that were left out, the last with {last.found}",
                last.expected, problem.do,
            ) from problem  # fmt: skip

    def _placed(self, problem: EstimatorError, stage: str, number: int, index: Tensor | None) -> EstimatorError:
        """The error with the batch that it came from."""
        where = f"batch {number} of {stage}"
        if index is not None:
            rows = index.tolist()
            names = [str(row) if self.ids is None else self.ids[row] for row in rows[:NAMED]]
            kind = "rows" if self.ids is None else "ids"
            where += f" ({len(rows)} samples, {kind} {', '.join(names)}{', ...' * (len(rows) > NAMED)})"
        return type(problem)(problem.where, f"{problem.found} in {where}", problem.expected, problem.do)

    def features(self, run: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor | None]:
        """What `run` returns, and which rows of it a bank may hold: None for all, under "skip" a bool [B]."""
        if self.policy == "stop":
            return run(), None
        before, features = self._buffers(), run()
        keep = torch.stack([value.reshape(len(value), -1).isfinite().all(1) for value in features.values()]).all(0)
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(torch.where(keep.all(), buffer, value))
        return features, keep

    def note(self, output: Any, number: int) -> None:
        """Keep a batch's values until they are read, where the host does not look at them. Nothing is computed."""
        if self.policy == "stop" and self.step.scaler is None and not self._looks(output.loss):
            information = getattr(output, "information", output)
            if information is not output:
                self._noted.setdefault(("task",), []).append((number, output.task.reshape(1)))
            if information is not None:
                self._noted.setdefault(tuple(information.names), []).append((number, information.stacked_values))

    def _first(self) -> tuple[str, int, str] | None:
        """The first value that was noted and is not finite, as (stage, batch, name). Waits for the device."""
        noted = [(names, torch.stack([v for _, v in values])) for names, values in self._noted.items()]
        numbers = [[number for number, _ in values] for values in self._noted.values()]
        self._noted = {}
        found = first_not_finite(noted, numbers)
        placed = self.position.noted() if found is None else (self.position.stage, found[1], found[0])
        if placed is None:
            return None
        stage, number, name = placed
        return stage, number, {"task": "task loss", "loss": "loss"}.get(name, f"objective term {name}")

    def require_a_step(self, losses: Mapping[str, Any]) -> None:
        """Raise NonFiniteError if all steps of stage 2 were left out."""
        if not losses and self.position.skipped:
            raise _error("losses", f"no step of this epoch that could be made ({self.position.skipped} left out)")


def _error(where: str, found: str) -> NonFiniteError:
    return NonFiniteError(
        where, found, "finite losses and gradients",
        'Look at these samples, lower train.lr, set train.clip_norm, or set train.non_finite="skip".',
    )  # fmt: skip


@torch.no_grad()
def _put_back(before: list[tuple[Tensor, Tensor]]) -> None:
    """Give buffers the values that they had before a forward pass."""
    for buffer, value in before:
        buffer.copy_(value)


def _any_non_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether a value is NaN or infinite. The fastest look at many tensors is the one that loss scaling takes."""
    for tensors in by_kind(gradients):
        found, one = (torch.full((), n, device=tensors[0].device, dtype=torch.float32) for n in (0.0, 1.0))
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, one)
        if found.item():
            return True
    return False
