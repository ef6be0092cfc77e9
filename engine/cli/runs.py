"""Commands on a finished run: evaluate, predict, report."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from engine.cli.command import Command, given_path, named_task, run_arguments, run_folder_argument
from engine.cli.folders import existing_run
from engine.cli.printing import print_metrics, say


def _evaluate(a: argparse.Namespace) -> None:
    from engine.trainer import evaluate

    named_task(a)
    metrics = evaluate(existing_run(a.run_folder), a.data, split=a.split, batch_size=a.batch_size, device=a.device)
    if a.json:
        print(json.dumps({k: v if v == v else None for k, v in metrics.items()}, indent=2))
    else:
        print_metrics(metrics, f"{a.split + ' ' if a.split else ''}metrics of {a.run_folder}")


def _evaluate_arguments(p: argparse.ArgumentParser) -> None:
    run_arguments(p)
    p.add_argument("--batch-size", metavar="N", type=int, help="default: the run's; in fast mode it changes nothing")
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _predict(a: argparse.Namespace) -> None:
    from engine.trainer import predict

    named_task(a)
    if str(a.out) == "-":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "predictions.csv"
            predict(existing_run(a.run_folder), a.data, path, split=a.split, device=a.device)
            sys.stdout.write(path.read_text(encoding="utf-8"))
        return
    predict(existing_run(a.run_folder), a.data, a.out, split=a.split, device=a.device)
    say(f"predictions: {a.out}")


def _predict_arguments(p: argparse.ArgumentParser) -> None:
    run_arguments(p)
    p.add_argument(
        "--out",
        metavar="CSV",
        type=given_path,
        required=True,
        help="the file to write, - for standard output: id, label, prediction",
    )


def _report(a: argparse.Namespace) -> None:
    from engine.report import write_report

    say(f"report: {write_report(existing_run(a.run_folder), a.out)}")


def _report_arguments(p: argparse.ArgumentParser) -> None:
    run_folder_argument(p)
    p.add_argument("--out", metavar="HTML", type=given_path, help="the file to write (report.html in the run folder)")


COMMANDS = (
    Command(
        "evaluate",
        _evaluate,
        "print the metrics of a run's best model on a split of a data set",
        _evaluate_arguments,
        """\
        Print the metrics of a run's best model on a split of a data set. The data needs only that split, with labels.
        The run folder holds all else, so that it may be copied to another machine.""",
    ),
    Command(
        "predict",
        _predict,
        "write the predictions of a run's best model as CSV, in file order with ids",
        _predict_arguments,
        """\
        Write the predictions of a run's best model as CSV, in file order with ids. The data needs only the samples to
        predict, one clip or many, with or without labels. The run folder holds all else, so that it may be copied to
        another machine.""",
    ),
    Command("report", _report, "write report.html of a run again", _report_arguments),
)
