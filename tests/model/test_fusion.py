"""The plug of fusion encoders: each built-in one, and one of your own."""

import pytest
import torch
from torch import nn

from bench.pretend import PretendedGpu
from engine.config import Config
from engine.errors import ConfigError
from engine.model import fusion
from engine.model.fusion import make_fusion, register_fusion

TIME, WIDTH = 6, 8


def config(**model) -> Config:
    cubemlp = {"d_hiddens": [(4, 3, 8), (3, 2, 8)], "d_outs": [(4, 3, 8), (3, 2, 10)]}
    return Config(data={"time_len": TIME}, model={"d_common": WIDTH, "cubemlp": cubemlp} | model)


def inputs(rows=4):
    torch.manual_seed(0)
    length = torch.randint(1, TIME + 1, (rows, 1, 3))
    mask = torch.arange(TIME)[None, :, None] < length
    return torch.randn(rows, TIME, 3, WIDTH) * mask[..., None], mask


@pytest.fixture(params=["cubemlp", "tfn", "transformer"])
def encoder(request):
    torch.manual_seed(0)
    return make_fusion(config(fusion=request.param)).eval()


def test_shape_and_gradients(encoder):
    x, mask = inputs()
    fused = encoder(x, mask)
    assert fused.shape == (4, encoder.dim)
    (fused * torch.randn_like(fused)).sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_row_does_not_depend_on_the_others(encoder):
    x, mask = inputs()
    fused = encoder(x, mask)
    for i in range(4):
        torch.testing.assert_close(encoder(x[i : i + 1], mask[i : i + 1])[0], fused[i], rtol=1e-5, atol=1e-5)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(encoder(x[order], mask[order]), fused[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["tfn", "transformer"])
@pytest.mark.parametrize("training", [False, True])
def test_positions_outside_the_mask_are_not_read(name, training):
    torch.manual_seed(0)
    module = make_fusion(config(fusion=name)).train(training)
    x, mask = inputs()
    dirty = torch.where(mask[..., None], x, torch.full_like(x, 9.0))
    torch.testing.assert_close(module(dirty, mask), module(x, mask), rtol=1e-5, atol=1e-5)
    x[:, 0] = torch.randn(4, 3, WIDTH)  # valid in every row: it is read
    assert (module(x, mask) - module(dirty, mask)).abs().amax(dim=1).min() > 1e-3


@pytest.mark.parametrize(
    "k, t, dim", [("mean", "mean", 10), ("cat", "sum", 20), ("sum", "cat", 30), ("cat", "cat", 60)]
)
def test_cubemlp_width_by_compose(k, t, dim):
    module = make_fusion(config(compose_k=k, compose_t=t))
    assert module.dim == dim and module(*inputs()).shape == (4, dim)


def test_cubemlp_removes_axes_on_a_gpu_too(monkeypatch):
    monkeypatch.setattr(fusion.CubeMLP, "forward", lambda self, x: x)
    x, mask = inputs()
    for k, t, expected in (("mean", "mean", x.mean((1, 2))), ("sum", "mean", x.sum(2).mean(1))):
        with PretendedGpu():
            found = make_fusion(config(compose_k=k, compose_t=t))(x, mask)
        torch.testing.assert_close(found, expected)


def test_tensor_fusion_holds_products_of_all_three_modalities():
    """The third mixed difference over t, a, v is not zero; of a sum of unimodal and bimodal parts it would be."""
    torch.manual_seed(0)
    module = make_fusion(config(fusion="tfn")).double()
    x = torch.rand(1, TIME, 3, WIDTH, dtype=torch.float64)
    mask = torch.ones(1, TIME, 3, dtype=torch.bool)
    step = torch.rand(3, WIDTH, dtype=torch.float64)
    total = 0
    for bits in range(8):
        on = torch.tensor([[bits >> k & 1] for k in range(3)])
        total = total + (-1) ** (3 - int(on.sum())) * module(x + on * step, mask)
    assert total.abs().max() > 1e-4


def test_your_own_encoder(monkeypatch):
    monkeypatch.setattr(fusion, "_REGISTERED", {})

    class Mean(nn.Module):
        dim = WIDTH

        def forward(self, x, mask):
            return (x * mask[..., None]).sum((1, 2)) / mask.sum((1, 2))[:, None]

    register_fusion("mean", lambda c: Mean())
    assert make_fusion(config(fusion="mean"))(*inputs()).shape == (4, WIDTH)
    register_fusion("mean", lambda c: nn.Identity())
    with pytest.raises(ConfigError, match=r"\.dim"):
        make_fusion(config(fusion="mean"))


def test_names_that_are_unknown_or_taken():
    with pytest.raises(ConfigError, match=r"model\.fusion.*cubmlp.*cubemlp, tfn, transformer"):
        make_fusion(config().model_copy(update={"model": config().model.model_copy(update={"fusion": "cubmlp"})}))
    with pytest.raises(ConfigError, match="cubemlp"):
        register_fusion("cubemlp", lambda c: None)
