"""The `engine` command: a thin layer over the Python API, one function a command."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import re
import shlex
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from engine import __version__
from engine.errors import CheckpointError, ConfigError, DataError, EngineError, OutputError, printable
from engine.files import user_path
from engine.run_folder import CONFIG, FILES, LAST, MARKS, PREVIOUS, TENSORBOARD, owned

DESCRIPTION = "Train multimodal models with mutual information objectives, and see what the information terms do."

EXAMPLES = """\
examples:
  engine demo                                                    generated data, a trained model and a report in minutes
  engine inspect mosi_data_noalign.pkl                           what is in a file, and what is wrong with it
  engine make-data data/try --shape mosi --format mmsa           synthetic files in that layout
  engine train --preset mosi --data data/mosi --out runs/mosi    train on your own files
  engine train --preset mosi --data data/mosi --out runs/paper mode=faithful seeds=0-2
  engine evaluate --run runs/mosi --data data/mosi               metrics of the best model
  engine import-command 'python Main.py --task_name x --dataset mosi_Dec'    a reference command line as YAML

`engine COMMAND --help` tells more. Errors are one line on stderr with exit code 2; --debug shows the traceback."""


MOST_SEEDS = 1000


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line like every other problem: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, printable(f"error: {' '.join(message.split())} (`{self.prog} --help` shows how)\n"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for a problem the user can mend, 130 when interrupted.

    SIGTERM and SIGHUP end a command as Ctrl-C does, with exit code 143 and 129.
    """
    arguments, rest = _parser().parse_known_args(argv)
    with _streams(open_ended=arguments.command in ("train", "demo")):
        return _main(arguments, rest)


def _main(arguments: argparse.Namespace, rest: list[str]) -> int:
    formatwarning = warnings.formatwarning
    try:
        if not arguments.debug:
            warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(' '.join(str(message).split()))}\n"
        settings = _settings(arguments, rest)
        with _signals():
            arguments.run(arguments, settings) if settings is not None else arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, _Stop) else signal.SIGINT
        by = f" by {signal.Signals(number).name}" if isinstance(stop, _Stop) else ""
        with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal
            _say(f"interrupted{by}{_kept(arguments, rest)}", file=sys.stderr)
        return 128 + number
    except BrokenPipeError:
        # Whoever read our output has gone (`engine config | head`); Python would complain once more at exit.
        sys.stdout = None
        return 0
    except (EngineError, OSError, MemoryError) as cause:
        if arguments.debug:
            raise
        _say(f"error: {_environment_error(cause)}", file=sys.stderr)
        return 2
    finally:
        warnings.formatwarning = formatwarning
    return 0


@contextlib.contextmanager
def _streams(open_ended: bool) -> Iterator[None]:
    """Have a standard output and error where they were closed before we began.

    Args:
        open_ended: go on when whoever reads them has gone (`engine train | head`).
    """
    from engine.callbacks import OpenEnded

    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(Path(os.devnull).open("w"))
        for stream, name, redirect in (
            (sys.stdout, "standard output", contextlib.redirect_stdout),
            (sys.stderr, "standard error", contextlib.redirect_stderr),
        ):
            if stream is None:
                stack.enter_context(redirect(nowhere))
            elif open_ended:
                stack.enter_context(redirect(OpenEnded(stream, name)))
        yield


def _environment_error(cause: Exception) -> Exception:
    """What the system refused, as an error of ours: a full disk, a name that is too long, too little memory."""
    from engine.files import output_error

    if isinstance(cause, MemoryError):
        return EngineError(
            "memory", "too little for this", "more of it", "Use smaller settings or less data, or a larger machine."
        )
    if not isinstance(cause, OSError):
        return cause
    path = Path(str(cause.filename or "output"))
    if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS):
        return output_error(path, cause)
    return EngineError(str(path), cause.strerror or str(cause), "a file or folder that can be used", "Check the path.")


def _say(text: object, file: Any = None) -> None:
    """Every line that a command prints: nothing in it acts on the terminal."""
    print(printable(text), file=file)


