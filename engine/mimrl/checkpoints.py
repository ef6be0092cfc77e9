"""Checkpoints of the published MIMRL code (IEEE Trans. Affective Computing 2025), as run folders.

A checkpoint is read with `torch.load(weights_only=True)`; no code in it runs.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from engine import checkpoint
from engine.config import Config, load_config, text_of
from engine.errors import CheckpointError, ConfigError, DataError, OutputError
from engine.files import is_compressed, user_path, write_json
from engine.mimrl.commands import REFERENCE_TEXT_ENCODER, import_command
from engine.mimrl.names import engine_to_reference, split_reference_state
from engine.mimrl.shapes import Shapes
from engine.run_folder import NORMALIZER, TOKENIZER, Checksums

if TYPE_CHECKING:
    from engine.loaders.normalize import Normalizer

_STATE_KEYS = ("model", "state_dict", "net", "network", "model_state_dict", "model_state")
_BERT_BASE = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12}
_HEAD_WIDTH = 64  # of every published BERT: its number of heads is hidden_size / 64


def import_checkpoint(
    path: str | Path,
    out: str | Path,
    command: str | None = None,
    config: str | Path | Config | None = None,
    text_encoder: str | None = None,
) -> list[str]:
    """Turn a checkpoint of the reference into a run folder that `engine evaluate` and `engine predict` take.

    Sizes come from the shapes of the parameters. What shapes cannot tell (activation, mean or sum, bound, …) comes from
    `command` or `config`, else from the reference's defaults; the notes say which. The mode is `faithful`.

    Args:
        path: a file written by `torch.save`: the reference's `best_valid_model.pth.tar`, or a state dict, raw or under
            a usual key. It is read without running any code in it.
        out: the run folder to write.
        command: the command line that trained it.
        config: our configuration (or its YAML file) to take instead of `command`.
        text_encoder: folder or name of the text encoder's configuration and tokenizer; default: what the shapes say,
            with the tokenizer of bert-base-uncased if they are bert-base's.

    Returns:
        Notes for the user: what was inferred, what was assumed, what is missing.

    Raises:
        CheckpointError: the file is missing, damaged, needs code to be read, or is not of the published model; or it
            contradicts `command` or `config`.
        ConfigError: both `command` and `config`, or a problem in one of them.
        OutputError: `out` holds another run or cannot be written.
    """
    from engine.loaders.text import load_tokenizer
    from engine.mimrl.model import build_model
    from engine.mimrl.terms import mimrl_objective
    from engine.model.text_encoder import text_encoder_from_config

    path, out = user_path(path), user_path(out)
    if command is not None and config is not None:
        raise ConfigError("engine import", "both a command and a config", "one of them", "Leave one out.")
    if (out / "config.yaml").exists():
        raise OutputError(str(out), "another run", "an empty or new folder", "Choose another --out.")
    state, epoch = _read_reference(path)
    model_state, objective_state, unused = split_reference_state(state, str(path))
    for name in [name for name in model_state if name.startswith("text_encoder.model.pooler.")]:
        unused.append(engine_to_reference(name))
        del model_state[name]

    settings, source, notes = _stated_settings(command, config)
    shapes = Shapes(str(path), model_state, objective_state)
    inferred = shapes.settings(settings)
    settings = _reconcile(str(path), settings, inferred, source)
    description = _text_description(str(path), shapes, text_encoder, notes)
    settings = settings.model_copy(update={"text_encoder": _tokenizer(shapes, text_encoder, out, notes)})

    resolved = settings.resolve()
    model = build_model(resolved, shapes.audio_dim, shapes.vision_dim, text_encoder_from_config(description))
    checkpoint.load_into(model, model_state, f"{path}: model")
    objective = mimrl_objective(resolved.objective, model.fused_dim, resolved.model.d_common)
    if objective_state:
        checkpoint.load_into(objective, objective_state, f"{path}: estimators")
    else:
        notes.append("estimators: none in the checkpoint; the run's are untrained")
    notes += _import_notes(settings, inferred, source, unused, path, epoch)

    if text_encoder is not None:
        try:
            load_tokenizer(text_encoder).save(out)
        except DataError as problem:
            notes.append(f"tokenizer: {problem.found}; put its tokenizer.json into {out}")
    meta = {"epoch": epoch, "text_encoder": description, "imported_from": path.name}
    _write_run(out, settings, {"model": model.state_dict(), "objective": objective.state_dict()}, meta, shapes)
    return notes


def _write_run(out: Path, settings: Config, state: dict[str, Any], meta: dict[str, Any], shapes: Shapes) -> None:
    write_json(out / "text_encoder" / "config.json", meta["text_encoder"])
    widths = {"audio_dim": shapes.audio_dim, "vision_dim": shapes.vision_dim}
    checkpoint.save(out / "best.safetensors", state, meta | widths)
    with Checksums(out).writing(NORMALIZER, *TOKENIZER):
        _no_normalizer(shapes).save(out / NORMALIZER)
    settings.save(out / "config.yaml")


def _stated_settings(command: str | None, config: str | Path | Config | None) -> tuple[Config, str | None, list[str]]:
    """What the user says the model was trained with: settings, how to call their source, and notes on them.

    Without a command or a config they are the published defaults, and the source is None.
    """
    if command is not None:
        settings, notes = import_command(command)
        superseded = ("text encoder:", "--normalize", "--log_scale")  # said anew, of the imported run
        return settings, "the command", [note for note in notes if not note.startswith(superseded)]
    if config is not None:
        settings = config.model_copy(deep=True) if isinstance(config, Config) else load_config(config)
        return settings, "the config", []
    return import_command("")[0], None, []


def _no_normalizer(shapes: Shapes) -> Normalizer:
    """No normalisation: the published code normalises before training or not at all, and saves no statistics."""
    from engine.loaders.normalize import ColumnNormalizer, Normalizer

    return Normalizer(*(ColumnNormalizer.fit(np.zeros((1, d)), "none") for d in (shapes.audio_dim, shapes.vision_dim)))


def _reconcile(where: str, settings: Config, inferred: Mapping[str, Any], source: str | None) -> Config:
    """`settings` with what the shapes say; where the user stated something else, an error."""
    values = settings.model_dump()
    for key, value in inferred.items():
        *path, last = key.split(".")
        node = values
        for part in path:
            node = node[part]
        if source is not None and node[last] != value:
            raise CheckpointError(
                where,
                f"{key}={text_of(value)} by the shapes of its parameters",
                f"{text_of(node[last])}, as {source} says",
                f"Give the command or config that trained this checkpoint, or correct {key}.",
            )
        node[last] = value
    values["mode"] = "faithful"
    values["data"] |= {"normalize_audio": "none", "normalize_vision": "none", "log_audio": False, "log_vision": False}
    if source is None and values["model"]["task"] == "classification":
        values["train"]["loss"] = "CE"
    return Config(**values)


def _text_description(where: str, shapes: Shapes, text_encoder: str | None, notes: list[str]) -> dict[str, Any]:
    """The text encoder's Hugging Face configuration."""
    sizes = shapes.bert()
    if sizes["hidden_size"] != shapes.text_dim:
        raise CheckpointError(
            where,
            f"a text encoder of width {sizes['hidden_size']} before W_t of width {shapes.text_dim}",
            "equal widths",
            "Import a checkpoint of the whole model.",
        )
    if text_encoder is None:
        from transformers import BertConfig

        heads = max(1, sizes["hidden_size"] // _HEAD_WIDTH)
        notes.append(
            f"text encoder: BERT of {sizes['num_hidden_layers']} layers, width {sizes['hidden_size']}; ASSUMED are "
            f"{heads} attention heads (width / {_HEAD_WIDTH}), gelu and layer_norm_eps 1e-12: name its folder with "
            "--text-encoder to be sure"
        )
        return json.loads(BertConfig(**sizes, num_attention_heads=heads).to_json_string(use_diff=False))
    from transformers import AutoConfig

    from engine.model.pretrained import load_pretrained

    given = load_pretrained(AutoConfig, text_encoder)
    for key, size in sizes.items():
        if getattr(given, key, size) != size:
            raise CheckpointError(
                where,
                f"a text encoder with {key} {size}",
                f"{getattr(given, key)}, as in {text_encoder}",
                "Name the text encoder that the checkpoint was trained with.",
            )
    return json.loads(given.to_json_string())


def _tokenizer(shapes: Shapes, text_encoder: str | None, out: Path, notes: list[str]) -> str:
    """The value of our setting `text_encoder`, which names the tokenizer."""
    if text_encoder is not None:
        return text_encoder
    if _BERT_BASE.items() <= shapes.bert().items():
        notes.append(f"tokenizer: {REFERENCE_TEXT_ENCODER}, whose sizes the text encoder has")
        return REFERENCE_TEXT_ENCODER
    folder = out / "text_encoder"
    notes.append(f"tokenizer: unknown; put its files into {folder}, or set text_encoder in config.yaml")
    return str(folder)


def _import_notes(
    settings: Config, inferred: Mapping[str, Any], source: str | None, unused: list[str], path: Path, epoch: int | None
) -> list[str]:
    # A mean and a sum have the same shapes.
    certain = {k: v for k, v in inferred.items() if not (k.startswith("model.compose_") and v != "cat")}
    notes = ["from the shapes: " + ", ".join(f"{key}={text_of(value)}" for key, value in certain.items())]
    assumed = {
        "model.compose_t": settings.model.compose_t,
        "model.compose_k": settings.model.compose_k,
        "model.cubemlp.activate": settings.model.cubemlp.activate,
        "model.cubemlp.ln_first": settings.model.cubemlp.ln_first,
        "objective.bound": settings.objective.bound,
        "objective.baseline": settings.objective.baseline,
        "objective.k_neighbor": settings.objective.k_neighbor,
        "objective.cmi_last_activate": settings.objective.cmi_last_activate,
    }
    told = ", ".join(f"{key}={text_of(value)}" for key, value in assumed.items() if key not in certain)
    notes.append(f"from {source}: {told}" if source else f"ASSUMED, for want of a command or config: {told}")
    notes.append(
        "normalisation: none, for a checkpoint holds no statistics (the reference has none for `*_Dec` data); "
        "give data scaled as in training"
    )
    if unused:
        notes.append("not used: " + ", ".join(unused))
    if epoch is not None and path.name.startswith("best_"):
        notes.append(
            f"{path.name}: the reference keeps references to its parameters, not copies, so its `best` files hold the "
            "weights of the LAST epoch of the run: evaluate before comparing with its log"
        )
    return notes


def _read_reference(path: Path) -> tuple[dict[str, Tensor], int | None]:
    """The state dict in a file of `torch.save`, and the epoch beside it."""
    if not path.is_file():
        raise CheckpointError(
            str(path), "no such file", "a file written by torch.save", "Name a .pth.tar file of the reference."
        )
    if is_compressed(path):
        raise CheckpointError(
            str(path), "a compressed archive", "a file as torch.save writes it, whose tensors are as they are",
            "Save it anew with torch.save.",
        )  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickle protocols; what cannot be read is an error below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as cause:
        raise CheckpointError(
            str(path), cause.strerror or str(cause), "a readable file", "Check the file and its permissions."
        ) from None
    except Exception as cause:  # UnpicklingError, RuntimeError, EOFError, KeyError, …, by the kind of damage
        code = re.search(r"GLOBAL (\S+)", str(cause))
        if code:
            raise CheckpointError(
                str(path),
                f"a pickle that runs code when read ({code[1]})",
                "tensors and plain values only",
                "Save model.state_dict() with the code that trained it, and import that.",
            ) from None
        raise CheckpointError(
            str(path),
            f"a file that torch.load cannot read ({type(cause).__name__})",
            "a complete file written by torch.save",
            "It is damaged or of another kind: copy it again.",
        ) from None
    epoch = content.get("epoch") if isinstance(content, dict) else None
    state = content
    if isinstance(content, dict) and not _is_state(content):
        state = next((content[key] for key in _STATE_KEYS if _is_state(content.get(key))), None)
    if not _is_state(state):
        inside = (
            f"a dict of {', '.join(map(str, list(content)[:5]))}"
            if isinstance(content, dict)
            else type(content).__name__
        )
        raise CheckpointError(
            str(path),
            inside,
            f"a state dict, raw or under {', '.join(_STATE_KEYS)}",
            "Save model.state_dict() with the code that trained it, and import that.",
        )
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    return state, epoch if isinstance(epoch, int) else None


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )
