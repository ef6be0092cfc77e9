"""Commands that train, and the settings with which they do: train, demo, config."""

from __future__ import annotations

import argparse
import re
import textwrap
import time
from pathlib import Path

from engine.cli.command import Command, chosen_config, config_arguments, given_path, named_task, set_data
from engine.cli.folders import check_folders, clear_demo, saved_config
from engine.cli.printing import (
    meaning,
    print_information,
    print_keys,
    print_metrics,
    print_results,
    print_seeds,
    say,
)
from engine.errors import ConfigError
from engine.files import user_path
from engine.torchrun import restarted, torchrun_shard

MOST_SEEDS = 1000


def _train(a: argparse.Namespace, settings: list[str]) -> None:
    seeds, settings = split_seeds(settings)
    writes = torchrun_shard()[0] == 0  # the other ranks of torchrun write and say nothing
    resume = a.resume or restarted(a.out)
    config = chosen_config(a, settings, resumed=saved_config(a.out, seeds) if resume else None)
    set_data(config, a.data, settings)
    if not config.data.path:
        raise ConfigError("--data", "no data", "the path of a feature file, a folder or a store", "Add --data PATH.")
    if not user_path(config.data.path).exists():
        raise ConfigError(f"--data {config.data.path}", "no such file or folder", "existing data", "Check the path.")
    if writes:
        check_folders(a.out, seeds, resume)
    if a.profile and seeds is not None:
        raise ConfigError("--profile", "several seeds", "one run", "Profile a run of one seed.")
    from engine.training.ahead import begin_ahead

    begin_ahead(config.device)  # before the engine's own modules are read
    from engine import trainer
    from engine.training.phases import in_words

    start = time.perf_counter() - a.began
    if seeds is None:
        result = trainer.train(config, a.out, resume=a.resume, profile=a.profile)
        if not writes:
            return
        if a.profile:
            say((a.out / "profile" / "shares.txt").read_text(encoding="utf-8"))
        split = "test" if result.metrics["test"] else "valid"  # a test split without labels has no metrics
        print_metrics(result.metrics[split], f"{split} metrics at the best epoch ({result.metrics['best_epoch']})")
        print_information(a.out, result.metrics["best_epoch"])
        timings = {"start": start} | result.metrics.get("timings", {})
        say(in_words(time.perf_counter() - a.began, timings))
    else:
        results = trainer.train_seeds(config, a.out, seeds, resume=a.resume)
        if not writes:
            return
        split = "test" if all(result.metrics["test"] for result in results) else "valid"
        print_seeds([result.metrics[split] for result in results], seeds, split)
    print_results(a.out)


def split_seeds(settings: list[str]) -> tuple[list[int] | None, list[str]]:
    """The seeds of `seeds=0-2` or `seeds=0,3,5`, apart from the other settings.

    >>> split_seeds(["seeds=0-2", "epochs=3"])
    ([0, 1, 2], ['epochs=3'])
    """
    seeds, others = None, []
    for setting in settings:
        name, _, text = setting.partition("=")
        if name != "seeds":
            others.append(setting)
            continue
        seeds = []
        for part in text.split(","):
            numbers = re.fullmatch(r"\s*(\d{1,10})\s*(?:-\s*(\d{1,10})\s*)?", part)
            first, last = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else (1, 0)
            if first > last or last >= 2**32:
                raise ConfigError("seeds", repr(text), "a range or a list such as 0-2 or 0,3,5", "Write it that way.")
            if last - first >= MOST_SEEDS:
                raise ConfigError("seeds", repr(text), f"at most {MOST_SEEDS} seeds", "Train fewer at a time.")
            seeds += range(first, last + 1)
        if len(set(seeds)) < len(seeds):
            raise ConfigError("seeds", f"{text!r}, which repeats a seed", "each seed once", "Drop the repeats.")
    if seeds is not None and any(setting.partition("=")[0] == "seed" for setting in others):
        raise ConfigError("seeds", "seed= beside it", "one of the two", "Drop one.")
    return seeds, others


