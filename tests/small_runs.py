"""Whole runs on small synthetic files with a tiny BERT: the files, the settings, and reading what was written.

The fixtures `text_encoder`, `data` and `config` of tests/conftest.py are made of it.
"""

import json
import sys
from pathlib import Path

import torch

from engine.config import Config
from tests.loaders import writers

SIZES = {"train": 21, "valid": 6, "test": 9}
DIMS = [[6, 3, 16], [3, 3, 16]]
STILL = {"dropout": 0.0, "modality_dropout": 0.0}
"""Settings of a model that draws nothing."""
# A process in the background of a shell script ignores SIGINT, and so would what it starts.
AS_IN_A_TERMINAL = [
    sys.executable, "-c",
    "import os, sys, signal as s; s.signal(s.SIGINT, s.default_int_handler); os.execv(sys.argv[1], sys.argv[1:])",
]  # fmt: skip


def make_text_encoder(folder: Path, dropout: float = 0.1) -> Path:
    """A tiny BERT with a tokeniser for the words of the synthetic files, as a local model folder."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *writers.WORDS]
    (folder / "words.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "words.txt")).save_pretrained(folder)
    return folder


def small_config(data: Path, text_encoder: Path) -> Config:
    return Config(
        epochs=3,
        batch_size=6,
        text_encoder=str(text_encoder),
        data={"path": str(data), "time_len": 10},
        model={"d_common": 16, "cubemlp": {"d_hiddens": DIMS, "d_outs": DIMS}},
        objective={"hidden": 16, "embed": 8},
        train={"lr": 1e-2},
        output={"progress": False, "tensorboard": False, "report": False},
    )


def changed(config: Config, **sections) -> Config:
    return Config(
        **{k: {**v, **sections.pop(k, {})} if isinstance(v, dict) else v for k, v in config.model_dump().items()}
        | sections
    )


def history(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text(encoding="utf-8").splitlines()]


def timeless(record: dict) -> dict:
    return {k: v for k, v in record.items() if "seconds" not in k}


def numbers(records) -> list[float]:
    """Every loss, estimate and metric of a history."""
    found = []
    for record in records:
        for split in ("train", "valid", "test"):
            for value in record[split].values():
                found += value.values() if isinstance(value, dict) else [value]
    return found
