"""Accuracy on real data as a committed result: the engine's two modes and the eager baseline, over the same seeds.

    python -m bench.accuracy baseline --data DATA --out runs/baseline --seeds 0-2
    python -m bench.accuracy collect fast=runs/fast faithful=runs/faithful baseline=runs/baseline \
        --out bench/results/mosi_accuracy.json

`baseline` trains bench/baselines with the recipe of preset mosi: the data as `engine train` reads and normalises it,
batches as the published code makes them. The engine's own runs come from `engine train --preset mosi … seeds=0-2`.
`collect` takes folders that hold one run folder a seed and prints the README's table.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.machine import commit
from engine import metrics
from engine.config import Config, load_config
from engine.files import write_json, write_text

COLUMNS = ("mae", "corr", "acc7", "acc2_non0", "acc2_has0")
HISTORY, METRICS = "history.jsonl", "metrics.json"
TARGETS = (1.0, 0.9, 0.85)  # valid MAE whose training time is reported


# -- the baseline ----------------------------------------------------------------------------------


def train_baseline(config: Config, seed: int, out: Path) -> dict[str, Any]:
    """Train the eager baseline and write history.jsonl and metrics.json as `engine train` does; the metrics.

    Args:
        config: preset mosi with data.path; only the settings that the baseline has are used.
        out: folder of the run, made if it is not there.
    """
    from transformers import AutoModel
    from transformers.utils import logging

    from bench.baselines import loader, mimrl
    from engine.loaders.dataset import open_dataset

    logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    c = config.resolve()
    data = open_dataset(c.data.path, c.data, "minilm")
    torch.manual_seed(seed)
    np.random.seed(seed)
    settings = mimrl.settings(
        d_in=[384, data.audio_dim, data.vision_dim],
        time_len=c.data.time_len,
        d_hiddens=[list(block) for block in c.model.cubemlp.d_hiddens],
        d_outs=[list(block) for block in c.model.cubemlp.d_outs],
    )
    model = mimrl.MIMRL(settings, AutoModel.from_pretrained(loader.minilm_folder(), trust_remote_code=False))
    trainer = mimrl.Trainer(model, c.train.lr, c.text.lr_rate, c.train.clip_value, 0.01, c.train.stage1_n)
    schedules = [
        torch.optim.lr_scheduler.MultiStepLR(o, c.train.schedule.milestones, c.train.schedule.rate)
        for o in (trainer.main, trainer.estimators)
    ]
    tokenizer = loader.load_tokenizer("minilm")
    batches = {
        name: loader.make_loader(_rows(split), c.batch_size, c.data.time_len, tokenizer, shuffle=name == "train")
        for name, split in data.splits.items()
    }
    trainer.estimators.step()  # without gradients: schedules want a step before theirs, and epoch 0 has no stage 1
    history, start = [], time.perf_counter()
    for epoch in range(c.epochs):
        began = time.perf_counter()
        loss = trainer.epoch(batches["train"])
        record = {"epoch": epoch, "seconds": time.perf_counter() - began, "train": {"loss": loss}}
        for schedule in schedules:
            schedule.step()
        record |= {split: _evaluate(trainer, batches[split]) for split in ("valid", "test")}
        history.append(record | {"wall_seconds": time.perf_counter() - start})
        write_text(out / HISTORY, "".join(json.dumps(r) + "\n" for r in history))
    best, oracle = (min(history, key=lambda r: r[split]["mae"]) for split in ("valid", "test"))
    metrics = {
        "best_epoch": best["epoch"],
        "valid": best["valid"],
        "test": best["test"],
        "oracle_test": oracle["test"] | {"epoch": oracle["epoch"]},
        "wall_s": history[-1]["wall_seconds"],
    }
    write_json(out / METRICS, metrics)
    return metrics


def _rows(split: Any) -> list[tuple]:
    """Batches as tuples, as the published code takes them."""
    return [
        (([], split.vision[i], split.audio[i], split.text[i].split(), 0, 0), split.label[i : i + 1].numpy(), name)
        for i, name in enumerate(split.ids)
    ]


@torch.no_grad()
def _evaluate(trainer: Any, batches: Any) -> metrics.Metrics:
    trainer.model.eval()
    outputs = [(trainer.forward(batch)[0], batch["label"]) for batch in batches]
    prediction, target = (torch.cat(column).numpy() for column in zip(*outputs, strict=True))
    return metrics.regression_metrics(prediction, target)


# -- the result ------------------------------------------------------------------------------------


def seconds_to(history: list[dict[str, Any]], valid_mae: float) -> float | None:
    """Training seconds, without evaluation, until a valid MAE is first reached; None if it never is."""
    total = 0.0
    for record in history:
        total += record["seconds"]
        if record["valid"]["mae"] <= valid_mae:
            return total
    return None


def collect(folder: Path) -> dict[str, Any]:
    """The numbers of every seed, their mean and their sample standard deviation."""
    runs = {}
    for path in sorted(folder.glob(f"*/{METRICS}")):
        history = [json.loads(line) for line in (path.parent / HISTORY).read_text(encoding="utf-8").splitlines()]
        runs[path.parent.name] = json.loads(path.read_text(encoding="utf-8")) | {
            "train_s": sum(record["seconds"] for record in history),
            "seconds_to_valid_mae": {str(target): seconds_to(history, target) for target in TARGETS},
        }
    return {
        "test": metrics.summary([run["test"] for run in runs.values()]),
        "valid_mae": metrics.summary([run["valid"] for run in runs.values()])["mae"],
        "oracle_test_mae": metrics.summary([run["oracle_test"] for run in runs.values()])["mae"],
        "runs": runs,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: one row per name, test metrics at the best-valid epoch as mean ± standard deviation over seeds.

    The last columns are the training seconds, without evaluation, of the slowest seed until a valid MAE.
    """
    head = ["", "seeds", "MAE", "Corr", "Acc-7", "Acc-2 neg/pos", "Acc-2 neg/non-neg", "valid MAE", "oracle MAE"]
    head += [f"s to valid {target}" for target in TARGETS]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, result in results.items():
        cells = [name, str(len(result["runs"]))]
        cells += [f"{result['test'][k]['mean']:.3f} ± {result['test'][k]['std']:.3f}" for k in COLUMNS]
        cells += [f"{result[k]['mean']:.3f}" for k in ("valid_mae", "oracle_test_mae")]
        for target in TARGETS:
            reached = [run["seconds_to_valid_mae"][str(target)] for run in result["runs"].values()]
            cells.append("not by all" if None in reached else f"{max(reached):.0f}")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    baseline = commands.add_parser("baseline", help="train the eager baseline")
    baseline.add_argument("--data", required=True)
    baseline.add_argument("--out", type=Path, required=True)
    baseline.add_argument("--seeds", default="0-2", help="first-last, or one")
    baseline.add_argument("--threads", type=int, default=1)
    gather = commands.add_parser("collect", help="a table and a result file from runs")
    gather.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    gather.add_argument("--out", type=Path)
    gather.add_argument("--commit", default=commit(), help="the commit that the runs were trained at")
    arguments = parser.parse_args()
    if arguments.command == "baseline":
        torch.set_num_threads(arguments.threads)
        first, last = (arguments.seeds.split("-") * 2)[:2]
        for seed in range(int(first), int(last) + 1):
            config = load_config("mosi", ["mode=faithful", f"data.path={arguments.data}"])
            metrics = train_baseline(config, seed, arguments.out / f"seed{seed}")
            print(f"seed {seed}: test MAE {metrics['test']['mae']:.4f}, {metrics['wall_s']:.0f} s", flush=True)
        return
    results = {name: collect(Path(folder)) for name, folder in (pair.split("=", 1) for pair in arguments.runs)}
    if arguments.out is not None:
        write_json(arguments.out, {"name": "mosi_accuracy", "commit": arguments.commit, "results": results})
    print(table(results))


if __name__ == "__main__":
    main()
