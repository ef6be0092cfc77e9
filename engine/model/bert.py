"""BERT as an encoder, with the names, parameters and results of transformers' BertModel, but without importing it.

Importing transformers takes longer than a short run trains. Its model is still used for every other architecture, and
for a BERT with settings that are not listed here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.files import parse_json, read_text
from engine.loaders.text import CONFIG_BYTES
from engine.model.described import without_memory
from engine.model.fused_bert import attention_with_dropout

DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512, "type_vocab_size": 2, "initializer_range": 0.02, "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}  # fmt: skip
"""What transformers takes where a description says nothing."""
ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("bert",), "hidden_act": ("gelu",), "position_embedding_type": ("absolute",),
    "is_decoder": (False,), "add_cross_attention": (False,), "gradient_checkpointing": (False,),
    "chunk_size_feed_forward": (0,), "dtype": ("float32", None), "torch_dtype": ("float32", None),
}  # fmt: skip
"""Settings that change what is computed, with the values for which this module is right."""
IGNORED = {
    "_name_or_path", "architectures", "bos_token_id", "classifier_dropout", "eos_token_id", "finetuning_task",
    "id2label", "label2id", "num_labels", "problem_type", "tie_word_embeddings", "transformers_version", "use_cache",
    "tokenizer_class", "output_attentions", "output_hidden_states", "return_dict", "directionality", "model_max_length",
}  # fmt: skip
"""Settings that change nothing that is computed here."""
WEIGHTS = "model.safetensors"
ADAPTER = "adapter_config.json"
"""Beside it are weights that transformers adds to the model's, where peft is installed."""


def is_plain(description: Mapping[str, Any]) -> bool:
    """Whether this module computes what a Hugging Face description describes. One unknown setting is enough for no."""
    if description.get("model_type") != "bert":
        return False
    for name, value in description.items():
        if name in ONLY:
            if value not in ONLY[name]:
                return False
        elif name in DEFAULTS:
            sizes = type(DEFAULTS[name]) is int
            if type(value) is bool or not isinstance(value, int if sizes else (int, float)):
                return False
        elif name not in IGNORED:
            return False
    sizes = DEFAULTS | dict(description)
    heads = sizes["num_attention_heads"]
    shares = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    return all(sizes[n] > 0 for n in DEFAULTS if n.startswith(("num", "vocab", "max", "type"))) and (
        all(0 <= sizes[n] <= 1 for n in shares) and 0 <= sizes["initializer_range"] < math.inf
        and sizes["hidden_size"] > 0 and sizes["intermediate_size"] > 0 and sizes["hidden_size"] % heads == 0
        and 0 <= sizes["pad_token_id"] < sizes["vocab_size"]
    )  # fmt: skip


class BertConfig(SimpleNamespace):
    """The settings of a `Bert`, as attributes."""

    def to_json_string(self) -> str:
        """The settings as JSON, from which transformers builds the same architecture."""
        return json.dumps({name: value for name, value in vars(self).items() if not name.startswith("_")}, indent=2)


class Hidden(NamedTuple):
    """What a `Bert` returns: hidden states [B, L, hidden_size]."""

    last_hidden_state: Tensor


