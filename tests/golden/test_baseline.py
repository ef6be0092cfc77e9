"""The benchmarks' baseline must itself be right: it replays the same recordings, sharing no code with engine/.

In float64: LayerNorm over two or three elements amplifies float32's rounding, which differs from one processor's matrix
products to the next, up to the recordings' tolerance. What is left is the recordings' own rounding.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench.baselines import mimrl
from tests.golden.common import assert_grad, assert_values, cases, load, part, recorded_parameters


@cases("cubemlp_")
def test_cubemlp(name, info):
    recorded = load(name)
    keys = ("d_in", "d_hiddens", "d_outs", "res_project", "activate", "bias", "ln_first")
    cube = mimrl.CubeMLP(*(info[k] for k in keys)).double()
    cube.load_state_dict(part(recorded, "param."))
    y = cube(recorded["x"].double())
    assert_values(y, recorded["y"])
    (y * recorded["cotangent"]).sum().backward()
    for parameter, value in cube.named_parameters():
        assert_grad(value.grad, recorded[f"grad.{parameter}"], parameter)


@cases("bounds_")
def test_bounds(name, info):
    recorded = load(name)
    for bound in ("infonce", "dv", "tuba", "nwj", "js", "js_fgan", "smile", "interpolate"):
        scores, baseline = (
            recorded["scores"].clone().requires_grad_(),
            recorded["log_baseline"].clone().requires_grad_(),
        )
        value = mimrl.bound_value(bound, scores, baseline, info["alpha_logit"], info["smile_clip"])
        assert_values(value, recorded[f"{bound}.value"], bound)
        value.backward()
        assert_grad(scores.grad, recorded[f"{bound}.grad_scores"], bound)


@cases("knn_")
def test_knn(name, info):
    r = load(name)
    rows = mimrl.knn_product(r["X"], r["Y"], r["Z"], info["batch_size"], info["k_neighbor"], r["query_index"].tolist())
    for axis, found in zip("xyz", rows, strict=True):
        assert torch.equal(found, r[f"prod_{axis}"]), axis


@cases("cmi_")
def test_cmi(name, info):
    r = load(name)
    c = SimpleNamespace(
        cmi_embed_dim=info["embed_dim"], critic_hidden=info["hidden_dim"], k_neighbor=info["k_neighbor"],
        cmi_last_activate=info["last_activate"],
    )  # fmt: skip
    estimator = mimrl.CMIEstimator(c)
    estimator.load_state_dict(part(r, "param."))
    value, loss = estimator((r["x"], r["y"], r["z"]), (r["prod_x"], r["prod_y"], r["prod_z"]))
    assert_values(value, r["cmi"])
    assert_values(loss, r["bce_loss"])


@pytest.fixture
def double():
    """The model makes its targets in torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@cases("model_")
def test_three_two_stage_steps(name, info, double):
    from transformers import BertConfig, BertModel

    recorded = load(name)
    torch.manual_seed(0)
    model = mimrl.MIMRL(SimpleNamespace(**info), BertModel(BertConfig(**info["bert"])))
    model.load_state_dict(recorded_parameters(info))
    sgd = info["sgd"]
    named = dict(model.named_parameters())
    estimators = [p for n, p in named.items() if "mi_estimator" in n]
    text = [p for n, p in named.items() if n.startswith("bertmodel")]
    rest = [p for n, p in named.items() if "mi_estimator" not in n and not n.startswith("bertmodel")]
    momentum = {"momentum": sgd["momentum"]}
    trainer = mimrl.Trainer(
        model, clip=sgd["clip_grad_value"], c2=info["stage2_coefficient"],
        main=torch.optim.SGD([{"params": rest}, {"params": text, "lr": sgd["lr_text"]}], lr=sgd["lr_main"], **momentum),
        estimators=torch.optim.SGD(estimators, lr=sgd["lr_estimators"], **momentum),
    )  # fmt: skip
    for number in range(len({k.split(".")[0] for k in recorded if k.startswith("step")})):
        step = {k: v.double() if v.is_floating_point() else v for k, v in part(recorded, f"step{number}.").items()}
        batch = {k: step[k] for k in ("input_ids", "attention_mask", "audio", "vision", "label")}
        for stage in ("stage1", "stage2"):
            expected = part(step, f"{stage}.")
            products = {t: tuple(expected[f"prod.{t}.{axis}"] for axis in "xyz") for t in mimrl.CMI_TRIPLES}
            output = getattr(trainer, stage)(batch, products)
            found = {k: output.features[k] for k in "FTAV"} | {
                "prediction": output.prediction,
                "values": torch.stack(output.values),
                "losses": torch.stack(output.losses),
                "total": output.total,
            }
            for key, value in found.items():
                where = f"{name} step {number} {stage} {key}"
                if number == 0:
                    assert_values(value, expected[key], where)
                else:
                    relative = (value.detach() - expected[key]).norm() / expected[key].norm()
                    assert relative <= 2e-3, f"{where}: relative difference {relative:.2e}"


def test_knn_draws_its_own_queries():
    np.random.seed(0)
    bank = torch.arange(40.0).reshape(40, 1)
    x, y, z = mimrl.knn_product(bank, bank, bank, 16, 2)
    assert x.shape == y.shape == z.shape == (16, 1)
    assert torch.equal(y, z)
    assert not set(x.flatten().tolist()) & set(y.flatten().tolist())
    with pytest.raises(ValueError, match="n_neighbors = 2, n_samples_fit = 1"):
        mimrl.knn_product(bank[:9], bank[:9], bank[:9], 16, 2)
