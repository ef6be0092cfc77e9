"""An epoch with a text encoder of BERT-base's size, in mode fast. It has no floor."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache

from bench import epochs, shapes
from bench.baselines.loader import minilm_folder
from bench.runner import Setting, Work

TITLE = "two-stage epoch, mode fast, 64 MOSI-shaped samples, BERT-base, against the eager baseline"
GOALS: dict[str, tuple[float, float]] = {}
SIDES = ("engine", "baseline")
MEMORY = ("engine", "baseline")
MEMORY_REPEATS = 1  # an epoch each
ROUNDS = 3


@cache
def bert_base() -> str:
    """A folder with a model of BERT-base's shape and fresh weights (time does not depend on them), and a tokeniser."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tempfile.mkdtemp(prefix="bench-bert-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.manual_seed(0)
    BertModel(BertConfig()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm_folder(), trust_remote_code=False).save_pretrained(folder)
    return folder


def build(side: str, setting: Setting) -> Work:
    samples = shapes.mosi(epochs.QUICK_SAMPLES if setting.quick else 64)
    if side == "baseline":
        return epochs.build_baseline(samples, setting, bert_base())
    return epochs.build_engine("fast", samples, setting, text_encoder=bert_base())


def gate(setting: Setting) -> None:
    epochs.gate_fast(setting)
