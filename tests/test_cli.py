"""The command line: what each command asks of the Python API, and one-line errors with exit code 2."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from engine import __version__
from engine.cli import main
from engine.cli.parser import EXAMPLES, build_parser, split_settings
from engine.cli.training import split_seeds, train_epilog
from engine.config import Config, common_keys, load_config, presets
from engine.errors import DataError
from engine.loaders.make_data import make_data
from engine.run_folder import FILES
from engine.sweeps.settings import read_words
from engine.sweeps.space import is_searched, read_space_words

PROJECT = Path(__file__).resolve().parents[1]
METRICS = {"best_epoch": 3, "test": {"mae": 0.75, "corr": 0.7, "acc7": None}}
COMMANDS = (
    "train", "evaluate", "predict", "convert", "make-data", "inspect", "import", "import-command", "report", "demo",
    "config", "sweep", "tune",
)  # fmt: skip


@dataclass
class Result:
    out: Path
    metrics: dict[str, Any]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "features.pkl"
    path.write_bytes(b"")
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The command line's calls, recorded in place of the modules that do the work."""
    made: list[tuple] = []

    def record(name: str, result: Any = None):
        def call(*args: Any, **options: Any) -> Any:
            made.append((name, args, options))
            return result(*args, **options) if callable(result) else result

        return call

    def module(name: str, **functions: Any) -> None:
        parent, _, child = name.rpartition(".")
        owner = import_module(parent)  # before one of its modules is replaced
        stand_in = ModuleType(name)
        stand_in.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, name, stand_in)
        monkeypatch.setattr(owner, child, stand_in, raising=False)

    def seeds_result(config: Config, out: Path, seeds: list[int], resume: bool) -> list[Result]:
        (out / "summary.json").parent.mkdir(parents=True, exist_ok=True)
        (out / "summary.json").write_text("{}")
        return [Result(out / f"seed{s}", {"best_epoch": 1, "test": {"mae": 0.7 + 0.1 * s}}) for s in seeds]

    module(
        "engine.trainer",
        train=record("train", lambda config, out, resume, profile: Result(out, METRICS)),
        train_seeds=record("train_seeds", seeds_result),
        evaluate=record("evaluate", METRICS["test"]),
        predict=record("predict"),
    )
    module("engine.loaders.convert", convert=record("convert"))
    inspection = type("Inspection", (), {"render": lambda self: "format: a store [not markup]"})()
    module("engine.loaders.inspect", inspect_path=record("inspect_path", lambda path: inspection))
    module("engine.mimrl.checkpoints", import_checkpoint=record("import_checkpoint", ["the optimiser is left out"]))
    module(
        "engine.mimrl.commands",
        import_command=record("import_command", lambda text: (load_config("mosi"), ["--radius has no effect"])),
    )
    module("engine.report", write_report=record("write_report", lambda run, out: out or run / "report.html"))
    module("engine.demo", run_demo=record("run_demo"), demo_config=lambda settings: load_config("demo", settings))
    return made


def run(*words: Any) -> int:
    return main([str(word) for word in words])


