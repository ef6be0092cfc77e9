"""Every C++ kernel compiles and has its functions: operations would run without it, silently, only slower."""

import importlib
import inspect
from pathlib import Path

import pytest
import torch

from engine import kernels
from tests.kernels.compiled import needs_compiler

SOURCES = sorted(Path(kernels.__file__).parent.glob("*/*.cpp"))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_kernel_is_there(source, dtype):
    library = importlib.import_module(f"engine.kernels.{source.parent.name}.cpu").library
    assert (library(dtype) if inspect.signature(library).parameters else library()) is not None
