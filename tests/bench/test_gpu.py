"""`python -m bench.gpu` without a GPU, and its code path on the CPU."""

import json

import pytest

from bench import gpu


def test_without_a_gpu_it_says_why_and_ends_well(monkeypatch, capsys, tmp_path):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("skipped: torch ")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_its_code_path_runs_on_the_cpu(tmp_path, capfd):
    assert (
        gpu.main(["--device", "cpu", "--quick", "--rounds", "1", "--only", "critics", "--results", str(tmp_path)]) == 0
    )
    result = json.loads((tmp_path / "critics.json").read_text(encoding="utf-8"))
    assert result["device"] == "cpu" and result["quick"] and result["ratio"] > 0
    assert (tmp_path / "ratios.svg").exists()
    assert "| five grouped critics" in capfd.readouterr().out
