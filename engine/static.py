"""The static step: each stage as one function over buffers that stay where they are, so that a GPU can replay it.

A step launches hundreds of small kernels, and Python takes longer to launch them than a GPU takes to run them.
Here a stage reads its batch, its random rows and its rates from static buffers, and leaves its results in others.
Nothing in it waits for the device or copies from the host. On a GPU it is captured as a CUDA graph for every shape it
meets, and replayed. With `graphs="emulate"` the same functions run uncaptured on any device.

A shape's first batch runs uncaptured. That is the warm-up that a capture needs, and it counts: no weight has to be
restored. The second batch is captured and replayed.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from engine.errors import ConfigError
from engine.kernels import registry
from engine.kernels.knn_product import Bank
from engine.loaders.feed import CopyFeed, Feed, Key
from engine.profile import part

if TYPE_CHECKING:
    from engine.step import FeatureBank, StepOutput, Sums, TwoStageStep

LIMIT = 64  # graphs a step keeps; further shapes run uncaptured
KERNELS = str(Path(registry.__file__).parent)

log = logging.getLogger("engine")


class NotCapturable(ConfigError):
    """An operation that a CUDA graph cannot hold."""

    def __init__(self, operation: str, where: str, why: str):
        super().__init__(
            "graphs", f"{operation} at {where}: {why}", "operations that a CUDA graph can replay",
            "Change the model there, or train with graphs off (train.graphs=off).",
        )  # fmt: skip


# -- what cannot be captured ---------------------------------------------------------------------------------------


_READS = {"_local_scalar_dense": "the host waits for its value"}
_SIZES = dict.fromkeys(
    ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"),
    "the size of its result depends on values",
)


class Watch(TorchDispatchMode):
    """Notices the first operation that a CUDA graph could not hold, on any device.

    Args:
        strict: raise it. Otherwise it is kept as `found`, and what is watched runs to its end.
    """

    def __init__(self, strict: bool = True):
        super().__init__()
        self.strict = strict
        self.found: NotCapturable | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        why = _READS.get(name) or _SIZES.get(name)
        if name == "index" and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
            why = "the size of its result depends on values"
        if name in ("copy_", "_to_copy", "index") and why is None:
            devices = {t.device.type for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
            target = (kwargs or {}).get("device")
            if len(devices | ({torch.device(target).type} if target is not None else set())) > 1:
                why = "data move between host and device"
        if why is not None:
            where, ours = _caller()
            # a host function for CPU tensors may look at them: on a GPU another one runs
            if not (ours and all(t.device.type == "cpu" for t in tree_iter(args) if isinstance(t, Tensor))):
                self.found = self.found or NotCapturable(name.strip("_"), where, why)
                if self.strict:
                    raise self.found
        return func(*args, **(kwargs or {}))


def _caller() -> tuple[str, bool]:
    """Where Python code outside of torch called an operation, and whether it is one of the engine's kernels."""
    frame = sys._getframe(2)
    library = str(Path(torch.__file__).parent)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((library, "<")):
            return f"{Path(file).name}:{frame.f_lineno}", file.startswith(KERNELS)
        frame = frame.f_back
    return "an unknown place", False


# -- graphs ---------------------------------------------------------------------------------------------------------


