"""Audio and vision encoders: packing, padding, initialisation, and the reference's rule of lengths."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from bench.pretend import PretendedGpu
from engine.errors import ConfigError, DataError
from engine.model.encoders import ENCODERS, SequenceEncoder, convolve, length_mask, masked_mean, nonzero_length

LENGTH = torch.tensor([5, 9, 1, 7])


def padded(width=9, d=6):
    x = torch.randn(4, width, d)
    return x * length_mask(LENGTH, width)[..., None]


def encoder(kind, zero_padding=True, d_in=6, d_out=8):
    torch.manual_seed(1)
    module = SequenceEncoder(kind, d_in, d_out, zero_padding)
    torch.nn.init.normal_(module.norm.bias)
    return module


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("zero_padding", [False, True])
def test_a_valid_row_equals_the_row_alone(kind, zero_padding):
    """Recurrent encoders never see padding; the masked convolution sees zeros, as at a sequence's own end."""
    module, x = encoder(kind, zero_padding), padded()
    y = module(x, LENGTH)
    assert y.shape == (4, 9, 8)
    for i, n in enumerate(LENGTH.tolist()):
        alone = module(x[i : i + 1, :n], LENGTH[i : i + 1])
        torch.testing.assert_close(y[i, :n], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ENCODERS)
def test_zero_padding_ignores_width_and_content_of_the_padding(kind):
    module, x = encoder(kind), padded()
    y = module(x, LENGTH)
    mask = length_mask(LENGTH, 9)
    assert torch.all(y[~mask] == 0) and torch.all(y[mask].abs().sum(-1) > 0)
    wide = torch.cat([x, torch.zeros(4, 5, 6)], dim=1)
    torch.testing.assert_close(module(wide, LENGTH)[:, :9], y, rtol=1e-5, atol=1e-6)
    dirty = torch.where(mask[..., None], x, torch.full_like(x, 7.0))
    torch.testing.assert_close(module(dirty, LENGTH), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_reference_padding_is_the_constant_of_the_norm(kind):
    module = encoder(kind, zero_padding=False)
    y = module(padded(), LENGTH)
    rest = y[~length_mask(LENGTH, 9)]
    assert torch.equal(rest, F.relu(module.norm.bias).expand_as(rest)) and rest.abs().sum() > 0


def test_reference_convolution_reads_and_writes_the_padding():
    module, x = encoder("conv", zero_padding=False), padded()
    expected = F.relu(F.layer_norm(module.conv(x.mT).mT, (8,), module.norm.weight, module.norm.bias, 1e-6))
    torch.testing.assert_close(module(x, LENGTH), expected)


@pytest.mark.parametrize("kind, layers", [("gru", 2), ("lstm", 1)])
def test_directions_are_summed_and_layers_counted(kind, layers):
    module = encoder(kind)
    assert module.rnn.num_layers == layers and module.rnn.bidirectional
    x = torch.randn(2, 5, 6)
    h = module.rnn(x)[0]
    expected = F.relu(F.layer_norm(h[..., :8] + h[..., 8:], (8,), module.norm.weight, module.norm.bias, 1e-6))
    torch.testing.assert_close(module(x, torch.tensor([5, 5])), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_recurrent_matrices_start_orthogonal(kind):
    for name, weight in SequenceEncoder(kind, 6, 8).named_parameters():
        if "weight_hh" in name:
            torch.testing.assert_close(weight.T @ weight, torch.eye(8), rtol=0, atol=1e-5)


def test_nonzero_length_is_the_reference_rule():
    x = torch.ones(4, 5, 2)
    x[0, 3:] = 0
    x[1, 1] = 0  # an interior zero frame is counted out as well
    x[2] = 0
    x[3, 2] = torch.tensor([1.0, -1.0])  # sums to zero, its absolute sum does not
    assert nonzero_length(x).tolist() == [3, 4, 1, 5]


def test_masked_mean():
    x = torch.randn(2, 4, 3)
    mask = torch.tensor([[True, False, True, False], [False] * 4])
    torch.testing.assert_close(masked_mean(x, mask), torch.stack([(x[0, 0] + x[0, 2]) / 2, torch.zeros(3)]))


def test_unknown_encoder_names_the_key():
    with pytest.raises(ConfigError, match=r"model\.encoder.*rnn.*gru"):
        SequenceEncoder("rnn", 3, 4)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_convolution_as_one_product(length):
    """What a GPU runs."""
    conv = torch.nn.Conv1d(6, 8, kernel_size=3, padding=1, dtype=torch.float64)
    x = torch.randn(4, length, 6, dtype=torch.float64, requires_grad=True)
    found, expected = convolve(conv, x), conv(x.mT).mT
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    wanted = [x, *conv.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(y, wanted, weight) for y in (found, expected)))


def test_a_masked_mean_is_the_same_on_a_gpu():
    x, mask = torch.randn(4, 9, 5), length_mask(torch.tensor([9, 1, 4, 7]), 9)
    expected = masked_mean(x, mask)
    with PretendedGpu():
        found = masked_mean(x, mask)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["gru", "lstm", "conv"])
def test_every_row_needs_a_length(kind):
    """Shapes are looked at on a GPU, too, whose kernels would read what lies behind."""
    encoder, x = SequenceEncoder(kind, 3, 4), torch.ones(2, 5, 3)
    for device in (contextlib.nullcontext, PretendedGpu):
        for length in (torch.ones(1, dtype=torch.int64), torch.ones(2, 1, dtype=torch.int64)):
            with device(), pytest.raises(DataError, match="one per row"):
                encoder(x, length)
