"""62 hostile run folders, for evaluate, predict, train --resume and demo."""

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

from engine import checkpoint
from engine.run_folder import CHECKSUMS, file_sum
from tests.hostile import files
from tests.hostile.encoders import FOREIGN
from tests.hostile.files import ESCAPE
from tests.hostile.runner import Case, data, run

Change = Callable[[Path], Any]


def resummed(folder: Path) -> None:
    """Checksums that fit: who writes a hostile file writes its sum too."""
    path = folder / CHECKSUMS
    sums = json.loads(path.read_text("utf-8"))["files"]
    for name in sums:
        if (folder / name).is_file() and (folder / name).stat().st_size < 1 << 30:
            sums[name] = list(file_sum(folder / name))
    path.write_text(json.dumps({"files": sums, "checksum": zlib.crc32(json.dumps(sums).encode())}), encoding="utf-8")


def file(name: str, change: Change) -> Change:
    return lambda folder: (change(folder / name), resummed(folder))


def saved(name: str, change: Callable[[dict, dict], Any]) -> Change:
    """A checkpoint whose state and meta are changed in place, with a checksum that fits."""

    def edit(folder: Path) -> None:
        state, meta = checkpoint.load(folder / name)
        change(state, meta)
        checkpoint.save(folder / name, state, meta)

    return edit


def meta(**values: Any) -> Change:
    return saved("best.safetensors", lambda state, meta: meta.update(values))


def described(**values: Any) -> Change:
    """Another description of the text encoder."""
    return saved("best.safetensors", lambda state, meta: meta["text_encoder"].update(values))


def both(section: str, **values: Any) -> Change:
    """Settings changed in config.yaml and in the checkpoint alike."""

    def edit(folder: Path) -> None:
        path = folder / "config.yaml"
        whole = yaml.safe_load(path.read_text("utf-8"))
        whole[section].update(values)
        path.write_text(yaml.safe_dump(whole), encoding="utf-8")
        saved("best.safetensors", lambda state, meta: meta["settings"][section].update(values))(folder)
        resummed(folder)

    return edit


def header(change: Callable[[dict], None]) -> Change:
    """The safetensors header itself."""

    def edit(folder: Path) -> None:
        path = folder / "best.safetensors"
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        values = json.loads(raw[8 : 8 + length])
        change(values)
        encoded = json.dumps(values).encode()
        path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + raw[8 + length :])

    return edit


def nested_state(values: dict) -> None:
    values["__metadata__"]["state"] = '{"list": [' * 50_000 + "1" + "]}" * 50_000


def long_state(values: dict) -> None:
    values["__metadata__"]["state"] = "[" + "[]," * 12_000_000 + "[]]"


def normalizer(**values: np.ndarray) -> Change:
    def edit(path: Path) -> None:
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as opened:
            about = opened.metadata()
        tensors = load_file(path) | {k.replace("_", ".", 1): torch.as_tensor(v) for k, v in values.items()}
        save_file(tensors, path, about)

    return file("normalizer.safetensors", edit)


def first_weight(change: Callable[[torch.Tensor], Any]) -> Change:
    def edit(state: dict, about: dict) -> None:
        name = next(iter(state["model"]))
        state["model"][name] = change(state["model"][name])

    return saved("best.safetensors", edit)


def foreign_encoder(folder: Path) -> None:
    (folder / "foreign.py").write_text(FOREIGN)
    described(model_type="rag", auto_map={"AutoModel": "foreign.M"}, name_or_path=str(folder))(folder)