def fails(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """The one line that a command leaves on stderr when it ends with exit code 2."""
    try:
        code = run(*words)
    except SystemExit as stop:  # a wrong command line, seen by argparse
        code = stop.code
    output = capsys.readouterr()
    assert code == 2
    assert output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1 and output.err.endswith("\n")
    return output.err


# -- train --


def test_train(calls: list, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    words = ("train", "epochs=3", "--preset", "mosi", "mode=faithful", "--data", data, "--out", out, "train.lr=5e-4")
    assert run(*words) == 0
    [(name, (config, folder), options)] = calls
    assert (name, folder, options) == ("train", out, {"resume": False, "profile": False})
    assert (config.preset, config.mode, config.epochs, config.train.lr) == ("mosi", "faithful", 3, 5e-4)
    assert config.data.path == str(data)
    printed = capsys.readouterr().out
    assert "0.7500" in printed and "best epoch (3)" in printed


def test_train_prints_what_all_rows_read(calls: list, data: Path, tmp_path: Path, capsys, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setenv("COLUMNS", "160")

    def train(config: Config, folder: Path, resume: bool, profile: bool) -> Result:
        folder.mkdir()
        bank = {"I(F;T)": 6.5, "I(A;C|T)": 0.112, "comp": 0.1}
        record = {
            "epoch": 3,
            "train": {"information": {"I(F;T)": 3.2}, "bank": bank, "bank_ceiling": {"I(F;T)": 7.157}},
            "valid": {"bank": bank | {"I(F;T)": -0.25}, "bank_ceiling": {"I(F;T)": 5.434}},
        }
        (folder / "history.jsonl").write_text(json.dumps(record) + "\n")
        return Result(folder, METRICS)

    monkeypatch.setattr(sys.modules["engine.trainer"], "train", train)
    assert run("train", "--preset", "mosi", "--data", data, "--out", out) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if "I(" in line}
    assert rows["I(F;T)"][:6] == ["I(F;T)", "3.200", "6.500", "7.157", "-0.250", "5.434"]
    assert " ".join(rows["I(F;T)"][6:]) == "train: at its ceiling; valid: below 0"
    assert rows["I(A;C|T)"] == ["I(A;C|T)", "-", "0.112", "-", "0.112", "-", "noise"]
    assert "comp" not in rows and "cannot be told from 0" in " ".join(printed.split())


def test_train_from_a_file_that_names_its_data(calls: list, data: Path, tmp_path: Path):
    config = load_config("mosei", [f"data.path={data}"])
    config.save(tmp_path / "mine.yaml")
    assert run("train", "--config", tmp_path / "mine.yaml", "--out", tmp_path / "run") == 0
    assert calls[0][1][0] == config


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-2", [0, 1, 2]), ("0,3,5", [0, 3, 5]), ("7", [7]), ("1-2,9", [1, 2, 9])]
)
def test_train_seeds(calls: list, data: Path, tmp_path: Path, capsys, text: str, seeds: list[int]):
    out = tmp_path / "run"
    assert run("train", "--preset", "mosi", "--data", data, "--out", out, f"seeds={text}") == 0
    [(name, (_, folder, given), options)] = calls
    assert (name, folder, given, options) == ("train_seeds", out, seeds, {"resume": False})
    assert f"summary: {out / 'summary.json'}" in capsys.readouterr().out


def test_train_seeds_prints_mean_and_spread(calls: list, data: Path, tmp_path: Path, capsys):
    run("train", "--preset", "mosi", "--data", data, "--out", tmp_path / "run", "seeds=0-2")
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("seed 0", "0.7000", "seed 2", "0.9000", "0.8000 ± 0.1000"))


@pytest.mark.parametrize("text", ["", "a", "2-0", "0-", "0;1", "1,1", "-1", "0-1000", "5000000000", "0-99999999999"])
def test_bad_seeds(calls: list, data: Path, tmp_path: Path, capsys, text: str):
    words = ("train", "--preset", "mosi", "--data", data, "--out", tmp_path / "run", f"seeds={text}")
    assert "seeds" in fails(capsys, *words) and not calls
    assert "seed= beside it" in fails(capsys, *words[:-1], "seeds=0-1", "seed=3")


@pytest.mark.parametrize("mark", ["config.yaml", "metrics.json", "history.jsonl", "last.safetensors"])
def test_a_folder_that_holds_a_run_is_refused(calls: list, data: Path, tmp_path: Path, capsys, mark: str):
    for folder, extra in ((tmp_path / "one", ()), (tmp_path / "many/seed1", ("seeds=0-1",))):
        folder.mkdir(parents=True)
        (folder / mark).write_text("")
        out = folder.parent if extra else folder
        message = fails(capsys, "train", "--preset", "mosi", "--data", data, "--out", out, *extra)
        assert str(folder) in message and "another run" in message and "--resume" in message
    words = ("train", "--preset", "mosi", "--data", data, "--out")
    if mark != "config.yaml":  # which may be a user's own
        assert "drop seeds= and go on with --resume." in fails(capsys, *words, tmp_path / "one", "seeds=0-1")
        assert "runs of several seeds" in fails(capsys, *words, tmp_path / "many")
    assert not calls
    assert run(*words, tmp_path / "one", "--resume") == 0


def test_profile_prints_where_time_went(calls: list, data: Path, tmp_path: Path, capsys):
    (tmp_path / "run/profile").mkdir(parents=True)
    (tmp_path / "run/profile/shares.txt").write_text("stage2 text 0.5")
    assert run("train", "--preset", "mosi", "--data", data, "--out", tmp_path / "run", "--profile") == 0
    assert calls[-1][-1] == {"resume": False, "profile": True}
    assert "stage2 text 0.5" in capsys.readouterr().out
    out = tmp_path / "several"
    message = fails(capsys, "train", "--preset", "mosi", "--data", data, "--out", out, "--profile", "seeds=0-1")
    assert "--profile" in message and "several seeds" in message


