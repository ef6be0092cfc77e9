"""Stores that are made on first use. They lie beside their source, or in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from engine.errors import DataError, OutputError
from engine.files import cache_home
from engine.loaders.content import StoreData
from engine.loaders.convert import fingerprint, open_current, read_source
from engine.loaders.formats import Choice, DataFiles, find_source
from engine.loaders.ragged import LengthRule
from engine.loaders.store import VERSION, is_store, open_store, write_store
from engine.loaders.text import Tokenizer


def load_content(
    path: str | Path,
    rule: LengthRule | Literal["auto"],
    tokenizer: Tokenizer | None,
    expected: str | None = None,
    choice: Choice | None = None,
    training: bool = True,
) -> StoreData:
    """The content of `path`: that of the store which it names, or of the store that is made from it on first use.

    Args:
        rule: how padding is told from frames; auto is `recorded`. A store keeps the rule it was made with.
        tokenizer: None asks for precomputed text features.
        expected: name of the format that the user says it is.
        choice: what to take if the data has several of a kind. A store keeps the choice it was made with.
        training: whether the data must be fit for training, or only for prediction.

    Raises:
        DataError: the data cannot be used.
    """
    if is_store(path):
        return open_current(path)
    rule = "recorded" if rule == "auto" else rule
    source = find_source(path, choice)
    mark = fingerprint(source)
    features = tokenizer is None and "text" in source.choice.modalities
    settings = {"length_rule": rule, "features": features, "expected": expected, **_chosen(source.choice)}
    known = places = cache_places(source, settings)
    if not training:  # not all data that can be predicted is fit for training: it has its own places
        places = cache_places(source, settings | {"training": False})
        known = known + places
    for place in known:
        if place.is_file():
            try:
                data = open_store(place)
            except DataError:
                continue  # a damaged or outdated cache is made again
            if data.meta["fingerprint"] == mark:
                return data
    place = next((p for p in places if is_writable(p.parent)), None)
    try:
        data = read_source(source, rule, tokenizer, expected, mark, place and place.parent, training)
        return data if place is None else open_store(write_store(place, data))
    except OutputError as problem:
        reason = problem.found
    except DataError as problem:
        if not isinstance(problem.__cause__, OutputError):
            raise
        reason = problem.found
    # for example, the disk is full: training can go on from memory
    data = read_source(find_source(path, choice), rule, tokenizer, expected, mark, None, training)
    data.meta["notes"].append(f"the converted data could not be kept for the next run ({reason})")
    return data


def _chosen(choice: Choice) -> dict[str, Any]:
    """The choice as part of a store's name.

    The newer fields count only where they differ from the default. So older stores keep their names.
    """
    newer = ("pool_audio", "pool_vision", "skip_columns")
    return {k: v for k, v in asdict(choice).items() if k not in newer or v != getattr(Choice(), k)}


def cache_places(source: DataFiles, settings: dict[str, Any]) -> list[Path]:
    """Where a store that is made on first use may lie: beside the source, else in the user's cache folder, if any."""
    key = hashlib.sha256(json.dumps({**settings, "version": VERSION}, sort_keys=True).encode()).hexdigest()[:8]
    first = next(iter(source.files.values())).absolute()
    stem = first.stem if "" in source.files else source.path.absolute().stem
    whole = hashlib.sha256(str(source.path.resolve()).encode()).hexdigest()[:8]
    places = [first.parent / f"{stem}.engine-{key}.safetensors"]
    return places + [p / f"{stem}.{whole}.engine-{key}.safetensors" for p in room_for(source)[1:]]


def room_for(source: DataFiles) -> list[Path]:
    """Folders for files that are made from a source: its own, then the user's cache folder, if there is one."""
    cache = cache_home()
    beside = next(iter(source.files.values())).absolute().parent
    return [beside] if cache is None else [beside, cache / "engine"]


def is_writable(folder: Path) -> bool:
    """Whether a file can be made in `folder`. It tries, because permission bits do not tell on network file systems."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
