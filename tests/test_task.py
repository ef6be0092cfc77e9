"""Tasks: which names find one, and what may be imported."""

import pytest

from engine import task as tasks
from engine.errors import ConfigError
from engine.task import DEFAULT, TASKS, Task, find_task, load_task, register_task, task_names


@pytest.fixture(autouse=True)
def registered_here_only(monkeypatch):
    monkeypatch.setattr(tasks, "_REGISTERED", {})


class Named(Task):
    def __init__(self, name):
        self.name = name


def test_own_tasks_are_found_by_name():
    assert DEFAULT in TASKS
    assert [find_task(name).name for name in TASKS] == list(TASKS)


def test_a_name_imports_nothing(tmp_path, monkeypatch):
    """Settings and run folders may come from strangers."""
    (tmp_path / "strange_task.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="not known here"):
        find_task("strange_task:TASK")


def test_load_task_imports_and_registers(tmp_path, monkeypatch):
    (tmp_path / "kind_task.py").write_text(
        "from engine.task import Task\nclass Kind(Task):\n    name = 'kind'\nTASK = Kind()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    task = load_task("kind_task:TASK")
    assert task is find_task("kind") is load_task("kind") is load_task(task)
    assert "kind" in task_names()


@pytest.mark.parametrize("place", ["no_such_module:TASK", "engine.task:NO_SUCH", ":TASK", "engine.task:"])
def test_what_cannot_be_imported(place):
    with pytest.raises(ConfigError, match="a module and its attribute"):
        load_task(place)


@pytest.mark.parametrize("task", [Named(""), Named("two words"), Named(DEFAULT), object()])
def test_what_cannot_be_registered(task):
    with pytest.raises(ConfigError, match="task"):
        register_task(task)


def test_registering_again_replaces():
    register_task(Named("again"))
    second = register_task(Named("again"))
    assert find_task("again") is second
