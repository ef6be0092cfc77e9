"""docs/your_own_model.md runs as it stands, and a run of a stranger's task imports nothing by itself."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from engine import task as tasks
from engine import trainer
from engine.cli import main
from engine.config import Config
from engine.errors import ConfigError
from engine.task import Task, find_task
from tests.loaders import writers
from tests.small_runs import SIZES, history
from tests.test_predict import table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "your_own_model.md"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The present folder, with the page's my_task.py and a small file under the name that the page uses."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(tasks, "_REGISTERED", {})
    monkeypatch.delitem(sys.modules, "my_task", raising=False)
    (code,) = blocks("python")
    (tmp_path / "my_task.py").write_text(code, encoding="utf-8")
    writers.dump(writers.mmsa(writers.samples(sizes=SIZES)), tmp_path / "mosi_data_noalign.pkl")
    yield tmp_path
    sys.modules.pop("my_task", None)


@pytest.fixture
def script_folder(folder, monkeypatch):
    """The same as the folder of the program that runs, from which Python imports."""
    monkeypatch.syspath_prepend(folder)
    return folder


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{re.escape(language)}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.filterwarnings("ignore")
def test_the_page_runs_as_it_stands(folder):
    for line in "".join(blocks("bash")).splitlines():
        words = shlex.split(line)
        assert words[0] == "engine" and main(words[1:]) == 0, line
    records = history(folder / "runs/mine")
    assert len(records) == 8
    assert list(records[-1]["train"]["information"]) == ["I(T;A)", "I(T;A|C)"]
    assert len(table(folder / "mine.csv")) == SIZES["test"]
    assert "I(T;A|C)" in (folder / "runs/mine/report.html").read_text(encoding="utf-8")
    assert (folder / "runs/mmim/best.safetensors").exists()


def small(data, text_encoder, **more) -> Config:
    output = {"progress": False, "tensorboard": False, "report": False}
    return Config(
        epochs=2, batch_size=6, text_encoder=str(text_encoder), data={"path": str(data)}, output=output, **more
    )


def test_the_same_in_python(script_folder, data, text_encoder):
    """The settings are for any task; `task=` brings the task's own sections."""
    trainer.train(small(data, text_encoder), script_folder / "run", task="my_task:TASK")
    assert "task: my_task\n" in (script_folder / "run/config.yaml").read_text()
    trainer.train(small(data, text_encoder), script_folder / "again", task=find_task("my_task"))
    assert trainer.evaluate(script_folder / "run", data) == trainer.evaluate(script_folder / "again", data)


def test_a_run_folder_imports_no_task(script_folder, data, text_encoder, monkeypatch, capsys):
    trainer.train(small(data, text_encoder), script_folder / "run", task="my_task:TASK")
    monkeypatch.setattr(tasks, "_REGISTERED", {})
    del sys.modules["my_task"]
    for name in ("my_task", "my_task:TASK"):
        text = (script_folder / "run/config.yaml").read_text()
        (script_folder / "run/config.yaml").write_text(re.sub("^task: .*$", f"task: {name}", text, flags=re.M))
        assert main(["evaluate", "--run", "run", "--data", str(data)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "not known here" in message and "--task module:attribute" in message
        assert "my_task" not in sys.modules
    (script_folder / "run/config.yaml").write_text(re.sub("^task: .*$", "task: my_task", text, flags=re.M))
    assert main(["evaluate", "--task", "my_task:TASK", "--run", "run", "--data", str(data)]) == 0


def test_a_task_without_terms_trains_on_its_loss(script_folder, data, text_encoder):
    import my_task

    class Plain(my_task.MyTask):
        name = "plain"
        terms = ()

    result = trainer.train(small(data, text_encoder), script_folder / "run", task=Plain())
    assert "information" not in history(script_folder / "run")[1]["train"]
    trainer.train(
        small(data, text_encoder).model_copy(update={"epochs": 3}), script_folder / "run", resume=True, task=Plain()
    )
    assert [r["epoch"] for r in history(script_folder / "run")] == [0, 1, 2]
    assert trainer.evaluate(script_folder / "run", data)["mae"] > 0 and result.metrics["test"]["mae"] > 0


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_a_task_that_cannot_be_imported(folder, capsys, command):
    words = {"train": ["--out", "x"], "evaluate": ["--run", "x"], "predict": ["--run", "x", "--out", "y"]}[command]
    assert main([command, "--task", "no_such:TASK", "--data", "mosi_data_noalign.pkl", *words]) == 2
    assert "No module named 'no_such'" in capsys.readouterr().err


def test_a_task_that_gives_no_model(folder, data, text_encoder):
    class Empty(Task):
        name = "empty"

    with pytest.raises(ConfigError, match="empty"):
        trainer.train(small(data, text_encoder), folder / "run", task=Empty())
