"""Versions and machine of a run, as `metrics.json` records them."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from pathlib import Path

from engine.limits import cores


def environment(device: str = "cpu") -> dict[str, str]:
    """Versions and kind of machine, for `metrics.json` under `environment`. Names no user, host or path.

    Args:
        device: the torch device the run used; for CUDA its name is recorded.
    """
    versions = {"python": platform.python_version()}
    for name in ("engine", "torch", "transformers", "numpy", "safetensors", "triton"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    versions["system"] = f"{platform.system()} {platform.machine()}"
    versions["processor"] = f"{_processor()}, {cores()} cores"
    if device.startswith("cuda"):
        import torch

        versions["device"] = torch.cuda.get_device_name(device)
    else:
        versions["device"] = device
    return versions


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1].strip() if model else platform.machine()
