"""What one run trains, and what trains it: model, objective, optimisers, step and passes, made from its settings."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from engine import checks
from engine.config import Config, ScheduleConfig
from engine.errors import ConfigError
from engine.loaders.batch import Batch
from engine.loaders.dataset import Dataset
from engine.model.described import without_memory
from engine.model.text_encoder import load_text_encoder, text_encoder_from_config
from engine.objective import Objective
from engine.precision import autocast_dtype
from engine.ranks import Ranks
from engine.step import TwoStageStep
from engine.step.averages import EpochResult
from engine.step.bank import FeatureBank
from engine.task import Inputs, Task
from engine.training.passes import Passes
from engine.training.random_state import seed_all
from engine.training.rank_step import StepOnRanks
from engine.training.records import Selection
from engine.training.sharding import check_shard, held_elsewhere
from engine.training.without_compiler import step_without_compiler
from engine.vocabulary import SPLITS


@dataclass
class Parts:
    """The parts of a run.

    Attributes:
        informed: whether there are information terms and the settings use them.
        scored: splits whose samples all have labels.
        text_config: the text encoder's configuration, as checkpoints keep it; None without text.
        selection: what chooses the best epoch.
        ranks: the processes that train together.
        text_encoder: the model's; None without text.
        sharded: whether the ranks hold the text encoder in parts at the moment.
    """

    task: Task
    config: Config
    dataset: Dataset
    device: torch.device
    model: nn.Module
    objective: Objective
    informed: bool
    step: TwoStageStep
    predictor: TwoStageStep
    optimizers: dict[str, torch.optim.Optimizer]
    schedulers: dict[str, Any]
    loaders: dict[str, Passes]
    unshuffled_train: Passes
    scored: list[str]
    text_config: dict[str, Any] | None
    selection: Selection
    ranks: Ranks
    text_encoder: nn.Module | None = None
    sharded: bool = False

    @property
    def samples(self) -> int:
        """Size of the training split."""
        return len(self.dataset.splits["train"])

    def weights(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "objective": self.objective.state_dict()}

    def evaluate(self, split: str, passes: Passes, bank: FeatureBank | None = None) -> EpochResult:
        """One pass over a split; without a loss where it has no labels."""
        return self.step.evaluate(passes, bank) if split in self.scored else self.predictor.evaluate(passes)

    def batches(self) -> dict[str, int]:
        """Batches of each stage in an epoch that has a bank, for the estimate of the time left."""
        train, n = self.config.train, len(self.loaders["train"])
        if not self.informed:
            return {"stage2": n}
        collected = train.stage1_features == "cached" and train.stage1_n
        return {"collect": n if collected else 0, "stage1": n * train.stage1_n, "stage2": n}


def build(task: Task, config: Config, inputs: Inputs, text_encoder: nn.Module | None) -> tuple[nn.Module, Objective]:
    """A task's fresh model and its objective."""
    model = task.model(config, inputs, text_encoder)
    return model, task.objective(config, model)


def predictor(model: nn.Module, ranks: Ranks | None = None) -> TwoStageStep:
    """A step that evaluates a model without a loss: samples need no labels."""
    return _step_of(ranks or Ranks())(model, None, lambda prediction, target: prediction.new_zeros(()))


def _step_of(ranks: Ranks) -> Callable[..., TwoStageStep]:
    """What makes the step of a process, or of one rank of several."""
    return TwoStageStep if ranks.size == 1 else partial(StepOnRanks, ranks)


def saved_encoder(meta: dict[str, Any], freeze: str = "no") -> nn.Module | None:
    """The text encoder that a checkpoint describes, its weights not loaded; None without text."""
    described = meta.get("text_encoder")
    return text_encoder_from_config(described, freeze) if described is not None else None