class Bert(nn.Module):
    """BERT's hidden states.

    Args:
        description: settings for which `is_plain` holds.

    Example:
        >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
        >>> encoder = Bert({"model_type": "bert", "vocab_size": 9, **sizes})
        >>> encoder(torch.tensor([[1, 2]]), torch.tensor([[1, 1]])).last_hidden_state.shape
        torch.Size([1, 2, 8])
    """

    def __init__(self, description: Mapping[str, Any]):
        super().__init__()
        self.config = BertConfig(**DEFAULTS | dict(description))
        self.embeddings = BertEmbeddings(self.config)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(BertLayer(self.config) for _ in range(self.config.num_hidden_layers))
        self.apply(self._begin)

    @torch.no_grad()
    def _begin(self, module: nn.Module) -> None:
        """Fresh weights as BERT's authors draw them."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.normal_(0.0, self.config.initializer_range)
        if isinstance(module, nn.Linear):
            module.bias.zero_()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].zero_()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Hidden:
        """Hidden states [B, L, hidden_size] as `last_hidden_state`.

        Args:
            input_ids: int64 [B, L].
            attention_mask: what each query sees: [B, L] with 0 for keys that none sees; or [B, 1, L, L], which is added
                to the scores.
            position_ids: int64 [B, L]; None counts from 0 in every row.
        """
        h = self.embeddings(input_ids, position_ids)
        if attention_mask is not None and attention_mask.dim() == 2:
            seen = attention_mask.to(torch.bool)
            length = input_ids.shape[1]
            looks = seen.device.type == "cpu" and not torch.compiler.is_compiling()  # a GPU would have to be waited for
            attention_mask = None if looks and seen.all() else seen[:, None, None, :].expand(-1, 1, length, -1)
        for layer in self.encoder.layer:
            h = layer(h, attention_mask)
        return Hidden(h)


class BertEmbeddings(nn.Module):
    """Word + type + position through LayerNorm and dropout."""

    def __init__(self, c: BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size, padding_idx=c.pad_token_id)
        self.position_embeddings = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.token_type_embeddings = nn.Embedding(c.type_vocab_size, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        length, most = input_ids.shape[1], self.position_embeddings.num_embeddings
        if position_ids is None:
            if length > most:
                raise ConfigError(
                    "text", f"{length} tokens", f"at most {most}, the model's positions", "Cut the texts."
                )
            position_ids = torch.arange(length, device=input_ids.device)[None]
        h = self.word_embeddings(input_ids) + self.token_type_embeddings(torch.zeros_like(input_ids))
        return self.dropout(self.LayerNorm(h + self.position_embeddings(position_ids)))


class BertLayer(nn.Module):
    """Self-attention and two layers of perceptrons, each with a LayerNorm of its sum with what went in."""

    def __init__(self, c: BertConfig):
        super().__init__()
        self.attention = nn.Module()
        self.attention.self = BertSelfAttention(c)
        self.attention.output = BertOutput(c, c.hidden_size)
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(c.hidden_size, c.intermediate_size)
        self.output = BertOutput(c, c.intermediate_size)

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        h = self.attention.output(self.attention.self(h, mask), h)
        return self.output(F.gelu(self.intermediate.dense(h)), h)


class BertSelfAttention(nn.Module):
    """Attention [B, L, hidden_size] -> [B, L, hidden_size] before its output's projection."""

    def __init__(self, c: BertConfig):
        super().__init__()
        self.num_attention_heads = c.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(c.hidden_size, c.hidden_size) for _ in range(3))
        self.dropout = nn.Dropout(c.attention_probs_dropout_prob)

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        width = h.shape[-1] // self.num_attention_heads
        query, key, value = (
            project(h).view(*h.shape[:2], -1, width).transpose(1, 2) for project in (self.query, self.key, self.value)
        )
        p = self.dropout.p if self.training else 0.0
        if p > 0 and h.device.type == "cpu":
            out = attention_with_dropout(query, key, value, mask, p, width**-0.5)
        else:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=p, scale=width**-0.5)
        return out.transpose(1, 2).reshape(h.shape)


class BertOutput(nn.Module):
    """Projection and dropout of x, then LayerNorm of the sum with the residual."""

    def __init__(self, c: BertConfig, size: int):
        super().__init__()
        self.dense = nn.Linear(size, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


def load_bert(folder: Path) -> Bert | None:
    """The model of a folder in float32. None where the folder holds another model, or where anything is unusual.

    transformers then reads the folder, or says what is wrong with it.
    """
    from safetensors import SafetensorError, safe_open

    if not (folder / WEIGHTS).is_file() or (folder / ADAPTER).exists():
        return None
    try:
        description = parse_json(read_text(folder / "config.json", CONFIG_BYTES))
        if not isinstance(description, dict) or not is_plain(description):
            return None
        with without_memory():  # the file has all weights
            model = Bert(description)
        with safe_open(folder / WEIGHTS, framework="pt", device="cpu") as file:
            if not set(model.state_dict()) <= set(file.keys()):
                return None
            # a clone leaves the file's memory map
            state = {name: file.get_tensor(name).clone() for name in model.state_dict()}
    except (OSError, ValueError, SafetensorError):
        return None
    fits = all(v.shape == state[n].shape and state[n].dtype == torch.float32 for n, v in model.state_dict().items())
    if not fits:
        return None
    model.load_state_dict(state, assign=True)
    return model.eval()
