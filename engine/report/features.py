"""The section of features, each in its principal plane."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.files import parse_json
from engine.metrics import PHQ_RANGE
from engine.report.charts import escape, number, scatter
from engine.report.folder import Run
from engine.report.pieces import MOST_DOTS, card, spread_over
from engine.report.predictions import label_groups
from engine.report.words import words_of

WIDEST = 2048
"""Features are drawn where their rows or their columns are no more than this. Time grows with its third power."""


def features_section(run: Run) -> str:
    test = run.predictions.get("test")
    splits = ("test", "valid", "train") if test is None or np.isfinite(test.label).any() else ("valid", "train", "test")
    split = next((s for s in splits if (run.folder / f"features_{s}.safetensors").is_file()), None)
    if split is None:
        return ""
    path, names = run.folder / f"features_{split}.safetensors", words_of(run).features
    try:
        features, ids = _load_features(path, names)
    except Exception as problem:  # the library raises its own, undocumented kinds of error
        return f"<p>{path.name} cannot be read ({escape(' '.join(str(problem).split())[:120])}).</p>"
    label = features.pop("label", None)
    cards, legend, palette = [], "", ""
    for name, values in features.items():
        real = values.size and values.ndim and values.dtype.kind in "biuf"
        flat = values.reshape(len(values), -1).astype(np.float64) if real else np.zeros((0, 1))
        kept = np.isfinite(flat).all(axis=1)
        if label is not None and len(label) == len(flat):
            kept &= np.isfinite(label.reshape(len(label), -1)[:, 0])
        rows = np.flatnonzero(kept)
        if min(flat.shape) > WIDEST:
            cards.append(card(names.get(name, name), '<p class="muted">too many to be drawn</p>'))
            continue
        if len(rows) < 3:
            cards.append(card(names.get(name, name), '<p class="muted">fewer than three finite rows</p>'))
            continue
        plane, share = principal_plane(flat[rows])
        shown = spread_over(len(rows), MOST_DOTS)
        rows, plane = rows[shown], plane[shown]
        texts = [ids[i] if i < len(ids) else f"sample {i}" for i in rows]
        groups = np.zeros(len(rows), dtype=int)
        if label is not None and len(label) == len(flat):
            colour = label.reshape(len(label), -1)[rows, 0].astype(np.float64)
            groups, palette, legend = label_groups(run, colour)
            scale = PHQ_RANGE if run.kind == "avec2019" else 1.0
            texts = [f"{text}\nlabel {number(scale * c, 2)}" for text, c in zip(texts, colour, strict=True)]
        chart = scatter(
            f"features {name} in their principal plane", plane[:, 0], plane[:, 1], groups, texts, ticked=False
        )
        about = f"variance: {100 * share[0]:.0f} % across, {100 * share[1]:.0f} % up"
        cards.append(card(names.get(name, name), chart, about, f"{flat.shape[1]} dimensions"))
    if not cards:
        return ""
    lead = (
        f"<p>Features of the {split} split at the best epoch, each in the plane of its first two principal components, "
        "coloured by label.</p>"
    )
    return f'{lead}<div class="{palette or "pal-q"}">{legend}<div class="grid4">{"".join(cards)}</div></div>'


def principal_plane(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The plane of the first two principal components of x [N, D]: coordinates [N, 2] and shares of the variance [2].

    The largest loading of each component is made positive, so that the plane is always the same.
    """
    centred = x - x.mean(axis=0)
    # The eigenvectors of the smaller of the two Gram matrices: far cheaper than a full SVD of many rows.
    wide = centred.shape[1] > centred.shape[0]
    values, vectors = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    values, vectors = values[::-1][:2].clip(min=0), vectors[:, ::-1][:, :2]
    axes = centred.T @ vectors if wide else vectors
    axes = axes / np.maximum(np.linalg.norm(axes, axis=0), np.finfo(np.float64).tiny)
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])] < 0, -1, 1)
    plane, share = centred @ axes, values / max(float((centred**2).sum()), np.finfo(np.float64).tiny)
    missing = 2 - plane.shape[1]
    return np.pad(plane, ((0, 0), (0, missing))), np.pad(share, (0, missing))


def _load_features(path: Path, names: Iterable[str]) -> tuple[dict[str, NDArray[Any]], list[str]]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        features = {name: file.get_tensor(name) for name in file.keys()}
        listed = parse_json((file.metadata() or {}).get("ids", "[]"))
    order = [name for name in (*names, "label") if name in features]
    order += sorted(set(features) - set(order))
    return {name: features[name] for name in order}, [str(name) for name in listed]
