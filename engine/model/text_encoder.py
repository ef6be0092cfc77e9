"""Text encoders: any Hugging Face encoder with a last hidden state, MiniLM, or precomputed features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.kernels import dropout as ops
from engine.loaders.batch import PackedText
from engine.loaders.text import check_model_files, check_sizes, quiet
from engine.model import fused_bert
from engine.model.bert import Bert, is_plain, load_bert
from engine.model.pretrained import first_line, known_code_only, load_pretrained, refuse_kernels, resolve_text_model
from engine.sharded import is_sharded

# Models that take 0-based positions and a mask over (query, key) pairs, so that several texts can share one row.
PACKABLE = fused_bert.TYPES
ATTENTION = "engine"  # the name under which transformers knows `_attention`
POSITIONS = ("position_embeddings", "embed_positions", "wpe")  # what models call their learned positions
FROZEN_LAYERS = 9  # freeze=part: encoder.layer 0..8, as in the reference
# What one more call of MiniLM costs, in tokens: about 26 ms beside .75 ms a token (forward and backward, one core).
CALL_OVERHEAD = 32


class TextEncoder(nn.Module):
    """A Hugging Face encoder's last hidden state.

    The pooler is never used: it is dropped, and its weights in a loaded state dict are ignored.

    Args:
        model: any encoder whose output has last_hidden_state. Its own dropout stays as its config says.
        freeze: no; part (encoder.layer 0..8 frozen, embeddings and later layers trained); all.

    Raises:
        ConfigError: freeze=part of a model without embeddings and encoder.layer.
    """

    def __init__(self, model: nn.Module, freeze: str = "no"):
        super().__init__()
        self.model = model
        self.dim: int = model.config.hidden_size
        _use_own_dropout(model)
        if isinstance(getattr(model, "pooler", None), nn.Module):
            model.pooler = None
        self.register_load_state_dict_pre_hook(_ignore_pooler)
        if freeze == "all":
            model.requires_grad_(False)
        elif freeze == "part":
            layers = getattr(getattr(model, "encoder", None), "layer", None)
            if layers is None or not hasattr(model, "embeddings"):
                raise ConfigError(
                    "text.freeze=part",
                    f"{type(model).__name__}, which has no embeddings and encoder.layer",
                    "a BERT-like encoder",
                    "Use text.freeze=no or all.",
                )
            for layer in layers[:FROZEN_LAYERS]:
                layer.requires_grad_(False)

    @property
    def vocabulary(self) -> int:
        """Tokens that have an embedding."""
        return self.model.get_input_embeddings().num_embeddings

    @property
    def positions(self) -> int | None:
        """The most tokens that a text may have. None where the model learns no position one by one."""
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITIONS:
                # RoBERTa and its like count from behind the padding token's id, OPT from an offset
                unused = 0 if module.padding_idx is None else module.padding_idx + 1
                return module.num_embeddings - unused - getattr(module, "offset", 0)
        return None

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        """int64 [B, Lt] twice -> float32 [B, Lt, dim]. Padded positions hold whatever the model gives there."""
        if token_ids.is_cuda and fused_bert.fusable(self.model):
            return encode_padded(self, token_ids, token_mask)
        return self.model(input_ids=token_ids, attention_mask=token_mask).last_hidden_state

    def describe(self) -> dict[str, Any]:
        """Plain values from which `text_encoder_from_config` builds the same architecture, without weights."""
        return json.loads(self.model.config.to_json_string())


def _use_own_dropout(model: nn.Module) -> None:
    """Replace torch's dropout by `engine.kernels.dropout`, in attention, too. Names and weights stay."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, ops.Dropout(child.p))
    if model.config.model_type in PACKABLE and getattr(model.config, "_attn_implementation", None) == "sdpa":
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        AttentionInterface.register(ATTENTION, _attention)
        AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.set_attn_implementation(ATTENTION)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention [B, heads, L, d] -> [B, L, heads, d]. On a CPU with dropout, torch's fused attention is replaced."""
    if dropout == 0 or query.device.type != "cpu":
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = fused_bert.attention_with_dropout(query, key, value, attention_mask, dropout, scaling)
    return out.transpose(1, 2), None


def _ignore_pooler(module: nn.Module, state_dict: dict, prefix: str, *_: Any) -> None:
    for key in [k for k in state_dict if k.startswith(prefix + "model.pooler.")]:
        del state_dict[key]


class PrecomputedText(nn.Module):
    """Takes the place of a text encoder where the data hold text features of width `dim`."""

    def __init__(self, dim: int):
        super().__init__()
        if type(dim) is not int or dim < 1:
            raise ConfigError("text_encoder=features", f"a width of {dim!r}", "a whole number from 1", "Convert again.")
        self.dim = dim

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        raise ConfigError(
            "text_encoder=features", "a batch of tokens", "precomputed text features", "Name a text encoder instead."
        )

    def describe(self) -> dict[str, Any]:
        return {"model_type": "features", "dim": self.dim}


