"""Where the seconds of a whole command go."""

import json

import pytest

from bench import whole
from engine.training.phases import in_words

TIMINGS = {"other": 0.5, "data": 0.25, "training": 4.0, "kernels": 0.01}


def folder(path):
    (path / "metrics.json").write_text(json.dumps({"timings": TIMINGS, "test": {"mae": 0.75}}))
    (path / "history.jsonl").write_text('{"seconds": 3.0}\n{"seconds": 1.0}\n')
    return path


def test_phases_add_up_to_the_command(tmp_path):
    line = in_words(8.0, {"start": 2.0} | TIMINGS)
    assert line == "time: 8.0 s (start 2.0, data 0.2, training 4.0, other 1.7)"
    found = whole.phases(f"a table\n{line}\nreport: run/report.html\n", folder(tmp_path), 9.5)
    assert found == pytest.approx(
        {"start": 2.0, "data": 0.25, "training": 4.0, "kernels": 0.01, "exit": 1.5, "other": 9.5 - 2 - 4.26 - 1.5}
    )
    assert sum(found.values()) == pytest.approx(9.5)


def test_a_command_that_says_nothing_of_its_time(tmp_path):
    found = whole.phases("", folder(tmp_path), 9.5)
    assert found["start"] == 0 and "exit" not in found and sum(found.values()) == pytest.approx(9.5)


def test_the_command_is_run_and_its_table_is_of_the_last_round(tmp_path, monkeypatch):
    seen = []

    def run(words, **options):
        seen.append(words)
        out = tmp_path / f"run{len(seen)}"
        out.mkdir()
        folder(out)
        return type("Done", (), {"returncode": 0, "stdout": in_words(5.0, {"start": 1.0} | TIMINGS), "stderr": ""})

    monkeypatch.setattr(whole.subprocess, "run", run)
    entries = [whole.measure(tmp_path, tmp_path / f"run{n}", "cpu", ["epochs=2"]) for n in (1, 2)]
    assert seen[0][1:5] == ["-m", "engine", "train", "--preset"] and seen[0][-1] == "epochs=2"
    assert entries[0]["epochs"] == [3.0, 1.0] and entries[0]["mae"] == 0.75
    text = whole.table(entries)
    assert "| training | 4.00 |" in text and "epochs of the last: 3.00, 1.00 s" in text


def test_a_command_that_fails_says_why(tmp_path, monkeypatch):
    done = type("Done", (), {"returncode": 2, "stdout": "", "stderr": "error: no data\n"})
    monkeypatch.setattr(whole.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(RuntimeError, match="no data"):
        whole.measure(tmp_path, tmp_path, "cpu")
