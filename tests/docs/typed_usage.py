"""What a user's type checker sees: typical uses of the public API, checked by `make types` with mypy --strict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import engine
from engine import CMI, MI, CMIEstimator, MIEstimator, Objective, TwoStageStep
from engine.kernels import InfoNCE, MILowerBound, infonce, mi_lower_bound
from engine.model.estimators import Estimate


def train(data: Path, out: Path) -> float:
    config: engine.Config = engine.load_config("mosi", [f"data.path={data}", "epochs=2"])
    config.train.lr = 5e-4
    config.data.clip = None
    result = engine.train(config, out)
    best: int | None = result.metrics["best_epoch"]
    assert best is None or best >= 0
    several = engine.train_seeds(config, out, [0, 1])
    metrics = engine.evaluate(out, str(data), split="test")
    engine.predict(out, str(data), out / "predictions.csv")
    return float(metrics["mae"]) + len(several)


class TwoViews(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z = self.encoder(x)
        return self.head(z), {"Z": z, "X": x}


def own_model(loader: list[tuple[Tensor, Tensor, Tensor]], rows: int) -> dict[str, float]:
    model = TwoViews()
    terms = [0.1 * MI("Z", "X"), -1.0 * (MI("Z", "Y") - CMI("Z", "X", given="Y")).named("leak")]
    objective = Objective(terms, dims={"Z": 8, "X": 4, "Y": 1})
    main, estimators = torch.optim.Adam(model.parameters()), torch.optim.Adam(objective.parameters())
    step = TwoStageStep(model, objective, nn.functional.mse_loss, main, estimators, label="Y")
    result, bank = step.train_epoch(loader, rows, None, batch_size=32)
    result, bank = step.train_epoch(loader, rows, bank, batch_size=32, stage1_n=2)
    loss: float = result.loss
    assert loss == loss
    return result.information


def measure(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> tuple[float, float]:
    estimate = engine.estimate_mi(x, y, seed=1)
    conditional = engine.estimate_cmi(x, y, z)
    low, high = conditional.interval
    flags: list[str] = list(estimate.flags)
    assert not flags or low <= high
    return float(estimate), conditional.value


def estimators(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    estimate: Estimate = MIEstimator(8, 4)(x, y)
    classifier = CMIEstimator(8)
    assert isinstance(classifier, nn.Module)
    return estimate.loss - estimate.value


def kernels(q: Tensor, k: Tensor) -> Tensor:
    loss = infonce(q, k, temperature=0.1, cosine=True, reduction="mean")
    bound = mi_lower_bound(q, k, bound="nwj")
    module = InfoNCE(temperature=0.07, learnable=True)
    mine = MILowerBound("mine")
    assert isinstance(mine, nn.Module)
    with engine.use_backend("reference"):
        more: Tensor = module(q, k)
    assert isinstance(bound, Tensor)
    return loss + more


def refuse(path: Path) -> str:
    try:
        engine.load_config(path)
    except engine.EngineError as error:
        return str(error)
    return ""