def text_encoder_from_config(description: dict[str, Any], freeze: str = "no") -> nn.Module:
    """A text encoder with fresh weights from the result of `describe`. Its state dict can then be loaded offline.

    Args:
        freeze: no, part or all.

    Raises:
        ConfigError: the installed transformers does not know the model_type, or it needs code of its own, which is
            never run.
    """
    settings = {str(key): value for key, value in description.items()}
    check_sizes(settings, "a run's text encoder")
    model_type = settings.pop("model_type", None)
    if model_type == "features":
        return PrecomputedText(settings.get("dim"))
    if is_plain(description):
        return TextEncoder(Bert(description), freeze)
    from transformers import AutoConfig, AutoModel

    try:
        with quiet():
            config = AutoConfig.for_model(model_type, **settings)
    except Exception as error:  # of many kinds, by what is wrong in the description
        raise ConfigError(
            "text encoder's model_type",
            repr(model_type),
            "a type that the installed transformers knows",
            "Install the version of transformers that the model needs.",
        ) from error
    source = f"model_type {model_type!r}"
    refuse_kernels(source, config)
    try:
        with known_code_only(source), quiet():
            model = AutoModel.from_config(config, trust_remote_code=False)
        return TextEncoder(model.float(), freeze)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            "text encoder's model_type",
            f"{model_type!r}: {first_line(error)}",
            "a type that is an encoder in the installed transformers",
            "Use the run folder as it was written.",
        ) from error


def load_text_encoder(name: str, freeze: str = "no", dim: int | None = None) -> nn.Module:
    """The text encoder that `text_encoder: name` names, in fp32.

    Args:
        name: minilm, a local model folder, a Hugging Face name, or features.
        freeze: no, part or all.
        dim: width of the precomputed text features, for `features`.

    Raises:
        ConfigError: the model cannot be found, read or frozen, or is no encoder of text.
    """
    if name == "features":
        if not dim:
            raise ConfigError(
                "text_encoder=features",
                "data without text features",
                "data that hold them",
                "Name a text encoder, such as text_encoder=minilm.",
            )
        return PrecomputedText(dim)
    model: Any = _plain_bert(name)
    if model is None:
        from transformers import AutoModel

        model = load_pretrained(AutoModel, name).float()
    _check_reads_text(model, name)
    return TextEncoder(model, freeze)


def _plain_bert(name: str) -> Bert | None:
    """The model of a folder that needs no transformers, if `name` is one."""
    source = Path(resolve_text_model(name))
    if not source.is_dir():
        return None
    check_model_files(source)
    return load_bert(source)


def _check_reads_text(model: nn.Module, name: str) -> None:
    """Run a model on two tokens. Raise ConfigError unless it gives a hidden state for each."""
    config, embeddings = model.config, model.get_input_embeddings()
    problem = None
    if getattr(config, "is_encoder_decoder", False):
        problem = "an encoder-decoder model"
    elif not isinstance(embeddings, nn.Embedding) or not hasattr(config, "hidden_size"):
        problem = "a model that does not read tokens alone"
    else:
        tokens = torch.zeros(1, 2, dtype=torch.long)
        try:
            with torch.no_grad():
                hidden = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
            if hidden.shape != (1, 2, config.hidden_size):
                problem = f"a model that makes {tuple(hidden.shape)} of two tokens"
        except Exception as cause:  # a model of any kind may fail in any way
            problem = f"a model that fails on two tokens ({' '.join(str(cause).split())[:200]})"
    if problem:
        raise ConfigError(
            f"text_encoder={name}", f"{problem} (model_type {config.model_type})",
            "a text encoder with a last hidden state, such as BERT or RoBERTa", "Name another encoder.",
        )  # fmt: skip


def length_groups(length: list[int], overhead: int = CALL_OVERHEAD) -> list[list[int]]:
    """Group rows by length so that running each group, padded to its longest row, costs least.

    A group costs its number of rows times its longest length, plus `overhead` tokens for the call. Dynamic programming
    finds the best cut of the sorted rows exactly.

    >>> length_groups([5, 100, 6, 98], overhead=10)
    [[2, 0], [1, 3]]
    """
    rows = sorted(range(len(length)), key=lambda i: -length[i])
    best, start = [0.0], [0]
    for end in range(1, len(rows) + 1):
        cost, s = min((best[s] + (end - s) * length[rows[s]] + overhead, s) for s in range(end))
        best.append(cost)
        start.append(s)
    groups, end = [], len(rows)
    while end:
        groups.append(rows[start[end] : end])
        end = start[end]
    return groups


def pack_rows(length: list[int], width: int) -> tuple[list[int], int]:
    """Pack texts end to end into rows of `width` tokens: the longest first, each into the first row with room.

    >>> pack_rows([2, 5, 3], width=5)
    ([8, 0, 5], 2)

    Returns:
        the start of each text in the flattened [rows, width], and the number of rows.
    """
    used: list[int] = []
    start = [0] * len(length)
    for i in sorted(range(len(length)), key=lambda i: -length[i]):
        row = next((r for r, n in enumerate(used) if n + length[i] <= width), len(used))
        if row == len(used):
            used.append(0)
        start[i] = row * width + used[row]
        used[row] += length[i]
    return start, len(used)


