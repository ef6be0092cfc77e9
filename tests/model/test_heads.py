import pytest
import torch

from bench.pretend import PretendedGpu
from engine.errors import ConfigError
from engine.model.heads import Head, make_head


def test_a_feature_of_128_or_less_has_one_linear():
    head = Head(128, 1, dropout=0.5)
    assert set(head.state_dict()) == {"layers.0.weight", "layers.0.bias"}
    x = torch.randn(4, 128)
    torch.testing.assert_close(head(x), x @ head.layers[0].weight.T + head.layers[0].bias)


def test_a_wider_feature_has_a_hidden_layer_with_dropout():
    head = Head(129, 3, dropout=0.5)
    assert {k: tuple(v.shape) for k, v in head.state_dict().items()} == {
        "layers.0.weight": (128, 129),
        "layers.0.bias": (128,),
        "layers.3.weight": (3, 128),
        "layers.3.bias": (3,),
    }
    x = torch.randn(4, 129)
    assert not torch.equal(head(x), head(x))
    hidden = torch.relu(x @ head.layers[0].weight.T + head.layers[0].bias)
    torch.testing.assert_close(head.eval()(x), hidden @ head.layers[3].weight.T + head.layers[3].bias)


def test_tasks():
    assert make_head(8, "regression", 1)(torch.zeros(2, 8)).shape == (2, 1)
    assert make_head(8, "classification", 7)(torch.zeros(2, 8)).shape == (2, 7)
    with pytest.raises(ConfigError, match=r"model\.num_class"):
        make_head(8, "classification", 1)


@pytest.mark.parametrize("dim", [8, 129])
def test_a_gpu_computes_in_the_parameters_type_what_autocast_left_in_16_bits(dim):
    """Fusion by TensorFusion ends in a Linear, whose result under autocast has 16 bits."""
    head, x = Head(dim, 1), torch.randn(4, dim).to(torch.bfloat16)
    expected = head(x.float())
    with PretendedGpu(), torch.autocast("cuda", torch.bfloat16):
        found = head(x)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
