"""What a folder's sweep or tuning is, so that only the same one goes on in it, and when it was started."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config import Config
from engine.errors import ConfigError, DataError, OutputError
from engine.files import append_text, parse_json, read_text, user_path, write_json
from engine.run_folder import LARGEST, MARKS, PLAN, STARTS
from engine.sweeps.settings import differences

FREE = ("preset", "device", "output")
FREE_DATA = ("path", "loader", "workers")
"""What may be another one when a sweep goes on: results do not depend on it. Runs compare the data itself."""


def comparable(config: Config) -> dict[str, Any]:
    """The settings that have to be the same when a sweep goes on."""
    settings = {key: value for key, value in config.model_dump(mode="json").items() if key not in FREE}
    return settings | {"data": {k: v for k, v in settings["data"].items() if k not in FREE_DATA}}


def saved_plan(out: Path) -> dict[str, Any] | None:
    """The plan of the sweep or tuning in a folder. None if there is none.

    Raises:
        OutputError: the folder is a file, or holds a single run. DataError: the plan is damaged.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(str(out), "a file", "a folder", "Choose another --out.")
    path = out / PLAN
    if not path.exists():
        if any((out / mark).exists() for mark in MARKS):
            raise OutputError(str(out), "a run", "an empty or new folder", "Choose another --out.")
        return None
    try:
        plan = parse_json(read_text(path, LARGEST))
        if not isinstance(plan, dict) or not isinstance(plan.get("kind"), str):
            raise ValueError("no plan")
    except (OSError, ValueError) as cause:
        raise DataError(
            str(path), f"{cause}", "the plan that engine wrote", "Put the original back, or choose another --out."
        ) from None
    return plan


def require_same(where: str, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse another plan in the same place, and say what differs.

    Raises:
        ConfigError: they differ.
    """
    # Through JSON, so that tuples are lists on both sides.
    if differing := differences(saved, json.loads(json.dumps(given))):
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ConfigError(
            where,
            f"another {saved.get('kind', 'plan')} ({'; '.join(differing[:5])}{more})",
            "the same settings, space and seeds",
            "Choose another --out, or give the first command again.",
        )


def checked_base(config: Config, threads: int, saved: Mapping[str, Any] | None) -> Config:
    """The settings of all runs: quiet, and with the number of threads that the first start chose.

    Raises:
        ConfigError: there is no such data.
    """
    path = config.data.path
    if not path:
        raise ConfigError("--data", "no data", "the path of a feature file, a folder or a store", "Add --data PATH.")
    if not user_path(path).exists():
        raise ConfigError(f"--data {path}", "no such file or folder", "existing data", "Check the path.")
    base = config.model_copy(deep=True)
    base.data.path = str(user_path(path).resolve())
    base.output.progress = False
    if base.threads is None:
        before = saved.get("settings", {}).get("threads") if saved else None
        base.threads = before if isinstance(before, int) else threads
    return base


def open_data_once(config: Config) -> None:
    """Open the data: a problem of it is told before the first run, and the runs find the store that is made of it."""
    from engine.task import find_task
    from engine.training.parts import choose_device

    choose_device(config.device)
    find_task(config.task).open_data(config.resolve(), config.data.path)


def begin(out: Path, plan: Mapping[str, Any]) -> None:
    """Write the plan, and note the start."""
    if not (out / PLAN).exists():
        write_json(out / PLAN, dict(plan))
    path = out / STARTS
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    append_text(path, json.dumps({"started": now}) + "\n", at=path.stat().st_size if path.exists() else 0)


def starts(out: Path) -> list[str]:
    """When the sweep was started, each time."""
    try:
        lines = read_text(out / STARTS, LARGEST).splitlines()
        return [str(parse_json(line)["started"]) for line in lines]
    except (OSError, ValueError, TypeError, KeyError):
        return []
