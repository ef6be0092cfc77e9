"""What every golden test needs: the recordings by content of the index, and the stated tolerances.

The folder is `$ENGINE_GOLDEN`, or `../shared/golden` beside the project. Cases are drawn from its `index.json` by the
beginning of their name, so another folder of the same kind, with other sizes and numbers, is tested just as well.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

PROJECT = Path(__file__).resolve().parents[2]
ABSENT = "no golden recordings: set ENGINE_GOLDEN to their folder"


def golden_dir() -> Path:
    """The folder of recordings. A set but wrong ENGINE_GOLDEN is an error, never a silent skip."""
    named = os.environ.get("ENGINE_GOLDEN")
    folder = Path(named) if named else PROJECT.parent / "shared" / "golden"
    if named and not folder.is_absolute():
        folder = Path.cwd() / folder
    if named and not (folder / "index.json").is_file():
        raise FileNotFoundError(f"ENGINE_GOLDEN={named}: no index.json there")
    return folder


@cache
def _index() -> dict[str, dict]:
    path = golden_dir() / "index.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def entries(prefix: str) -> list[tuple[str, dict]]:
    """(name, info) of every recording whose name starts with `prefix`, in index order; [] without a folder."""
    return [(name, info) for name, info in _index().items() if name.startswith(prefix)]


def cases(prefix: str):
    """Parametrise a test with `name, info` over `entries(prefix)`; one skipped case where there are none."""
    found = [pytest.param(name, info, id=name) for name, info in entries(prefix)]
    reason = f"no recording named {prefix}* in {golden_dir()}" if _index() else ABSENT
    return pytest.mark.parametrize(
        "name, info", found or [pytest.param("", {}, id=f"{prefix}absent", marks=pytest.mark.skip(reason=reason))]
    )


def load(name: str) -> dict[str, Tensor]:
    """The tensors of one recording; skips the test if there is no folder of recordings."""
    if not _index():
        pytest.skip(ABSENT)
    return load_file(golden_dir() / f"{name}.safetensors")


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with `prefix`, under the rest of their name."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def assert_values(
    actual: Tensor, expected: Tensor, what: str = "values", rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    """Elementwise |actual - expected| <= atol + rtol |expected|, same shape."""
    torch.testing.assert_close(
        actual.detach(), expected, rtol=rtol, atol=atol, check_dtype=False, msg=lambda text: f"{what}: {text}"
    )


def assert_grad(actual: Tensor | None, expected: Tensor, what: str = "grad") -> None:
    """Norm of the difference <= 1e-3 of the recorded norm + 1e-4, same shape. None is a gradient of zeros."""
    actual = torch.zeros_like(expected) if actual is None else actual.detach()
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, recorded {tuple(expected.shape)}"
    difference, size = (actual - expected).norm().item(), expected.norm().item()
    # written so that a NaN anywhere fails
    assert difference <= 1e-3 * size + 1e-4, f"{what}: |difference| {difference:.3e}, |recorded| {size:.3e}"


def recorded_parameters(info: dict) -> dict[str, Tensor]:
    """The rule of the recordings' README, under the reference's names."""
    values = {}
    for k, name in enumerate(info["param_order"]):
        r = np.random.RandomState(info["param_seed"] + k).randn(*info["param_shapes"][name]).astype(np.float32)
        norm = ("ln_" in name or "LayerNorm" in name) and name.endswith("weight")
        values[name] = torch.from_numpy(np.float32(1) + np.float32(0.05) * r if norm else np.float32(0.05) * r)
    return values
