"""The two sequence encoders of MIMRL on ragged batches, against torch.nn.GRU on packed sequences."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bench import shapes
from bench.runner import Setting, Work, assert_same_gradient
from engine.model.encoders import SequenceEncoder

TITLE = "bi-GRU encoders (audio 350x5, vision 310x20, ragged, B=32), forward and backward, against packed torch.nn.GRU"
GOALS = {"ratio": (3.0, 6.0)}
SIDES = ("engine", "baseline")
WIDTH, BATCH = 128, 32
LONGEST = {"audio": 350, "vision": 310}


class PackedGRU(nn.Module):
    """The reference's encoder: a packed 2-layer bidirectional nn.GRU, sum of the directions, LayerNorm, ReLU."""

    def __init__(self, d_in: int):
        super().__init__()
        self.rnn = nn.GRU(d_in, WIDTH, num_layers=2, bidirectional=True, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, length.cpu(), batch_first=True, enforce_sorted=False)
        h, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])
        forward, backward = h.chunk(2, dim=-1)
        return functional.relu(self.norm(forward + backward))


def inputs(batch: int, shorter: int, setting: Setting) -> dict[str, tuple[Tensor, Tensor]]:
    """{modality: (frames [B, L, d], length [B])}: MOSI-shaped lengths, the longest exactly LONGEST // shorter."""
    samples = shapes.mosi(batch, seed=1)
    inputs = {}
    for name, sequences in (("audio", samples.audio), ("vision", samples.vision)):
        most = LONGEST[name] // shorter
        lengths = np.clip([len(s) // shorter for s in sequences], 1, most)
        lengths[lengths.argmax()] = most
        x = torch.zeros(batch, most, sequences[0].shape[1])
        generator = torch.Generator().manual_seed(2)
        for row, n in zip(x, lengths, strict=True):
            row[:n] = torch.randn(int(n), x.shape[2], generator=generator)
        inputs[name] = x.to(setting.device), torch.from_numpy(lengths).to(setting.device)
    return inputs


def encoders(side: str, batch: dict[str, tuple[Tensor, Tensor]], setting: Setting) -> nn.ModuleDict:
    torch.manual_seed(0)
    widths = {name: x.shape[2] for name, (x, _) in batch.items()}
    eager = nn.ModuleDict({name: PackedGRU(d) for name, d in widths.items()})
    if side == "baseline":
        return eager.to(setting.device)
    ours = nn.ModuleDict({name: SequenceEncoder("gru", d, WIDTH) for name, d in widths.items()})
    ours.load_state_dict(eager.state_dict())
    return ours.to(setting.device)


def build(side: str, setting: Setting) -> Work:
    batch = inputs(BATCH, 4 if setting.quick else 1, setting)
    modules = encoders(side, batch, setting)
    cotangent = {name: torch.randn(*x.shape[:2], WIDTH, device=x.device) for name, (x, _) in batch.items()}

    def run() -> None:
        modules.zero_grad(set_to_none=True)
        for name, (x, length) in batch.items():
            (modules[name](x, length) * cotangent[name]).sum().backward()

    return Work(run, samples=BATCH)


def gate(setting: Setting) -> None:
    batch = inputs(7, 8, setting)
    ours, theirs = encoders("engine", batch, setting), encoders("baseline", batch, setting)
    for name, (x, length) in batch.items():
        valid = (torch.arange(x.shape[1], device=x.device) < length[:, None])[..., None]
        a, b = ours[name](x, length) * valid, theirs[name](x, length) * valid
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        a.square().sum().backward()
        b.square().sum().backward()
        expected = dict(theirs[name].named_parameters())
        for key, parameter in ours[name].named_parameters():
            assert_same_gradient(parameter.grad, expected[key].grad, f"{name} {key}")
