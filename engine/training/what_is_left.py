"""After training: what the best model's features still tell of what its terms were to remove."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine import checkpoint
from engine.errors import CheckpointError, DataError
from engine.files import write_json
from engine.information.probing import Probe, probe
from engine.objective.terms import Term
from engine.run_folder import BEST, METRICS
from engine.training.records import Record
from engine.training.saving import RunFiles


def write_left(
    files: RunFiles, history: list[Record], summary: dict[str, Any], timings: Callable[[], dict[str, float]]
) -> None:
    """Probe every term that was minimised, and add the result to `summary` and metrics.json as "left".

    The probes learn from the training rows and are scored on the others, all by the best model in evaluation mode. The
    model holds the best weights afterwards. Nothing happens in a run that minimises no term of the user's.

    Args:
        timings: where the time of the run went until now, for metrics.json.
    """
    parts = files.parts
    terms = parts.task.minimised(parts.config, parts.objective) if parts.informed else []
    if not terms:
        return
    try:
        checkpoint.load_into(parts.model, checkpoint.load(files.out / BEST)[0]["model"], str(files.out / BEST))
    except CheckpointError as problem:
        warnings.warn(f"what is left of minimised terms is not measured: {problem}", stacklevel=2)
        return
    known = parts.evaluate("train", parts.unshuffled_train).features
    unseen = {s: parts.evaluate(s, parts.loaders[s]).features for s in ("valid", "test")}
    record = next(r for r in history if r["epoch"] == summary["best_epoch"])
    left = {}
    for term in terms:
        found: dict[str, Any] = {}
        for split, features in unseen.items():
            try:
                found[split] = probe_term(term, known, features, parts.objective.classes).to_dict()
            except DataError as problem:  # such as a split without labels
                warnings.warn(f"{term}, {split}: what is left is not measured: {problem}", stacklevel=2)
        left[str(term)] = {"reading": _reading(record, str(term)), **found}
    summary |= {"left": left, "timings": timings()}
    with files.sums.writing(METRICS):
        write_json(files.out / METRICS, summary)


def probe_term(
    term: Term, known: Mapping[str, Tensor], unseen: Mapping[str, Tensor], classes: Mapping[str, int]
) -> Probe:
    """A probe of the term's y from its x. For I(x;y|z): from x and z, where chance is what z alone gives, if more.

    Args:
        known, unseen: features [rows, width] by name.
        classes: the number of classes of the features that hold classes.
    """

    def of(*names: str) -> Probe:
        x, seen = (torch.cat([f[name] for name in names], 1) for f in (unseen, known))
        return probe(x, unseen[term.y], known=(seen, known[term.y]), discrete=term.y in classes)

    if term.given is None:
        return of(term.x)
    alone = of(term.given)
    return replace(of(term.x, term.given), chance=max(alone.knn, alone.linear, alone.chance))


def _reading(record: Record, name: str) -> float | None:
    """The term's reading on valid at the best epoch: on all rows where it was read so, else of batches."""
    for group in ("bank", "information"):
        value = record["valid"].get(group, {}).get(name)
        if value is not None and math.isfinite(value):
            return float(value)
    return None