class _Stop(KeyboardInterrupt):
    """A signal that asks the process to end."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Raise `_Stop` for SIGTERM and SIGHUP, except where they are ignored (nohup) or handled by someone else."""

    def stop(number: int, frame: Any) -> NoReturn:
        raise _Stop(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _kept(a: argparse.Namespace, rest: Sequence[str]) -> str:
    """What training that was stopped has left, and how to go on."""
    if a.command not in ("train", "demo"):
        return ""
    runs = [a.out, *sorted(a.out.glob("seed*"))]
    if not any((folder / CONFIG).is_file() for folder in runs):
        return ": nothing was kept, for training had not begun"
    kept = {folder: epochs for folder in runs if (epochs := _saved_epochs(folder))}
    seeds = [word for word in rest if word.startswith("seeds=")]
    go_on = shlex.join(["engine", "train", "--resume", "--out", str(a.out), *seeds])
    if not kept:
        return f": nothing was kept, for no epoch was finished. Begin again with: {go_on}"
    found = ", ".join(f"{epochs} epoch{'s' * (epochs > 1)} in {folder}" for folder, epochs in kept.items())
    return f": kept {found}. Go on with: {go_on}"


def _saved_epochs(run: Path) -> int:
    from engine import checkpoint

    for name in (LAST, PREVIOUS):
        with contextlib.suppress(CheckpointError, KeyError, TypeError):
            return checkpoint.load_meta(run / name)["epoch"] + 1
    return 0


def _settings(arguments: argparse.Namespace, rest: list[str]) -> list[str] | None:
    """The `key=value` words of a command that takes them; None for the others. Any other leftover word is an error."""
    takes = getattr(arguments, "takes_settings", False)
    for word in rest:
        if not takes or word.startswith("-") or "=" not in word:
            options = [option for action in arguments.parser._actions for option in action.option_strings]
            raise ConfigError(
                f"engine {arguments.command}",
                f"the argument {word!r}",
                f"the options {', '.join(options)}" + (", or settings such as train.lr=5e-4" if takes else ""),
                f"See engine {arguments.command} --help.",
            )
    return rest if takes else None


# -- commands --------------------------------------------------------------------------------------


def _train(a: argparse.Namespace, settings: list[str]) -> None:
    seeds, settings = _split_seeds(settings)
    config = _config(a, settings, resumed=_saved_config(a.out, seeds) if a.resume else None)
    if a.data:
        config.data.path = a.data
    if not config.data.path:
        raise ConfigError("--data", "no data", "the path of a feature file, a folder or a store", "Add --data PATH.")
    if not user_path(config.data.path).exists():
        raise ConfigError(f"--data {config.data.path}", "no such file or folder", "existing data", "Check the path.")
    for folder in [a.out] if seeds is None else [a.out / f"seed{seed}" for seed in seeds]:
        _check_out(folder, a.resume)
    if a.profile and seeds is not None:
        raise ConfigError("--profile", "several seeds", "one run", "Profile a run of one seed.")
    from engine import trainer

    if seeds is None:
        result = trainer.train(config, a.out, resume=a.resume, profile=a.profile)
        if a.profile:
            _say((a.out / "profile" / "shares.txt").read_text(encoding="utf-8"))
        split = "test" if result.metrics["test"] else "valid"  # a test split without labels has no metrics
        _print_metrics(result.metrics[split], f"{split} metrics at the best epoch ({result.metrics['best_epoch']})")
        _print_information(a.out, result.metrics["best_epoch"])
    else:
        results = trainer.train_seeds(config, a.out, seeds, resume=a.resume)
        split = "test" if all(result.metrics["test"] for result in results) else "valid"
        _print_seeds([result.metrics[split] for result in results], seeds, split)
    _print_results(a.out)


def _evaluate(a: argparse.Namespace) -> None:
    from engine.trainer import evaluate

    _named_task(a)
    metrics = evaluate(_run_folder(a.run_folder), a.data, split=a.split, batch_size=a.batch_size, device=a.device)
    if a.json:
        print(json.dumps({k: v if v == v else None for k, v in metrics.items()}, indent=2))
    else:
        _print_metrics(metrics, f"{a.split + ' ' if a.split else ''}metrics of {a.run_folder}")


def _predict(a: argparse.Namespace) -> None:
    from engine.trainer import predict

    _named_task(a)
    predict(_run_folder(a.run_folder), a.data, a.out, split=a.split, device=a.device)
    _say(f"predictions: {a.out}")


def _convert(a: argparse.Namespace) -> None:
    from engine.loaders.convert import convert

    more: dict[str, Any] = {} if a.format is None else {"expected": a.format}
    chosen = {
        "audio_features": a.audio_features, "vision_features": a.vision_features, "text_features": a.text_features,
        "label_column": a.label_column, "align": a.align, "modalities": a.modalities,
        "label_key": a.label_key,
    }  # fmt: skip
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if chosen:
        from engine.config import DataConfig
        from engine.loaders.dataset import choice_of

        more["choice"] = choice_of(DataConfig(**chosen))
    if a.precision is not None:
        more["dtype"] = {"fp32": "float32", "fp16": "float16"}[a.precision]
    convert(a.src, a.dst, text_encoder=a.text_encoder, length_rule=a.length_rule, **more)
    _say(f"store: {a.dst}")


def _make_data(a: argparse.Namespace) -> None:
    from engine.loaders.make_data import make_data

    made = make_data(a.out, a.shape, a.n, a.format, a.seed)
    _say(f"data: {made}\nnext: engine inspect {made}")


def _inspect(a: argparse.Namespace) -> None:
    from engine.loaders.inspect import inspect_path

    report = inspect_path(a.path, **({"verify": True} if a.verify else {}))
    rendered = report.render()
    _say(rendered) if isinstance(rendered, str) else _console().print(rendered)
    if a.verify and report.problems:
        raise DataError(
            str(a.path), report.problems[0], "a file without problems, as --verify asks", "See the list above."
        )


def _import(a: argparse.Namespace) -> None:
    from engine.mimrl.checkpoints import import_checkpoint

    _check_out(a.out, resume=False)
    notes = import_checkpoint(
        a.checkpoint, a.out, command=a.reference_command, config=a.config, text_encoder=a.text_encoder
    )
    _print_notes(notes)
    _say(f"run: {a.out}\nnext: engine evaluate --run {a.out} --data PATH")


def _import_command(a: argparse.Namespace) -> None:
    from engine.mimrl.commands import import_command

    config, notes = import_command(a.text)
    _print_notes(notes)
    if a.out is None:
        print(config.to_yaml(), end="")  # YAML escapes what does not print
    else:
        config.save(a.out)
        _say(f"configuration: {a.out}\nnext: engine train --config {a.out} --data PATH --out DIR")


def _report(a: argparse.Namespace) -> None:
    from engine.report import write_report

    _say(f"report: {write_report(_run_folder(a.run_folder))}")


def _demo(a: argparse.Namespace, settings: list[str]) -> None:
    from engine.demo import demo_config, run_demo

    demo_config(settings)
    _clear_demo(a.out)

    run_demo(a.out, settings)
    _print_results(a.out)


def _show_config(a: argparse.Namespace, settings: list[str]) -> None:
    if a.keys:
        from rich.table import Table

        from engine.config import keys

        table = Table("key", "default", "values and meaning", box=None, pad_edge=False)
        table.columns[0].no_wrap = True
        table.columns[1].overflow = "fold"
        task = _named_task(a)
        for key in keys() if task is None else keys(task):
            table.add_row(key.name, _escape(key.default), _escape(_meaning(key)))
        _console().print(table)
        return
    print(_config(a, settings).resolve().to_yaml(), end="")


# -- helpers ---------------------------------------------------------------------------------------


def _config(a: argparse.Namespace, settings: list[str], resumed: Path | None = None) -> Any:
    from engine.config import load_config, presets

    task = _named_task(a)
    source = a.preset or (user_path(a.config) if a.config is not None else resumed)
    if source is not None or task is not None:
        config = load_config(source, settings, task)
        if task not in (None, config.task):
            raise ConfigError(
                f"--task {a.task}", f"settings of the task {config.task}", "one task", "Drop one of them."
            )
        return config
    raise ConfigError(
        f"engine {a.command}",
        "none of --preset, --config and --task",
        f"a preset ({', '.join(preset.name for preset in presets())}), a YAML file or a task",
        "Add --preset NAME or --config FILE.",
    )


def _named_task(a: argparse.Namespace) -> str | None:
    """The name of the task that --task gives; its module may lie in the present folder."""
    if a.task is None:
        return None
    from engine.task import load_task

    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return load_task(a.task).name


def _split_seeds(settings: list[str]) -> tuple[list[int] | None, list[str]]:
    """`seeds=0-2` and `seeds=0,3,5` apart from the other settings."""
    seeds, others = None, []
    for setting in settings:
        name, _, text = setting.partition("=")
        if name != "seeds":
            others.append(setting)
            continue
        seeds = []
        for part in text.split(","):
            found = re.fullmatch(r"\s*(\d{1,10})\s*(?:-\s*(\d{1,10})\s*)?", part)
            first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
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


def _saved_config(out: Path, seeds: list[int] | None) -> Path | None:
    """The configuration of the run to go on with, so that --resume needs no --preset."""
    folders = [out] if seeds is None else [out / f"seed{seed}" for seed in seeds]
    return next((path for folder in folders if (path := folder / "config.yaml").is_file()), None)


def _check_out(out: Path, resume: bool) -> None:
    """Refuse an output folder that is a file or holds a run, before anything slow begins."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out}", "a file", "a folder", "Choose another --out.")
    if not resume and any((out / mark).exists() for mark in MARKS):
        raise OutputError(
            f"--out {out}", "another run", "an empty or new folder", "Choose another --out, or go on with --resume."
        )


def _run_folder(run: Path) -> Path:
    if not run.is_dir():
        found = "a file" if run.exists() else "no such folder"
        raise CheckpointError(f"--run {run}", found, "a folder made by engine train", "Check the path.")
    return run


def _clear_demo(out: Path) -> None:
    """Remove an earlier demo run from `out`, so that `engine demo` can be repeated; nothing else.

    Nobody else's run, and no file that a run does not write.
    """
    _check_out(out, resume=True)
    saved = out / "config.yaml"
    if not saved.exists():
        return _check_out(out, resume=False)
    from engine.callbacks import TensorBoardCallback
    from engine.config import load_config

    if load_config(saved).preset != "demo":
        _check_out(out, resume=False)
    with owned(out):
        for name in FILES:
            (out / name).unlink(missing_ok=True)
        for events in TensorBoardCallback.event_files(out / TENSORBOARD):
            events.unlink()
        for folder in (TENSORBOARD, "profile"):
            with contextlib.suppress(OSError):  # not there, or with files of the user's
                (out / folder).rmdir()
    return None


def _console() -> Any:
    from rich.console import Console

    # A pipe or a file has no width of its own, and rich's 80 columns squeeze the tables.
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        _say(f"note: {note}", file=sys.stderr)


def _meaning(key: Any) -> str:
    """A key's description, after its values where they are a choice."""
    choice = "|" in key.type and not key.type.startswith(("true", "integer", "number"))
    return f"{key.type}. {key.description}" if choice else key.description


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "-" if value is None else str(value)


def _print_metrics(metrics: dict[str, Any], title: str) -> None:
    from rich.table import Table

    table = Table("metric", "value")
    table.columns[1].justify = "right"
    for name, value in metrics.items():
        table.add_row(name, _number(value))
    _say(title)
    _console().print(table)


def _print_seeds(metrics: list[dict[str, Any]], seeds: list[int], split: str) -> None:
    """One column a seed, then mean ± sample standard deviation."""
    from rich.table import Table

    from engine.metrics import summary

    table = Table("metric", *(f"seed {seed}" for seed in seeds), "mean ± std")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, both in summary(metrics).items():
        spread = f" ± {both['std']:.4f}" if len(seeds) > 1 else ""
        table.add_row(name, *(_number(one.get(name)) for one in metrics), f"{both['mean']:.4f}{spread}")
    print(f"{split} metrics at each run's best epoch, {len(seeds)} seeds")
    _console().print(table)


def _print_information(out: Path, best_epoch: int | None) -> None:
    from engine.readings import print_rows

    path = out / "history.jsonl"
    if path.exists():
        history = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        print_rows(_console(), history, best_epoch)


def _print_results(out: Path) -> None:
    """Where to look next: only what is really there."""
    for label, name in (("report", "report.html"), ("metrics", "metrics.json"), ("summary", "summary.json")):
        if (out / name).exists():
            _say(f"{label}: {out / name}")


# -- the parser ------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("engine", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=_help_format)
    parser.add_argument("--version", action="version", version=f"engine {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_LazyParser)

    def command(
        name: str, run: Callable[..., None], help: str, text: str = "", epilog: Callable[[], str] | None = None
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help, description=textwrap.dedent(text) or f"{help[0].upper()}{help[1:]}.",
            formatter_class=_help_format, allow_abbrev=False,
        )  # fmt: skip
        sub.make_epilog = epilog
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=run, parser=sub)
        return sub

    p = command(
        "train",
        _train,
        "train a model and write a run folder",
        """\
        Train a model on feature files and write a run folder: config.yaml, metrics, predictions, checkpoints
        (best and last), TensorBoard scalars and report.html. Settings are given as key=value, anywhere on the line.
        seeds=0-2 (or 0,3,5) trains one run a seed in DIR/seed0 ... and writes summary.csv and summary.json with the
        mean and standard deviation over them.""",
        _train_epilog,
    )
    _config_arguments(p)
    p.add_argument("--data", metavar="PATH", help="feature file or folder, or a store made by engine convert")
    p.add_argument("--out", metavar="DIR", type=user_path, required=True, help="the run folder to write")
    p.add_argument(
        "--resume", action="store_true", help="go on with the run in DIR, by its own settings if none are given"
    )
    p.add_argument(
        "--profile",
        action="store_true",
        help="measure where time goes in a few batches of the second epoch: DIR/profile/shares.txt, shares.json and "
        "trace.json (Perfetto)",
    )
    p.set_defaults(takes_settings=True)

    p = command(
        "evaluate",
        _evaluate,
        "print the metrics of a run's best model on a split of a data set",
        """\
        Print the metrics of a run's best model on a split of a data set. The data needs to hold that split alone, with
        labels. The run folder holds all else, so that it may be copied to another machine.""",
    )
    _run_arguments(p)
    p.add_argument("--batch-size", metavar="N", type=int, help="default: the run's; in fast mode it changes nothing")
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")

    p = command(
        "predict",
        _predict,
        "write the predictions of a run's best model as CSV, in file order with ids",
        """\
        Write the predictions of a run's best model as CSV, in file order with ids. The data needs to hold the samples
        to predict alone, one clip or many, without labels or with them. The run folder holds all else, so that it may
        be copied to another machine.""",
    )
    _run_arguments(p)
    p.add_argument(
        "--out", metavar="CSV", type=user_path, required=True, help="the file to write: id, label, prediction"
    )

    p = command(
        "convert",
        _convert,
        "make a store of a feature file, so that training starts at once",
        """\
        Read a feature file of any supported format and write a ragged, memory-mapped store with tokenised text.
        engine train does this by itself on first use; convert beforehand to look at the store or move it elsewhere.""",
    )
    p.add_argument("src", metavar="SRC", type=user_path, help="feature file or folder")
    p.add_argument("dst", metavar="DST", type=user_path, help="the store to write")
    p.add_argument("--text-encoder", metavar="NAME", default="minilm", help="whose tokeniser to use (minilm)")
    rules = ("auto", "recorded", "all_zero", "sum_zero")
    p.add_argument("--length-rule", choices=rules, default="auto", help="how padding is told from frames (auto)")
    p.add_argument("--precision", choices=("fp32", "fp16"), help="of frames; fp16 halves the store (fp32)")

    p.add_argument("--format", metavar="NAME", help="refuse every family of files but this one")
    for kind in ("audio", "vision", "text"):
        p.add_argument(f"--{kind}-features", metavar="NAME", help="feature set to use where the data has several")
    p.add_argument("--label-column", metavar="N", type=int, help="column of labels with several")
    p.add_argument("--label-key", metavar="KEY", help="set of labels where an MMSA file has several")
    p.add_argument("--modalities", metavar="LIST", help="what the data has to hold (text,audio,vision)")
    p.add_argument("--align", choices=("words", "segments"), help=".csd files: a row a word, or frames as they are")

    p = command(
        "make-data",
        _make_data,
        "write synthetic files of a data set's shape in any format",
        """\
        Write generated samples with the lengths, widths and layout of a data set's files: for benchmarks, and to try
        the engine without access to the data. Their labels are random: there is nothing to learn from them.""",
    )
    p.add_argument("out", metavar="DIR", type=user_path, help="a new or empty folder")
    p.add_argument("--shape", choices=("mosi", "mosei", "avec2019"), required=True, help="whose lengths and widths")
    p.add_argument("--n", metavar="N", type=int, help="samples in all three splits (as many as the real data has)")
    p.add_argument("--format", metavar="NAME", help="layout of the files (declarelab, or avec2019 for that shape)")
    p.add_argument("--seed", metavar="S", type=int, default=0, help="equal seeds give equal files (0)")

    p = command(
        "inspect", _inspect, "name a file's format, splits, dims, lengths, non-finite values and problems",
        """\
        Say what a data file is and what is wrong with it: format, splits, dims, length statistics, counts of
        non-finite values, and problems. Nothing is executed from a pickle: only arrays and plain values are read.""",
    )  # fmt: skip
    p.add_argument("path", metavar="PATH", type=user_path, help="feature file or folder, or a store")
    p.add_argument(
        "--verify", action="store_true", help="compare all checksums of a store, and end with an error on any problem"
    )

    p = command(
        "import",
        _import,
        "turn a checkpoint of the published MIMRL code into a run folder",
        """\
        Load a REF.pth.tar of the published MIMRL code and write a run folder that evaluate and predict accept.
        The checkpoint does not say all about how its model was built: give the command line it was trained with, or
        a YAML file (engine import-command makes one). Without them, sizes come from the checkpoint and the rest from
        the published defaults. Notes on stderr say what was assumed.""",
    )
    p.add_argument("checkpoint", metavar="REF.pth.tar", type=user_path, help="the reference's checkpoint")
    group = p.add_mutually_exclusive_group()
    group.add_argument("--command", metavar="TEXT", dest="reference_command", help="'python Main.py --task_name ...'")
    group.add_argument("--config", metavar="FILE", help="a YAML file instead of --command")
    p.add_argument("--text-encoder", metavar="NAME", help="the text encoder it was trained with: a path or a name")
    p.add_argument("--out", metavar="DIR", type=user_path, required=True, help="the run folder to write")

    p = command(
        "import-command",
        _import_command,
        "turn a command line of the published MIMRL code into YAML",
        """\
        Map every flag of a command line of the published MIMRL code to a setting, or name it as unsupported, and
        print the YAML. Notes go to stderr. Then: engine train --config FILE --data PATH --out DIR""",
    )
    p.add_argument("text", metavar="'python Main.py ...'", help="the command line, in quotes")
    p.add_argument("--out", metavar="FILE", type=user_path, help="write the YAML to a file instead of printing it")

    p = command("report", _report, "write report.html of a run anew")
    p.add_argument("--run", metavar="DIR", type=user_path, required=True, dest="run_folder", help="a run folder")

    p = command(
        "demo",
        _demo,
        "train on generated utterances of known information and write a report",
        """\
        Generate utterances whose shared, specific and complementary information is known, train on them, and write
        a report that shows the estimators against the truth and the model's information terms over time.
        Settings are given as key=value, as for engine train. Repeating it replaces an earlier demo in DIR.""",
    )
    p.add_argument("--out", metavar="DIR", type=user_path, default=Path("runs/demo"), help="the run folder (runs/demo)")
    p.set_defaults(takes_settings=True)

    p = command(
        "config",
        _show_config,
        "print the settings of a preset or file after overrides, or all keys",
        """\
        Print the YAML that engine train would use, `auto` resolved for the mode. --keys lists every key with its
        default, its values and what it means.""",
    )
    _config_arguments(p)
    p.add_argument("--keys", action="store_true", help="list all keys instead")
    p.set_defaults(takes_settings=True)
    return parser


def _help_format(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=118)


class _LazyParser(_Parser):
    """A sub-command's parser whose epilog is made when help is asked for: it reads presets and settings."""

    make_epilog: Callable[[], str] | None = None

    def format_help(self) -> str:
        if self.make_epilog is not None:
            self.epilog = self.make_epilog()
        return super().format_help()


def _config_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--task", metavar="NAME", help="what is trained: mimrl, mmim, or one of your own as module:attribute (mimrl)"
    )
    group = p.add_mutually_exclusive_group()
    group.add_argument("--preset", metavar="NAME", help="a packaged recipe, see `engine train --help`")
    group.add_argument("--config", metavar="FILE", help="a YAML file; `preset: NAME` in it starts from that preset")


def _run_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--task", metavar="MODULE:ATTRIBUTE", help="where the run's task is, if it is one of your own")
    p.add_argument("--run", metavar="DIR", type=user_path, required=True, dest="run_folder", help="a run folder")
    p.add_argument("--data", metavar="PATH", type=user_path, required=True, help="feature file or folder, or a store")
    p.add_argument(
        "--split", choices=("train", "valid", "test"), help="which split (test, or the only one that the data has)"
    )
    p.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, cuda:1 or mps (auto)")


def _train_epilog() -> str:
    from engine.config import common_keys, presets

    lines = ["presets:"]
    known = presets()
    width = max(len(preset.name) for preset in known) + 2
    lines += [f"  {preset.name:<{width}}{preset.summary}" for preset in known]
    lines += ["", "most used keys (default), `engine config --keys` lists all:"]
    for key in common_keys():
        head = f"  {key.name} ({key.default})"
        text = textwrap.wrap(_meaning(key), 84)
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
        "  engine train --resume --data data/mosi --out runs/mosi",
    ]
    return "\n".join(lines)
