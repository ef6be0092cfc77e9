import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.config import Config
from engine.errors import CheckpointError
from engine.files import write_json
from engine.metrics import (
    avec2019_metrics,
    classification_metrics,
    regression_metrics,
    write_predictions,
)
from engine.report import TERMS, environment, principal_plane, write_report
from engine.report_charts import number, ticks

ESTIMATORS = (
    *("I(F;T)", "I(F;A)", "I(F;V)", "I(T;A)", "I(T;V)"),
    *("I(A;C|T)", "I(T;A|C)", "I(V;C|T)", "I(T;V|C)", "I(T;C|A)", "I(T;C|V)"),
)


def fake_run(folder, kind="sentiment", epochs=8, features=True, truth=True, n=400, seed=0):
    """A run folder as training leaves it, with plausible numbers. kind: sentiment, avec2019 or classification."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = Config(preset="demo", epochs=max(epochs, 1))
    config.data.dataset = "avec2019" if kind == "avec2019" else "mosi"
    if kind == "classification":
        config.model.task, config.model.num_class, config.train.loss = "classification", 3, "CE"
    config.save(folder / "config.yaml")

    best = max(0, epochs - 3)
    metrics, curves = {"best_epoch": best}, {}
    for split, offset in (("train", 0.0), ("valid", 0.1), ("test", 0.15)):
        ids = [f"video{i // 7}_{i % 7}" for i in range(n)]
        scores = None
        if kind == "sentiment":
            label = np.round(rng.uniform(-3, 3, n), 1).astype(np.float32)
            prediction = (0.8 * label + rng.normal(0, 0.7 + offset, n)).astype(np.float32)
            measured = regression_metrics(prediction, label)
        elif kind == "avec2019":
            label = (rng.integers(0, 25, n) / 25).astype(np.float32)
            prediction = (0.5 * label + 0.2 + rng.normal(0, 0.12, n)).astype(np.float32)
            measured = avec2019_metrics(prediction, label)
        else:
            label = rng.integers(0, 3, n).astype(np.float32)
            scores = rng.normal(0, 1, (n, 3)) + 1.5 * np.eye(3)[label.astype(int)]
            prediction = scores.argmax(1)
            measured = classification_metrics(scores, label)
        curves[split] = measured
        if split != "train":
            metrics[split] = measured
            write_predictions(folder / f"predictions_{split}.csv", ids, label, prediction, scores)
        if features and split == "test":
            mix = rng.normal(size=(2, 64))
            tensors = {
                name: (np.stack([label * (3 - k), rng.normal(size=n)], 1) @ mix + rng.normal(0, 1, (n, 64))).astype(
                    np.float32
                )
                for k, name in enumerate("FTAV")
            }
            tensors["label"] = label[:, None]
            save_file(tensors, folder / f"features_{split}.safetensors", metadata={"ids": json.dumps(ids)})
    metrics["oracle_test"] = {**metrics["test"], "epoch": epochs - 1}
    metrics |= {"samples_per_second": 83.2, "peak_memory_mb": 2310.0, "wall_s": 192.4, "environment": environment()}
    write_json(folder / "metrics.json", metrics)

    rows = []
    for epoch in range(epochs):
        ease = np.exp(-epoch / 2.5)
        row = {"epoch": epoch, "seconds": 21 + rng.normal(), "lr_main": 1e-3, "lr_estimators": 1e-3}
        for k, split in enumerate(("train", "valid", "test")):
            part = {"loss": 0.5 + ease + 0.08 * k + rng.normal(0, 0.02), "task": 0.55 + ease + 0.08 * k}
            part |= {
                key: value * (1 + 0.6 * ease * (1 if key in ("mae",) else -1)) for key, value in curves[split].items()
            }
            if epoch:
                level = {name: (1.8 - 0.3 * i) * (1 - ease) for i, name in enumerate(TERMS)}
                part["information"] = {name: v + rng.normal(0, 0.03) for name, v in level.items()}
                if split == "train":
                    part["estimators"] = {name: rng.normal(1, 0.1) * (1 - ease) for name in ESTIMATORS}
            row[split] = part
        rows.append(json.dumps(row))
    (folder / "history.jsonl").write_text("\n".join(rows) + "\n")

    if truth:
        true = {"I(T;A)": 0.81, "I(T;V)": 0.52, "I(A;V)": 0.24, "I(T;A,V)": 4.9, "I(A;V|T)": 0.0}
        latents = [
            {
                "name": name,
                "true": value,
                "estimates": {
                    "infonce": min(value, 4.0) * 0.95,
                    "smile": value * 1.04 + 0.02,
                    "nwj": value * 0.9,
                    "dv": None if value > 4 else value * 0.99,
                },
                "ceiling": 4.159,
            }
            for name, value in true.items()
        ]
        write_json(folder / "truth.json", {"latents": latents})
    return folder
