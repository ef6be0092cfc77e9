"""Audio and vision encoders: recurrent or convolutional, then LayerNorm and ReLU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from engine.errors import ConfigError
from engine.kernels.gradients import transformed
from engine.kernels.recurrent.op import available, bidirectional, bidirectional_norm, fuses_norm, parameters
from engine.model.frames import check_frames
from engine.vocabulary import ENCODERS

LAYER_NORM_EPS = 1e-6


def length_mask(length: Tensor, size: int) -> Tensor:
    """bool [B, size], true at positions before each row's length (int64 [B])."""
    return torch.arange(size, device=length.device) < length[:, None]


def nonzero_length(x: Tensor) -> Tensor:
    """int64 [B]: the number of frames of x [B, L, d] whose absolute sum is not 0, at least 1.

    This is the rule of the published code. A zero frame inside a sequence makes the length one too short, so that the
    LAST frame is lost, not the zero one.
    """
    return (x.abs().sum(-1) != 0).sum(1).clamp(min=1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x [B, L, d] over the positions where mask (bool [B, L]) is true -> [B, d]. 0 where there are none.

    >>> masked_mean(torch.tensor([[[2.0], [4.0], [9.0]]]), torch.tensor([[True, True, False]]))
    tensor([[3.]])
    """
    weight = mask.to(x.dtype)
    # on a GPU a sum is fewer launches than a product, and autocast does not round it to 16 bits
    total = (x * weight[..., None]).sum(1) if x.is_cuda else torch.einsum("bld,bl->bd", x, weight)
    return total / weight.sum(1, keepdim=True).clamp(min=1)


# torch.compile does not trace instances of nn.GRU or nn.LSTM. These are the same modules with another type.
class GRU(nn.RNNBase):
    def __init__(self, *sizes: int, **options: Any):
        super().__init__("GRU", *sizes, **options)

    forward = nn.GRU.forward


class LSTM(nn.RNNBase):
    def __init__(self, *sizes: int, **options: Any):
        super().__init__("LSTM", *sizes, **options)

    forward = nn.LSTM.forward
    permute_hidden = nn.LSTM.permute_hidden
    check_forward_args = nn.LSTM.check_forward_args
    get_expected_cell_size = nn.LSTM.get_expected_cell_size


def convolve(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """conv, of kernel 3 and padding 1, over x [B, L, d] -> [B, L, d_out], as one matrix product.

    It then has the precision of all products. cuDNN's convolutions have a setting of their own, which allows TF32.
    """
    windows = F.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1)  # [B, L, d, 3]
    return F.linear(windows.flatten(2), conv.weight.flatten(1), conv.bias)


class SequenceEncoder(nn.Module):
    """One modality's frames to the common width.

    gru: 2 bidirectional layers, the directions summed. lstm: 1 bidirectional layer, summed. conv: kernel 3, padding 1.
    Then LayerNorm (eps 1e-6) and ReLU. Recurrent matrices start orthogonal.

    Args:
        kind: gru, lstm or conv. d_in: width of a frame. d_out: the common width.
        zero_padding: True treats frames past the valid length as absent. The convolution reads zeros there and the
            output is zero there, so that a result does not depend on the padded width. False is what the published
            code does: the convolution reads the padding, and a recurrent encoder gives ReLU(LayerNorm's bias) there.
    """

    def __init__(self, kind: str, d_in: int, d_out: int, zero_padding: bool = True):
        super().__init__()
        self.kind, self.zero_padding, self.d_in = kind, zero_padding, d_in
        if kind == "gru":
            self.rnn = GRU(d_in, d_out, num_layers=2, bidirectional=True, batch_first=True)
        elif kind == "lstm":
            self.rnn = LSTM(d_in, d_out, num_layers=1, bidirectional=True, batch_first=True)
        elif kind == "conv":
            self.conv = nn.Conv1d(d_in, d_out, kernel_size=3, padding=1)
        else:
            raise ConfigError("model.encoder", repr(kind), "one of " + ", ".join(ENCODERS), "Choose one of these.")
        self.norm = nn.LayerNorm(d_out, eps=LAYER_NORM_EPS)
        for name, parameter in self.named_parameters():
            if "weight_hh" in name:
                nn.init.orthogonal_(parameter)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        """float32 [B, L, d_in], int64 [B] with 1 <= length <= L -> float32 [B, L, d_out]."""
        check_frames(f"{self.kind} encoder", x, length, self.d_in, self.norm.weight.dtype)
        weights = None if self.kind == "conv" else parameters(self.rnn)
        if weights is not None and fuses_norm(x, weights, self.norm):
            return bidirectional_norm(x, length, weights, self.kind, self.norm, self.zero_padding)
        mask = length_mask(length, x.shape[1])[..., None] if self.zero_padding else None
        if self.kind == "conv":
            x = x if mask is None else x * mask
            h = convolve(self.conv, x) if x.is_cuda else self.conv(x.transpose(1, 2)).transpose(1, 2)
        else:
            if weights is not None and (x.is_cuda or available(x) or transformed()):
                h = bidirectional(x, length, weights, self.kind)
            else:
                packed = pack_padded_sequence(x, length.cpu(), batch_first=True, enforce_sorted=False)
                h, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])
            forward, backward = h.chunk(2, dim=-1)
            h = (forward + backward).to(self.norm.weight.dtype)  # parameters may have 16 bits
        h = F.relu(self.norm(h))
        return h if mask is None else h * mask