def test_resume_uses_the_settings_of_the_run(calls: list, data: Path, tmp_path: Path):
    saved = load_config("mosi-paper", [f"data.path={data}", "seed=5"])
    saved.save(tmp_path / "run/config.yaml")
    assert run("train", "--resume", "--out", tmp_path / "run", "epochs=90") == 0
    [(_, (config, _), options)] = calls
    saved.epochs = 90
    assert config == saved and options == {"resume": True, "profile": False}


def test_train_refuses_before_it_begins(calls: list, data: Path, tmp_path: Path, capsys):
    out = tmp_path / "run"
    assert "--preset NAME or --config FILE" in fails(capsys, "train", "--data", data, "--out", out)
    assert "--preset NAME or --config FILE" in fails(capsys, "train", "--resume", "--data", data, "--out", out)
    assert "Add --data PATH" in fails(capsys, "train", "--preset", "mosi", "--out", out)
    assert "no such file" in fails(capsys, "train", "--preset", "mosi", "--data", tmp_path / "no", "--out", out)
    assert "--out" in fails(capsys, "train", "--preset", "mosi", "--data", data)
    assert "Did you mean mosi?" in fails(capsys, "train", "--preset", "mosy", "--data", data, "--out", out)
    assert "Did you mean train.lr?" in fails(capsys, "train", "--preset", "mosi", "--data", data, "--out", out, "lr=1")
    assert "'word'" in fails(capsys, "train", "--preset", "mosi", "--data", data, "--out", out, "word")
    assert "'--reusme'" in fails(capsys, "train", "--preset", "mosi", "--data", data, "--out", out, "--reusme")
    assert "not allowed with" in fails(capsys, "train", "--preset", "mosi", "--config", "x.yaml", "--out", out)
    assert "a file" in fails(capsys, "train", "--preset", "mosi", "--data", data, "--out", data)
    assert not calls and not out.exists()


# -- the other commands --


def test_evaluate(calls: list, data: Path, tmp_path: Path, capsys):
    assert run("evaluate", "--run", tmp_path, "--data", data) == 0
    assert "0.7500" in capsys.readouterr().out
    assert run("evaluate", "--run", tmp_path, "--data", data, "--split", "valid", "--batch-size", 7, "--json",
               "--device", "cuda:1") == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out) == METRICS["test"]
    assert calls == [
        ("evaluate", (tmp_path, data), {"split": None, "batch_size": None, "device": "auto"}),
        ("evaluate", (tmp_path, data), {"split": "valid", "batch_size": 7, "device": "cuda:1"}),
    ]
    assert "no such folder" in fails(capsys, "evaluate", "--run", tmp_path / "no", "--data", data)
    assert "invalid choice: 'dev'" in fails(capsys, "evaluate", "--run", tmp_path, "--data", data, "--split", "dev")
    assert "'epochs=3'" in fails(capsys, "evaluate", "--run", tmp_path, "--data", data, "epochs=3")


def test_predictions_to_standard_output(monkeypatch, calls, data, tmp_path, capsys):
    def predict(run: Path, data: Path, out: Path, **options: Any) -> None:
        out.write_text("id,label,prediction\nü,1,0.5\n", encoding="utf-8")

    monkeypatch.setattr(sys.modules["engine.trainer"], "predict", predict)
    assert run("predict", "--run", tmp_path, "--data", data, "--out", "-") == 0
    assert capsys.readouterr().out == "id,label,prediction\nü,1,0.5\n"


@pytest.mark.parametrize(
    ("words", "meant"),
    [(["--epochs", "3"], "epochs"), (["epochs", "3"], "epochs"), (["--batch-size=3"], "batch_size"),
     (["--train.lr", "1"], "train.lr"), (["--lr=1"], "train.lr"), (["--seeds", "0-2"], "seeds")],
)  # fmt: skip
def test_settings_written_as_options(capsys, words, meant):
    line = fails(capsys, "train", "--preset", "mosi", "--out", "x", *words)
    assert f"found the argument {words[0]!r}; " in line and line.rstrip().endswith(f"Write {meant}=VALUE.")


def test_an_option_whose_value_looks_like_an_option(capsys):
    assert "--option=VALUE" in fails(capsys, "train", "--preset", "mosi", "--out", "-x")


