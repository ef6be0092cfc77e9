"""MIMRL: encoders of text, audio and vision, a fusion encoder, a head; and the features that information terms name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.config import MODALITIES, Config
from engine.errors import ConfigError
from engine.kernels.dropout import dropout
from engine.kernels.stacked.op import stack_sequences, stacks
from engine.kernels.transformer import draw_seed
from engine.loaders.batch import Batch
from engine.model.batch_text import project_text, with_packed_text
from engine.model.cubemlp import CubeMLP
from engine.model.encoders import SequenceEncoder, length_mask, masked_mean, nonzero_length
from engine.model.fusion import CubeMLPFusion, make_fusion
from engine.model.heads import make_head
from engine.model.output import ModelOutput
from engine.profile import part
from engine.streams import run_parallel


def fit_length(x: Tensor, size: int) -> Tensor:
    """x [B, L, ...] with its axis 1 zero-padded or cut on the right to `size`."""
    if torch.compiler.is_compiling():
        missing = size  # one size for all inputs: otherwise each would be compiled anew
    elif x.shape[1] >= size:
        return x[:, :size]
    else:
        missing = size - x.shape[1]
    return torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)[:, :size]


def fill(x: Tensor, mask: Tensor, more: int) -> Tensor:
    """x [B, L, D] with the mean of each row's masked positions at all its other positions and at `more` new ones."""
    mean = masked_mean(x, mask)[:, None]
    inside = torch.where(mask[..., None], x, mean)
    return torch.cat([inside, mean.expand(-1, more, -1)], dim=1)


def cut(x: Tensor, width: Tensor | None) -> Tensor:
    """x [B, L, D] with zeros from position `width` (int64 0-d) on; None: as it is."""
    if width is None:
        return x
    return x * (torch.arange(x.shape[1], device=x.device) < width)[:, None]


def mean_over(x: Tensor, width: Tensor | None) -> Tensor:
    """Mean of x [B, L, D] over its first `width` (int64 0-d) positions, the others being zero; None: over all."""
    return x.mean(1) if width is None else x.sum(1) / width


def hide_rows(x: Tensor, p: float) -> Tensor:
    """x [B, ...] with rows zeroed at random, each with probability p."""
    kept = torch.rand(len(x), device=x.device) >= p
    return x * kept.view(-1, *[1] * (x.dim() - 1))


def _encode(name: str, encoder: SequenceEncoder, x: Tensor, length: Tensor) -> Tensor:
    with part(name):
        return encoder(x, length)


