"""Every code block of the README and the pages runs, or is checked against what exists, or says why not."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from engine.cli import main
from engine.cli.parser import build_parser
from engine.config import load_config
from engine.kernels import use_backend
from tests.docs import blocks, scopes
from tests.test_cli import documented

MAKEFILE = (blocks.PROJECT / "Makefile").read_text(encoding="utf-8")
RUN = sorted({block.page for block in blocks.every() if block.kind == "run"})
ALONE = {"data.md"}  # its example registers a reader, which would stay for the tests that follow


def run_page(page: str) -> dict:
    """Run the page's blocks one after another in the current folder, and return the names that they defined."""
    scope = scopes.of_page(page, Path.cwd())
    with use_backend("auto"):  # a page may choose another one for the process
        for block in blocks.every():
            if block.page == page and block.kind == "run":
                try:
                    _run_python(block, scope) if block.language == "python" else _run_shell(block)
                except Exception as error:
                    raise AssertionError(f"the block at {block.place} failed: {error!r}") from error
    return scope


def _run_python(block: blocks.Block, scope: dict) -> None:
    lines = "\n" * block.line  # tracebacks then name the line of the page
    exec(compile(lines + block.code, block.page, "exec"), scope)


def _run_shell(block: blocks.Block) -> None:
    for command in blocks.commands(block):
        program, *words = shlex.split(command)
        assert program == "engine", f"{command}: only engine's own commands are run here"
        if words[0] == "train" and not any(word.startswith("epochs=") for word in words):
            words.append("epochs=1")  # what is tested is the command, not the training
        assert main(words) == 0, command


@pytest.mark.parametrize("page", [page for page in RUN if page not in ALONE])
def test_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    CHECKS.get(page, lambda scope: None)(run_page(page))


