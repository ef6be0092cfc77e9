"""The static step: each stage is one function over buffers that stay in place, so that a GPU can replay it.

A step launches hundreds of small kernels, and Python takes longer to launch them than a GPU takes to run them.
Here a stage reads its batch, its random rows and its rates from static buffers, and writes its results into others.
It never waits for the device and copies nothing from the host. On a GPU each shape is captured as a CUDA graph and
replayed. With `graphs="emulate"` the same functions run uncaptured on any device.

The first batch of a shape runs uncaptured. It is the warm-up that a capture needs, and a training step like any other.
The second batch is captured and replayed.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.kernels.knn_product import Bank
from engine.loaders.feed import CopyFeed, Feed, Key, send
from engine.model.lowered import LOW, Copies
from engine.profile import part
from engine.step.averages import Average, EpochResult, Sums, means
from engine.step.bank import FeatureBank
from engine.step.batches import whole_batches
from engine.step.graph_state import DeviceNumbers, StateWatch, make_capturable, optimizer_settings, plain_settings
from engine.step.graphs import GraphRunner
from engine.step.known_code import KnownCode, is_known
from engine.step.notes import Notes
from engine.step.passes import OnBatch, nothing, only_looks
from engine.step.position import Position

if TYPE_CHECKING:
    from engine.step import StepOutput, TwoStageStep

PREDICTION, TARGET = "<prediction>", "<target>"
"""Names beside those of features in the bank of an evaluation."""


class StaticPasses:
    """The passes of an epoch as static functions, one call per batch. `TwoStageStep` makes and uses them.

    Args:
        step: whose stages these are.
        capture, strict: as for `GraphRunner`.
    """

    def __init__(self, step: TwoStageStep, capture: bool, strict: bool):
        self.step = step
        self.device = next((p.device for p in step.model.parameters()), torch.device("cpu"))
        self.graphs = GraphRunner(self.device, capture, strict, warm_ups=1 if step.compile == "off" else 2)
        self.held = DeviceNumbers(self.device)
        # the batch's number in its pass, and that of its product rows in the epoch
        self._counters = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.number, self.row = self._counters[:1], self._counters[1:]
        self._loader: Iterable | None = None
        self._copies: CopyFeed | None = None
        self._feeds: dict[int, tuple[Any, Feed]] = {}  # the loaders too: while they live no other gets their ids
        self._known: dict[str, Tensor] = {}
        self._prepared: Bank | None = None  # of these
        self._order = torch.zeros(0, 0, dtype=torch.int64, device=self.device)
        self._draws: dict[str, Any] = {}
        self._totals: dict[str, tuple[list[str], Tensor]] = {}
        self._counts: Counter[str] = Counter()  # samples that each of the totals holds
        self._notes = Notes(self.device)
        self._left_out: dict[str, Tensor] = {}  # of these, samples of steps that were left out
        self._banks: dict[str, FeatureBank] = {}
        self._watched: StateWatch | None = None
        self._code: KnownCode | None = None
        self._lowered: Copies | None = None  # of weights, for the forward passes of the stages' functions
        self._replayed = False  # whether nothing but a replay has happened since the last look at the parameters
        self._settings: list[Any] = []
        self._plain: list[tuple] = []

    # -- passes

    def collect(self, loader: Iterable, size: int, on_batch: OnBatch, position: Position | None = None) -> FeatureBank:
        """As `EagerPasses.collect`."""
        position = position or Position()
        bank = position.filling = self._bank("collect", size, position.filling)
        run = self._runner(on_batch, loader)
        with self._pass(position.left(loader), position=position) as feed:
            for number, key in enumerate(feed.steps(), position.batches):
                run(("collect", key), partial(self._collect_batch, key))
                on_batch("collect", number)
        return bank

    def begin_epoch(self, bank: FeatureBank | None, passes: Sequence[list[int]]) -> list[int]:
        """Copy the bank and draw the product rows of all passes: the number of each pass's first batch in the epoch."""
        with self.graphs.stream():
            if self._notes.begin_epoch(sum(len(sizes or ()) for sizes in passes)):
                self.graphs.clear()
            if bank is not None:
                self._draw("training", self._load(bank), [size for sizes in passes for size in sizes])
        return list(itertools.accumulate((len(sizes or ()) for sizes in passes[:-1]), initial=0))

    def stage1_bank(self, size: int, position: Position) -> FeatureBank:
        """The bank in which stage 1 keeps the features that it computes."""
        position.seen = self._bank("stage1", size, position.seen)
        return position.seen

    def stage1(
        self,
        loader: Iterable,
        bank: FeatureBank,
        batch_size: int,
        fresh: bool,
        first: int,
        on_batch: OnBatch,
        position: Position | None = None,
    ) -> Callable[[], Sums]:
        """One pass of stage 1 on the bank that `begin_epoch` copied. Returns as `EagerPasses.stage1`.

        Args:
            first: number of its first batch in the epoch, from `begin_epoch`.
        """
        step, position = self.step, position or Position()
        if fresh and not position.batches:
            bank.clear()
        run = self._runner(on_batch, loader if fresh else None)
        with self._pass(position.left(loader), first, position) as feed:
            self._begin_notes("stage1", first, len(loader) if fresh else -(-bank.size // batch_size), position)
            if fresh:
                keys = feed.steps()
            else:
                keys = ((size,) for size in self._shuffle(batch_size, position)[position.batches :])
            for number, key in enumerate(keys, position.batches):
                if key[0] < step.objective.min_batch:
                    self._counters.add_(1)
                    continue
                self.held.refresh_rates(step.estimator_optimizer)
                run(("stage1", fresh, key), partial(self._stage1_batch, key, fresh))
                self._count("stage1", key[0])
                on_batch("stage1", number)
            return self._sums_later("stage1")

    def stage2(
        self,
        loader: Iterable,
        size: int,
        bank: FeatureBank | None,
        first: int,
        on_batch: OnBatch,
        position: Position | None = None,
    ) -> tuple[Sums, Sums, FeatureBank]:
        """The pass of stage 2: sums of the losses, sums of the information terms, and the next bank."""
        step, position = self.step, position or Position()
        next_bank = position.filling = self._bank("stage2", size, position.filling)
        run = self._runner(on_batch, loader)
        with self._pass(position.left(loader), first, position) as feed:
            self._begin_notes("stage2", first, len(loader), position)
            for number, key in enumerate(feed.steps(), position.batches):
                use = bank is not None and key[0] >= step.objective.min_batch
                self.held.refresh_rates(step.main_optimizer)
                if step.average is not None:
                    self.held.refresh("average", step.average.next_rate())
                run(("stage2", use, key), partial(self._stage2_batch, key, use))
                self._count("losses", key[0])
                self._count("information", key[0] if use else 0)
                on_batch("stage2", number)
            copied = next_bank.copy()
            return self._sums("losses"), self._sums("information"), copied

    def evaluate(self, loader: Iterable, bank: FeatureBank | None) -> EpochResult:
        """As `EagerPasses.evaluate`. The samples come in the order of their rows."""
        step, run = self.step, self._runner(nothing, loader)
        sizes = loader.batch_sizes()
        with self._pass(loader) as feed:
            name = f"evaluate {self._place}"
            outputs = self._bank(name, sum(sizes))
            if bank is not None:
                self._draw(name, self._load(bank), sizes)
            for key in feed.steps():
                use = bank is not None and key[0] >= step.objective.min_batch
                run(("evaluate", use, key), partial(self._evaluate_batch, key, use))
                self._count("losses", key[0])
                self._count("information", key[0] if use else 0)
            rows = outputs.copy().rows
            losses, information = self._sums("losses"), self._sums("information")
        return EpochResult(
            **means(losses),
            information=means(information),
            prediction=rows.pop(PREDICTION),
            target=rows.pop(TARGET),
            features=rows,
        )

    def first_batch(self, loader: Iterable) -> Any:
        """The inputs of the first batch of a new pass, as the stages' functions read them."""
        feed, _ = self._feed_of(loader)
        key = next(iter(feed.steps()))
        return feed.batch(key, torch.zeros_like(self.number))[0]

    # -- one batch: what a graph holds

    @torch.no_grad()
    def _collect_batch(self, key: Key) -> None:
        inputs, target, index = self._feed.batch(key, self.number)
        features, keep = self.step.finite.features(partial(self.step.features, inputs, target))
        self._banks["collect"].store(index, features, keep)
        self._counters.add_(1)

    def _stage1_batch(self, key: Key, fresh: bool) -> None:
        if fresh:
            inputs, target, index = self._feed.batch(key, self.number)
            with torch.no_grad():
                features, keep = self.step.finite.features(partial(self.step.features, inputs, target))
                self._banks["stage1"].store(index, features, keep)
        else:
            rows = self._order.index_select(0, self.number)[0, : key[0]]
            features = {name: value.index_select(0, rows) for name, value in self._known.items()}
        run = partial(self.step.stage1, features, self._take("training", key[0]))
        output = self.step.finite.guarded("stage1", 0, None, run)
        self._add("stage1", output.names, output.stacked_values, key[0], self.step.finite.keep(output.loss))
        self._note("stage1", output.names, output.stacked_values)
        self._counters.add_(1)

    def _stage2_batch(self, key: Key, information: bool) -> None:
        inputs, target, index = self._feed.batch(key, self.number)
        products = self._take("training", key[0]) if information else None
        run = partial(self.step.stage2, inputs, target, products, information=information)
        output = self.step.finite.guarded("stage2", 0, None, run)
        keep = self.step.finite.keep(output.loss)
        self._banks["stage2"].store(index, output.features, keep)
        self._add_output(output, key[0], keep)
        self._note("losses", ["task"], output.task.reshape(1))
        if output.information is not None:
            self._note("information", output.information.names, output.information.stacked_values)
        self._counters.add_(1)

    @torch.no_grad()
    def _evaluate_batch(self, key: Key, information: bool) -> None:
        inputs, target, index = self._feed.batch(key, self.number)
        name = f"evaluate {self._place}"
        products = self._take(name, key[0]) if information else None
        output = self.step.evaluated(inputs, target, products, information)
        self._banks[name].store(index, {PREDICTION: output.prediction, TARGET: target, **output.features})
        self._add_output(output, key[0])
        self._counters.add_(1)

    def _add_output(self, output: StepOutput, size: int, keep: Tensor | None = None) -> None:
        self._add("losses", ("loss", "task"), torch.stack([output.loss, output.task]), size, keep)
        if output.information is not None:
            self._add("information", output.information.names, output.information.stacked_values, size, keep)

    # -- what they share

    @contextlib.contextmanager
    def _pass(self, loader: Iterable, first: int = 0, position: Position | None = None) -> Iterator[Feed]:
        position = position or Position()
        self._check_settings()
        self._feed, self._place = self._feed_of(loader)
        self.step.held = self.held
        try:
            with self.graphs.stream():
                self.number.fill_(position.batches)
                self.row.fill_(first + position.batches)
                self._begin_sums(position)
                self._begin_copies()
                yield self._feed
        finally:
            self.step.held = None

    def _feed_of(self, loader: Iterable) -> tuple[Feed, int]:
        """The feed of a loader, and a number for the keys of its graphs. Loaders without a feed share one."""
        if not hasattr(loader, "feed"):
            self._loader = loader
            if self._copies is None:
                self._copies = CopyFeed(lambda: whole_batches(self.step.batches(self._loader)), self.device)
            return self._copies, 0
        if id(loader) not in self._feeds:
            self._feeds[id(loader)] = loader, loader.feed()
        return self._feeds[id(loader)][1], id(loader)

    def _runner(self, on_batch: OnBatch, loader: Iterable | None) -> Callable[[tuple, Callable[[], None]], None]:
        """What runs the batches of a pass. It makes graphs anew where what they hold has changed since the last one.

        Code that it does not know may have done so. After a callback everything is compared, and parameters alone after
        a loader's batch, or where a function ran instead of being replayed. Where such code runs between two batches,
        no kept copies of weights are used.
        """
        looks = only_looks(on_batch)
        quiet = looks and (loader is None or hasattr(loader, "feed"))
        known = quiet and (loader is None or is_known(loader))

        def run(key: tuple, function: Callable[[], None]) -> None:
            if not looks:
                self._check_settings()
            elif not (quiet and self._replayed) and self._watched.moved():
                self._begin_watching()
            if (copies := self._lowered) is None or not known:
                self._replayed = self.graphs.run((*key, self._place), function)
                return
            self._replayed = self.graphs.run((*key, self._place, "copies"), partial(_with_copies, copies, function))
            if copies.make():
                # Graphs do not write the new copies. Warm-ups begin anew: the update makes its tables in one, outside
                # of the graph, which else would make them again in every replay.
                self.graphs.clear()

        return run

    def _begin_copies(self) -> None:
        """Cast the kept 16-bit weights anew. They are forgotten where code that is not known might change weights."""
        if self.step.autocast not in LOW or not self._code.alone():
            if self._lowered is not None:
                self._lowered = None
                self.graphs.clear()
        elif self._lowered is None:
            self._lowered = Copies(self.step.autocast)
        else:
            self._lowered.refresh()

    def _modules(self) -> list[nn.Module]:
        return [m for m in (self.step.model, self.step.objective) if m is not None]

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [o for o in (self.step.main_optimizer, self.step.estimator_optimizer) if o is not None]

    def _check_settings(self) -> None:
        """Forget the graphs where a setting that they hold has changed."""
        step, modules, optimizers = self.step, self._modules(), self._optimizers()
        now = [*map(optimizer_settings, optimizers), step.clip_value, step.clip_norm, step.autocast, step.label]
        now += [*modules, *optimizers, step.average, step.scaler, step.task_loss, step.finite]  # equal: the same ones
        watched = self._watched
        if watched is None or now != self._settings or not watched.unchanged(modules, optimizers):
            for optimizer in optimizers:
                make_capturable(optimizer, self.device)
            now = [*map(optimizer_settings, optimizers), *now[len(optimizers) :]]  # which that may have changed
            plain = plain_settings(modules)
            same = watched is not None and (now, plain) == (self._settings, self._plain)
            if not same or watched.moved() or watched.replaced():
                self.graphs.clear()
                self._lowered = None
            self._code = KnownCode(step)
            self._settings, self._plain = now, plain
            self._watched = StateWatch(modules, optimizers)  # with state that earlier passes added
        self._replayed = True

    def _begin_watching(self) -> None:
        self.graphs.clear()
        self._lowered, self._code = None, KnownCode(self.step)
        self._watched = StateWatch(self._modules(), self._optimizers())

    def _bank(self, name: str, size: int, content: FeatureBank | None = None) -> FeatureBank:
        """The bank `name`, empty or with the content that a pass that is gone on with has left."""
        if content is not None and content is not self._banks.get(name):
            self._banks[name] = content
            self.graphs.clear()
            return content
        if name not in self._banks or self._banks[name].size != size:
            if name in self._banks:
                self.graphs.clear()
            self._banks[name] = FeatureBank(size, self.device)
        self._banks[name].clear()
        return self._banks[name]

    def _load(self, bank: FeatureBank) -> Bank:
        """Copy a bank's features to where the graphs read them."""
        features = bank.tensors()
        if {k: v.shape for k, v in features.items()} != {k: v.shape for k, v in self._known.items()}:
            if self._known:
                self.graphs.clear()
            self._known = {name: torch.empty_like(value) for name, value in features.items()}
            self._prepared = None
        for name, value in features.items():
            self._known[name].copy_(value)
        bank = Bank(self._known)
        if self._prepared is not None:
            bank.take_over(self._prepared)
        self._prepared = bank
        return bank

    def _shuffle(self, batch_size: int, position: Position) -> list[int]:
        """Draw the order in which the known bank's rows are taken; return the sizes of the batches."""
        count = len(next(iter(self._known.values())))
        batches = -(-count // batch_size)
        if position.order is None:
            position.order = self.step.shuffled(count)
        if self._order.shape != (batches, batch_size):
            if self._order.numel():
                self.graphs.clear()
            self._order = torch.zeros(batches, batch_size, dtype=torch.int64, device=self.device)
        order = position.order.new_zeros(batches * batch_size)
        order[:count] = position.order
        send(self._order, order.view(batches, batch_size))
        return [min(batch_size, count - start) for start in range(0, count, batch_size)]

    def _draw(self, stage: str, known: Bank, sizes: list[int]) -> None:
        """Draw product rows for batches of these sizes, into the buffers of the last draw where they fit."""
        if not self.step.objective.needs_products:
            return
        with part("products"):
            drawn = self.step.objective.sample_epoch(known, sizes, self.step.generator)
            if stage in self._draws and self._draws[stage].fits(drawn):
                self._draws[stage].load(drawn)
            else:
                if stage in self._draws:
                    self.graphs.clear()
                self._draws[stage] = drawn

    def _take(self, stage: str, size: int) -> Mapping[str, Any] | None:
        if stage not in self._draws:
            return None
        foreseen = sorted(set(self._draws[stage].batch_sizes))
        if size not in foreseen:
            raise ConfigError(
                "loader", f"a batch of {size} samples", f"batches of {foreseen}",
                "Give batches of batch_size samples, the last one smaller, or a loader with a method batch_sizes().",
            )  # fmt: skip
        with part("products"):
            return self._draws[stage].take(self.row[0], size)

    def _add(self, name: str, names: Sequence[str], values: Tensor, weight: int, keep: Tensor | None = None) -> None:
        if name not in self._totals:
            self._totals[name] = list(names), torch.zeros_like(values, dtype=torch.float32)
            self._left_out[name] = torch.zeros((), dtype=torch.int64, device=self.device)
        if keep is not None:
            values = torch.where(keep, values, torch.zeros_like(values))
            self._left_out[name].add_(~keep, alpha=weight)
        self._totals[name][1].add_(values, alpha=weight)

    def _note(self, name: str, names: Sequence[str], values: Tensor) -> None:
        """Keep a batch's values until the epoch is read."""
        if self.step.finite.policy != "skip" and self.step.scaler is None:
            self._notes.note(name, names, values, self.row)

    def _begin_notes(self, stage: str, first: int, batches: int, position: Position) -> None:
        if self._notes.begin_pass(stage, first, batches):
            self.graphs.clear()
        position.noted = self._notes.first_not_finite

    def _begin_sums(self, position: Position) -> None:
        """Begin a pass's sums at 0, or at what they were."""
        self._counts.clear()
        for name, (_, total) in self._totals.items():
            total.zero_()
            self._left_out[name].zero_()
        for name, average in position.now().items():
            for names, total, count in average.state_dict()["batches"]:
                self._add(name, names, total, 1)
                self._counts[name] = count
        position.now = lambda: {
            name: Average.of({"batches": [[*self._totals[name], count]], "sums": {}}, self.device)
            for name in self._counts
            if (count := self._seen(name))
        }

    def _count(self, name: str, samples: int) -> None:
        self._counts[name] += samples

    def _sums(self, name: str) -> Sums:
        """Sums of a pass, read from the device; empty where nothing was added."""
        count = self._seen(name)
        if not count:
            return {}
        names, total = self._totals[name]
        return _named(names, total, count)

    def _sums_later(self, name: str) -> Callable[[], Sums]:
        """What reads the sums of a pass, which are kept until then. Where steps may be left out they are read now."""
        count = self._seen(name)
        if not count:
            return dict
        names, total = self._totals[name]
        return partial(_named, names, total.clone(), count)

    def _seen(self, name: str) -> int:
        """Samples of the steps that were made, of those that the totals `name` hold."""
        count, skips = self._counts[name], self.step.finite.policy == "skip"
        return count - int(self._left_out[name]) if count and skips else count


def _with_copies(copies: Copies, function: Callable[[], None]) -> None:
    with copies.used():
        function()


def _named(names: Sequence[str], total: Tensor, count: int) -> Sums:
    return {name: (value, count) for name, value in zip(names, total.tolist(), strict=True)}