def _train_arguments(p: argparse.ArgumentParser) -> None:
    config_arguments(p)
    p.add_argument("--data", metavar="PATH", help="feature file or folder, or a store made by engine convert")
    p.add_argument("--out", metavar="DIR", type=given_path, required=True, help="the run folder to write")
    p.add_argument(
        "--resume", action="store_true", help="continue the run in DIR, with its own settings if none are given"
    )
    p.add_argument(
        "--profile",
        action="store_true",
        help="measure where time goes in a few batches of the second epoch: DIR/profile/shares.txt, shares.json and "
        "trace.json (Perfetto)",
    )


def train_epilog() -> str:
    """Presets, the most used keys and examples."""
    from engine.config import common_keys, presets

    lines = ["presets:"]
    known = presets()
    width = max(len(preset.name) for preset in known) + 2
    lines += [f"  {preset.name:<{width}}{preset.summary} (task {preset.task})" for preset in known]
    lines += ["", "most used keys (default), `engine config --keys` lists all:"]
    for key in common_keys():
        head = f"  {key.name} ({key.default})"
        text = textwrap.wrap(meaning(key), 84)
        lines += [f"{head:<36}{text[0]}" if len(head) < 36 else f"{head}\n{'':<36}{text[0]}"]
        lines += [f"{'':<36}{more}" for more in text[1:]]
    lines += [
        "",
        "examples:",
        "  engine train --preset mosi --data data/mosi --out runs/mosi",
        "  engine train --preset mosi --data data/mosi --out runs/long epochs=20 train.schedule.milestones=10-15",
        "  engine train --preset mosi --data data/mosi --out runs/faithful mode=faithful seeds=0-2",
        "  engine train --preset mosi-paper --data data/mosi --out runs/paper text_encoder=models/bert-base-uncased",
        "  engine train --config mine.yaml --data data/mosi --out runs/mine model.cubemlp.d_outs=20-3-128=5-3-64",
        "  engine train --task my_model:TASK --data data/mosi --out runs/mine",
        "  engine train --resume --data data/mosi --out runs/mosi",
    ]
    return "\n".join(lines)


def _demo(a: argparse.Namespace, settings: list[str]) -> None:
    from engine.demo import demo_config, run_demo

    demo_config(settings)
    clear_demo(a.out)
    run_demo(a.out, settings)
    print_results(a.out)


def _demo_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--out", metavar="DIR", type=given_path, default=Path("runs/demo"), help="the run folder (runs/demo)"
    )


def _show_config(a: argparse.Namespace, settings: list[str]) -> None:
    if a.keys:
        from engine.config import keys
        from engine.task import DEFAULT

        print_keys(keys(named_task(a) or DEFAULT))
    else:
        print(chosen_config(a, settings).resolve().to_yaml(), end="")


def _config_command_arguments(p: argparse.ArgumentParser) -> None:
    config_arguments(p)
    p.add_argument("--keys", action="store_true", help="list all keys of the task instead")


COMMANDS = (
    Command(
        "train",
        _train,
        "train a model and write a run folder",
        _train_arguments,
        """\
        Train a model on feature files and write a run folder: config.yaml, metrics, predictions, checkpoints
        (best and last), TensorBoard scalars and report.html. Settings are given as key=value, anywhere on the line.
        seeds=0-2 (or 0,3,5) trains one run per seed in DIR/seed0 ... and writes summary.csv and summary.json with the
        mean and standard deviation over them.""",
        train_epilog,
        takes_settings=True,
    ),
    Command(
        "demo",
        _demo,
        "train on generated utterances of known information and write a report",
        _demo_arguments,
        """\
        Generate utterances whose shared, specific and complementary information is known, train on them, and write
        a report that shows the estimators against the truth and the model's information terms over time.
        Settings are given as key=value, as for engine train. Repeating it replaces an earlier demo in DIR.""",
        takes_settings=True,
    ),
    Command(
        "config",
        _show_config,
        "print the settings of a preset or file after overrides, or all keys",
        _config_command_arguments,
        """\
        Print the YAML that engine train would use, with `auto` resolved for the mode. --keys lists every key with its
        default, its values and its meaning.""",
        takes_settings=True,
    ),
)
