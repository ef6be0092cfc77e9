"""`python -m bench.gpu` without a GPU, and its code path on the CPU."""

import argparse
import json
import re
import subprocess
import sys
import time

import pytest
import torch

from bench import gpu, gpu_operations, gpu_rows, gpu_table, machine, timing
from engine.kernels import dispatch


def test_without_a_gpu_it_says_why_and_ends_well(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("skipped: torch ")
    assert not list(tmp_path.iterdir())


def test_the_order_names_every_group():
    assert set(gpu.ORDER) == set(gpu_rows.GROUPS)


def test_everything_that_a_gpu_runs_is_rehearsed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_operations, "command", lambda context: iter(()))  # starts two processes: below
    monkeypatch.setitem(gpu_rows.GROUPS, "command", gpu_rows.Group(gpu_operations.command, 60))
    table = dispatch.TABLE.read_bytes()
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- gpu:start -->\nold\n<!-- gpu:end -->\nb\n", encoding="utf-8")
    before = readme.read_bytes()
    arguments = ["--rehearse", "--here", "--tune", "--minutes", "30", "--results", str(tmp_path / "out")]
    assert gpu.main([*arguments, "--readme", str(readme)]) == 0
    printed = capsys.readouterr().out
    entries = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    wanted = {
        "ceiling", "epoch_fast", "epoch_faithful", "stage2_fast", "stage1_faithful", "draw_fast", "collect_fast",
        "infonce", "concat_critic", "cubemlp", "five_critics", "draws", "epoch_draws", "take_rows", "epoch_mosei",
        "op_update", "op_stack_sequences", "op_recurrent", "op_embeddings", "tune",
    }  # fmt: skip
    measured = {e["row"] for e in entries if e["side"] == "engine" or e["row"] == "ceiling"}
    assert wanted <= measured
    for entry in entries:
        absent = entry["side"] in ("cce", "liger")  # libraries that are not installed
        assert absent or not {"failed", "red", "graph_failed"} & set(entry), entry
    infonce = [e for e in entries if e["row"] == "infonce" and "error" in e]
    assert all(e["error"][0] < 1e-5 and e["ms"] > 0 for e in infonce) and {"engine", "eager"} <= {
        e["side"] for e in infonce
    }
    files = gpu_table.load(tmp_path / "out")
    assert set(files) == {*gpu.ORDER, "tune"} and all(c["complete"] and c["rehearsal"] for c in files.values())
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["left_out"] == summary["failed"] == []
    assert "| stage 2, a batch |" in printed
    assert "A rehearsal without a GPU: no figure means anything." in printed
    # of a page only a copy is written, and neither the table of algorithms nor committed results are
    page = (tmp_path / "out" / "page.md").read_text(encoding="utf-8")
    assert page.startswith("a\n<!-- gpu:start -->\n\n| what |") and readme.read_bytes() == before
    assert dispatch.TABLE.read_bytes() == table and "graph_ms" in infonce[0] and "extra_mib" in infonce[0]
    assert gpu.adopt(tmp_path / "out") == 1 and dispatch.TABLE.read_bytes() == table