class Graphs:
    """Runs functions without arguments, each under a key: captured once and replayed, or uncaptured.

    Args:
        device: where the functions' buffers are.
        capture: False runs them uncaptured, which works on every device.
        strict: raise `NotCapturable` where a function cannot be captured. Otherwise it is said once, and everything
            runs uncaptured from there.
        warm_ups: uncaptured runs before a capture. The first is watched; torch.compile compiles nothing in it, and so
            needs a second.
        limit: graphs kept at once.
    """

    def __init__(self, device: torch.device, capture: bool, strict: bool, warm_ups: int = 1, limit: int = LIMIT):
        self.device, self.capture, self.strict, self.warm_ups, self.limit = device, capture, strict, warm_ups, limit
        self._graphs: dict[Hashable, Any] = {}
        self._seen: Counter[Hashable] = Counter()
        self._uncaptured: set[Hashable] = set()
        self._watching = True
        if capture:
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()  # memory that all graphs share

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Forget everything: what the graphs read has moved."""
        self._graphs.clear()
        self._seen.clear()
        self._uncaptured.clear()
        if self.capture:
            # a pool that no graph uses any more takes no new one while something in it is alive
            self._pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """A context in which work is queued where graphs are captured and replayed."""
        if not self.capture:
            yield
            return
        outside = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outside.wait_stream(self._stream)

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """Run `function`: as the graph of this key, as its warm-up, or uncaptured."""
        if key in self._graphs:
            self._graphs[key].replay()
            return
        self._seen[key] += 1
        with registry.static():
            if self._seen[key] == 1 and self._watching:
                self._watched(function)
            elif not self.capture or key in self._uncaptured or self._seen[key] <= self.warm_ups:
                function()
            elif len(self._graphs) >= self.limit:
                log.warning("%d CUDA graphs are kept, no more are made: further shapes run uncaptured", self.limit)
                self._uncaptured.add(key)
                function()
            elif self._captured(key, function):
                self._graphs[key].replay()
            else:
                function()

    def _watched(self, function: Callable[[], None]) -> None:
        # run once, whatever is found: a step that is broken off and begun anew would train twice on its batch
        with Watch(self.strict) as watch:
            function()
        if watch.found is not None:
            self._give_up(watch.found)

    def _captured(self, key: Hashable, function: Callable[[], None]) -> bool:
        """Whether the function could be captured under the key."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                function()
        except ConfigError:
            raise
        except RuntimeError as error:
            cause = _first_error(error)
            if isinstance(cause, torch.OutOfMemoryError):
                self._no_room_for(key, cause)
            else:
                _mend_generator(
                    self.device
                )  # not above: the graphs that are kept there draw from the state it replaces
                self._give_up(NotCapturable("an operation", _raised_at(cause), str(cause).splitlines()[0]))
            return False
        self._graphs[key] = graph
        return True

    def _no_room_for(self, key: Hashable, cause: torch.OutOfMemoryError) -> None:
        self._uncaptured.add(key)
        log.warning(
            "out of memory while a CUDA graph was captured for %s (%d are kept): this shape runs uncaptured. A smaller "
            "batch_size, or train.graphs=off, needs less. %s",
            key, len(self._graphs), str(cause).splitlines()[0],
        )  # fmt: skip
        torch.cuda.empty_cache()

    def _give_up(self, cause: NotCapturable) -> None:
        if self.strict:
            raise cause
        log.warning("steps run without CUDA graphs: %s", cause)
        self.capture = self._watching = False
        self._graphs.clear()


def _mend_generator(device: torch.device) -> None:
    """A capture that broke leaves torch's generator as if it went on, and every draw fails: give it a state of its own
    with the same numbers to come."""
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    fresh = torch.Generator(device)
    fresh.set_state(generator.get_state())
    generator.graphsafe_set_state(fresh.graphsafe_get_state())


def _first_error(error: BaseException) -> BaseException:
    """The error that led to this one: ending a broken capture raises another."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _raised_at(error: BaseException) -> str:
    """The last place outside of torch in an error's traceback."""
    library, found, trace = str(Path(torch.__file__).parent), "an unknown place", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith((library, "<")):
            found = f"{Path(file).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


# -- what graphs read of Python's ---------------------------------------------------------------------------------


