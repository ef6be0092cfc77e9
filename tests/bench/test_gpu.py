"""`python -m bench.gpu` without a GPU, and its code path on the CPU."""

import json
import subprocess
import sys

import pytest
import torch

from bench import gpu, gpu_rows, gpu_table, machine, timing


def test_without_a_gpu_it_says_why_and_ends_well(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("skipped: torch ")
    assert not list(tmp_path.iterdir())


def test_the_order_names_every_group():
    assert set(gpu.ORDER) == set(gpu_rows.GROUPS)


def test_the_whole_code_path_on_the_cpu(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- gpu:start -->\nold\n<!-- gpu:end -->\nb\n", encoding="utf-8")
    arguments = ["--device", "cpu", "--quick", "--results", str(tmp_path / "out"), "--readme", str(readme)]
    assert gpu.main(arguments) == 0
    printed = capsys.readouterr().out
    entries = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    wanted = {
        "ceiling", "epoch_fast", "epoch_faithful", "stage2_fast", "stage1_faithful", "draw_fast", "collect_fast",
        "infonce", "concat_critic", "cubemlp", "five_critics", "draws", "epoch_mosei",
    }  # fmt: skip
    measured = {e["row"] for e in entries if e["side"] == "engine" or e["row"] == "ceiling"}
    assert wanted <= measured
    for entry in entries:
        absent = entry["side"] in ("cce", "liger", "baseline")  # libraries that are not installed, MiniLM
        assert absent or not {"failed", "red", "graph_failed"} & set(entry), entry
    infonce = [e for e in entries if e["row"] == "infonce" and "error" in e]
    assert all(e["error"][0] < 1e-5 and e["ms"] > 0 for e in infonce) and {"engine", "eager"} <= {
        e["side"] for e in infonce
    }
    files = gpu_table.load(tmp_path / "out")
    assert set(files) == set(gpu.ORDER) and all(content["complete"] for content in files.values())
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["left_out"] == summary["failed"] == []
    assert "| stage 2, a batch |" in printed
    assert readme.read_text(encoding="utf-8").startswith("a\n<!-- gpu:start -->\n\n| what |")


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
    assert content["fault"] == "RuntimeError: illegal memory access"
    assert json.loads((tmp_path / "ceilings.json").read_text(encoding="utf-8"))["complete"]
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary == {"left_out": ["draws (in part)"], "failed": ["draws"], "slower_than_eager": []}


def test_a_group_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--group", "ceilings", "--device", "cpu", "--quick"]
    done = subprocess.run(
        [*command, "--results", str(tmp_path)], cwd=machine.ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[0])["row"] == "ceiling"
    assert json.loads((tmp_path / "ceilings.json").read_text(encoding="utf-8"))["complete"]


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

    measured = gpu_rows.measured(context, {"engine": lambda: None, "other": broken})
    assert measured["other"] == {"failed": "ValueError: no such kernel"} and measured["engine"]["ms"] >= 0


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
