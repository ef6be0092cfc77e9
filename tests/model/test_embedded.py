"""Encoders, CubeMLP and critics in models of other people: what fits is computed, what does not is one line."""

import pytest
import torch
from torch import nn

from engine.errors import DataError, EngineError, EstimatorError
from engine.model.cubemlp import CubeMLP
from engine.model.encoders import SequenceEncoder
from engine.model.estimators import Critic, MIEstimator

X, LENGTH = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([7, 3, 1, 5])


@pytest.mark.parametrize("kind", ["gru", "lstm", "conv"])
@pytest.mark.parametrize(
    ("x", "length", "told"),
    [
        (X, torch.tensor([7, 9, 1, 5]), "from 1 to 9"),
        (X, torch.tensor([7, 0, 1, 5]), "from 0 to 7"),
        (X, LENGTH.float(), "torch.float32"),
        (X, LENGTH[:3], r"shape \[3\]"),
        (X, LENGTH.tolist(), "a list"),
        (X[..., :4], LENGTH, r"frames \[4, 7, 4\]"),
        (X[0], LENGTH[:1], r"frames \[7, 5\]"),
        (X.double(), LENGTH, "float64 for parameters of torch.float32"),
    ],
)
def test_frames_and_lengths_that_do_not_fit(kind, x, length, told):
    """A convolution took any lengths without a word."""
    with pytest.raises(DataError, match=told):
        SequenceEncoder(kind, 5, 6)(x, length)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_recurrent_encoders_in_other_types(kind, dtype):
    """Against torch's own layer, row by row, in float64."""
    torch.manual_seed(0)
    encoder = SequenceEncoder(kind, 5, 6)
    options = {"batch_first": True, "bidirectional": True}
    layers = nn.GRU(5, 6, 2, **options) if kind == "gru" else nn.LSTM(5, 6, 1, **options)
    layers.load_state_dict(encoder.rnn.state_dict())
    layers = layers.double()
    found = encoder.to(dtype)(X.to(dtype), LENGTH)
    assert found.dtype == dtype
    for row, count in enumerate(LENGTH.tolist()):
        both = layers(X[row : row + 1, :count].double())[0]
        expected = torch.relu(nn.functional.layer_norm(both[..., :6] + both[..., 6:], (6,), eps=1e-6))[0]
        tolerance = {torch.bfloat16: 0.15, torch.float16: 0.02, torch.float64: 1e-5}[dtype]
        torch.testing.assert_close(found[row, :count].double(), expected, rtol=0, atol=tolerance)


def test_a_cube_of_any_number_of_blocks_by_default():
    for blocks in (1, 2, 3):
        torch.manual_seed(0)
        default = CubeMLP((5, 3, 8), [(4, 2, 6)] * blocks, [(5, 3, 8)] * blocks)
        torch.manual_seed(0)
        named = CubeMLP((5, 3, 8), [(4, 2, 6)] * blocks, [(5, 3, 8)] * blocks, res_project=[True] * blocks)
        cube = torch.randn(2, 5, 3, 8)
        assert torch.equal(default(cube), named(cube))


@pytest.mark.parametrize(
    "build", [lambda: MIEstimator(0, 3), lambda: MIEstimator("4", 3), lambda: Critic(4, 3, hidden=0)]
)
def test_widths_are_whole_numbers(build):
    with pytest.raises(EstimatorError, match=r"width = .*expected a whole number of at least 1"):
        build()


def test_features_that_are_no_tensors():
    with pytest.raises(EngineError, match=r"a ndarray; expected a torch\.Tensor"):
        MIEstimator(4, 3)(torch.randn(5, 4).numpy(), torch.randn(5, 3))