class Held:
    """Numbers that change from step to step, such as learning rates, as tensors that a graph reads.

    Python keeps the numbers; `refresh` copies those that changed. Other settings of an optimiser are part of its
    graphs: see `settings`.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._values: dict[Hashable, tuple[Tensor, float | None]] = {}

    def tensor(self, name: Hashable) -> Tensor:
        """0-d, the number `name`: in float32 on a GPU, whose optimisers read no other, else in float64."""
        if name not in self._values:
            dtype = torch.float32 if self._device.type == "cuda" else torch.float64
            self._values[name] = torch.zeros((), dtype=dtype, device=self._device), None
        return self._values[name][0]

    def refresh(self, name: Hashable, value: float) -> None:
        tensor = self.tensor(name)
        if self._values[name][1] != value:
            tensor.fill_(value)
            self._values[name] = tensor, value

    def refresh_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the learning rates that the optimiser's groups have now."""
        for number, group in enumerate(optimizer.param_groups):
            self.refresh((id(optimizer), number), float(group["lr"]))

    @contextlib.contextmanager
    def rates(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """A context in which the optimiser's learning rates are the tensors."""
        own = [group["lr"] for group in optimizer.param_groups]
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = self.tensor((id(optimizer), number))
        try:
            yield
        finally:
            for group, rate in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = rate


def settings(optimizer: torch.optim.Optimizer) -> list[tuple]:
    """An optimiser's settings but for learning rates: a graph holds them as they were."""
    return [tuple((k, v) for k, v in g.items() if k not in ("params", "lr")) for g in optimizer.param_groups]


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Let an optimiser's step be part of a graph.

    Raises:
        ConfigError: it cannot.
    """
    kind, first = type(optimizer).__name__, optimizer.param_groups[0]
    if "capturable" not in optimizer.defaults and not first.get("fused"):
        raise ConfigError(
            "graphs", f"the optimiser {kind}, which reads its learning rate on the host",
            "one that can be captured: Adam, AdamW or another with capturable=True, SGD with fused=True",
            "Use such an optimiser, or graphs off.",
        )  # fmt: skip
    if device.type != "cuda":
        return
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(device)


class Watched:
    """Notices that something which graphs hold has been replaced.

    Args:
        modules: whose parameters, with their storages, buffers and parts are watched.
        optimizers: whose state is watched. What a step adds to it is no replacement.
    """

    def __init__(self, modules: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer]):
        every = [module for root in modules for module in root.modules()]
        self._parameters = [
            (module._parameters, name, p, 0 if p is None else p.data_ptr(), p is not None and p.requires_grad)
            for module in every
            for name, p in module._parameters.items()
        ]
        self._parts = [
            (held, name, value) for m in every for held in (m._buffers, m._modules) for name, value in held.items()
        ]
        self._state = [
            (o, p, name, value) for o in optimizers for p, state in o.state.items() for name, value in state.items()
        ]

    def moved(self) -> bool:
        """Whether a parameter is another one, lies elsewhere, or is frozen or no longer so. Cheap: for every batch."""
        return any(
            held.get(name) is not p or (p is not None and (p.data_ptr() != place or p.requires_grad != moving))
            for held, name, p, place, moving in self._parameters
        )

    def replaced(self) -> bool:
        """Whether anything else is another one."""
        parts = (held.get(name) is not value for held, name, value in self._parts)
        state = (o.state.get(p, {}).get(name) is not value for o, p, name, value in self._state)
        return any(parts) or any(state)


def numbers(modules: Iterable[nn.Module]) -> list[tuple]:
    """Plain settings of modules, such as a dropout's p: a graph holds them as they were.

    Integers are left out: where they change they are counters.
    """
    found = []
    for root in modules:
        for module in root.modules():
            found += [(k, v) for k, v in vars(module).items() if k != "training" and isinstance(v, (bool, float, str))]
    return found


# -- the passes -------------------------------------------------------------------------------------------------


class StaticStep:
    """The passes of an epoch, batch by batch as static functions. `TwoStageStep` makes and uses it.

    Args:
        step: whose stages these are.
        capture, strict: as for `Graphs`.
    """

    def __init__(self, step: TwoStageStep, capture: bool, strict: bool):
        self.step = step
        self.device = next((p.device for p in step.model.parameters()), torch.device("cpu"))
        self.graphs = Graphs(self.device, capture, strict, warm_ups=1 if step.compile == "off" else 2)
        self.held = Held(self.device)
        # the batch's number in its pass, and that of its product rows in the epoch
        self._counters = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.number, self._row = self._counters[:1], self._counters[1]
        self._loader: Iterable | None = None
        self._copies: CopyFeed | None = None
        self._feeds: dict[int, tuple[Any, Feed]] = {}  # with their loaders: their ids must not be given anew
        self._known: dict[str, Tensor] = {}
        self._order = torch.zeros(0, 0, dtype=torch.int64, device=self.device)
        self._draws: dict[str, Any] = {}
        self._totals: dict[str, tuple[list[str], Tensor]] = {}
        self._banks: dict[str, FeatureBank] = {}
        self._watched: Watched | None = None
        self._settings: list[Any] = []

    # the passes

    def collect(self, loader: Iterable, size: int, on_batch: Callable[[str, int], None]) -> FeatureBank:
        """As `TwoStageStep.collect`."""
        bank = self._bank("collect", size)
        with self._pass(loader) as feed:
            for number, key in enumerate(feed.steps()):
                self._run(("collect", key), partial(self._collect_batch, key))
                on_batch("collect", number)
        return bank

    def begin_epoch(self, bank: FeatureBank | None, passes: Sequence[list[int]]) -> list[int]:
        """Take over the bank and draw the product rows of all of the epoch's passes; the number of each one's first."""
        if bank is not None:
            with self.graphs.stream():
                self._draw("training", self._load(bank), [size for sizes in passes for size in sizes])
        return list(itertools.accumulate((len(sizes or ()) for sizes in passes[:-1]), initial=0))

    def stage1_bank(self, size: int) -> FeatureBank:
        """An empty bank, in which stage 1 keeps the features that it computes."""
        return self._bank("stage1", size)

    def stage1(
        self,
        loader: Iterable,
        bank: FeatureBank,
        batch_size: int,
        fresh: bool,
        first: int,
        on_batch: Callable[[str, int], None],
    ) -> Sums:
        """One pass of stage 1 on the bank that `begin_epoch` took over: sums of the estimators' values.

        `first`: the number of its first batch's product rows, as `begin_epoch` gave it.
        """
        step, seen = self.step, 0
        if fresh:
            self.stage1_bank(bank.size)
        with self._pass(loader, first) as feed:
            if fresh:
                keys = feed.steps()
            else:
                keys = ((size,) for size in self._shuffle(len(next(iter(self._known.values()))), batch_size))
            for number, key in enumerate(keys):
                if key[0] < step.objective.min_batch:
                    self._counters.add_(1)
                    continue
                self.held.refresh_rates(step.estimator_optimizer)
                self._run(("stage1", fresh, key), partial(self._stage1_batch, key, fresh))
                seen += key[0]
                on_batch("stage1", number)
            return self._sums("stage1", seen)

    def stage2(
        self,
        loader: Iterable,
        size: int,
        bank: FeatureBank | None,
        first: int,
        on_batch: Callable[[str, int], None],
    ) -> tuple[Sums, Sums, FeatureBank]:
        """The pass of stage 2: sums of the losses, sums of the information terms, and the next bank."""
        step, seen, informed = self.step, 0, 0
        next_bank = self._bank("stage2", size)
        with self._pass(loader, first) as feed:
            for number, key in enumerate(feed.steps()):
                use = bank is not None and key[0] >= step.objective.min_batch
                self.held.refresh_rates(step.main_optimizer)
                if step.average is not None:
                    self.held.refresh("average", step.average.next_rate())
                self._run(("stage2", use, key), partial(self._stage2_batch, key, use))
                seen += key[0]
                informed += key[0] if use else 0
                on_batch("stage2", number)
            return self._sums("losses", seen), self._sums("information", informed), next_bank.copy()

    def evaluate(self, loader: Iterable, bank: FeatureBank | None) -> tuple[Sums, Sums, FeatureBank]:
        """A pass without training: sums of the losses and of the information terms; "prediction", "target" and features
        of all samples, by row."""
        step, seen, informed = self.step, 0, 0
        sizes = loader.batch_sizes()
        with self._pass(loader) as feed:
            found = self._bank(f"evaluate {self._place}", sum(sizes))
            if bank is not None:
                self._draw(f"evaluate {self._place}", self._load(bank), sizes)
            for key in feed.steps():
                use = bank is not None and key[0] >= step.objective.min_batch
                self._run(("evaluate", use, key), partial(self._evaluate_batch, key, use))
                seen += key[0]
                informed += key[0] if use else 0
            return self._sums("losses", seen), self._sums("information", informed), found.copy()

    def first_batch(self, loader: Iterable) -> Any:
        """The inputs of a pass's first batch, as the stages' functions read them. The pass is begun for it."""
        feed, _ = self._feed_of(loader)
        key = next(iter(feed.steps()))
        return feed.batch(key, torch.zeros_like(self.number))[0]

    # one batch: what a graph holds

    @torch.no_grad()
    def _collect_batch(self, key: Key) -> None:
        inputs, target, index = self._feed.batch(key, self.number)
        self._banks["collect"].store(index, self.step.features(inputs, target))
        self._counters.add_(1)

    def _stage1_batch(self, key: Key, fresh: bool) -> None:
        if fresh:
            inputs, target, index = self._feed.batch(key, self.number)
            with torch.no_grad():
                features = self.step.features(inputs, target)
                self._banks["stage1"].store(index, features)
        else:
            rows = self._order.index_select(0, self.number)[0, : key[0]]
            features = {name: value.index_select(0, rows) for name, value in self._known.items()}
        output = self.step.stage1(features, self._take("training", key[0]))
        self._add("stage1", output.names, output.stacked_values, key[0])
        self._counters.add_(1)

    def _stage2_batch(self, key: Key, information: bool) -> None:
        inputs, target, index = self._feed.batch(key, self.number)
        products = self._take("training", key[0]) if information else None
        output = self.step.stage2(inputs, target, products, information=information)
        self._banks["stage2"].store(index, output.features)
        self._add_output(output, key[0])
        self._counters.add_(1)

    @torch.no_grad()
    def _evaluate_batch(self, key: Key, information: bool) -> None:
        inputs, target, index = self._feed.batch(key, self.number)
        name = f"evaluate {self._place}"
        products = self._take(name, key[0]) if information else None
        output = self.step.evaluated(inputs, target, products, information)
        self._banks[name].store(index, {"prediction": output.prediction, "target": target, **output.features})
        self._add_output(output, key[0])
        self._counters.add_(1)

    def _add_output(self, output: StepOutput, size: int) -> None:
        self._add("losses", ("loss", "task"), torch.stack([output.loss, output.task]), size)
        if output.information is not None:
            self._add("information", output.information.names, output.information.stacked_values, size)

    # what they share

    @contextlib.contextmanager
    def _pass(self, loader: Iterable, first: int = 0) -> Iterator[Feed]:
        self._check_settings()
        self._feed, self._place = self._feed_of(loader)
        self.step.held = self.held
        try:
            with self.graphs.stream():
                self.number.zero_()
                self._row.fill_(first)
                for _, total in self._totals.values():
                    total.zero_()
                yield self._feed
        finally:
            self.step.held = None

    def _feed_of(self, loader: Iterable) -> tuple[Feed, int]:
        """The feed of a loader, and a number for its graphs' keys. Foreign loaders share one set of buffers."""
        if not hasattr(loader, "feed"):
            self._loader = loader
            if self._copies is None:
                self._copies = CopyFeed(lambda: self._loader, self.device)
            return self._copies, 0
        if id(loader) not in self._feeds:
            self._feeds[id(loader)] = loader, loader.feed()
        return self._feeds[id(loader)][1], id(loader)

    def _run(self, key: tuple, function: Callable[[], None]) -> None:
        if self._watched.moved():
            self._begin_watching()
        self.graphs.run((*key, self._place), function)

    def _modules(self) -> list[nn.Module]:
        return [m for m in (self.step.model, self.step.objective) if m is not None]

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [o for o in (self.step.main_optimizer, self.step.estimator_optimizer) if o is not None]

    def _check_settings(self) -> None:
        """Graphs hold settings as they were: forget the graphs where one has changed since."""
        for optimizer in self._optimizers():
            make_capturable(optimizer, self.device)
        step = self.step
        now = [*map(settings, self._optimizers()), step.clip_value, step.clip_norm, step.autocast, step.label]
        now.append(numbers(self._modules()))
        watched = self._watched
        if now != self._settings or watched is None or watched.moved() or watched.replaced():
            self.graphs.clear()
        self._settings = now
        self._watched = Watched(self._modules(), self._optimizers())  # also what the passes before added

    def _begin_watching(self) -> None:
        self.graphs.clear()
        self._watched = Watched(self._modules(), self._optimizers())

    def _bank(self, name: str, size: int) -> FeatureBank:
        from engine.step import FeatureBank

        if name not in self._banks or self._banks[name].size != size:
            self._banks[name] = FeatureBank(size, self.device)
            self.graphs.clear()
        self._banks[name].clear()
        return self._banks[name]

    def _load(self, bank: FeatureBank) -> Bank:
        """A bank's features, copied to where the graphs read them."""
        found = bank.tensors()
        if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in self._known.items()}:
            self._known = {name: torch.empty_like(value) for name, value in found.items()}
            self.graphs.clear()
        for name, value in found.items():
            self._known[name].copy_(value)
        return Bank(self._known)

    def _shuffle(self, count: int, batch_size: int) -> list[int]:
        """Draw the order in which a bank's rows are taken; the sizes of the batches."""
        batches = -(-count // batch_size)
        if self._order.shape != (batches, batch_size):
            self._order = torch.zeros(batches, batch_size, dtype=torch.int64, device=self.device)
            self.graphs.clear()
        order = torch.zeros(batches * batch_size, dtype=torch.int64)
        order[:count] = self.step.shuffled(count)
        self._order.copy_(order.view(batches, batch_size))
        return [min(batch_size, count - start) for start in range(0, count, batch_size)]

    def _draw(self, stage: str, known: Bank, sizes: list[int]) -> None:
        """Draw the product rows of batches of these sizes, into the buffers of those drawn before."""
        if not self.step.objective.needs_products:
            return
        with part("products"):
            drawn = self.step.objective.sample_epoch(known, sizes, self.step.generator)
            if stage in self._draws and self._draws[stage].fits(drawn):
                self._draws[stage].load(drawn)
            else:
                self._draws[stage] = drawn
                self.graphs.clear()

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
            return self._draws[stage].take(self._row, size)

    def _add(self, name: str, names: Sequence[str], values: Tensor, weight: int) -> None:
        if name not in self._totals:
            self._totals[name] = list(names), torch.zeros_like(values, dtype=torch.float32)
        self._totals[name][1].add_(values, alpha=weight)

    def _sums(self, name: str, count: int) -> Sums:
        """Sums of a pass, read from the device. Empty where nothing was added."""
        if count == 0 or name not in self._totals:
            return {}
        names, total = self._totals[name]
        return {n: (value, count) for n, value in zip(names, total.tolist(), strict=True)}
