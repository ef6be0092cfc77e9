"""Data in: from the files users have to the batches models receive."""

from engine.loaders.batch import Batch
from engine.loaders.dataset import Dataset, DataWarning, Split, open_dataset
from engine.loaders.formats import Format, register_format
from engine.loaders.loader import Loader
from engine.loaders.normalize import Normalizer
from engine.loaders.text import load_tokenizer

__all__ = [
    "Batch",
    "DataWarning",
    "Dataset",
    "Format",
    "Loader",
    "Normalizer",
    "Split",
    "load_tokenizer",
    "open_dataset",
    "register_format",
]
