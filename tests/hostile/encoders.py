"""28 hostile folders of text encoders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.hostile import files
from tests.hostile.files import ESCAPE
from tests.hostile.runner import MARK, Case, data, encoder, settings

FOREIGN = f"open({MARK!r}, 'w').close()\n"


def edited(name: str, **changes: object) -> Callable[[Path], None]:
    """Other values in a JSON file."""

    def change(folder: Path) -> None:
        path = folder / name
        values = json.loads(path.read_text("utf-8")) if path.exists() else {}
        path.write_text(json.dumps(values | changes), encoding="utf-8")

    return change


def foreign(**names: dict) -> Callable[[Path], None]:
    """Files that name Python code of the folder; config=..., tokenizer_config=..., processor_config=..."""

    def change(folder: Path) -> None:
        (folder / "foreign.py").write_text(FOREIGN)
        for name, values in names.items():
            edited(f"{name}.json", **values)(folder)

    return change


class _Evil:
    def __reduce__(self) -> tuple:
        return exec, (FOREIGN,)


def pickled(folder: Path) -> None:
    """Weights as a pickle that runs code."""
    torch.save(load_file(folder / "model.safetensors") | {"x": _Evil()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def fewer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layer.0" not in k}, folder / "model.safetensors", {"format": "pt"})


def sharded(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../../../../etc/passwd")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def slow_tokeniser(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    names = {"auto_map": {"AutoTokenizer": [None, "foreign.T"]}, "tokenizer_class": "T"}
    foreign(config={"model_type": "own"}, tokenizer_config=names)(folder)


def all_of(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: [change(folder) for change in changes] and None


def file(name: str, change: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: change(folder / name)


AUTO = {"auto_map": {"AutoConfig": "foreign.C", "AutoModel": "foreign.M"}}
CHANGES: dict[str, Callable[[Path], None]] = {
    "auto_map in config.json": foreign(config=AUTO | {"model_type": "own"}),
    "auto_map in config.json of a known type": foreign(config=AUTO),
    "auto_map of a tokeniser": slow_tokeniser,
    "auto_map in every file": all_of(
        foreign(
            config=AUTO | {"model_type": "own"}, tokenizer_config={"auto_map": {"AutoTokenizer": ["foreign.T"] * 2}}
        ),
        foreign(processor_config={"auto_map": {"AutoProcessor": "foreign.P"}, "processor_class": "P"}),
        foreign(preprocessor_config={"auto_map": {"AutoImageProcessor": "foreign.I"}}),
    ),
    "auto_map in processor_config.json": foreign(processor_config={"auto_map": {"AutoProcessor": "foreign.P"}}),
    "attention of a repository": edited("config.json", attn_implementation="someone/attention"),
    "pickled weights that run code": pickled,
    "quantised by a library": edited("config.json", quantization_config={"quant_method": "bitsandbytes"}),
    "a billion layers": edited("config.json", num_hidden_layers=10**9),
    "a width of 2^40": edited("config.json", hidden_size=2**40),
    "a vocabulary of a billion": edited("config.json", vocab_size=10**9),
    "wider than its weights": edited("config.json", intermediate_size=2**22),
    "no heads": edited("config.json", num_attention_heads=0),
    "a negative width": edited("config.json", hidden_size=-16),
    "a width that is a text": edited("config.json", hidden_size=ESCAPE),
    "escape sequences as the type": edited("config.json", model_type=ESCAPE),
    "config.json nested without end": file("config.json", files.deep_json),
    "config.json a list": file("config.json", files.text("[1]")),
    "config.json a pipe": file("config.json", files.fifo),
    "weights cut off": file("model.safetensors", files.cut),
    "weights of noise": file("model.safetensors", files.noise),
    "weights with a header of 2^60 bytes": file("model.safetensors", files.text(b"\0\0\0\0\0\0\0\x10" + b"{}" * 100)),
    "weights that lack a layer": fewer,
    "weights a pipe": file("model.safetensors", files.fifo),
    "shards outside the folder": sharded,
    "tokenizer.json cut off": file("tokenizer.json", files.cut),
    "tokenizer.json nested without end": file("tokenizer.json", files.deep_json),
    "tokenizer.json a link to itself": file("tokenizer.json", files.itself),
}
ACCEPTED = {
    "auto_map in config.json of a known type": "transformers has the type itself: the folder's code is not asked for",
    "auto_map in processor_config.json": "a text encoder has no processor: the file is not read",
    "tokenizer.json a link to itself": "vocab.txt says the same",
}


def _case(change: Callable[[Path], None]) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        place = folder / "encoder"
        shutil.copytree(encoder(), place)
        change(place)
        settings().save(folder / "x.yaml")
        words = ["--config", "x.yaml", "--data", str(data()), "--out", "out", "epochs=1"]
        return ["train", *words, f"text_encoder={place}"]

    return make


ENCODERS = [Case(name, _case(change), ACCEPTED.get(name, "")) for name, change in CHANGES.items()]
assert len(ENCODERS) == 28