def assemble(
    task: Task,
    config: Config,
    dataset: Dataset,
    device: torch.device,
    resumed: dict[str, Any] | None,
    check_space: Callable[[nn.Module, Objective], None],
    ranks: Ranks | None = None,
) -> Parts:
    """All parts of a run before its first epoch.

    Args:
        ranks: the processes that train together; by default this one alone.
        resumed: what the checkpoint to go on from says of itself; None for a new run.
        check_space: is given model and objective, which have no memory yet, before they get any.
    """
    ranks = ranks or Ranks()
    _check_ranks(config, ranks)
    checks.class_numbers(config, dataset)
    checks.last_batch(config, dataset)
    seed_all(config.seed)
    encoder = _text_encoder(config, dataset, resumed)
    check_shard(config, encoder, device, ranks)
    checks.text_fits(config, dataset, encoder, task.pad_tokens(config))
    inputs, samples = Inputs(dataset.audio_dim, dataset.vision_dim), len(dataset.splits["train"])
    with torch.random.fork_rng(devices=[]), without_memory():
        described = build(task, config, inputs, encoder)
    batch = min(config.batch_size, samples)
    elsewhere = held_elsewhere(config, encoder, ranks)
    checks.memory(config, described, task.held_bytes(config, batch), device, elsewhere)
    checks.long_sequences(config, dataset, device)
    checks.bank_size(config, described[1], samples)
    check_space(*described)
    model, objective = build(task, config, inputs, encoder)
    config.data.label_scale = checks.label_scale(config, dataset)
    for message in task.warnings(config, objective):
        warnings.warn(message, stacklevel=2)
    task.start(config, model, dataset)
    model, objective = model.to(device), objective.to(device)
    informed = config.objective.enabled and bool(objective.terms)
    optimizers = _optimizers(config, model, encoder, objective)
    selection = Selection(*task.selection(config))

    def passes(split: str, training: bool) -> Passes:
        return passes_over(task, config, model, dataset, split, device, training, ranks)

    return Parts(
        task, config, dataset, device, model, objective, informed,
        step=_step(task, config, model, objective if informed else None, optimizers, device, ranks),
        predictor=predictor(model, ranks),
        optimizers=optimizers,
        schedulers={k: _scheduler(o, config.train.schedule, selection.higher_is_better) for k, o in optimizers.items()},
        loaders={split: passes(split, split == "train") for split in SPLITS},
        unshuffled_train=passes("train", False),
        scored=[s for s in SPLITS if not dataset.splits[s].label.isnan().any()],
        text_config=None if encoder is None else encoder.describe(),
        selection=selection,
        ranks=ranks,
        text_encoder=encoder,
    )  # fmt: skip


def _check_ranks(config: Config, ranks: Ranks) -> None:
    """Raise ConfigError where several ranks cannot train by these settings."""
    if ranks.size == 1:
        return
    size, over = divmod(config.batch_size, ranks.size)
    if over or not size:
        below, above = size * ranks.size, (size + 1) * ranks.size
        raise ConfigError(
            "batch_size", f"{config.batch_size}, which {ranks.size} ranks cannot share evenly",
            f"a multiple of {ranks.size}: it counts the rows of all ranks together",
            f"Set batch_size={f'{below} or ' if below else ''}{above}.",
        )  # fmt: skip
    if config.train.graphs == "emulate":
        raise ConfigError(
            "train.graphs",
            f"emulate on {ranks.size} ranks",
            "auto or off",
            "Set train.graphs=off: ranks have no graphs.",
        )


def _text_encoder(config: Config, dataset: Dataset, resumed: dict[str, Any] | None) -> nn.Module | None:
    if resumed is not None:  # the run has all of its encoder, whose folder may be gone
        return saved_encoder(resumed, config.text.freeze)
    if "text" not in config.data.modalities:
        return None
    return load_text_encoder(config.text_encoder, config.text.freeze, dim=dataset.text_dim)


def _step(
    task: Task,
    config: Config,
    model: nn.Module,
    objective: Objective | None,
    optimizers: dict[str, torch.optim.Optimizer],
    device: torch.device,
    ranks: Ranks,
) -> TwoStageStep:
    t = config.train
    return _step_of(ranks)(
        model,
        objective,
        task.loss(config),
        optimizers["main"],
        optimizers.get("estimators"),
        clip_value=t.clip_value,
        clip_norm=t.clip_norm,
        average=t.average,
        autocast=autocast_dtype(t.amp, device),
        compile=t.compile,
        generator=torch.Generator().manual_seed(config.seed),
        non_finite=t.non_finite,
        **({"graphs": t.graphs} if ranks.size == 1 else {}),
    )


