"""37 hostile inputs of `engine report`: history, metrics, settings, predictions, truth and features."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from tests.hostile import files
from tests.hostile.files import ESCAPE, SCRIPT
from tests.hostile.runner import Case
from tests.hostile.runs import Change, copied, file

HOSTILE = SCRIPT + ESCAPE


def lines(change: Callable[[dict], Any]) -> Change:
    """Every record of history.jsonl changed."""

    def edit(path: Path) -> None:
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for record in records:
            change(record)
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")

    return file("history.jsonl", edit)


def values(name: str, change: Callable[[Any], Any]) -> Change:
    """A JSON file changed."""

    def edit(path: Path) -> None:
        content = json.loads(path.read_text("utf-8")) if path.exists() else {}
        path.write_text(json.dumps(change(content) or content), encoding="utf-8")

    return file(name, edit)


def config(change: Callable[[dict], Any]) -> Change:
    def edit(path: Path) -> None:
        content = yaml.safe_load(path.read_text("utf-8"))
        change(content)
        path.write_text(yaml.safe_dump(content), encoding="utf-8")

    return file("config.yaml", edit)


def rows(*cells: str) -> Change:
    return file("predictions_test.csv", files.text("id,label,prediction\n" + "\n".join(cells) + "\n"))


def features(**tensors: np.ndarray) -> Change:
    return file("features_test.safetensors", lambda path: save_file(tensors, path, {"ids": json.dumps([HOSTILE] * 9)}))


def classification(folder: Path) -> None:
    config(lambda c: c["model"].update(task="classification"))(folder)
    rows("a,1e30,0", "b,0,1")(folder)


LARGEST = "9" * 5000
CHANGES: dict[str, Change] = {
    "history.jsonl a pipe": file("history.jsonl", files.fifo),
    "history.jsonl a folder": file("history.jsonl", files.folder),
    "history.jsonl nested without end": file("history.jsonl", files.deep_json),
    "history.jsonl of 100,000 digits": file("history.jsonl", files.huge_number),
    "an epoch of 400 digits": lines(lambda r: r.update(epoch=10**400)),
    "losses that are texts": lines(lambda r: r["train"].update(loss=HOSTILE, task=[1])),
    "losses beyond floats": lines(lambda r: r["train"].update(loss=10**400)),
    "a term named by a script": lines(lambda r: r["train"].update(information={HOSTILE: 1.0})),
    "20,000 terms": lines(lambda r: r["train"].update(information={f"t{i}": 1.0 for i in range(20_000)})),
    "information that is a list": lines(lambda r: r["train"].update(information=[1], estimators="x")),
    "splits that are texts": lines(lambda r: r.update(train="x", valid=5, test=None)),
    "seconds that are texts": lines(lambda r: r.update(seconds="x", wall_seconds=[])),
    "history.jsonl of 20,000 epochs": file("history.jsonl", files.text(
        "".join(json.dumps({"epoch": i, "train": {"loss": 1 / (1 + i)}}) + "\n" for i in range(20_000)))),
    "metrics.json a device": file("metrics.json", files.device),
    "metrics.json a list": file("metrics.json", files.text("[]")),
    "metrics.json nested without end": file("metrics.json", files.deep_json),
    "metrics that are texts": values("metrics.json", lambda m: m.update(test={"mae": HOSTILE, "corr": None}, valid=3)),
    "an environment of scripts": values("metrics.json", lambda m: m.update(environment={HOSTILE: HOSTILE})),
    "a class of 5,000 digits": values("metrics.json", lambda m: m.update(test={f"recall_{LARGEST}": 1, "acc": 1})),
    "a best epoch of 400 digits": values("metrics.json", lambda m: m.update(best_epoch=10**400)),
    "config.yaml a pipe": file("config.yaml", files.fifo),
    "config.yaml nested without end": file("config.yaml", files.text("a: " + "[" * 50_000)),
    "a loss named by a script": config(lambda c: c["train"].update(loss=HOSTILE)),
    "a preset named by a script": config(lambda c: c.update(preset=HOSTILE, mode=HOSTILE, seed=HOSTILE)),
    "modalities that are numbers": config(lambda c: c["data"].update(modalities=5)),
    "modalities that are lists": config(lambda c: c["data"].update(modalities=[["text"], {"a": 1}])),
    "predictions a pipe": file("predictions_test.csv", files.fifo),
    "predictions with ids of scripts": rows(f'"{HOSTILE}",1,2', '"=cmd|x",2,3'),
    "predictions beyond floats": rows("a,1e300,-1e300", "b,nan,inf"),
    "predictions of another form": rows("a,1", "b,2,3,4"),
    "a class of 1e30": classification,
    "truth.json of scripts": values("truth.json", lambda t: {"latents": [
        {"name": HOSTILE, "true": 1.0, "estimates": {HOSTILE: 1.0, "x": "y"}, "ceiling": HOSTILE}]}),
    "truth.json without latents": values("truth.json", lambda t: {"latents": 5}),
    "truth.json nested without end": file("truth.json", files.deep_json),
    "features of 3,000 by 3,000": features(F=np.ones((3000, 3000), np.float16)),
    "features named by scripts": features(**{HOSTILE: np.ones((5, 2), np.float32)}),
    "features of complex numbers and no rows": features(F=np.ones((0, 3), np.float32), T=np.ones((4, 2), np.complex64)),
}  # fmt: skip
SAYS = "the page shows a dash or an empty card in its place"
TEXT = "the page shows it as text"
ACCEPTED = {
    "losses that are texts": SAYS,
    "losses beyond floats": SAYS,
    "a term named by a script": TEXT,
    "20,000 terms": "the page shows the first 100",
    "information that is a list": "the page says that no terms are recorded",
    "splits that are texts": SAYS,
    "seconds that are texts": SAYS,
    "history.jsonl of 20,000 epochs": "a long run is a run",
    "metrics that are texts": SAYS,
    "an environment of scripts": TEXT,
    "a class of 5,000 digits": "no class has such a number: it is left out",
    "a best epoch of 400 digits": "the page marks no epoch",
    "a loss named by a script": TEXT,
    "a preset named by a script": TEXT,
    "modalities that are numbers": "the page explains the terms of all three",
    "modalities that are lists": "the page explains the terms of all three",
    "predictions with ids of scripts": TEXT,
    "predictions beyond floats": "the page says that there is no finite one",
    "a class of 1e30": "the page says that there is no table of confusions",
    "truth.json of scripts": TEXT,
    "features of 3,000 by 3,000": "the page says that they are too many",
    "features named by scripts": TEXT,
    "features of complex numbers and no rows": SAYS,
}


def _case(change: Change) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        copied(folder, lambda run: ((run / "report.html").unlink(missing_ok=True), change(run)))
        return ["report", "--run", "run"]

    return make


REPORTS = [Case(name, _case(change), ACCEPTED.get(name, "")) for name, change in CHANGES.items()]
assert len(REPORTS) == 37, len(REPORTS)
