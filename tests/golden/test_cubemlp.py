"""CubeMLP against the recordings `cubemlp_*`: output, gradient of the input, gradient of every parameter."""

import torch

from engine.model.cubemlp import CubeMLP
from tests.golden.common import assert_grad, assert_values, cases, load, part

AXES = {"l": "time", "k": "modality", "d": "channel"}


def engine_name(reference: str) -> str:
    """`layers_stack.0.mlp_l.fc1.weight` -> `blocks.0.time.fc1.weight`, and so on for ln_ and res_projection_."""
    _, block, module, *rest = reference.split(".")
    kind, axis = module.rsplit("_", 1)
    inner = {"mlp": [], "ln": ["norm"], "res_projection": ["residual"]}[kind]
    return ".".join(["blocks", block, AXES[axis], *inner, *rest])


@cases("cubemlp_")
def test_output_and_gradients(name, info):
    tensors = load(name)
    keys = ("d_in", "d_hiddens", "d_outs", "activate", "bias", "ln_first", "res_project")
    model = CubeMLP(**{key: info[key] for key in keys})
    model.load_state_dict({engine_name(key): value for key, value in part(tensors, "param.").items()})
    x = tensors["x"].requires_grad_()
    y = model(x)
    assert_values(y, tensors["y"], "y")
    (y * tensors["cotangent"]).sum().backward()
    assert_grad(x.grad, tensors["grad_x"], "grad_x")
    parameters = dict(model.named_parameters())
    recorded = part(tensors, "grad.")
    assert len(recorded) == len(parameters)
    for key, expected in recorded.items():
        assert_grad(parameters[engine_name(key)].grad, expected, key)


def test_the_whole_batch_is_mixed_row_by_row():
    """No axis mix reaches over the batch axis: a row alone gives what it gives among others."""
    torch.manual_seed(0)
    model = CubeMLP((7, 3, 5), [(4, 3, 6)], [(4, 3, 6)], res_project=[True])
    x = torch.randn(3, 7, 3, 5)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))