def packable(encoder: nn.Module) -> bool:
    """Whether `encode_packed` can run this encoder."""
    return isinstance(encoder, TextEncoder) and encoder.model.config.model_type in PACKABLE


def text_lengths(token_mask: Tensor) -> list[int]:
    """Positions up to each text's last attended token, at least 1."""
    column = torch.arange(1, token_mask.shape[1] + 1, device=token_mask.device)
    return (column * (token_mask != 0)).amax(1).clamp(min=1).tolist()


def pack_text(token_ids: Tensor, token_mask: Tensor) -> PackedText:
    """Texts [B, Lt] laid out end to end (`pack_rows`). On a GPU this waits for the device, so pack in the loader."""
    length, device = text_lengths(token_mask), token_ids.device
    width = max(length)
    start, rows = pack_rows(length, width)
    column = torch.arange(width, device=device).expand(len(length), width)
    real = column < torch.tensor(length, device=device)[:, None]
    place = torch.where(real, torch.tensor(start, device=device)[:, None] + column, 0)
    ids = torch.zeros(rows * width, dtype=torch.long, device=device)
    position, text = torch.zeros_like(ids), torch.full_like(ids, -1)
    ids[place[real]] = token_ids[:, :width][real]
    position[place[real]] = column[real]
    attended = real & (token_mask[:, :width] != 0)
    text[place[attended]] = torch.arange(len(length), device=device)[:, None].expand_as(real)[attended]
    return PackedText(ids.view(rows, width), position.view(rows, width), text.view(rows, width), place)


def encode_packed(encoder: TextEncoder, packed: PackedText) -> Tensor:
    """Hidden states of packed texts, [B, L, dim] for a longest text of L tokens. Each text attends to itself only."""
    # unattended places see one another, so that no row of the softmax is empty
    apart = packed.text[:, None, :, None] != packed.text[:, None, None, :]
    if apart.is_cuda and fused_bert.fusable(encoder.model):
        bias = fused_bert.score_bias(apart, fused_bert.product_type(encoder.model, apart.device))
        h = fused_bert.last_hidden_state(encoder.model, packed.token_ids, bias, packed.position)
        return h.flatten(0, 1)[packed.place]
    dtype = encoder.model.get_input_embeddings().weight.dtype
    bias = torch.zeros(apart.shape, dtype=dtype, device=apart.device).masked_fill(apart, torch.finfo(dtype).min)
    output = encoder.model(input_ids=packed.token_ids, attention_mask=bias, position_ids=packed.position)
    return output.last_hidden_state.flatten(0, 1)[packed.place]


def encode_padded(
    encoder: nn.Module, token_ids: Tensor, token_mask: Tensor, projection: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Run `encoder` on a batch with its padding: [B, Lt] twice -> [B, Lt, dim].

    BERT and Electra run in few launches (`engine.model.fused_bert`). They read nothing back and no size depends on
    values, so that a CUDA graph can hold them. Other encoders are called as they are. Attended positions equal those of
    `encode_without_padding` up to rounding, but training draws other dropout masks. The other positions mean nothing.

    projection: [d, dim], by which the result is multiplied: [B, Lt, d], of autocast's type where autocast is on.
    """
    if not (isinstance(encoder, TextEncoder) and fused_bert.fusable(encoder.model)):
        h = encoder(token_ids, token_mask)
        return h if projection is None else F.linear(h, projection)
    bias = fused_bert.mask_of(encoder.model, token_mask)
    return fused_bert.last_hidden_state(encoder.model, token_ids, bias, projection=projection)


def encode_without_padding(encoder: nn.Module, token_ids: Tensor, token_mask: Tensor) -> Tensor:
    """Run `encoder` on a batch with little of its padding: [B, Lt] twice -> [B, Lt, dim].

    BERT and Electra run once on texts packed end to end (`pack_text`). Each text attends to itself only and counts its
    positions from 0. Other encoders run on a few groups of similar length (`length_groups`), or once where the ranks
    hold them in parts. Attended positions equal those of one padded call up to rounding. The other positions mean
    nothing.
    """
    size = token_ids.shape[1]
    if packable(encoder):
        h = encode_packed(encoder, pack_text(token_ids, token_mask))
        return F.pad(h, (0, 0, 0, size - h.shape[1]))
    if is_sharded(next(encoder.parameters(), None)):  # the ranks must call it equally often
        return encoder(token_ids, token_mask)
    length = text_lengths(token_mask)
    groups = length_groups(length)
    parts = []
    for group in groups:
        width = max(length[i] for i in group)
        h = encoder(token_ids[group, :width], token_mask[group, :width])
        parts.append(F.pad(h, (0, 0, 0, size - width)))
    order = torch.tensor([i for group in groups for i in group], device=token_ids.device)
    return torch.cat(parts)[order.argsort()]
