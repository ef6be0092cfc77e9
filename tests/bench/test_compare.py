"""Comparison with another commit: its engine, the present suites."""

import json
import subprocess

import pytest

from bench import compare, machine


def in_repository() -> bool:
    return subprocess.run(["git", "-C", str(machine.ROOT), "rev-parse", "HEAD"], capture_output=True).returncode == 0


needs_repository = pytest.mark.skipif(not in_repository(), reason="not a git working tree")


@needs_repository
def test_the_other_side_imports_the_other_engine():
    import os
    import sys

    with compare.roots("HEAD") as places:
        origins = {}
        for side, root in places.items():
            command = [sys.executable, "-c", "import bench, engine; print(engine.__file__); print(bench.__file__)"]
            environment = os.environ | {"PYTHONPATH": str(root)}
            done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
            engine, bench = done.stdout.split()
            assert engine.startswith(str(root)) and bench.startswith(str(root))
            origins[side] = (root / "engine").resolve()
        assert origins["here"] == machine.ROOT / "engine" and origins["base"] != origins["here"]
        tree = origins["base"].parent
    assert not tree.exists()
    listed = subprocess.run(
        ["git", "-C", str(machine.ROOT), "worktree", "list"], capture_output=True, text=True, check=True
    )
    assert str(tree) not in listed.stdout


@pytest.mark.slow
@needs_repository
def test_a_comparison_with_itself(capsys):
    assert compare.compare("HEAD", ["critics"], True, 2, 1, say=lambda text: None) == 0
    line = json.loads(capsys.readouterr().out)
    assert 0.2 < line["ratio"] < 5 and line["rounds"] == 2
