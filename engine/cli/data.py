"""Commands on data: convert, make-data, inspect."""

from __future__ import annotations

import argparse
from typing import Any

from engine.cli.command import Command, given_path
from engine.cli.printing import console, say
from engine.errors import DataError
from engine.vocabulary import ALIGNMENTS, LENGTH_RULES

DTYPES = {"fp32": "float32", "fp16": "float16"}
CHOICES = (
    *("audio_features", "vision_features", "text_features"),
    *("label_column", "label_key", "modalities", "align", "pool_audio", "pool_vision", "skip_columns"),
)
"""Options of `convert` that are settings of `data`, too."""


def _convert(a: argparse.Namespace) -> None:
    from engine.loaders.convert import convert

    more: dict[str, Any] = {} if a.format is None else {"expected": a.format}
    chosen = {name: getattr(a, name) for name in CHOICES if getattr(a, name) is not None}
    if chosen:
        from engine.config import DataConfig
        from engine.loaders.dataset import choice_of

        more["choice"] = choice_of(DataConfig(**chosen))
    if a.precision is not None:
        more["dtype"] = DTYPES[a.precision]
    convert(a.src, a.dst, text_encoder=a.text_encoder, length_rule=a.length_rule, **more)
    say(f"store: {a.dst}")


def _convert_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("src", metavar="SRC", type=given_path, help="feature file or folder")
    p.add_argument("dst", metavar="DST", type=given_path, help="the store to write")
    p.add_argument("--text-encoder", metavar="NAME", default="minilm", help="whose tokeniser to use (minilm)")
    p.add_argument("--length-rule", choices=LENGTH_RULES, default="auto", help="how padding is told from frames (auto)")
    p.add_argument("--precision", choices=tuple(DTYPES), help="of frames; fp16 halves the store (fp32)")
    p.add_argument("--format", metavar="NAME", help="refuse every family of files but this one")
    for kind in ("audio", "vision", "text"):
        p.add_argument(f"--{kind}-features", metavar="NAME", help="feature set to use where the data has several")
    p.add_argument("--label-column", metavar="N", type=int, help="column of labels that have several")
    p.add_argument("--label-key", metavar="KEY", help="set of labels where an MMSA file has several")
    p.add_argument("--modalities", metavar="LIST", help="what the data has to hold (text,audio,vision)")
    p.add_argument("--align", choices=ALIGNMENTS, help=".csd files: one row per word, or frames as they are")
    for kind in ("audio", "vision"):
        p.add_argument(f"--pool-{kind}", metavar="N", type=int, help="the mean of N successive frames is one step")
    p.add_argument("--skip-columns", metavar="LIST", help="columns of a manifest's .csv files that are no features")


def _make_data(a: argparse.Namespace) -> None:
    from engine.loaders.make_data import make_data

    made = make_data(a.out, a.shape, a.n, a.format, a.seed)
    say(f"data: {made}\nnext: engine inspect {made}")


def _make_data_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("out", metavar="DIR", type=given_path, help="a new or empty folder")
    p.add_argument("--shape", choices=("mosi", "mosei", "avec2019"), required=True, help="whose lengths and widths")
    p.add_argument("--n", metavar="N", type=int, help="samples in all three splits (as many as the real data has)")
    p.add_argument("--format", metavar="NAME", help="layout of the files (declarelab, or avec2019 for that shape)")
    p.add_argument("--seed", metavar="S", type=int, default=0, help="equal seeds give equal files (0)")


def _inspect(a: argparse.Namespace) -> None:
    from engine.loaders.inspect import inspect_path

    report = inspect_path(a.path, **({"verify": True} if a.verify else {}))
    rendered = report.render()
    say(rendered) if isinstance(rendered, str) else console().print(rendered)
    if a.verify and report.problems:
        raise DataError(
            str(a.path), report.problems[0], "a file without problems, as --verify asks", "See the list above."
        )


def _inspect_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("path", metavar="PATH", type=given_path, help="feature file or folder, or a store")
    p.add_argument(
        "--verify", action="store_true", help="compare all checksums of a store, and end with an error on any problem"
    )


COMMANDS = (
    Command(
        "convert",
        _convert,
        "make a store of a feature file, so that training starts at once",
        _convert_arguments,
        """\
        Read a feature file of any supported format and write a ragged, memory-mapped store with tokenised text.
        engine train does this by itself on first use. Convert first to look at the store or move it elsewhere.""",
    ),
    Command(
        "make-data",
        _make_data,
        "write synthetic files of a data set's shape in any format",
        _make_data_arguments,
        """\
        Write generated samples with the lengths, widths and layout of a data set's files: for benchmarks, and to try
        the engine without access to the data. Their labels are random: there is nothing to learn from them.""",
    ),
    Command(
        "inspect",
        _inspect,
        "name a file's format, splits, dims, lengths, non-finite values and problems",
        _inspect_arguments,
        """\
        Say what a data file is and what is wrong with it: format, splits, dims, length statistics, counts of
        non-finite values, and problems. Nothing is executed from a pickle: only arrays and plain values are read.""",
    ),
)
