"""CubeMLP against its formula written out a second way, every option, and its errors."""

import pytest
import torch
import torch.nn.functional as F

from engine.config import ACTIVATIONS
from engine.errors import ConfigError
from engine.model.cubemlp import AxisMix, CubeMLP, compose, make_activation

FUNCTIONS = {
    "elu": F.elu,
    "gelu": F.gelu,
    "hardshrink": F.hardshrink,
    "hardtanh": F.hardtanh,
    "leakyrelu": F.leaky_relu,
    "prelu": lambda x: torch.where(x > 0, x, 0.25 * x),
    "relu": F.relu,
    "rrelu": F.rrelu,
    "tanh": torch.tanh,
}


def normalise(x, axis, weight, bias, eps=1e-6):
    shape = [1] * x.dim()
    shape[axis] = -1
    mean, var = x.mean(axis, keepdim=True), x.var(axis, keepdim=True, unbiased=False)
    return (x - mean) / (var + eps).sqrt() * weight.view(shape) + bias.view(shape)


def along(x, axis, weight, bias=None):
    """A Linear along `axis`, as a sum over that index."""
    y = torch.einsum("oi,b...i->b...o", weight, x.movedim(axis, -1))
    return (y if bias is None else y + bias).movedim(-1, axis)


def formula(mix: AxisMix, x, function):
    p = dict(mix.named_parameters())
    axis = mix.axis
    u = normalise(x, axis, p["norm.weight"], p["norm.bias"]) if mix.ln_first else x
    h = along(u, axis, p["fc1.weight"], p.get("fc1.bias"))
    h = along(function(h), axis, p["fc2.weight"], p.get("fc2.bias"))
    y = h + (along(x, axis, p["residual.weight"]) if "residual.weight" in p else x)
    return y if mix.ln_first else normalise(y, axis, p["norm.weight"], p["norm.bias"])


def randomise(module):
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module