def test_a_rehearsal_writes_nothing_among_results(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--rehearse", "--results", str(gpu.RESULTS / "gpu")])
    assert "a rehearsal writes nothing under" in capsys.readouterr().err


@pytest.mark.slow
def test_a_rehearsal_as_a_person_runs_it(tmp_path):
    """Every group in a process of its own, the check of the kernels in triton's interpreter, the command twice."""
    line = [sys.executable, "-m", "bench.gpu", "--rehearse", "--check", "--minutes", "30", "--results", str(tmp_path)]
    done = subprocess.run(line, cwd=machine.ROOT, capture_output=True, text=True)
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert done.returncode == 0 and summary["failed"] == summary["left_out"] == [], done.stderr[-3000:]
    assert summary["check"]["broken"] == [] and summary["check"]["results"]["stacked"]["passed"] > 5
    rows = {e["row"] for e in gpu_table.entries(gpu_table.load(tmp_path))}
    assert {"command_kept", "command_compiled", "epoch_fast", "op_update"} <= rows
    assert not list(tmp_path.glob("*.hung.txt"))


def test_without_time_groups_are_left_out_by_name(tmp_path, capsys):
    arguments = ["--device", "cpu", "--quick", "--minutes", "0.2", "--results", str(tmp_path)]
    assert gpu.main([*arguments, "--only", "mosei", "eager_epoch"]) == 0
    assert "Left out for lack of time or by a fault: mosei, eager_epoch." in capsys.readouterr().out


def test_a_fault_keeps_what_was_measured_and_leaves_the_others_alone(tmp_path, monkeypatch):
    def broken(context):
        yield {"row": "one", "side": "engine", "ms": 1.0}
        raise RuntimeError("illegal memory access")

    groups = gpu_rows.GROUPS | {"draws": gpu_rows.Group(broken, 30)}
    monkeypatch.setattr(gpu_rows, "GROUPS", groups)
    arguments = ["--device", "cpu", "--quick", "--results", str(tmp_path), "--only", "draws", "ceilings"]
    assert gpu.main(arguments) == 1
    content = json.loads((tmp_path / "draws.json").read_text(encoding="utf-8"))
    assert content["entries"][0]["ms"] == 1.0 and not content["complete"]
    assert content["fault"].startswith("RuntimeError: illegal memory access (bench/gpu.py:")
    assert json.loads((tmp_path / "ceilings.json").read_text(encoding="utf-8"))["complete"]
    assert "raise RuntimeError" in content["traceback"]
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["left_out"] == ["draws (in part)"] and summary["failed"] == ["draws"]


def test_a_group_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--group", "ceilings", "--device", "cpu", "--quick"]
    done = subprocess.run(
        [*command, "--results", str(tmp_path)], cwd=machine.ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[0])["row"] == "ceiling"
    assert json.loads((tmp_path / "ceilings.json").read_text(encoding="utf-8"))["complete"]


# -- groups in processes of their own ---------------------------------------------------------------------------------


def arguments(folder, **changes):
    values = {"device": "cpu", "quick": True, "rehearse": False, "rounds": 1, "results": folder, "here": False}
    return argparse.Namespace(
        **values | {"plain": (), "minutes": 1.0, "check": False, "tune": False, "readme": None} | changes
    )


def process(monkeypatch, code):
    """Groups run this Python code, with `path` the file of the group and `seconds` its time."""
    start = "import json, os, sys, time; path, seconds = sys.argv[1], float(sys.argv[2]);"
    monkeypatch.setattr(
        gpu, "_command",
        lambda a, name, seconds: [sys.executable, "-c", start + code, str(a.results / f"{name}.json"), str(seconds)],
    )  # fmt: skip


WRITE = """
content = {"entries": [{"row": "one", "side": "engine", "ms": 1.0}], "machine": {"gpu": "a GPU"}, "versions": {},
           "commit": "", "date": "", "quick": True, "complete": False}
json.dump(content, open(path, "w"))
"""


def test_a_group_that_hangs_ends_in_time_and_says_where(tmp_path, monkeypatch):
    code = WRITE + "from pathlib import Path; from bench import gpu\n"
    code += "with gpu._last_words(Path(path).with_suffix('.hung.txt'), 0.0):\n"
    code += "    os.fork() or time.sleep(1000)\n    time.sleep(1000)\n"
    process(monkeypatch, code)
    summary = {"left_out": [], "failed": [], "plain": []}
    start = time.monotonic()
    content = gpu._measured(arguments(tmp_path), "ceilings", 8.0, summary)
    assert time.monotonic() - start < 200
    assert content["fault"] == "did not end within 8 s" and 'File "<string>"' in content["traceback"]
    assert json.loads((tmp_path / "ceilings.json").read_text(encoding="utf-8")) == content
    assert summary["left_out"] == ["ceilings (in part)"] and not list(tmp_path.glob("*.hung.txt"))


def test_a_group_that_crashes_says_by_what(tmp_path, monkeypatch):
    process(monkeypatch, WRITE + "os.abort()")
    summary = {"left_out": [], "failed": [], "plain": []}
    content = gpu._measured(arguments(tmp_path), "ceilings", 300.0, summary)
    assert content["fault"] == "ended by SIGABRT" and content["entries"][0]["ms"] == 1.0
    assert summary["failed"] == ["ceilings"]


def test_a_step_that_fails_is_run_again_without_the_newest_kernels(tmp_path, monkeypatch, capsys):
    """Both are kept; the table shows the second and says so."""
    code = WRITE.replace('"ms": 1.0}', '"seconds": 0.3, **({} if os.environ["ENGINE_PLAIN"] else {"failed": "x"})}')
    code = code.replace('"one"', '"epoch_fast"').replace('"complete": False', '"complete": True')
    code += "content['entries'][0] |= {'plain': [n for n in os.environ['ENGINE_PLAIN'].split(',') if n]}\n"
    process(monkeypatch, code + "json.dump(content, open(path, 'w'))")
    monkeypatch.setattr(gpu, "absent", list)
    gpu.measure(arguments(tmp_path, minutes=2.0), ["step_fast", "ceilings"])
    spoilt, again = (
        json.loads((tmp_path / f"step_fast{end}.json").read_text(encoding="utf-8"))["entries"][0]
        for end in ("_spoilt", "")
    )
    assert spoilt["failed"] == "x" and "failed" not in again and again["plain"] == sorted(gpu.NEW)
    assert "| 0.3 s (plain torch for recurrent, stacked, transformer, update) |" in capsys.readouterr().out
    assert (tmp_path / "table.md").exists()


def test_a_broken_page_costs_no_results(tmp_path, monkeypatch, capsys):
    process(monkeypatch, WRITE.replace("False}", "True}"))
    monkeypatch.setattr(gpu, "absent", lambda: ["a package"])
    assert gpu.measure(arguments(tmp_path, readme=tmp_path / "absent.md"), ["ceilings"]) == 1
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["failed"] == ["plots and table"] and summary["absent"] == ["a package"]
    assert "| what | measured |" in capsys.readouterr().out


def test_all_of_it_ends_in_time(tmp_path, monkeypatch):
    process(monkeypatch, WRITE + "time.sleep(1000)")
    monkeypatch.setattr(gpu, "absent", list)
    monkeypatch.setattr(gpu, "SPARE", 1.0)
    for name in gpu_rows.GROUPS:
        monkeypatch.setitem(gpu_rows.GROUPS, name, gpu_rows.Group(gpu_rows.ceilings, 6.0, 1.0))
    start = time.monotonic()
    gpu.measure(arguments(tmp_path, minutes=0.2), list(gpu.ORDER))
    assert time.monotonic() - start < 6.0 * (len(gpu.ORDER) - 1)
    left_out = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["left_out"]
    assert len(left_out) == len(gpu.ORDER) and left_out[0] == "step_fast (in part)" and left_out[-1] == "eager_epoch"


def test_a_table_that_was_measured_elsewhere_is_adopted(tmp_path, monkeypatch):
    table = tmp_path / "dispatch.json"
    monkeypatch.setattr(dispatch, "TABLE", table)
    entry = {
        "operation": "infonce", "precision": "bf16", "architecture": "sm90", "sizes": {"rows": 4},
        "algorithm": "eager", "milliseconds": {"eager": 1.0}, "source": "measured",
    }  # fmt: skip
    content = {"quick": False, "entries": [{"row": "tune", "table": [entry]}, {"row": "tune", "failed": "x"}]}
    (tmp_path / "tune.json").write_text(json.dumps(content), encoding="utf-8")
    assert gpu.main(["--adopt", str(tmp_path)]) == 0
    assert dispatch.read(table) == [entry]
    monkeypatch.undo()
    dispatch._load()


@pytest.mark.slow
def test_suites_run_on_a_device_too(tmp_path, capfd):
    arguments = ["--device", "cpu", "--quick", "--rounds", "1", "--only", "critics", "--results", str(tmp_path)]
    assert gpu.main(arguments) == 0
    result = json.loads((tmp_path / "critics.json").read_text(encoding="utf-8"))
    assert result["device"] == "cpu" and result["quick"] and result["ratio"] > 0
    assert "| five grouped critics" in capfd.readouterr().out


# -- pieces -----------------------------------------------------------------------------------------------------------


def test_infonce_in_float64_by_chunks():
    q, k = (v.double().requires_grad_() for v in gpu_rows.embeddings(37, 6, "cpu"))
    value = torch.nn.functional.cross_entropy(q @ k.t(), torch.arange(37))
    value.backward()
    measured = gpu_rows.exact_infonce(q.detach(), k.detach(), chunk=10)
    for a, b in zip(measured, (value.detach(), q.grad, k.grad), strict=True):
        torch.testing.assert_close(a, b)


def test_a_wrong_result_is_not_timed(monkeypatch):
    import engine.kernels

    context = gpu_rows.Context("cpu", quick=True, rounds=1)
    monkeypatch.setattr(gpu_rows, "QUICK_INFONCE", ((24, 8, ("fp32",)),))
    right = engine.kernels.infonce
    monkeypatch.setattr(engine.kernels, "infonce", lambda q, k: right(q, k) * 1.001)
    measured = [e for e in gpu_rows.infonce(context) if e["side"] in ("engine", "eager")]
    assert [("red" in e, "ms" in e) for e in measured] == [(True, False), (False, True)]


def test_a_side_that_fails_leaves_the_others_their_turns():
    context = gpu_rows.Context("cpu", quick=True, rounds=2)

    def broken():
        raise ValueError("no such kernel")

    calls = []

    def breaks_later():
        calls.append(1)
        if len(calls) > 3:
            broken()

    measured = gpu_rows.measured(context, {"engine": lambda: None, "other": broken, "third": breaks_later})
    for side in ("other", "third"):
        assert re.fullmatch(r"ValueError: no such kernel \(bench/\w+.py:\d+\)", measured[side].pop("failed"))
        assert not measured[side]
    assert measured["engine"]["ms"] >= 0 and "failed" not in measured["engine"]


def test_sides_take_turns():
    calls = []
    clock = timing.Clock("cpu")
    sides = {name: lambda name=name: calls.append(name) for name in "abc"}
    assert set(clock.interleaved(sides, rounds=3, budget=0)) == set("abc")
    assert calls[-9:] == list("abcbcacab")  # warm-ups and first calls come before


def test_busy_time_is_the_union_of_spans():
    assert timing.union([(0, 10), (2, 5), (8, 12), (20, 21)]) == 13
    assert timing.union([]) == 0


def result(entries):
    return {
        "x": {
            "entries": entries, "machine": {"gpu": "a GPU"}, "versions": {"torch": "2.11.0"}, "commit": "abc",
            "date": "2026-11-27", "quick": False,
        }
    }  # fmt: skip


def test_the_table_shows_what_was_measured_and_what_was_not():
    case = {"row": "infonce", "B": 16384, "d": 128, "precision": "bf16"}
    measured = result(
        [
            {**case, "side": "engine", "ms": 1.5, "graph_ms": 0.9},
            {**case, "side": "eager", "ms": 3.4},
            {"row": "epoch_fast", "side": "engine", "seconds": 0.5, "busy": 0.97},
            {"row": "cubemlp", "side": "engine", "precision": "tf32", "red": "off"},
        ]
    )
    lines = gpu_table.table(measured).splitlines()
    assert (
        "| InfoNCE bf16, B=16,384, d=128, forward and backward | 0.9 ms | 1.1 ms | 0.7 ms | eager torch 3.4 ms |"
        in lines
    )
    assert any("| 0.5 s (misses the floor) | 0.4 s | 0.15 s |" in line for line in lines)
    assert any("| 97 % | 80 % | 95 % |" in line for line in lines)
    assert any(line.startswith("| CubeMLP, B=128, tf32 | wrong result |") for line in lines)
    assert any(line.startswith("| launches of stage 1 | not measured |") for line in lines)
    assert lines[-1] == "a GPU; torch 2.11.0; commit abc; 2026-11-27."
    assert gpu_table.slower(measured) == []
    slow = result([{**case, "side": "engine", "ms": 4.0}, {**case, "side": "eager", "ms": 3.4}])
    assert gpu_table.slower(slow) == ["infonce 16384 128 bf16: engine 4 ms, eager 3.4 ms"]


def test_plots_need_something_to_compare(tmp_path):
    case = {"row": "cubemlp", "precision": "tf32"}
    assert gpu_table.draw(result([{**case, "side": "engine", "ms": 1.0}]), tmp_path) == []
    both = [{**case, "side": "engine", "ms": 1.0}, {**case, "side": "eager", "ms": 2.0}]
    (path,) = gpu_table.draw(result(both), tmp_path)
    assert path.stat().st_size > 1000
