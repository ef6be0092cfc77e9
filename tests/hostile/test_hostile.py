"""A sample of every corpus; the whole is `python -m tests.hostile`. And a user who answers "y" to every question."""

import os
import pty
import select
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.hostile.corpora import CORPORA
from tests.hostile.encoders import CHANGES
from tests.hostile.runner import MARK, data, encoder, execute, settings, warm

SIZES = {"pickles": 64, "runs": 62, "encoders": 28, "yaml": 24, "reports": 37}
SAMPLE = {
    "pickles": ["code: os.system", "code: NEWOBJ", "a dtype of endless lists", "a shape of 400,000 numbers",
                "escape sequences in ids", "markup and escape sequences in keys", "a pipe", "a name of 5,000 letters"],
    "runs": ["config.yaml a pipe", "checksums.json of another form", "code named by the text encoder",
             "code named by a tokeniser's folder", "a billion layers of text", "settings of a wide model",
             "a normaliser of NaN", "resume: a bank of another form"],
    "encoders": ["auto_map in every file", "pickled weights that run code", "wider than its weights",
                 "config.json a pipe", "tokenizer.json nested without end"],
    "yaml": ["a billion laughs", "a billion merges", "a number of 100,000 digits", "a Python object", "a key twice",
             "escape sequences in a key and a value", "a width of 16,384", "a device"],
    "reports": ["history.jsonl a pipe", "a term named by a script", "a loss named by a script", "truth.json of scripts",
                "features named by scripts", "a class of 1e30", "a best epoch of 400 digits"],
}  # fmt: skip
CASES = [(corpus, case) for corpus, names in SAMPLE.items() for case in CORPORA[corpus] if case.name in names]


def test_the_corpora_are_whole():
    assert {corpus: len(cases) for corpus, cases in CORPORA.items()} == SIZES
    assert len(CASES) == sum(map(len, SAMPLE.values()))


@pytest.mark.parametrize(("corpus", "case"), CASES, ids=[f"{corpus}: {case.name}" for corpus, case in CASES])
def test_nothing_is_executed_and_everything_told_in_a_line(corpus, case):
    with warm():
        outcome = execute(case)
    assert outcome.faults == [], outcome.output
    assert outcome.silent == bool(case.accepted), outcome.output
    assert outcome.seconds < 20


# -- a terminal whose user says yes --


def answered(words: list[str], folder: Path) -> tuple[int, str]:
    """A command in a forked process with a terminal of its own, where "y" is typed again and again."""
    child, terminal = pty.fork()
    if child == 0:
        code = 70
        try:
            os.chdir(folder)
            for number, name in enumerate(("stdin", "stdout", "stderr")):  # pytest has put its own in their place
                setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
            from engine.cli import main

            torch.set_num_threads(1)  # the threads of the process that forked are not in this one
            code = main(words)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    said, end, start = b"", 0, time.monotonic()
    while not end:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                said += os.read(terminal, 65536)
            except OSError:  # the other side has closed
                break
        else:
            os.write(terminal, b"y\n")
        if time.monotonic() - start > 600:
            os.kill(child, signal.SIGKILL)
            break
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), said.decode("utf-8", "replace")


def foreign_encoder(folder: Path, kind: str) -> list[str]:
    import shutil

    place = folder / "encoder"
    shutil.copytree(encoder(), place)
    CHANGES[kind](place)
    settings().save(folder / "x.yaml")
    words = ["--config", "x.yaml", "--data", str(data()), "--out", "out", "epochs=1"]
    return ["train", *words, f"text_encoder={place}"]


ENCODERS = [name for name in CHANGES if name.startswith("auto_map")]
RUNS = ["code named by the text encoder", "code named by a tokeniser's folder"]


@pytest.mark.parametrize("name", [*ENCODERS, *RUNS])
def test_a_terminal_whose_user_says_yes_runs_nothing(tmp_path, monkeypatch, name):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    with warm():
        if name in RUNS:
            words = next(case for case in CORPORA["runs"] if case.name == name).make(tmp_path)
        else:
            words = foreign_encoder(tmp_path, name)
    code, said = answered(words, tmp_path)
    assert not list(tmp_path.rglob(MARK)), said
    assert "[y/N]" not in said
    harmless = name in ("auto_map in config.json of a known type", "auto_map in processor_config.json")
    assert code == (0 if harmless else 2), said
    assert harmless or "never runs code" in said