def foreign_folder(folder: Path) -> None:
    """An imported run asks for its tokeniser in text_encoder/."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    place = folder / "text_encoder"
    place.mkdir()
    (place / "foreign.py").write_text(FOREIGN)
    (place / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "foreign.C"}}))
    names = {"auto_map": {"AutoTokenizer": [None, "foreign.T"]}}
    (place / "tokenizer_config.json").write_text(json.dumps(names))
    both_names(folder, str(place))
    resummed(folder)


def both_names(folder: Path, encoder: str) -> None:
    path = folder / "config.yaml"
    whole = yaml.safe_load(path.read_text("utf-8")) | {"text_encoder": encoder}
    path.write_text(yaml.safe_dump(whole), encoding="utf-8")
    saved("best.safetensors", lambda state, meta: meta["settings"].update(text_encoder=encoder))(folder)


def wide_header(folder: Path) -> None:
    (folder / "best.safetensors").write_bytes(struct.pack("<Q", 90_000_000) + b" " * 90_000_000 + b"x" * 9)


ODD = {"empty": files.empty, "cut": files.cut, "noise": files.noise, "a pipe": files.fifo, "a folder": files.folder,
       "a link to itself": files.itself, "a device": files.device}  # fmt: skip
EVALUATED: dict[str, Change] = {
    **{f"{name} {what}": file(name, change) for name in ("config.yaml", "best.safetensors", "normalizer.safetensors")
       for what, change in ODD.items()},
    **{f"checksums.json {what}": lambda folder, change=ODD[what]: change(folder / "checksums.json") for what in
       ("empty", "a pipe", "a folder")},
    "checksums.json nested without end": lambda folder: files.deep_json(folder / "checksums.json"),
    "checksums.json of another form": lambda folder: files.text(
        json.dumps({"files": {"config.yaml": 5, "normalizer.safetensors": "x"},
                    "checksum": zlib.crc32(b'{"config.yaml": 5, "normalizer.safetensors": "x"}')})
    )(folder / "checksums.json"),
    "tokenizer.json cut": file("tokenizer.json", files.cut),
    "tokenizer.json nested without end": file("tokenizer.json", files.deep_json),
    "tokenizer_config.json a pipe": file("tokenizer_config.json", files.fifo),
    "code named by the text encoder": foreign_encoder,
    "code named by a tokeniser's folder": foreign_folder,
    "attention of a repository": described(attn_implementation="someone/attention"),
    "a billion layers of text": described(num_hidden_layers=10**9),
    "a text encoder of width 2^20": described(hidden_size=2**20),
    "a text encoder that draws weights from elsewhere": described(backbone="resnet50", use_pretrained_backbone=True),
    "a billion audio columns": meta(audio_dim=10**9),
    "900,000 audio columns": meta(audio_dim=900_000),
    "a negative width": meta(vision_dim=-1),
    "a width that is text": meta(audio_dim=ESCAPE),
    "no text encoder": meta(text_encoder=None),
    "settings that are a list": meta(settings=[1]),
    "settings of a wide model": both("model", d_common=1 << 14),
    "settings of a long time axis": both("data", time_len=99_999),
    "escape sequences in the fusion's name": both("model", fusion=ESCAPE),
    "no model": saved("best.safetensors", lambda state, meta: state.pop("model")),
    "a list as the model": saved("best.safetensors", lambda state, meta: state.update(model=[1])),
    "a parameter of another shape": first_weight(lambda w: w.new_zeros(3)),
    "a parameter of complex numbers": first_weight(lambda w: w.to(torch.complex64)),
    "a parameter that is a number": first_weight(lambda w: 1.5),
    "a state nested without end": header(nested_state),
    "a state of 12 million lists": header(long_state),
    "a header of 90 megabytes": wide_header,
    "a normaliser of another width": normalizer(**{f"audio_{k}": np.zeros(3) for k in ("low", "shift", "scale")}),
    "a normaliser of NaN": normalizer(audio_scale=np.full(5, np.nan)),
}  # fmt: skip
RESUMED: dict[str, Change] = {
    "last.safetensors noise": lambda folder: (files.noise(folder / "last.safetensors"), drop_previous(folder)),
    "last.safetensors a pipe": lambda folder: (files.fifo(folder / "last.safetensors"), drop_previous(folder)),
    "history.jsonl a pipe": file("history.jsonl", files.fifo),
    "history.jsonl nested without end": file("history.jsonl", files.deep_json),
    "an optimiser of another form": saved("last.safetensors", lambda s, m: s["optimizers"].update(main=[1])),
    "a bank of another form": saved("last.safetensors", lambda s, m: s.update(bank={"rows": 5})),
    "a random state of another form": saved("last.safetensors", lambda s, m: s.update(rng={"torch": 5})),
    "a history of another form": saved("last.safetensors", lambda s, m: m.update(history="x")),
}


def drop_previous(folder: Path) -> None:
    (folder / "previous.safetensors").unlink(missing_ok=True)


def _evaluated(change: Change, number: int) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        copied(folder, change)
        if number % 3 == 2:
            return ["predict", "--run", "run", "--data", str(data()), "--out", "p.csv", "--device", "cpu"]
        return ["evaluate", "--run", "run", "--data", str(data()), "--device", "cpu"]

    return make


def _resumed(change: Change) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        copied(folder, change)
        return ["train", "--resume", "--data", str(data()), "--out", "run", "epochs=2"]

    return make


def copied(folder: Path, change: Change) -> None:
    """The finished run, changed, in `folder`/run."""
    shutil.copytree(run(), folder / "run", symlinks=True)
    change(folder / "run")


RUNS = [
    *(Case(n, _evaluated(c, i)) for i, (n, c) in enumerate(EVALUATED.items())),
    *(Case(f"resume: {n}", _resumed(c)) for n, c in RESUMED.items()),
]
assert len(RUNS) == 62, len(RUNS)
