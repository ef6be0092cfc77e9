"""Runs: from a config and a data path to a run folder, and back from a run folder to metrics and predictions.

    >>> from engine import load_config
    >>> from engine.loaders.make_data import make_data
    >>> data = make_data("data", "mosi", 60, "declarelab")  # 60 generated samples
    >>> quick = ["data.modalities=audio-vision", "objective.enabled=false", "epochs=1", "output.progress=false"]
    >>> config = load_config("mosi", [*quick, f"data.path={data}"])
    >>> train(config, "run").metrics["best_epoch"]
    0

The examples below go on with this run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine import checks, metrics
from engine.callbacks import Callback
from engine.config import Config, require_config
from engine.config.seeds import different_seeds
from engine.errors import ConfigError
from engine.files import require_made_here, user_path, write_json
from engine.loaders.dataset import Dataset
from engine.ranks import Ranks, joined
from engine.run_folder import owned, require_kind, require_no_run_file
from engine.task import Task, find_task, load_task
from engine.torchrun import restartable, restarted
from engine.training.applying import Run, apply, load_run, open_split, own_tokenizer, require_labels
from engine.training.parts import choose_device
from engine.training.records import metrics_of
from engine.training.resuming import finished_metrics
from engine.training.run import TrainingRun
from engine.training.saving import write_predictions

__all__ = ["Run", "RunResult", "choose_device", "evaluate", "load_run", "predict", "train", "train_seeds"]


@dataclass
class RunResult:
    """A finished run: its folder and the content of its metrics.json."""

    out: Path
    metrics: dict[str, Any]


def train(
    config: Config,
    out: str | Path,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    dataset: Dataset | None = None,
    profile: bool = False,
    task: Task | str | None = None,
) -> RunResult:
    """Train one model and write its run folder.

    Args:
        config: the run's settings; `config.data.path` names the data.
        out: folder to write; it may not hold another run unless `resume`.
        resume: go on from the newest checkpoint of the run in `out`, with the same settings and on the same data. A
            resumed CPU run ends bit-equal to one that was not interrupted. If last.safetensors is damaged, the run
            goes on from previous.safetensors, with a warning.
        callbacks: called beside the built-in progress and TensorBoard ones (`config.output`).
        dataset: an open dataset, to share one among several runs; default: `config.data.path` is opened.
        profile: measure where the time of a few batches of each stage goes, in the second epoch:
            `out`/profile/shares.txt, shares.json and trace.json (Perfetto).
        task: what is trained: a `Task`, a name, or "module:attribute", which is imported; default: `config.task`.

    Returns:
        The run's folder as `out`, and the content of its metrics.json as `metrics`.

    Raises:
        EngineError: a problem with settings, data or the output folder, in one line.

    Example:
        >>> from engine import load_config
        >>> config = load_config("run/config.yaml", ["epochs=2"])
        >>> result = train(config, "run", resume=True)
        >>> len((result.out / "history.jsonl").read_text().splitlines())
        2
    """
    out, config = user_path(out), _with_task(config, task)
    if isinstance(dataset, (str, Path)):
        do = "Set config.data.path to the path, and leave dataset out."
        raise ConfigError("dataset", f"a path ({dataset})", "an open dataset", do)
    with _threads_as_before(), joined(config.device, config.train.timeout) as ranks:
        return RunResult(out, TrainingRun(config, out, callbacks, dataset, profile, ranks).fit(resume))


def train_seeds(
    config: Config,
    out: str | Path,
    seeds: Sequence[int],
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    task: Task | str | None = None,
) -> list[RunResult]:
    """Train one run per seed in `out`/seedN, and write the mean and standard deviation over them.

    summary.csv and summary.json in `out` hold them for the test split, or for valid if the test split has no labels.

    Args:
        seeds: one run is trained with each; `config.seed` is not used.
        resume: finished runs stay as they are; the others are resumed or begun.
        config, out, callbacks, task: as for `train`.

    Returns:
        The runs, in the order of `seeds`.

    Raises:
        EngineError: as for `train`.

    Example:
        >>> from engine import load_config
        >>> [result.out.name for result in train_seeds(load_config("run/config.yaml"), "runs", seeds=[0, 1])]
        ['seed0', 'seed1']
    """
    out, config, seeds = user_path(out), _with_task(config, task), different_seeds(seeds)
    with joined(config.device, config.train.timeout) as ranks, ranks.failing_together():
        if not ranks.writes:
            return _train_seeds(config, out, seeds, ranks.tell(resume), callbacks, ranks)
        with owned(out):
            require_kind(out, seeds=True)
            resume = ranks.tell(resume or restarted(out))
            with restartable(out):
                return _train_seeds(config, out, seeds, resume, callbacks, ranks)


def _train_seeds(
    config: Config, out: Path, seeds: Sequence[int], resume: bool, callbacks: Sequence[Callback], ranks: Ranks
) -> list[RunResult]:
    with ranks.writer_first():
        own = (own_tokenizer(out / f"seed{seed}", config) for seed in seeds) if resume else iter(())
        tokenizer = next((t for t in own if t is not None), None)
        dataset = find_task(config.task).open_data(config.resolve(), config.data.path, tokenizer=tokenizer)
    results = []
    for seed in seeds:
        folder = out / f"seed{seed}"
        one = config.model_copy(deep=True, update={"seed": seed})
        finished = finished_metrics(one.resolve(), folder, dataset) if resume and ranks.writes else None
        finished = ranks.tell(finished)
        if finished is None:
            results.append(train(one, folder, resume, callbacks, dataset))
        else:
            results.append(RunResult(folder, finished))
    if not ranks.writes:
        return results
    split = "test" if all(r.metrics["test"] for r in results) else "valid"
    values = [r.metrics[split] for r in results]
    metrics.write_summary_csv(out / "summary.csv", {config.preset or config.mode: values})
    runs = {f"seed{seed}": r.metrics for seed, r in zip(seeds, results, strict=True)}
    write_json(out / "summary.json", {split: metrics.summary(values), "runs": runs})
    return results


def evaluate(
    run: str | Path,
    data: str | Path,
    split: str | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    task: Task | str | None = None,
) -> dict[str, float]:
    """Compute the metrics of a run's best model on one split of `data`, in float32.

    Only the run folder and that split are needed. Data is normalised by the run's own statistics. Every sample needs a
    label.

    Args:
        run: the run folder.
        data: file or folder of features, or a store, in any format.
        split: None: test, or the only split of the data.
        batch_size: None: the run's. In fast mode it changes nothing.
        device: as in a run's settings: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1" or "mps".
        task: the run's task, if it is one of your own: a `Task` or "module:attribute".

    Returns:
        {name: value} of docs/metrics.md. Accuracies and F1 are fractions.

    Raises:
        CheckpointError, ConfigError, DataError: there is no such run or split, a label is missing, or features have
            other widths than the run was trained with.

    Example:
        >>> list(evaluate("run", "data/mosi_data_noalign.pkl", split="valid"))[:3]
        ['mae', 'corr', 'acc7']
    """
    loaded = _load(run, device, task)
    split, dataset = open_split(loaded, data, split)
    require_labels(dataset.splits[split], f"{data}, {split}")
    checks.class_numbers(loaded.config, dataset, [split])
    loaded.config.data.label_scale = checks.evaluated_scale(loaded.config, dataset.splits[split])
    return metrics_of(loaded.config, apply(loaded, dataset, split, batch_size, loaded.config.model.task))


def predict(
    run: str | Path,
    data: str | Path,
    out: str | Path,
    split: str | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    task: Task | str | None = None,
) -> Path:
    """Write the best model's predictions on one split of `data` as CSV, in file order with ids.

    The other arguments are those of `evaluate`. Samples need no labels: the column `label` holds the data's number, or
    nothing.

    Args:
        out: the CSV to write, with the columns id, label and prediction, and for classes a score each. Of existing
            files only such a CSV is replaced.

    Returns:
        The path of the CSV.

    Raises:
        CheckpointError, ConfigError, DataError: as for `evaluate`, except that labels may be missing.
        OutputError: the CSV cannot be written, or `out` is another file or one of a run.

    Example:
        >>> predict("run", "data/mosi_data_noalign.pkl", "predictions.csv").name
        'predictions.csv'
    """
    out = user_path(out)
    require_no_run_file(out)
    require_made_here(out, b"id,label,prediction", "predictions")
    loaded = _load(run, device, task)
    split, dataset = open_split(loaded, data, split)
    result = apply(loaded, dataset, split, batch_size, "regression")  # which asks nothing of the labels
    write_predictions(out, loaded.config, dataset.splits[split], result)
    return out


def _load(run: str | Path, device: str, task: Task | str | None) -> Run:
    if task is not None:
        load_task(task)
    return load_run(run, choose_device(device))


@contextlib.contextmanager
def _threads_as_before() -> Iterator[None]:
    """The process has as many CPU threads afterwards as before: `config.threads` is that of one run."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _with_task(config: Config, task: Task | str | None) -> Config:
    """`config` for another task: what was set stays, everything else has the defaults of that task."""
    require_config(config)
    if task is None or (name := load_task(task).name) == config.task:
        return config
    return Config(**config.model_dump(exclude_unset=True) | {"task": name})