def test_options_pass_through_torchrun():
    """torchrun takes an option's beginning for the option, behind the name of the module, too."""
    from torch.distributed.run import parse_args

    subcommands = build_parser()._subparsers._group_actions[0].choices
    options = {
        (command, option)
        for command in ("train", "evaluate", "predict", "report")
        for action in subcommands[command]._actions
        for option in action.option_strings
        if option not in ("--run", "-h", "--help")
    }
    assert ("evaluate", "--run-folder") in options and ("train", "--resume") in options
    for command, option in sorted(options):
        passed = parse_args(["--nproc-per-node=1", "-m", "engine", command, option, "x"])
        assert passed.training_script_args == [command, option, "x"], option
    with pytest.raises(SystemExit):  # why --run has another name
        parse_args(["-m", "engine", "evaluate", "--run", "x"])


def test_a_current_folder_that_was_removed(tmp_path):
    """Without this check, libraries of torch end the process without a reason."""
    gone = tmp_path / "gone"
    code = (
        "import os, sys; os.chdir(sys.argv[1]); os.rmdir(sys.argv[1]); from engine.cli import main;"
        "sys.exit(main(['evaluate', '--run', '/tmp', '--data', '/tmp']))"
    )
    gone.mkdir()
    env = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", code, gone], capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert done.stderr.startswith("error: current folder: ") and done.stderr.count("\n") == 1