def passes_over(
    task: Task,
    config: Config,
    model: nn.Module,
    dataset: Dataset,
    split: str,
    device: torch.device,
    training: bool = False,
    ranks: Ranks | None = None,
) -> Passes:
    """Passes over a split, shuffled and augmented as the settings say where they are for training."""
    c = config
    loader = dataset.loader(
        split, c.batch_size, shuffle=training and c.data.shuffle, seed=c.seed, pad_tokens_to=task.pad_tokens(c),
        drop_last=training and c.data.drop_last,
        drop_singleton=training,
        task=c.model.task, draw_words=training, device=device, kind=c.data.loader,
        workers=c.data.workers, max_padding=c.data.max_padding if training else None,
        augment=c.data.augment if training else None,
    )  # fmt: skip
    return Passes(loader, device, preparation(model), exact=task.exact_widths(c), ranks=ranks, deals=training)


def preparation(model: nn.Module) -> Callable[[Batch], Batch]:
    """The model's `prepare`, which readies a batch before it moves to a device; else what changes nothing."""
    return getattr(model, "prepare", lambda batch: batch)


def parameter_groups(model: nn.Module, encoder: nn.Module | None) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters of a model: "text" (its text encoder's) and "main" (all others)."""
    text = [] if encoder is None else [p for p in encoder.parameters() if p.requires_grad]
    own = set(map(id, text))
    return {"main": [p for p in model.parameters() if p.requires_grad and id(p) not in own], "text": text}


def _optimizers(
    config: Config, model: nn.Module, encoder: nn.Module | None, objective: Objective
) -> dict[str, torch.optim.Optimizer]:
    """ "main": the text encoder at a rate of its own and the rest of the model. "estimators": the objective's."""
    lr, rate, trained = config.train.lr, config.text.lr_rate, parameter_groups(model, encoder)
    groups = [{"params": trained["main"]}, {"params": trained["text"], "lr": lr * rate if rate > 0 else lr}]
    optimizers = {"main": _optimizer(config, groups, lr)}
    if estimators := list(objective.parameters()):
        optimizers["estimators"] = _optimizer(config, [{"params": estimators}], lr * config.train.mi_lr_rate)
    return optimizers


def _optimizer(config: Config, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    groups = [g for g in groups if g["params"]]
    t = config.train
    optimizer: torch.optim.Optimizer
    if t.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=t.momentum, weight_decay=t.weight_decay, fused=True)
    else:
        optimizer = torch.optim.Adam(groups, lr=lr, weight_decay=t.weight_decay, fused=True)
    if t.compile == "off" and groups[0]["params"][0].device.type == "cpu":  # a GPU's update does not call `step`
        step_without_compiler(optimizer)
    return optimizer


def _scheduler(optimizer: torch.optim.Optimizer, s: ScheduleConfig, higher_is_better: bool) -> Any:
    from torch.optim import lr_scheduler

    match s.kind:
        case "none":
            return lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
        case "step":
            return lr_scheduler.StepLR(optimizer, s.step_size, s.rate)
        case "multi_step":
            return lr_scheduler.MultiStepLR(optimizer, s.milestones, s.rate)
        case "exp":
            return lr_scheduler.ExponentialLR(optimizer, s.rate)
        case "plateau":
            mode = "max" if higher_is_better else "min"
            return lr_scheduler.ReduceLROnPlateau(optimizer, mode, factor=s.rate, patience=s.patience)


def choose_device(name: str) -> torch.device:
    """The device that a setting names; "auto" is a GPU where there is one.

    Raises:
        ConfigError: this machine cannot use it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(name, (str, torch.device)):
        raise ConfigError("device", f"a {type(name).__name__}", "auto, cpu, cuda or mps", "Use auto.")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # meta has nothing to copy
    except (RuntimeError, AssertionError, NotImplementedError) as cause:
        raise ConfigError(
            "device", f"{name!r}, which this machine cannot use", "auto, cpu, cuda or mps", "Use auto."
        ) from cause
    return device
