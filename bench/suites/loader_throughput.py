"""Batches per second over a whole data set, for each of the three loaders, against the published way of loading.

Side engine is the resident loader, which a data set of this size gets.
"""

from __future__ import annotations

import math
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import shapes
from bench.baselines import loader as reference_loader
from bench.runner import Setting, Work, measure, warm
from engine.allocator import keep_memory
from engine.config import load_config
from engine.loaders import open_dataset
from engine.loaders.dataset import Dataset

TITLE = "one shuffled epoch of batches, 16,326 MOSEI-shaped utterances, against a pickled list tokenised in collate"
GOALS = {"ratio": (20.0, 100.0)}
SIDES = ("engine", "baseline", "torch", "dali")
KINDS = {"engine": "resident", "torch": "torch", "dali": "dali"}
SMALL = 1284  # utterances of the smaller set that `growth` compares with
ROUNDS = 3
TIME_LEN, BATCH, UTTERANCES, QUICK_UTTERANCES = 100, 32, 16326, 640
HELD_OUT = 4


def count(setting: Setting) -> int:
    return QUICK_UTTERANCES if setting.quick else UTTERANCES


def open_engine(samples: shapes.Utterances, folder: Path) -> Dataset:
    """Open the samples as the training split of a store in `folder`, with unchanged frames as in the baseline."""
    held_out = {name: samples.part(0, HELD_OUT) for name in ("valid", "test")}
    store = shapes.write_store(folder, {"train": samples, **held_out})
    data = load_config("mosi-paper", [f"data.time_len={TIME_LEN}"]).resolve().data
    return open_dataset(store, data)


def engine_loader(dataset: Dataset, setting: Setting, shuffle: bool = True, side: str = "engine"):
    return dataset.loader("train", BATCH, shuffle=shuffle, seed=0, kind=KINDS[side], device=setting.device)


def baseline_loader(samples: shapes.Utterances, folder: Path, shuffle: bool = True):
    path = folder / "train.pkl"
    reference_loader.write_pickle(path, samples)
    tokenizer = reference_loader.load_tokenizer("minilm")
    return reference_loader.make_loader(reference_loader.PickledList(path), BATCH, TIME_LEN, tokenizer, shuffle)


def build(side: str, setting: Setting) -> Work:
    return _work(side, setting, count(setting))


def _work(side: str, setting: Setting, utterances: int) -> Work:
    keep_memory()  # as the trainer does; the baseline shares the process, and the gain
    folder = Path(tempfile.mkdtemp(prefix="bench-loader-"))
    samples = shapes.mosei(utterances)
    if side == "baseline":
        loader = baseline_loader(samples, folder)
    else:
        loader = engine_loader(open_engine(samples, folder), setting, side=side)

    def run() -> None:
        for batch in loader:
            if side == "baseline":
                batch = {name: tensor.to(setting.device) for name, tensor in batch.items()}
            del batch

    return Work(run, samples=len(samples), close=lambda: shutil.rmtree(folder, ignore_errors=True))


def details(setting: Setting, works: dict[str, Work], numbers: dict[str, list[float]]) -> dict[str, Any]:
    """`ratios`: each loader against the baseline. `growth`: time per sample in the whole set over that in a small one.

    `dali_passing_seconds`, on a CPU: what a DALI pipeline takes for as many batches that are ready: it only passes them
    through.
    """
    median = {side: statistics.median(values) for side, values in numbers.items()}
    ratios = {KINDS[side]: median["baseline"] / median[side] for side in KINDS}
    growth = {}
    for side, kind in KINDS.items():
        small = _work(side, setting, min(SMALL, count(setting)))
        calls = warm(small, setting)
        seconds = statistics.median(measure(small, calls, setting) for _ in range(len(numbers[side])))
        growth[kind] = (median[side] / works[side].samples) / (seconds / small.samples)
        small.close()
    record = {"ratios": ratios, "growth": growth}
    return record if setting.device != "cpu" else {**record, "dali_passing_seconds": _passing(setting)}


def _passing(setting: Setting) -> float:
    """Seconds. The batch is as wide as the longest sequence, because most batches contain one."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    sizes = (shapes.MOSEI.audio_max, shapes.MOSEI.audio_dim), (shapes.MOSEI.vision_max, shapes.MOSEI.vision_dim)
    ready = tuple(np.zeros((BATCH, *size), np.float32) for size in sizes)
    with Pipeline(batch_size=BATCH, num_threads=torch.get_num_threads(), device_id=None) as pipeline:
        source = fn.external_source(
            source=lambda: ready, num_outputs=len(ready), batch=True, dtype=types.FLOAT, ndim=2, no_copy=True
        )
        pipeline.set_outputs(*source)
    pipeline.build()

    def run() -> None:
        for _ in range(math.ceil(count(setting) / BATCH)):
            [torch.from_dlpack(part.as_tensor()) for part in pipeline.run()]

    run()
    return statistics.median(measure(Work(run), 1, setting) for _ in range(3))


def gate(setting: Setting) -> None:
    """The first batch holds the same tokens, frames and labels, sorted by length in the baseline; all loaders agree."""
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as folder:
        samples = shapes.mosei(BATCH, seed=3)
        opened = open_engine(samples, Path(folder))
        first = (next(iter(engine_loader(opened, setting, shuffle=False, side=side))) for side in KINDS)
        ours, *others = (batch.to("cpu") for batch in first)
        theirs = next(iter(baseline_loader(samples, Path(folder), shuffle=False)))
    for other in others:
        for name in ("label", "audio", "vision", "token_ids", "token_mask"):
            assert torch.equal(getattr(ours, name), getattr(other, name)), f"the loaders' {name} differs"
    order = sorted(range(BATCH), key=lambda i: samples.words[i], reverse=True)
    assert torch.equal(ours.label[order], theirs["label"]), "labels differ"
    assert torch.equal(ours.audio[order], theirs["audio"]), "audio differs"
    assert torch.equal(ours.vision[order], theirs["vision"]), "vision differs"
    width = ours.token_ids.shape[1]
    mask = theirs["attention_mask"]
    assert int(mask[:, width:].sum()) == 0, "fewer tokens than the baseline has"
    assert torch.equal(ours.token_mask[order], mask[:, :width]), "token masks differ"
    assert torch.equal((ours.token_ids * ours.token_mask)[order], (theirs["input_ids"] * mask)[:, :width]), (
        "tokens differ"
    )