def test_a_terminal_without_utf8(tmp_path):
    """The frames of tables and a name in another script must not end a command that has done its work."""
    code = (
        "import sys; from engine.cli import main; from engine.cli import printing, runs\n"
        "from engine.cli.process import standing_streams\n"
        "with standing_streams(True):\n    printing.print_metrics({'mae': .5, 'ü…': 1}, 'té')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=PROJECT, check=False,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert done.returncode == 0 and done.stderr == b""
    assert b"t\\xe9" in done.stdout and b"mae" in done.stdout and b"0.5000" in done.stdout


def test_warnings_that_are_errors(tmp_path, monkeypatch, capsys):
    """PYTHONWARNINGS=error"""

    def warn(*_: Any) -> None:
        raise UserWarning("labels\nfrom 0")

    monkeypatch.setattr("engine.cli.training.chosen_config", warn)
    assert "warning: found labels from 0;" in (line := fails(capsys, "config", "--preset", "mosi"))
    assert "PYTHONWARNINGS" in line


def test_predict(calls: list, data: Path, tmp_path: Path):
    assert run("predict", "--run", tmp_path, "--data", data, "--out", tmp_path / "p.csv") == 0
    assert calls == [("predict", (tmp_path, data, tmp_path / "p.csv"), {"split": None, "device": "auto"})]


def test_convert(calls: list, data: Path, tmp_path: Path):
    assert run("convert", data, tmp_path / "store", "--text-encoder", "bert", "--length-rule", "all_zero") == 0
    assert calls == [("convert", (data, tmp_path / "store"), {"text_encoder": "bert", "length_rule": "all_zero"})]


def test_inspect(calls: list, data: Path, capsys):
    assert run("inspect", data) == 0
    assert calls == [("inspect_path", (data,), {})]
    assert capsys.readouterr().out == "format: a store [not markup]\n"


def test_import(calls: list, tmp_path: Path, capsys):
    assert run("import", "REF.pth.tar", "--command", "--dataset mosi_Dec", "--out", tmp_path / "run") == 0
    [(name, args, options)] = calls
    assert (name, args) == ("import_checkpoint", (Path("REF.pth.tar"), tmp_path / "run"))
    assert options == {"command": "--dataset mosi_Dec", "config": None, "text_encoder": None}
    assert capsys.readouterr().err == "note: the optimiser is left out\n"
    both = ("--command", "--dataset x", "--config", tmp_path / "mine.yaml")
    assert run("import", "REF.pth.tar", *both[2:], "--text-encoder", "bert", "--out", tmp_path / "run") == 0
    assert calls[1][2] == {"command": None, "config": str(tmp_path / "mine.yaml"), "text_encoder": "bert"}
    capsys.readouterr()
    assert run("import", "REF.pth.tar", "--out", tmp_path / "run") == 0
    assert calls[2][2] == {"command": None, "config": None, "text_encoder": None}
    capsys.readouterr()
    assert "not allowed with" in fails(capsys, "import", "REF.pth.tar", *both, "--out", tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("")
    assert "another run" in fails(capsys, "import", "REF.pth.tar", "--out", tmp_path / "run")


def test_import_command(calls: list, tmp_path: Path, capsys):
    assert run("import-command", "python Main.py --dataset mosi_Dec") == 0
    output = capsys.readouterr()
    assert output.err == "note: --radius has no effect\n"
    assert Config(**yaml.safe_load(output.out)) == load_config("mosi")
    assert run("import-command", "python Main.py", "--out", tmp_path / "mine.yaml") == 0
    assert Config.load_yaml(tmp_path / "mine.yaml") == load_config("mosi")


def test_report(calls: list, tmp_path: Path, capsys):
    assert run("report", "--run", tmp_path) == 0
    assert run("report", "--run-folder", tmp_path, "--out", tmp_path / "elsewhere.html") == 0
    assert calls == [
        ("write_report", (tmp_path, None), {}),
        ("write_report", (tmp_path, tmp_path / "elsewhere.html"), {}),
    ]
    printed = [f"report: {tmp_path / name}" for name in ("report.html", "elsewhere.html")]
    assert capsys.readouterr().out.splitlines() == printed


def test_demo_replaces_an_earlier_demo_and_nothing_else(calls: list, tmp_path: Path, capsys):
    assert run("demo", "--out", tmp_path / "demo", "epochs=2") == 0
    assert calls == [("run_demo", (tmp_path / "demo", ["epochs=2"]), {})]
    assert "Did you mean epochs?" in fails(capsys, "demo", "--out", tmp_path / "demo", "epohcs=2")

    load_config("demo").save(tmp_path / "demo/config.yaml")
    (tmp_path / "demo/tensorboard").mkdir()
    (tmp_path / "demo/tensorboard/events.out.tfevents.1.engine").touch()
    for name in (*FILES, *(mine := ["labels.csv", "more.yaml", "notes.txt", "results.json", "w.safetensors"])):
        (tmp_path / "demo" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "demo" / name).touch()
    load_config("demo").save(tmp_path / "demo/config.yaml")
    assert run("demo", "--out", tmp_path / "demo") == 0
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == mine

    load_config("mosi").save(tmp_path / "other/config.yaml")
    capsys.readouterr()
    assert "another run" in fails(capsys, "demo", "--out", tmp_path / "other")
    assert (tmp_path / "other/config.yaml").exists() and len(calls) == 2


def test_config(capsys):
    assert run("config", "--preset", "mosi", "mode=faithful", "batch_size=16") == 0
    printed = Config(**yaml.safe_load(capsys.readouterr().out))
    assert printed == load_config("mosi", ["mode=faithful", "batch_size=16"]).resolve()
    assert run("config", "--keys") == 0
    assert "train.schedule.milestones" in capsys.readouterr().out


# -- problems --


def test_our_errors_are_one_line_and_debug_shows_more(calls: list, tmp_path: Path, capsys, monkeypatch):
    def broken(path: Path) -> None:
        raise DataError("row 3", "text\nmissing", "text", "Add it.")

    monkeypatch.setattr(sys.modules["engine.loaders.inspect"], "inspect_path", broken)
    assert fails(capsys, "inspect", "x") == "error: row 3: found text missing; expected text. Add it.\n"
    with pytest.raises(DataError, match="row 3"):
        run("inspect", "x", "--debug")


def test_warnings_are_one_line(calls: list, capsys, monkeypatch):
    shown = type("Shown", (), {"render": lambda self: warnings.formatwarning("3 rows\nempty", UserWarning, "f.py", 1)})
    monkeypatch.setattr(sys.modules["engine.loaders.inspect"], "inspect_path", lambda path: shown())
    before = warnings.formatwarning
    run("inspect", "x")
    assert capsys.readouterr().out.strip() == "warning: 3 rows empty"
    assert warnings.formatwarning is before


def test_disk_full_and_interruption(calls: list, tmp_path: Path, capsys, monkeypatch):
    def raising(cause: BaseException):
        def write_report(run: Path, out: Path | None) -> None:
            raise cause

        monkeypatch.setattr(sys.modules["engine.report"], "write_report", write_report)

    raising(OSError(errno.ENOSPC, "No space left on device", "report.html"))
    assert "no space left" in fails(capsys, "report", "--run", tmp_path)
    raising(KeyboardInterrupt())
    assert run("report", "--run", tmp_path) == 130
    assert capsys.readouterr().err == "interrupted\n"
    raising(OSError(errno.ENAMETOOLONG, "File name too long", "n" * 300))
    assert f"{'n' * 300}: found File name too long; expected" in fails(capsys, "report", "--run", tmp_path)
    raising(MemoryError())
    assert "memory: found too little for this" in fails(capsys, "report", "--run", tmp_path)
    raising(FileNotFoundError(errno.ENOENT, "a fault of ours"))
    with pytest.raises(FileNotFoundError, match="a fault of ours"):
        run("report", "--run", tmp_path, "--debug")


# -- help --


def test_help_of_train_names_presets_and_keys(capsys):
    with pytest.raises(SystemExit) as stop:
        run("train", "--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for preset in presets():
        assert preset.name in text and preset.summary in text
    assert len(common_keys()) > 20 and all(f"  {key.name} (" in text for key in common_keys())
    assert "train.lr (0.001)" in text and "engine train --preset mosi --data" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys):
    with pytest.raises(SystemExit) as stop:
        run(command, "--help")
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: engine {command} ")
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    assert f"\n    {command}" in capsys.readouterr().out


def documented() -> list[str]:
    """Every `engine ...` line of the documentation's shell blocks and of the help texts."""
    pages = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
    blocks = [b for page in pages for b in re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.DOTALL)]
    lines = [line.strip() for text in (*blocks, EXAMPLES, train_epilog()) for line in text.splitlines()]
    return sorted({line for line in lines if line.startswith("engine ") and not line.startswith("engine --version")})


@pytest.mark.parametrize("line", documented())
def test_documented_commands_are_accepted(line: str):
    words = shlex.split(line.split("   ")[0], comments=True)[1:]
    arguments, rest = build_parser().parse_known_args(words)
    settings = split_settings(arguments, rest)
    if settings:
        config = getattr(arguments, "preset", None) or "mosi"
        _, settings = split_seeds(settings)
        searched = [word for word in settings if is_searched(word)] if arguments.command in ("sweep", "tune") else []
        loaded = load_config(config, [word for word in settings if word not in searched])
        read_space_words(searched, loaded) if arguments.command == "tune" else read_words(searched, loaded.task)


def test_the_documentation_shows_every_command():
    assert {line.split()[1] for line in documented()} >= set(COMMANDS) - {"convert", "report"}


def test_no_command_and_unknown_command(capsys):
    assert "COMMAND" in fails(capsys)
    assert "'tarin'" in fails(capsys, "tarin")


def test_python_m_engine():
    def command(word: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "engine", word], capture_output=True, text=True, cwd=PROJECT)

    assert command("--version").stdout == f"engine {__version__}\n"
    done = command("config")
    assert done.returncode == 2 and done.stderr.startswith("error: ")


