"""Which kind of loader gives the batches: where frames lie, and who gathers them."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any, get_args

import torch

from engine import limits
from engine.errors import ConfigError
from engine.loaders.loader import Loader
from engine.vocabulary import Loader as Kind

SHARE = 0.5  # of the free memory that `auto` gives to resident frames


def has_dali() -> bool:
    """Whether NVIDIA DALI is installed. Does not import it."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def free_memory(device: torch.device) -> int | None:
    """Bytes that are still free on a device; None if nothing tells.

    For a GPU it is what CUDA says; else what the system calls available, within the limits of a container or a batch
    job.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return limits.free_memory()


def choose(kind: Kind, size: int, device: torch.device) -> tuple[str, str]:
    """The kind of loader for frames of `size` bytes, and why.

    Raises:
        ConfigError: there is no such kind, or it is dali, which is not installed.

    >>> choose("resident", 0, torch.device("cpu"))
    ('resident', 'as data.loader says')
    """
    if kind not in get_args(Kind):
        raise ConfigError("kind", f"{kind!r}"[:60], f"one of {', '.join(get_args(Kind))}", "Choose one of these.")
    if kind == "dali" and not has_dali():
        raise ConfigError(
            "data.loader", "dali, which is not installed", "auto, resident or torch", "pip install 'engine[dali]'."
        )
    if kind != "auto":
        return kind, "as data.loader says"
    free = free_memory(device)
    frames = f"{size / 1e6:.0f} MB of frames"
    if free is None or size <= SHARE * free:
        room = "" if free is None else f" fit into the {free / 1e6:.0f} MB free on {device.type}"
        return "resident", frames + room
    why = f"{frames} do not fit into {SHARE:.0%} of the {free / 1e6:.0f} MB free on {device.type}"
    if device.type == "cpu":
        return "torch", f"{why}, and without a GPU it is faster than dali"
    if sys.platform == "linux" and has_dali():
        return "dali", why
    return "torch", f"{why}, and DALI is not installed"


def build(kind: str, *args: Any, workers: int | None = None, **options: Any) -> Loader:
    """A loader of this kind. `args` and `options` go to its constructor."""
    if kind == "resident":
        from engine.loaders.resident import ResidentLoader

        return ResidentLoader(*args, **options)
    if kind == "dali":
        from engine.loaders.dali import DaliLoader

        return DaliLoader(*args, workers=workers, **options)
    from engine.loaders.torch import TorchLoader

    return TorchLoader(*args, workers=workers, **options)