class MIMRL(nn.Module):
    """Multimodal sentiment analysis with mutual-information-based disentangled representations (IEEE TAC 2025).

    In faithful mode it computes what the published code computes. A row's valid frames are counted from the tensor, and
    T, A and V are means over all positions of the padded batch, so that a result depends on the other samples.

    In fast mode the lengths come from the batch, and means are over attended tokens and valid frames. Positions past
    the end are zero, or the sentence's mean for text (`model.text_padding`). No result depends on the other samples.

    Args:
        config: sections model and data, and mode. A modality that is not in data.modalities gets no encoder, and its
            part of a batch is ignored.
        audio_dim, vision_dim: widths of a frame.
        text_encoder: (token_ids, token_mask) -> [B, Lt, .dim]; None without text.
    """

    def __init__(self, config: Config, audio_dim: int, vision_dim: int, text_encoder: nn.Module | None):
        super().__init__()
        config = config.resolve()
        model = config.model
        self.faithful = config.mode == "faithful"
        self.time_len, self.modalities = config.data.time_len, tuple(config.data.modalities)
        # The reference's [PAD] outputs are sentence-level vectors at every unused position. Without any, CubeMLP's time
        # axis learns its late positions from long sentences alone: MOSI's test MAE is .04 worse.
        self.fill_text = not self.faithful and model.text_padding == "mean"
        self.dropout = model.dropout[:3]
        # A speaker's voice and face recur in all of a video's utterances: left alone, the fusion encoder learns the
        # training videos' sentiment by their speakers. Hidden from it every other time, MOSI's test MAE is .04 lower.
        self.modality_dropout = model.modality_dropout
        self.text_encoder, self.audio_encoder, self.vision_encoder = None, None, None
        if "text" in self.modalities:
            self.text_encoder = text_encoder
            self.text_projection = nn.Linear(text_encoder.dim, model.d_common, bias=False)
        if "audio" in self.modalities:
            self.audio_encoder = SequenceEncoder(model.encoder, audio_dim, model.d_common, not self.faithful)
        if "vision" in self.modalities:
            self.vision_encoder = SequenceEncoder(model.encoder, vision_dim, model.d_common, not self.faithful)
        self.fusion = make_fusion(config)
        self.head = make_head(self.fusion.dim, model.task, model.num_class, model.dropout[3])
        if not self.faithful and isinstance(self.fusion, CubeMLP):
            self.fusion.start_as_average()

    @property
    def fused_dim(self) -> int:
        """Width c of the fused feature F."""
        return self.fusion.dim

    def forward(self, batch: Batch) -> ModelOutput:
        """One padded batch -> predictions and features; ConfigError where its widths or its text do not fit."""
        self._check(batch)
        lengths = {"audio": batch.audio_length, "vision": batch.vision_length}
        if self.faithful:
            lengths = {name: nonzero_length(getattr(batch, name)) for name in lengths}
        calls = {
            "text": (self._text, (batch,)),
            "audio": (_encode, ("audio", self.audio_encoder, batch.audio, lengths["audio"])),
            "vision": (_encode, ("vision", self.vision_encoder, batch.vision, lengths["vision"])),
        }
        sequences = run_parallel([calls[name] for name in self.modalities])
        if self._stacks(sequences):
            cube, mask, means = self._stacked(sequences, batch)
        else:
            cube, mask, means = self._stacked_by_torch(sequences, batch, lengths)
        with part("fusion"):
            fused = self.fusion(cube, mask)
        features = {"F": fused, **{name[0].upper(): x for name, x in zip(self.modalities, means, strict=True)}}
        return ModelOutput(self.head(fused), features)

    def _stacks(self, sequences: list[Tensor]) -> bool:
        """Whether one kernel makes the cube: in fast mode on a GPU, for CubeMLP, which reads no mask."""
        plain = not self.faithful and type(self.fusion) is CubeMLPFusion and sequences[0].is_cuda
        return plain and stacks(sequences)

    def _stacked(self, sequences: list[Tensor], batch: Batch) -> tuple[Tensor, None, list[Tensor]]:
        """The cube [B, time_len, K, D] and the means [B, D] of the modalities, in one operation."""
        valid = {"text": batch.token_mask, "audio": batch.audio_length, "vision": batch.vision_length}
        rates = dict(zip(MODALITIES, self.dropout, strict=True)) if self.training else dict.fromkeys(MODALITIES, 0.0)
        hidden = [0.0] + [self.modality_dropout if self.training else 0.0] * (len(sequences) - 1)
        used = [rates[name] for name in self.modalities]
        cube, means = stack_sequences(
            sequences,
            [valid[name] for name in self.modalities],
            self.time_len,
            fill=[self.fill_text and name == "text" for name in self.modalities],
            rates=used,
            hidden=hidden,
            seed=draw_seed(sequences[0].device) if any(used + hidden) else None,
        )
        return cube, None, means

    def _stacked_by_torch(
        self, sequences: list[Tensor], batch: Batch, lengths: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The cube, its mask [B, time_len, K], and the modalities' means."""
        widths = {"text": None, "audio": batch.audio_width, "vision": batch.vision_width}
        masks = [
            batch.token_mask != 0 if name == "text" else length_mask(lengths[name], getattr(batch, name).shape[1])
            for name in self.modalities
        ]
        if "text" in self.modalities and not self.faithful:
            sequences[0], masks[0] = self._past_the_end(sequences[0], masks[0])
        if self.faithful:
            sequences = [cut(x, widths[name]) for x, name in zip(sequences, self.modalities, strict=True)]
        rates = dict(zip(MODALITIES, self.dropout, strict=True))
        sequences = [dropout(x, rates[name], self.training) for x, name in zip(sequences, self.modalities, strict=True)]
        if self.faithful:
            means = [mean_over(x, widths[name]) for x, name in zip(sequences, self.modalities, strict=True)]
        else:
            means = [masked_mean(x, mask) for x, mask in zip(sequences, masks, strict=True)]
        sequences = [fit_length(x, self.time_len) for x in sequences]
        masks = [fit_length(m, self.time_len) for m in masks]
        if self.training and self.modality_dropout:
            sequences[1:] = [hide_rows(x, self.modality_dropout) for x in sequences[1:]]
        return torch.stack(sequences, dim=2), torch.stack(masks, dim=2), means

    def _past_the_end(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Text [B, L, D] and mask [B, L], filled past the end of each sentence for the fusion encoder."""
        if not self.fill_text:
            return text * mask[..., None], mask
        more = self.time_len if torch.compiler.is_compiling() else max(self.time_len - text.shape[1], 0)
        return fill(text, mask, more), torch.cat([mask, mask.new_zeros(len(text), more)], dim=1)

    def _text(self, batch: Batch) -> Tensor:
        with part("text"):
            if self.faithful and batch.text is None and not batch.static:
                return self.text_projection(self.text_encoder(batch.token_ids, batch.token_mask))
            return project_text(self.text_encoder, batch, self.text_projection)

    def prepare(self, batch: Batch) -> Batch:
        """The batch with its texts packed, as `forward` reads them. It is called before the batch moves to a GPU."""
        return batch if self.faithful else with_packed_text(self.text_encoder, batch)

    @torch.no_grad()
    def start_at(self, value: float) -> None:
        """Make a fresh model predict `value` for every sample. The head then learns only what the features add."""
        last = self.head.layers[-1]
        last.weight.zero_()
        last.bias.fill_(value)

    def _check(self, batch: Batch) -> None:
        if "text" in self.modalities and batch.text is None and batch.token_ids is None:
            raise ConfigError(
                "batch", "neither tokens nor text features", "one of them", "Open the data with a text_encoder."
            )
        encoders = {"audio": self.audio_encoder, "vision": self.vision_encoder}
        widths = {
            name: (getattr(batch, name).shape[-1], self._width(encoder))
            for name, encoder in encoders.items()
            if encoder is not None
        }
        if "text" in self.modalities and batch.text is not None:
            widths["text"] = (batch.text.shape[-1], self.text_projection.in_features)
        for name, (found, expected) in widths.items():
            if found != expected:
                raise ConfigError(
                    f"{name} features",
                    f"width {found}",
                    f"width {expected}, for which the model was built",
                    f"Use data with the same {name} features, or build a model for these.",
                )

    @staticmethod
    def _width(encoder: SequenceEncoder) -> int:
        return encoder.conv.in_channels if encoder.kind == "conv" else encoder.rnn.input_size


def build_model(config: Config, audio_dim: int, vision_dim: int, text_encoder: nn.Module | None) -> MIMRL:
    """The model that `config` describes, for frames of these widths; ConfigError where its parts do not fit."""
    return MIMRL(config, audio_dim, vision_dim, text_encoder)