def test_what_is_not_overwritten(tmp_path, capsys):
    """A store has the ending of a checkpoint."""
    folder = make_data(tmp_path / "data", "mosi", 6, "tuples")
    (tmp_path / "best.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    for taken in ("best.safetensors", "empty.safetensors"):
        (tmp_path / "empty.safetensors").touch()
        line = fails(capsys, "convert", folder, tmp_path / taken)
        assert f"{taken}: found a file that is no store; expected a new name, or a store to replace" in line
    assert (tmp_path / "best.safetensors").read_bytes() == b"\x02\0\0\0\0\0\0\0{}"
    for _ in range(2):
        assert run("convert", folder, tmp_path / "store") == 0


def test_wrong_words_of_data_commands(tmp_path, capsys):
    assert "modalities[0]: found txt" in fails(capsys, "convert", tmp_path, tmp_path / "x", "--modalities", "txt")
    line = fails(capsys, "make-data", tmp_path / "new", "--shape", "mosi", "--n", "9", "--seed", "-1")
    assert "--seed: found -1; expected an integer from 0" in line
    assert not (tmp_path / "new").exists()


def test_no_report_of_a_sweep_by_the_command_for_runs(tmp_path, capsys):
    (tmp_path / "plan.json").write_text("{}")
    assert "found a sweep or a tuning; expected a run" in fails(capsys, "report", "--run", tmp_path)


def test_data_that_is_named_twice(capsys, tmp_path):
    for command in ("train", "sweep"):
        said = fails(capsys, command, "--preset", "mosi", "--data", "a", "--out", tmp_path / "run", "data.path=b")
        assert "--data: found data.path= beside it; expected one of the two. Drop one." in said


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", ""),
        ("convert", " ", "out"),
        ("train", "--preset", "mosi", "--data", "a", "--out", ""),
        ("predict", "--run", "r", "--data", "", "--out", "p.csv"),
        ("report", "--run", ""),
        ("demo", "--out", ""),
    ],
)
def test_an_empty_path_is_not_the_current_folder(capsys, words):
    assert "an empty path; is a variable of the shell not set?" in fails(capsys, *words)