@pytest.mark.parametrize("page", sorted(ALONE))
def test_blocks_run_in_a_process_of_their_own(page: str, tmp_path: Path):
    code = f"from tests.docs.test_blocks import CHECKS, run_page; CHECKS[{page!r}](run_page({page!r}))"
    path = f"import sys; sys.path.insert(0, {str(blocks.PROJECT)!r}); "
    done = subprocess.run([sys.executable, "-c", path + code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- what a page's blocks must have done --


def _ranks(scope: dict) -> None:
    assert scope["total"] == 3.0


def _data(scope: dict) -> None:
    """A batch has seven samples, and the reader of the page reads JSON lines."""
    import json

    from engine.config import DataConfig
    from engine.loaders import open_dataset
    from tests.loaders import writers
    from tests.loaders.test_text import small_tokenizer

    assert len(scope["batch"]) == 7
    data, path = writers.samples(), Path("data.jsonl")
    with path.open("w") as file:
        for split, rows in data.items():
            for s in rows:
                row = {"split": split, "id": s.id, "text": s.text, "label": s.label}
                print(json.dumps({**row, "audio": s.audio.tolist(), "vision": s.vision.tolist()}), file=file)
    opened = open_dataset(path, DataConfig(), str(small_tokenizer(Path("encoder"))))
    assert opened.report.format == "lines"
    assert opened.splits["test"].ids == [s.id for s in data["test"]]


def _formats(scope: dict) -> None:
    from engine.config import DataConfig
    from engine.loaders import open_dataset
    from tests.loaders.test_text import small_tokenizer

    opened = open_dataset("mydata", DataConfig(), str(small_tokenizer(Path("encoder"))))
    assert opened.report.format == "manifest"
    assert (len(opened.splits["train"]), opened.audio_dim, opened.vision_dim) == (8, 5, 20)


def _loaders(scope: dict) -> None:
    assert len(scope["first"]) == len(scope["rest"]) == 2


def _kernels(scope: dict) -> None:
    assert scope["q"].grad.isfinite().all()


def _kernels_inside(scope: dict) -> None:
    assert scope["y"].tolist() == [2.0, 2.0, 2.0]


def _readme(scope: dict) -> None:
    assert Path("runs/mosi/report.html").stat().st_size > 10_000
    assert len(Path("predictions.csv").read_text().splitlines()) > 1
    assert set(scope["result"].information) == {"I(A;B)"}
    low, high = scope["estimate"].interval
    assert low <= scope["estimate"].value <= high


def _other_loops(scope: dict) -> None:
    import torch

    assert set(scope["result"].information) == {"I(A;B)"}
    (saved,) = Path("bert").glob("checkpoint-*/estimators.pt")
    for path in (saved, "step.pt", "accelerated.pt"):
        assert torch.load(path, weights_only=True)
    assert scope["module"].trainer.global_step == 2 * 4 + 7  # the first batch finds no recent features for stage 1


def _sweeps(scope: dict) -> None:
    assert len(scope["result"].cells) == 2 and len(scope["found"].ended) == 3
    named = json.loads(Path("runs/named/sweep.json").read_text())
    assert {row["name"].partition(",")[0] for row in named["settings"]} == {"plain", "terms"}


CHECKS = {
    "README.md": _readme,
    "data.md": _data,
    "formats.md": _formats,
    "kernels.md": _kernels,
    "kernels_inside.md": _kernels_inside,
    "loaders.md": _loaders,
    "ranks.md": _ranks,
    "other_loops.md": _other_loops,
    "sweeps.md": _sweeps,
}


# -- blocks that are not run --


def test_every_block_is_counted():
    """What is not run is a choice: a new block has to be run, parsed or counted here."""
    counts = Counter(block.kind for block in blocks.every())
    assert counts["not run"] == 1, [block.place for block in blocks.every() if block.kind == "not run"]
    assert counts["run"] >= 20 and counts["parsed"] >= 20
    languages = {block.language for block in blocks.every()}
    assert languages <= {"python", "bash", "yaml", ""}, languages
    fences = sum(page.read_text(encoding="utf-8").count("\n```") for page in blocks.PAGES)
    assert fences == 2 * len(blocks.every())


PARSED = [b for b in blocks.every() if b.kind == "parsed" and b.language == "bash"]
SETTINGS = [b for b in blocks.every() if b.kind == "parsed" and b.language == "yaml"]


@pytest.mark.parametrize("block", SETTINGS, ids=[block.place for block in SETTINGS])
def test_settings_load(block: blocks.Block, tmp_path: Path):
    (tmp_path / "settings.yaml").write_text(block.code, encoding="utf-8")
    load_config(tmp_path / "settings.yaml")


@pytest.mark.parametrize("block", PARSED, ids=[block.place for block in PARSED])
def test_commands_exist(block: blocks.Block):
    for command in blocks.commands(block):
        _check(command, block)


def _check(command: str, block: blocks.Block) -> None:
    """The command's program, module or target exists, and so does every option."""
    if command.startswith("engine "):
        known = {line.split("   ")[0] for line in documented()}  # tests/test_cli.py gives these to the parser
        assert any(shlex.split(line, comments=True) == shlex.split(command) for line in known), command
        return
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    program = words[0].rpartition("/")[2]
    if program == "make":
        assert all(re.search(rf"^{word}:", MAKEFILE, re.MULTILINE) for word in words[1:] if "=" not in word), command
    elif program == "python" and words[1] == "-m" and words[2].split(".")[0] in ("bench", "tests", "engine"):
        _check_module(words[2], words[3:], command)
    elif program == "python" and words[1].endswith(".py"):
        assert (blocks.PROJECT / words[1]).is_file(), command
    elif program == "pytest":
        paths = [word for word in words[1:] if word.startswith("tests")]
        assert paths and all((blocks.PROJECT / path).exists() for path in paths), command
    elif program == "torchrun":
        place = words.index("-m")
        assert words[place + 1] == "engine", command
        _, rest = build_parser().parse_known_args(words[place + 2 :])
        assert all("=" in word for word in rest), command
        options = {o for action in get_args_parser()._actions for o in action.option_strings}
        assert {word for word in words[1:place] if word.startswith("--")} <= options, command
    elif program == "sbatch":
        assert (blocks.PROJECT / words[1]).is_file(), command
    elif program == "pip":
        extras = re.findall(r"\[([\w,]+)\]", command)
        for extra in (part for group in extras for part in group.split(",")):
            assert re.search(rf"^{extra} = \[", (blocks.PROJECT / "pyproject.toml").read_text(), re.MULTILINE), command
        for path in re.findall(r"-r (\S+)", command):
            assert (blocks.PROJECT / path).is_file(), command
    else:
        assert program in ("git", "cd", "pre-commit") or command.startswith("python -m venv "), (
            f"{block.place}: nothing here knows {command!r}"
        )


def _check_module(module: str, words: list[str], command: str) -> None:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, command
    path = Path(spec.origin)
    files = path.parent.glob("*.py") if path.name == "__init__.py" else [path]
    source = "\n".join(file.read_text(encoding="utf-8") for file in files)
    for word in words:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in source, f"{command}: {word}"
