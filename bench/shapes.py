"""Generated data for benchmarks, with the lengths of the field's data sets (see `engine.loaders.synthetic`)."""

from __future__ import annotations

from pathlib import Path

from engine.loaders.make_data.synthetic import MOSEI, MOSI, WORDS, Shape, Utterances, avec, mosei, mosi, utterances

__all__ = ["MOSEI", "MOSI", "WORDS", "Shape", "Utterances", "avec", "mosei", "mosi", "utterances", "write_store"]


def write_store(path: str | Path, splits: dict[str, Utterances], text_encoder: str = "minilm") -> Path:
    """Keep samples as the engine's own store, tokenised for `text_encoder`; `splits` holds train, valid and test."""
    from engine.loaders.convert import prepare
    from engine.loaders.formats import DataFiles, RawDataset, RawSplit
    from engine.loaders.ragged import from_sequences
    from engine.loaders.store import write_store
    from engine.loaders.text import load_tokenizer

    raw = {}
    for name, samples in splits.items():
        ids = [f"{name}_{i}" for i in range(len(samples))]
        audio, vision = (
            from_sequences(v, ids, f"{name}/{w}") for w, v in (("a", samples.audio), ("v", samples.vision))
        )
        raw[name] = RawSplit(ids, samples.text, samples.label, audio, vision)
    source = DataFiles(Path(path), {})
    content = prepare(source, RawDataset("generated", raw), "recorded", load_tokenizer(text_encoder), "generated")
    return write_store(path, content)