@pytest.mark.parametrize("activate", ACTIVATIONS)
def test_every_activation(activate):
    torch.manual_seed(0)
    mix = AxisMix(1, 6, 5, 4, activate=activate).double()
    assert any(n == "act.weight" for n, _ in mix.named_parameters()) == (activate == "prelu")
    with torch.no_grad():
        for name, p in mix.named_parameters():
            if not name.startswith("act"):
                p.normal_()
    x = torch.randn(3, 6, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(mix.eval()(x), formula(mix, x, FUNCTIONS[activate]))


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("ln_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("res_project", [False, True])
def test_every_option_on_every_axis(axis, ln_first, bias, res_project):
    torch.manual_seed(0)
    size = (5, 3, 8)[axis - 1]
    d_out = size + 2 if res_project else size
    mix = randomise(AxisMix(axis, size, 4, d_out, "tanh", bias, ln_first, res_project).double())
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    y = mix(x)
    assert y.shape[axis] == d_out
    expected = formula(mix, x, torch.tanh)
    torch.testing.assert_close(y, expected)
    cotangent = torch.randn_like(y)
    inputs = [x, *mix.parameters()]
    for found, wanted in zip(
        torch.autograd.grad(y, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_axes_are_mixed_in_the_order_time_modality_channel():
    torch.manual_seed(0)
    model = randomise(CubeMLP((5, 3, 8), [(4, 2, 6)], [(7, 2, 9)], "relu", res_project=[True]))
    x = torch.randn(2, 5, 3, 8)
    block = model.blocks[0]
    ordered = formula(block.channel, formula(block.modality, formula(block.time, x, F.relu), F.relu), F.relu)
    assert model(x).shape == (2, 7, 2, 9)
    torch.testing.assert_close(model(x), ordered, rtol=1e-4, atol=1e-4)
    swapped = formula(block.time, formula(block.modality, formula(block.channel, x, F.relu), F.relu), F.relu)
    assert (model(x) - swapped).abs().max() > 1e-2


@pytest.mark.parametrize("which", [0, 1, 2])
def test_dropout_of_each_axis(which):
    """A rate belongs to one axis and acts in training only, on the MLP and not on the residual path."""
    torch.manual_seed(0)
    rates = [0.0, 0.0, 0.0]
    rates[which] = 0.5
    model = CubeMLP((5, 3, 8), [(5, 3, 8)], [(5, 3, 8)], "relu", True, True, [False], rates)
    mix = [model.blocks[0].time, model.blocks[0].modality, model.blocks[0].channel][which]
    x = torch.randn(4, 5, 3, 8)
    whole = mix.eval()(x) - x
    dropped = mix.train()(x) - x
    kept = dropped.abs() > 1e-7
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(dropped[kept], 2 * whole[kept], rtol=1e-4, atol=1e-5)
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("how_k", ["mean", "sum", "cat"])
@pytest.mark.parametrize("how_t", ["mean", "sum", "cat"])
def test_compose(how_k, how_t):
    x = torch.randn(2, 4, 3, 5)
    y = compose(compose(x, 2, how_k), 1, how_t)
    reduce = {"mean": lambda r: sum(r) / len(r), "sum": sum, "cat": lambda r: torch.cat(r, dim=-1)}
    rows = [reduce[how_k]([x[:, i, k] for k in range(3)]) for i in range(4)]
    torch.testing.assert_close(y, reduce[how_t](rows))


def test_state_dict_round_trip():
    model = randomise(CubeMLP((5, 3, 8), [(4, 2, 6)] * 2, [(4, 2, 6)] * 2))
    other = CubeMLP((5, 3, 8), [(4, 2, 6)] * 2, [(4, 2, 6)] * 2)
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 5, 3, 8)
    assert torch.equal(model(x), other(x))
    assert {"blocks.1.modality.residual.weight", "blocks.0.time.norm.bias"} <= set(model.state_dict())


@pytest.mark.parametrize(
    "change, key, found",
    [
        ({"res_project": [False]}, "model.cubemlp.res_project[0]", "time 5 -> 4"),
        ({"d_outs": [(5, 3, 9)], "res_project": [False]}, "model.cubemlp.res_project[0]", "channel 8 -> 9"),
        ({"res_project": [True, True]}, "model.cubemlp.res_project", "2 entries"),
        ({"d_hiddens": []}, "model.cubemlp.d_hiddens", "0 entries"),
        ({"d_hiddens": [], "d_outs": [], "res_project": []}, "model.cubemlp.d_outs", "no block"),
        ({"d_outs": [(4, 0, 6)]}, "model.cubemlp.d_outs[0]", "4-0-6"),
        ({"d_hiddens": [(4, 2)]}, "model.cubemlp.d_hiddens[0]", "4-2"),
        ({"dropout": (0.0, 0.0, 1.5)}, "model.cubemlp.dropout", "1.5"),
        ({"activate": "swish"}, "model.cubemlp.activate", "swish"),
    ],
)
def test_settings_that_do_not_fit_name_their_key(change, key, found):
    settings = {"d_in": (5, 3, 8), "d_hiddens": [(4, 2, 6)], "d_outs": [(4, 2, 6)], "res_project": [True]} | change
    with pytest.raises(ConfigError) as error:
        CubeMLP(**settings)
    assert error.value.where == key and found in error.value.found


@pytest.mark.parametrize("shape, axis", [((2, 6, 3, 8), "time"), ((2, 5, 2, 8), "modality"), ((2, 5, 3, 7), "channel")])
def test_an_input_of_another_shape_names_the_axis(shape, axis):
    model = CubeMLP((5, 3, 8), [(4, 2, 6)], [(4, 2, 6)], res_project=[True])
    with pytest.raises(ConfigError, match=axis):
        model(torch.zeros(shape))


def test_make_activation_lists_the_choices():
    with pytest.raises(ConfigError, match="gelu"):
        make_activation("silu")


def test_a_rate_of_one_would_drop_everything():
    with pytest.raises(ConfigError, match=r"dropout: found \[0, 0, 1\.0\]; expected three rates in \[0, 1\)"):
        CubeMLP((5, 3, 8), [(4, 2, 6)], [(5, 3, 8)], dropout=(0, 0, 1.0))
