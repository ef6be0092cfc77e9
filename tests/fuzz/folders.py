"""What is fuzzed besides the readers of data: settings, run folders, and what a report is made of.

An input that begins with an odd byte is the bytes of one file. Any other is a list of edits of well-formed content
(`edited`), which gets behind checksums and parsers.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from engine import checkpoint, trainer
from engine.config import Config, load_config
from engine.loaders.normalize import ColumnNormalizer, Normalizer
from engine.report import read_run, render
from engine.run_folder import CHECKSUMS, Checksums
from engine.task import Inputs, find_task
from engine.training.parts import build
from engine.training.resuming import newest_checkpoint
from tests.fuzz.targets import Finding, Target, edited, folder
from tests.hostile.files import SCRIPT
from tests.hostile.runs import resummed

SETTINGS = {
    "preset": "", "epochs": 1, "batch_size": 4, "seed": 3, "device": "cpu", "text_encoder": "features",
    "data": {"modalities": ["audio", "vision"], "time_len": 4, "label_scale": "none"},
    "model": {"d_common": 4, "cubemlp": {"d_hiddens": [[2, 2, 4]], "d_outs": [[2, 2, 4]], "res_project": [True]}},
    "objective": {"hidden": 4, "embed": 4}, "train": {"lr": 0.01, "schedule": {"milestones": [1, 2]}},
}  # fmt: skip


def plain(value: Any) -> Any:
    """What a checkpoint or JSON can hold of an edited value."""
    if isinstance(value, dict):
        return {k if isinstance(k, (str, int)) else str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value)) if value.dtype.kind in "iufbc" else plain(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).decode("latin-1")
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def as_json(value: Any) -> str:
    def other(value: Any) -> Any:
        return value.tolist() if isinstance(value, torch.Tensor) and not value.is_complex() else str(value)

    return json.dumps(plain(value), default=other)


def _edits() -> list[bytes]:
    places = [(k, i, j) for k in range(8) for i in range(6) for j in (1, 5)]
    return [bytes([2 * k, i, 13 * i % 256, 8 * j, 9, i, 7 * i % 256, 4]) for k, i, j in places]


def config() -> Target:
    """A settings file, or one `key=value`."""
    path = folder() / "fuzzed.yaml"
    texts = [
        "preset: mosi\nepochs: 3\ntrain: {lr: 0.01, schedule: {milestones: 2-5}}\n",
        "mode: faithful\ndata:\n  time_len: 30\n  clip: none\n  modalities: text,audio,vision\nobjective: {c2: 0.1}\n",
        "a: &a [1, 2]\nb: *a\n<<: {seed: 1}\n",
        yaml.safe_dump(SETTINGS),
    ]

    def run(data: bytes) -> None:
        if data[:1] == b"\x00":
            settings = load_config("demo", [data[1:].decode("utf-8", "replace")])
        elif data[:1] == b"\x02":
            path.write_text(yaml.safe_dump(json.loads(as_json(edited(SETTINGS, iter(data[1:]))))), encoding="utf-8")
            settings = load_config(path)
        else:
            path.write_bytes(data)
            settings = load_config(path)
        settings.resolve()
        if len(data) % 16 == 0:  # a whole file takes longer than all else
            path.write_text(settings.to_yaml(), encoding="utf-8")
            if load_config(path) != settings:
                raise Finding("settings that are not those that were saved")

    overrides = ["train.lr=5e-4", "data.clip=none", "model.cubemlp.d_outs=2-3-4=2-3-4", "objective.c1=[1, 2]"]
    seeds = [t.encode() for t in texts] + [b"\x00" + o.encode() for o in overrides]
    return Target("config", lambda: seeds + [b"\x02" + edit[1:] for edit in _edits()], run)


def _run_folder() -> Path:
    """A run of a model of a few parameters, never trained."""
    place = folder() / "run"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    settings = Config(**SETTINGS).resolve()
    (place / "config.yaml").write_text(yaml.safe_dump(SETTINGS), encoding="utf-8")
    columns = ColumnNormalizer("zscore", False, 5.0, *(np.ones(3) for _ in range(3)))
    Normalizer(columns, columns).save(place / "normalizer.safetensors")
    model, objective = build(find_task("mimrl"), settings, Inputs(3, 3), None)
    meta = {"epoch": 0, "audio_dim": 3, "vision_dim": 3, "text_encoder": None, "data": {"train": "x"},
            "settings": settings.model_dump(mode="json"), "history": [0, 0]}  # fmt: skip
    state = {"model": model.state_dict(), "objective": objective.state_dict()}
    for name in ("best", "last"):
        checkpoint.save(place / f"{name}.safetensors", state, meta)
    with Checksums(place).writing("config.yaml", "normalizer.safetensors"):
        pass
    return place


def run_folder() -> Target:
    """What `engine evaluate` and `engine train --resume` read of a run folder before its data."""
    place = _run_folder()
    whole = {path.name: path.read_bytes() for path in place.iterdir()}
    names = sorted(whole)
    state, meta = checkpoint.load(place / "best.safetensors")
    contents: dict[str, tuple[Any, Callable[[Any], None]]] = {
        "config.yaml": (SETTINGS, lambda c: _written(place / "config.yaml", yaml.safe_dump(json.loads(as_json(c))))),
        "meta": ([meta], lambda c: checkpoint.save(place / "best.safetensors", state, json.loads(as_json(c[0])))),
        "settings": ([meta["settings"]], lambda c: checkpoint.save(
            place / "best.safetensors", state, meta | {"settings": json.loads(as_json(c[0]))})),
        "state": ([state], lambda c: checkpoint.save(place / "best.safetensors", plain(c[0]), meta)),
        "last": ([state, meta], lambda c: checkpoint.save(
            place / "last.safetensors", plain(c[0]), json.loads(as_json(c[-1])))),
        "sums": (json.loads(whole[CHECKSUMS]), lambda c: _written(place / CHECKSUMS, as_json(c))),
    }  # fmt: skip
    kinds, changed = list(contents), []

    def seeds() -> list[bytes]:
        return [bytes([2 * i + 1]) + whole[name] for i, name in enumerate(names)] + _edits()

    def run(data: bytes) -> None:
        for name in changed:
            (place / name).write_bytes(whole[name])
        first = data[0] if data else 0
        if first % 2:
            changed[:] = [names[first // 2 % len(names)], CHECKSUMS]
            (place / changed[0]).write_bytes(data[1:])
        else:
            content, write = contents[kinds[first // 2 % len(kinds)]]
            changed[:] = names
            try:
                write(edited(content, iter(data[1:])))
            except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):  # nothing that could be saved
                return
        if first < 192 and (place / CHECKSUMS).read_bytes() == whole[CHECKSUMS]:
            resummed(place)
        loaded = trainer.load_run(place)
        if not isinstance(loaded.meta["epoch"], (int, type(None))):
            raise Finding("an epoch that is no number")
        newest_checkpoint(place, loaded.config, {})

    return Target("run", seeds, run)


def _written(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def report() -> Target:
    """What `engine report` reads."""
    place = folder() / "report"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    warnings.simplefilter("ignore", UserWarning)  # that the folder has no checksums
    split = {"loss": 0.5, "task": 0.4, "mae": 1.0, "corr": 0.1, "information": {"I(F;T)": 0.1, SCRIPT: 1},
             "estimators": {"F_T": 0.2}}  # fmt: skip
    history = [{"epoch": i, "seconds": 0.1, "train": split, "valid": split, "test": split} for i in range(2)]
    test = {"mae": 1.0, "corr": 0.1, "acc7": 0.5}
    texts: dict[str, Any] = {
        "config.yaml": {"preset": SCRIPT, "mode": "fast", "data": {"dataset": "mosi", "modalities": ["text", "audio"]},
                        "model": {"task": "regression"}, "train": {"loss": "MAE"}, "batch_size": 4},
        "metrics.json": {"best_epoch": 1, "valid": test, "test": test, "oracle_test": test | {"epoch": 0},
                         "environment": {"python": SCRIPT}, "wall_s": 1.0},
        "history.jsonl": history,
        "truth.json": {"latents": [{"name": SCRIPT, "true": 1.0, "ceiling": 2.0, "estimates": {"nwj": 0.5}}]},
    }  # fmt: skip
    predictions = f'id,label,prediction\n"{SCRIPT}",1,2\nb,0.5,-1\nc,,0\n'
    kinds = list(texts)

    def as_text(name: str, content: Any) -> str:
        if name == "config.yaml":
            return yaml.safe_dump(json.loads(as_json(content)))
        if name == "history.jsonl" and isinstance(content, list):
            return "".join(as_json(record) + "\n" for record in content)
        return as_json(content)

    whole = {name: as_text(name, content) for name, content in texts.items()} | {"predictions_test.csv": predictions}
    names = sorted(whole)

    def seeds() -> list[bytes]:
        return [bytes([2 * i + 1]) + whole[name].encode() for i, name in enumerate(names)] + _edits()

    def run(data: bytes) -> None:
        for name, text in whole.items():
            (place / name).write_text(text, encoding="utf-8")
        first = data[0] if data else 0
        if first % 2:
            (place / names[first // 2 % len(names)]).write_bytes(data[1:])
        else:
            name = kinds[first // 2 % len(kinds)]
            _written(place / name, as_text(name, edited(texts[name], iter(data[1:]))))
        page = render(read_run(place))
        if "<script>alert" in page or re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", page):
            raise Finding("a script or a control character in the page")

    return Target("report", seeds, run)


TARGETS = {"config": config, "run": run_folder, "report": report}
