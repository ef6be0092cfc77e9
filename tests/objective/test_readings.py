"""Marks on readings and the table of an epoch's terms."""

import io
import math

import pytest

from engine.objective.readings import NEAR_CEILING, NOISE, TEXTS, TermRow, best_rows, mark, print_rows, term_rows


@pytest.mark.parametrize(
    ("term", "value", "ceiling", "expected"),
    [
        ("I(F;T)", 6.9, 7.16, "at its ceiling"),
        ("I(F;T)", 7.16 - NEAR_CEILING - 0.01, 7.16, ""),
        ("I(F;T)", 6.9, None, ""),
        ("I(F;T)", 0.1, 7.16, ""),  # small, but no conditional term
        ("I(F;T)", -0.01, 7.16, "below 0"),
        ("I(T;A|C)", 0.149, None, "noise"),
        ("I(T;A|C)", -0.149, None, "noise"),
        ("I(T;A|C)", NOISE, None, ""),
        ("I(T;A|C)", -0.3, None, "below 0"),
        ("I(T;A|C)", None, None, ""),
        ("I(T;A|C)", math.nan, None, ""),
    ],
)
def test_marks(term, value, ceiling, expected):
    assert mark(term, value, ceiling) == expected
    assert not expected or expected in TEXTS


def record(epoch, bank=None):
    train = {"mae": 1.0, "information": {"I(F;T)": 1.2, "comp": 0.3}, "estimators": {"I(F;T)": 1.1, "I(T;A|C)": 0.2}}
    valid = {"mae": 1.0, "information": {"I(F;T)": 0.9, "comp": 0.3}}
    if bank is not None:
        train |= {"bank": {"I(F;T)": bank, "I(T;A|C)": None, "comp": 2.0}, "bank_ceiling": {"I(F;T)": 7.16}}
        valid |= {"bank": {"I(F;T)": 1.5, "I(T;A|C)": 0.1, "comp": 2.0}, "bank_ceiling": {"I(F;T)": 5.43}}
    return {"epoch": epoch, "train": train, "valid": valid, "test": {}}


def test_rows_of_a_record():
    assert term_rows(record(0)) == []
    assert term_rows({"epoch": 0, "train": {"bank": "text"}, "valid": None}) == []
    assert term_rows(record(1, 6.5), ("train", "valid", "test")) == [
        TermRow("I(F;T)", "train", 1.2, 6.5, 7.16),
        TermRow("I(F;T)", "valid", 0.9, 1.5, 5.43),
        TermRow("I(T;A|C)", "train", 0.2, None, None),
        TermRow("I(T;A|C)", "valid", None, 0.1, None),
    ]
    assert [row.mark for row in term_rows(record(1, 6.5))] == ["at its ceiling", "", "", "noise"]


@pytest.mark.parametrize("value", [None, math.inf, "6.5", True, [6.5], 10**400])
def test_what_is_no_number_is_not_there(value):
    strange = record(1, 6.5)
    strange["train"]["bank"]["I(F;T)"] = strange["valid"]["bank_ceiling"]["I(F;T)"] = value
    train, valid, *_ = term_rows(strange)
    assert (train.bank, train.mark) == (None, "") and (valid.bank, valid.ceiling) == (1.5, None)


def test_the_best_epoch_that_was_read():
    history = [record(0), record(1, 4.0), record(2, 5.0), record(3, 6.0)]
    for best, epoch in ((1, 1), (0, 3), (None, 3)):
        found, rows = best_rows(history, best)
        assert (found, rows[0].bank) == (epoch, history[epoch]["train"]["bank"]["I(F;T)"])
    assert best_rows([record(0)], 0) == best_rows([], None) == (None, [])


def test_the_printed_table():
    """Every number in its column, a mark of one split with the split's name, and each mark's text once."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=500)
    print_rows(console, [record(0), record(1, 6.5), record(2, 4.0)], 1)
    lines = [line.split() for line in console.file.getvalue().splitlines() if line.strip()]
    assert lines[0][:2] == ["Information", "terms"] and "epoch 1 (nats" in " ".join(lines[0])
    rows = [line for line in lines if line[0].startswith("I(")]
    assert rows == [
        ["I(F;T)", "1.200", "6.500", "7.160", "1.500", "5.430", "train:", "at", "its", "ceiling"],
        ["I(T;A|C)", "0.200", "-", "-", "0.100", "-", "valid:", "noise"],
    ]
    assert [" ".join(line) for line in lines[-2:]] == [f"{name}: {TEXTS[name]}" for name in ("at its ceiling", "noise")]


def test_nothing_is_printed_without_readings():
    from rich.console import Console

    console = Console(file=io.StringIO())
    print_rows(console, [record(0)], 0)
    assert console.file.getvalue() == ""


def test_a_mark_of_both_splits_is_printed_once():
    from rich.console import Console

    both = record(1, 6.5)
    both["valid"]["bank"]["I(F;T)"] = 5.4
    console = Console(file=io.StringIO(), width=500)
    print_rows(console, [both], 1)
    (row,) = [line.split() for line in console.file.getvalue().splitlines() if line.strip().startswith("I(F;T)")]
    assert row[4:] == ["5.400", "5.430", "at", "its", "ceiling"]
